"""Pictures -> what the model is given."""

import math
from collections.abc import Callable, Iterable, Mapping

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_wan.errors import UserError


def best_output_size(width: int, height: int, stride_w: int, stride_h: int, max_area: int) -> tuple[int, int]:
    """The video size (width, height) for a picture: the official TI2V rule (`wan/utils/utils.py`).

    Sides are multiples of the strides, the area is at most `max_area` pixels, and of two roundings, width first
    or height first, the one nearer to the picture's own aspect ratio wins; the second wins a tie.
    UserError if the picture is so narrow that one side would vanish.
    """
    ratio = width / height
    ideal_w = math.sqrt(max_area * ratio)
    candidates = []
    w = math.floor(ideal_w / stride_w) * stride_w
    if w:
        candidates.append((w, math.floor(max_area / w / stride_h) * stride_h))
    h = math.floor(max_area / ideal_w / stride_h) * stride_h
    if h:
        candidates.append((math.floor(max_area / h / stride_w) * stride_w, h))
    candidates = [(w, h) for w, h in candidates if w and h]
    if not candidates:
        raise UserError(f"a {width}x{height} picture is too narrow for a video of {max_area} pixels; crop it")

    def distortion(size: tuple[int, int]) -> float:
        kept = size[0] / size[1]
        return max(ratio / kept, kept / ratio)

    return min(reversed(candidates), key=distortion)


def area_size(width: int, height: int, stride_w: int, stride_h: int, max_area: int) -> tuple[int, int]:
    """The video size (width, height) for a picture: the official I2V rule (`wan/image2video.py`).

    Each side is what it would be at `max_area` pixels, rounded down to a multiple of its stride. UserError as
    `best_output_size`.
    """
    ratio = height / width
    w = math.floor(math.sqrt(max_area / ratio) / stride_w) * stride_w
    h = math.floor(math.sqrt(max_area * ratio) / stride_h) * stride_h
    if not (w and h):
        raise UserError(f"a {width}x{height} picture is too narrow for a video of {max_area} pixels; crop it")
    return w, h


# Task -> frames of a clip that the model is shown, as channels beside its latents.
KNOWN_FRAMES = {"i2v": (0,), "flf2v": (0, -1)}
# Task -> how the size follows from a picture.
SIZE_RULES = {"ti2v": best_output_size, "i2v": area_size, "flf2v": area_size}  # of VACE: vace.source_size


def image_to_frame(image: Image.Image, width: int, height: int) -> np.ndarray:
    """A picture as one video frame: float32 (1, 1, height, width, 3) in [-1, 1].

    Scaled with Lanczos until it covers the frame, then cropped about the centre (official `textimage2video.py`).
    """
    scale = max(width / image.width, height / image.height)
    covering = (round(image.width * scale), round(image.height * scale))
    image = image.convert("RGB").resize(covering, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    return ((pixels - np.float32(0.5)) / np.float32(0.5))[None, None]


def frame_to_image(frame: np.ndarray) -> Image.Image:
    """The way back from `image_to_frame`: a frame (1, 1, height, width, 3) in [-1, 1] as a picture."""
    return Image.fromarray(np.rint((np.clip(frame[0, 0], -1, 1) + 1) * 127.5).astype(np.uint8))


def to_uint8(video: mx.array) -> np.ndarray:
    """Pixels in [-1, 1] to uint8 0-255, rounded."""
    return np.array(mx.round((mx.clip(video, -1, 1) + 1) * 127.5).astype(mx.uint8))


def cropped(image: Image.Image, width: int, height: int, step: int) -> Image.Image:
    """The picture itself if the size has its shape but for less than `step` pixels, as all that the official rule makes
    of it have; else the largest part of that shape about its centre."""
    ratio = image.height / image.width
    if abs(height - width * ratio) < step or abs(width - height / ratio) < step:
        return image
    scale = min(image.width / width, image.height / height)
    w, h = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def stretched_frame(image: Image.Image, width: int, height: int) -> np.ndarray:
    """A picture as one video frame, as `image_to_frame`, but stretched to the size (official `image2video.py`).

    Bicubic with a = -0.75 and without smoothing, as torch's `interpolate` does it; values may pass [-1, 1] a little.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255)
    pixels = (pixels - np.float32(0.5)) / np.float32(0.5)
    columns = _interpolate(pixels.swapaxes(0, 1), width).swapaxes(0, 1)
    return _interpolate(columns, height)[None, None]


def _interpolate(rows: np.ndarray, count: int) -> np.ndarray:
    """`rows` (n, ·, ·) float32 to `count` of them, each mixed of four; beyond the border the last one repeats."""
    a = -0.75
    where = np.float32(len(rows)) / np.float32(count) * (np.arange(count, dtype=np.float32) + np.float32(0.5))
    where -= np.float32(0.5)
    first = np.floor(where)
    mixed = np.zeros((count, *rows.shape[1:]), np.float32)
    for offset in (-1, 0, 1, 2):
        d = np.abs(where - (first + offset)).astype(np.float64)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        weight = np.where(d <= 1, near, far).astype(np.float32)
        mixed += weight[:, None, None] * rows[np.clip(first + offset, 0, len(rows) - 1).astype(int)]
    return mixed


def known_frames(frames: Mapping[int, np.ndarray], num_frames: int, stride_t: int) -> tuple[np.ndarray, np.ndarray]:
    """A video of which some frames are known, and a mask that tells which (official `image2video.py`).

    Args:
        frames: position -> frame (1, 1, H, W, 3).
        num_frames: of the video, a multiple of stride_t and one.

    Returns:
        video (1, num_frames, H, W, 3), zeros, which are grey, where nothing is known;
        mask (1, t, 1, 1, stride_t) of ones and zeros: a latent frame has a channel for each frame it stands for, and
        the first, which stands for one, has it in all of them.
    """
    height, width = next(iter(frames.values())).shape[2:4]
    video = np.zeros((1, num_frames, height, width, 3), np.float32)
    known = np.zeros(num_frames, np.float32)
    for position, frame in frames.items():
        video[:, position], known[position] = frame[:, 0], 1
    mask = np.concatenate([np.repeat(known[:1], stride_t), known[1:]])
    return video, mask.reshape(1, -1, 1, 1, stride_t)


def known_channels(
    frames: Mapping[int, np.ndarray], num_frames: int, stride_t: int, encode: Callable[[mx.array], mx.array]
) -> mx.array:
    """What I2V models get beside the noisy latents: (1, t, h, w, stride_t + C), the mask, then latents.

    The latents are of `known_frames`' whole video, grey frames and all: zeros among pixels are not zeros among latents.

    Args:
        encode: video (1, T, H, W, 3) -> latents (1, t, h, w, C).
    """
    video, mask = known_frames(frames, num_frames, stride_t)
    encoded = encode(mx.array(video))
    return mx.concatenate([mx.broadcast_to(mx.array(mask), (*encoded.shape[:-1], stride_t)), encoded], axis=-1)


def image_tokens(pictures: Iterable[Image.Image], side: int, encode: Callable[[mx.array], mx.array]) -> mx.array:
    """What Wan2.1's I2V models attend to beside the text: (1, n, image_dim), all pictures' tokens in a row.

    Args:
        side: of the squares that pictures are stretched to.
        encode: pictures (B, side, side, 3) -> (B, m, image_dim).
    """
    squares = np.concatenate([stretched_frame(picture, side, side)[0] for picture in pictures])
    tokens = encode(mx.array(squares))
    return tokens.reshape(1, -1, tokens.shape[-1])
