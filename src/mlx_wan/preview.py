"""Latents as small pictures, by a linear map from latent channels to colours that is fitted to the VAE at hand."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from mlx_wan.models.autoencoder import WanVAE
    from mlx_wan.weights.checkpoint import Checkpoint

CLIPS, FRAMES, CELLS = 4, 5, 16  # the fit sees 4 clips of 5 frames whose latents are 16 x 16
SCENES, SCENE_FRAMES = 12, 9  # and for the embedded model scenes of its training world
SEED = 0
SHOWN = 5  # latent frames of a preview, evenly spread
MIN_HEIGHT = 96  # pixels of a preview; latents are enlarged by a whole factor to reach it


@dataclass(frozen=True)
class LatentColours:
    """RGB = latent @ weights + bias, in [-1, 1] where the latent is one of a video.

    weights: (C, 3). bias: (3,). Both float32.
    """

    weights: np.ndarray
    bias: np.ndarray

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """(..., C) -> (..., 3)."""
        return latents @ self.weights + self.bias


def fit_colours(vae: "WanVAE", clips: Iterable[np.ndarray]) -> LatentColours:
    """Least squares over the latents of clips and the mean colour of the pixels behind each of them.

    Args:
        clips: float32 (T, H, W, 3) in [-1, 1], of the kind that the model makes.
    """
    stride_t, stride_h, stride_w = vae.config.stride
    latents, colours = [], []
    for clip in clips:
        latent = np.array(vae.encode(mx.array(clip[None])))[0]  # (t, h, w, C)
        latents.append(latent.reshape(-1, latent.shape[-1]))
        colours.append(mean_colours(clip, (stride_t, stride_h, stride_w)).reshape(-1, 3))
    ones = np.ones((sum(map(len, latents)), 1))
    inputs = np.concatenate([np.concatenate(latents).astype(np.float64), ones], axis=1)
    solution = np.linalg.lstsq(inputs, np.concatenate(colours), rcond=None)[0].astype(np.float32)
    return LatentColours(solution[:-1], solution[-1])


def clips_for(checkpoint: "Checkpoint") -> Iterator[np.ndarray]:
    """Clips to fit a model's colours to: of its own world for the embedded one, whose VAE knows nothing else."""
    rng = np.random.default_rng(SEED)
    if checkpoint.spec.name != "tiny":
        _, stride_h, stride_w = checkpoint.vae_config.stride
        for _ in range(CLIPS):
            yield draw_clip(rng, FRAMES, CELLS * stride_h, CELLS * stride_w)
        return
    from mlx_wan.training.scenes import render, sample_batch

    _, params, _ = sample_batch(rng, SCENES)
    for row in params:
        scene = render(mx.array(row[None]), height=checkpoint.spec.height, width=checkpoint.spec.width)
        yield np.array(scene[0])[:SCENE_FRAMES]


def draw_clip(rng: np.random.Generator, frames: int, height: int, width: int) -> np.ndarray:
    """Float32 (frames, height, width, 3) in [-1, 1]: soft colours that drift behind a few hard-edged boxes."""
    grid = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    field = np.asarray(grid.resize((2 * width, 2 * height), Image.Resampling.BICUBIC))
    drift_y, drift_x = rng.integers(0, height // 8, 2)
    clip = np.stack([field[t * drift_y :, t * drift_x :][:height, :width] for t in range(frames)])
    for _ in range(6):
        top, left = rng.integers(0, height), rng.integers(0, width)
        tall, wide = rng.integers(height // 16, height // 2), rng.integers(width // 16, width // 2)
        clip[:, top : top + tall, left : left + wide] = rng.integers(0, 256, 3)
    return clip.astype(np.float32) / 127.5 - 1


def mean_colours(clip: np.ndarray, stride: tuple[int, int, int]) -> np.ndarray:
    """(1 + n * stride_t, H, W, 3) -> (1 + n, h, w, 3): the mean of the pixels that a latent stands for."""
    (frames, height, width, _), (stride_t, stride_h, stride_w) = clip.shape, stride
    h, w = height // stride_h, width // stride_w
    pooled = clip.reshape(frames, h, stride_h, w, stride_w, 3).mean(axis=(2, 4))
    rest = pooled[1:].reshape(-1, stride_t, h, w, 3).mean(axis=1)
    return np.concatenate([pooled[:1], rest])


def contact_sheet(latents: mx.array, colours: LatentColours) -> np.ndarray:
    """Normalised latents (1, t, h, w, C) -> uint8 (H, W, 3): five frames at most, side by side and enlarged."""
    frames = np.array(latents[0].astype(mx.float32))
    chosen = frames[np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().astype(int)]
    row = np.concatenate(list(colours(chosen)), axis=1)  # (h, n * w, 3)
    factor = -(-MIN_HEIGHT // row.shape[0])
    pixels = np.round((np.clip(row, -1, 1) + 1) * 127.5).astype(np.uint8)
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
