"""How well a model of the little world shows what it is told: clips of many prompts made together, and judged."""

import contextlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_wan.conditioning import to_uint8
from mlx_wan.models.autoencoder import WanVAE
from mlx_wan.models.transformer import WanTransformer
from mlx_wan.sampling import Expert, denoise, initial_noise
from mlx_wan.schedulers import make_scheduler
from mlx_wan.training.judge import judge
from mlx_wan.training.world import COLOURS, Scene
from mlx_wan.weights.load import Checkpoint


def make_clips(
    checkpoint: Checkpoint,
    transformer: WanTransformer,
    vae: WanVAE,
    contexts: list[mx.array],
    negative: mx.array,
    seed: int = 0,
    batch: int | None = None,
) -> Iterator[np.ndarray]:
    """A clip (T, H, W, 3), uint8, of each context: what `WanPipeline` makes of it with the model's own settings.

    Args:
        contexts: embeddings (1, text_len, text_dim) of prompts, zeros after the text.
        negative: the same of the negative prompt.
        seed: clip i is made from the noise of `seed + i`.
        batch: clips that are made together; None: one on a CPU, where no more is gained by it, 64 on a GPU.
    """
    spec, (time, rows, columns) = checkpoint.spec, checkpoint.vae_config.stride
    shape = (1, (spec.num_frames - 1) // time + 1, spec.height // rows, spec.width // columns)
    assert isinstance(spec.guidance_scale, float | int)  # a pair is of models with two experts
    expert = Expert(transformer, spec.guidance_scale)
    batch = batch or (64 if mx.default_device() == mx.gpu else 1)
    for start in range(0, len(contexts), batch):
        some = contexts[start : start + batch]
        noises = [initial_noise((*shape, checkpoint.vae_config.z_dim), seed + start + i) for i in range(len(some))]
        scheduler = make_scheduler(spec.scheduler, spec.num_inference_steps, spec.shift, spec.timesteps or None)
        steps = denoise(
            lambda timestep: expert,
            scheduler,
            mx.concatenate(noises),
            mx.concatenate(some),
            mx.repeat(negative, len(some), axis=0),
        )
        *_, last = steps
        yield from to_uint8(vae.decode(last.latents))


@contextlib.contextmanager
def judges() -> Iterator[Executor | None]:
    """Processes for `judge_clips`, while a GPU makes the clips; None on a CPU, which has no time left for them.

    They know the colours that are known here when they start.
    """
    if mx.default_device() != mx.gpu:
        yield None
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), spawn, _at_work, (dict(COLOURS),)) as pool:
        yield pool


def judge_clips(clips: Iterable[np.ndarray], scenes: list[Scene], pool: Executor | None = None) -> list[dict[str, Any]]:
    """The verdict of `judge` on each clip, whose scene stands at the same place."""
    pairs = zip(clips, scenes, strict=True)
    if pool is None:
        return [judge(*pair) for pair in pairs]
    return [one.result() for one in [pool.submit(judge, *pair) for pair in pairs]]


def _at_work(colours: dict[str, tuple[int, int, int]]) -> None:
    mx.set_default_device(mx.cpu)
    COLOURS.update(colours)
