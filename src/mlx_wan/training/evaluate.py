"""What a model, or a model with a LoRA, is worth on given clips: losses by timestep band, and its VAE's accuracy."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_wan.errors import UserError
from mlx_wan.lora.fuse import EXPERTS, Adapters
from mlx_wan.lora.load import read_lora, transformer_shapes
from mlx_wan.training.adherence import judge_clips, judges, make_clips
from mlx_wan.training.cache import Cache, Cached, load_clip, load_context
from mlx_wan.training.captions import heldout_prompts
from mlx_wan.training.dataset import Skipped, find_sources, plan_clips, read_clip
from mlx_wan.training.hub import open_data
from mlx_wan.training.judge import summarise
from mlx_wan.training.objective import psnr
from mlx_wan.training.options import FinetuneRecipe
from mlx_wan.training.plan import expert_sigmas, resolve, sampling, without_pictures
from mlx_wan.training.trainer import DTYPES
from mlx_wan.training.validate import band_losses
from mlx_wan.weights.load import Checkpoint, load_transformer, load_vae, locate


@dataclass(frozen=True)
class Evaluation:
    """split: "valid", or "train" where the data has no other. clips: how many. numbers: by name. skipped: not used."""

    split: str
    clips: int
    numbers: dict[str, float]
    skipped: list[Skipped]


def evaluate(
    recipe: FinetuneRecipe,
    adapters: list[Path],
    limit: int | None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    prompts: int = 0,
) -> Evaluation:
    """The losses of `validate.band_losses`, and mean PSNR (dB) and SSIM of clips that went through the VAE.

    The same clips, noise and levels for every model, so that two can be compared where they share a VAE; so with the
    prompts and noise of adherence.

    Args:
        recipe: model, data and how clips are cut from it.
        adapters: LoRA files, at strength 1.
        limit: of the number of clips.
        prompts: of a model of the little world, so many held-out prompts become clips, which `judge` looks at.

    Raises:
        UserError, CheckpointError: the model, an adapter or the data cannot be used.
    """
    checkpoint = locate(str(recipe.model))
    if recipe.expert == "both":
        raise UserError("expert is 'both'; evaluate one at a time: high or low")
    recipe = resolve(recipe, checkpoint)
    dtype = DTYPES[str(recipe.dtype)]
    loras = Adapters()
    for path in adapters:
        loras.add(read_lora(path, transformer_shapes(checkpoint.transformer_config)), None, 1.0)
    split, skipped = "valid", []
    data = open_data(str(recipe.data), Path(str(recipe.cache)))
    sources, missing = find_sources(data, split)
    if not sources:
        split = "train"
        sources, missing = find_sources(data, split)
    sources, pictures = without_pictures(sources, checkpoint)
    clips, unusable = plan_clips(sources, sampling(recipe, checkpoint))
    skipped = [*missing, *pictures, *unusable]
    if not clips:
        raise UserError(f"{recipe.data}: no clip to evaluate on{f': {skipped[0]}' if skipped else ''}")
    clips = clips[:limit]
    if prompts and checkpoint.spec.name != "tiny":
        raise UserError(f"{recipe.model}: is {checkpoint.spec.name}; adherence is judged of the embedded model's kind")
    told, negative = heldout_prompts(prompts), checkpoint.spec.negative_prompt
    texts = [*(clip.source.caption for clip in clips), *(prompt for prompt, _ in told), negative]
    cached = Cache(Path(str(recipe.cache)), checkpoint, dtype, progress).fill(clips, texts)
    if not cached.latents:
        raise UserError(f"{recipe.data}: no clip could be encoded: {cached.skipped[0]}")
    numbers = reconstruction(checkpoint, cached)
    part = EXPERTS[recipe.expert or "high"]
    transformer = load_transformer(checkpoint, dtype, part)
    loras.install(transformer, part)

    def context(text: str) -> mx.array:
        return load_context(cached.texts[text], checkpoint.transformer_config.text_len)

    def example(i: int) -> tuple[dict[str, mx.array], mx.array]:
        clip, file = cached.latents[i]
        return load_clip(file), context(clip.source.caption)

    sigmas = expert_sigmas(checkpoint, recipe.expert)
    numbers = {**band_losses(transformer, len(cached.latents), example, sigmas), **numbers}
    if told:
        contexts = [context(prompt)[None] for prompt, _ in told]
        made = make_clips(checkpoint, transformer, load_vae(checkpoint), contexts, context(negative)[None])
        with judges() as pool:
            rates = summarise(judge_clips(made, [scene for _, scene in told], pool))["rates"]
        numbers |= {f"adherence_{name}": rates[name] for name in ("colour", "shape", "motion", "all")}
    return Evaluation(split, len(cached.latents), numbers, [*skipped, *cached.skipped])


def reconstruction(checkpoint: Checkpoint, cached: Cached) -> dict[str, float]:
    """{"vae_psnr", "vae_ssim"}: means over clips of what decoding their latents gives, against their pixels."""
    vae, scores = load_vae(checkpoint), []
    for clip, file in cached.latents:
        pixels = read_clip(clip)[0]
        decoded = np.array(vae.decode(load_clip(file)["latents"].astype(mx.float32)[None]))[0]
        mse = float(np.mean((pixels - decoded).astype(np.float64) ** 2))
        scores.append((psnr(mse), ssim(pixels, decoded)))
    mx.clear_cache()
    means = np.mean(scores, axis=0).tolist()
    return {"vae_psnr": means[0], "vae_ssim": means[1]}


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity (Wang et al., 2004) of two clips (T, H, W, 3) in [-1, 1]: mean over frames and channels.

    Gaussian windows of 11 pixels with a deviation of 1.5, those that fit into the frame; smaller frames have smaller
    windows.
    """
    size = min(11, one.shape[1], one.shape[2])
    taps = np.exp(-((np.arange(size) - (size - 1) / 2) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            x = np.lib.stride_tricks.sliding_window_view(x, size, axis) @ taps
        return x

    x, y = one.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # of the range of values, which is 2
    return float(
        np.mean((2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    )
