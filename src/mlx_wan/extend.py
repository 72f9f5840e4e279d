"""Longer videos: part after part, each of which begins with the last frames of what came before it."""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_wan.errors import UserError
from mlx_wan.pipeline import Event, WanPipeline
from mlx_wan.sampling import Point
from mlx_wan.zoo import ModelSpec

OVERLAP = 1  # frames that a part takes from the one before: what the models were trained with


def check(spec: ModelSpec, num_frames: int, overlap: int, last: bool) -> None:
    """UserError if a model's videos cannot go on this way.

    Args:
        num_frames: of a part.
        last: whether a last frame is given.
    """
    stride = spec.vae_stride[0]
    if spec.task not in ("ti2v", "i2v"):
        raise UserError(f"{spec.name} cannot go on with a video: use a TI2V or I2V model")
    if last:
        raise UserError("a video that goes on takes no last frame: leave it out")
    if overlap < 1 or (overlap - 1) % stride:
        near = max(round((overlap - 1) / stride), 0) * stride + 1
        raise UserError(f"an overlap of {overlap} frames: must be {stride}n+1, for instance {near}")
    if overlap >= num_frames:
        raise UserError(f"an overlap of {overlap} frames: must be less than the {num_frames} frames of a part")


def stream(
    pipe: WanPipeline,
    prompt: str,
    parts: int,
    overlap: int = OVERLAP,
    before: np.ndarray | None = None,
    done: Sequence[mx.array] = (),
    start: Point | None = None,
    **options: Any,
) -> Iterator[Event]:
    """The events of each part in turn, as `WanPipeline.stream`; those of frames hold what the part adds (perhaps none).

    Part i's seed is the given one plus i. Every process of several gets the frames that parts begin with.

    Args:
        parts: how many to make.
        overlap: frames, 4n + 1, that a part begins with: the last ones of what came before it. One is what the models
            were trained with; more carry motion over the seam.
        before: uint8 (T, height, width, 3), a video of this size to go on with; it is not repeated.
        done: latents of parts that an earlier run has made; they are decoded again.
        start: where that run stood in the part after those.
        options: of the pipeline, seed, width, height and num_frames among them.
    """
    seed, tail = options.pop("seed"), None if before is None else before[-overlap:]
    if tail is not None and len(tail) < overlap:
        raise UserError(f"the video has {len(tail)} frames, fewer than the overlap of {overlap}")
    picture = options.pop("image", None)
    for part in range(parts):
        skip = 0 if tail is None else overlap
        own = picture if tail is None else [Image.fromarray(frame) for frame in tail]
        if part < len(done):
            begin = Point(options["num_inference_steps"], done[part], None)
        else:
            begin = start if part == len(done) else None
        shown = np.zeros((0, options["height"], options["width"], 3), np.uint8) if tail is None else tail
        for event in pipe.stream(prompt, **options, image=own, seed=seed + part, start=begin):
            if event.stage == "frames":
                shown = np.concatenate([shown, event.value[skip:]])
                new, skip = event.value[skip:], max(skip - len(event.value), 0)
                event, shown = event._replace(value=new), shown[-overlap:]
            yield event
        if part + 1 < parts:
            tail = _shared(pipe, shown, (overlap, options["height"], options["width"], 3))


def _shared(pipe: WanPipeline, frames: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The frames that the first process has decoded."""
    own = frames if pipe.parallel.is_first else np.zeros(shape, np.uint8)
    return np.array(pipe.parallel.from_first(mx.array(own)))


def seam(frames: np.ndarray, at: int) -> float:
    """How much frame `at` differs from the one before it, as a multiple of what is usual among the ten frames around.

    frames: uint8 (T, H, W, 3). Differences are means over pixels; 1 is a seam that cannot be told.
    """
    around = frames[max(at - 6, 0) : at + 6].astype(np.float32)
    differences = np.abs(np.diff(around, axis=0)).mean(axis=(1, 2, 3))
    place = at - max(at - 6, 0) - 1
    usual = np.delete(differences, place).mean()
    return float(differences[place] / max(usual, 1e-6))
