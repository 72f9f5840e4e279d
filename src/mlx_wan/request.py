"""What a caller asks of the pipeline: values checked one by one, and filled in where they were left out."""

import numbers
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx
import numpy as np

from mlx_wan.errors import UserError
from mlx_wan.sampling import Point, initial_noise

if TYPE_CHECKING:
    from PIL import Image

Value = TypeVar("Value")


def open_picture(image: "Image.Image | str | Path | None") -> "Image.Image | None":
    """A picture, or the one in a file, in RGB. UserError for anything else."""
    if isinstance(image, str | Path):
        from mlx_wan.video import read_image

        return read_image(image)
    if image is None:
        return None
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise UserError(f"image is a {type(image).__name__}; give a file name or a PIL image")
    from mlx_wan.video import to_rgb

    return to_rgb(image)


def or_default(value: Value | None, default: Value) -> Value:
    """The value, or the default where it is None."""
    return default if value is None else value


def text(name: str, value: str) -> str:
    """A string. UserError for a list of them, or anything else."""
    if not isinstance(value, str):
        raise UserError(f"{name} is a {type(value).__name__}; it must be a string (one video a call)")
    return value


def whole(name: str, value: int | None) -> int | None:
    """A whole number from 0 to 2**64 - 1, or None. UserError for anything else."""
    if value is None:
        return None
    if not isinstance(value, int | np.integer) or not 0 <= value < 2**64:
        raise UserError(f"{name} is {value!r}; it must be a whole number, not negative")
    return int(value)


def noise_for(latents: mx.array | None, seed: int | None, shape: tuple[int, ...]) -> tuple[mx.array, int | None]:
    """Noise of `shape`, float32, and its seed: drawn, or given and found to be finite."""
    if latents is None:
        seed = secrets.randbelow(2**32) if seed is None else seed
        return initial_noise(shape, seed), seed
    latents = mx.array(latents, dtype=mx.float32)
    if latents.shape != shape:
        raise UserError(f"latents are {latents.shape}; this size and number of frames need {shape}")
    if not mx.isfinite(latents).all().item():
        raise UserError("latents hold NaN or infinite values; they must be noise of mean 0 and variance 1")
    return latents, seed


def checked_interval(interval: Sequence[float] | None) -> tuple[float, float]:
    """The noise levels (low, high) between which there is guidance; all of them for None. UserError for others."""
    if interval is None:
        return 0.0, 1.0
    if len(interval) != 2 or not all(isinstance(level, numbers.Real) for level in interval):
        raise UserError(f"guidance_interval is {interval!r}; give two noise levels")
    low, high = interval
    if not 0 <= low < high <= 1:
        raise UserError(f"guidance_interval is {low:g}, {high:g}; give two noise levels, 0 <= low < high <= 1")
    return float(low), float(high)


def checked_start(start: Point, latents: mx.array | None, shape: tuple[int, ...]) -> Point:
    """Where an earlier run stood, if that can be continued here; UserError if not."""
    if latents is not None:
        raise UserError("start and latents are both given; a run goes on from where it stood, or begins with noise")
    if start.latents.shape != shape:
        raise UserError(f"start has latents {start.latents.shape}; this size and number of frames need {shape}")
    return start
