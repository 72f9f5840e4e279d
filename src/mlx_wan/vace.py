"""What VACE is told: a source video, a mask of what may change in it, pictures to take things from -> control channels.

Follows `wan/vace.py` and `wan/utils/vace_processor.py` of Wan-Video/Wan2.1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_wan.errors import UserError


@dataclass(frozen=True)
class Source:
    """Nothing at all is plain text to video.

    Attributes:
        video: uint8 (T, H, W, 3); None is grey, all of which may change.
        mask: uint8 (T, H, W) or, one picture for all frames, (1, H, W): what is white may change, the rest stays; None:
            all may. Pixels change or do not (from 128 on); the network is told the grey value, too. Of a video only.
        references: pictures of what the video is to show, each of which fills a latent frame before it.
        scale: how much all of it counts; 1 is as trained.
    """

    video: np.ndarray | None = None
    mask: np.ndarray | None = None
    references: Sequence[Image.Image] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.mask is not None and self.video is None:
            raise UserError("a mask says what may change in a source video: give that too")
        for name, array, ndim in (("source video", self.video, 4), ("mask", self.mask, 3)):
            if array is not None and (array.ndim != ndim or array.dtype != np.uint8 or not array.size):
                raise UserError(f"the {name} is {array.dtype} {array.shape}; it must be uint8 with {ndim} dimensions")
        if not math.isfinite(self.scale):
            raise UserError(f"the scale of the control is {self.scale}; it must be a number")


def control_channels(
    encode: Callable[[mx.array], mx.array],
    source: Source,
    width: int,
    height: int,
    num_frames: int,
    stride: tuple[int, int, int],
) -> mx.array:
    """(1, n + t, h, w, 2 C + rows · columns of a latent), n references first.

    Args:
        encode: video (1, T, H, W, 3) in [-1, 1] -> normalised latents (1, t, h, w, C).
        stride: frames, rows and columns of video for one latent.
    """
    video, mask = prepared(source, width, height, num_frames)
    changes = (mask > 0.5).astype(np.float32)[None, ..., None]
    stays, changing = (encode(mx.array(part)) for part in (video * (1 - changes), video * changes))
    latents = mx.concatenate([stays, changing], axis=-1)
    channels = mx.concatenate([latents, mx.array(mask_channels(mask, stride))], axis=-1)
    mx.eval(channels)
    before = []
    for picture in source.references:
        latent = encode(mx.array(on_canvas(picture, width, height)))
        before.append(mx.pad(latent, [(0, 0)] * 4 + [(0, channels.shape[-1] - latent.shape[-1])]))
        mx.eval(before[-1])
    return mx.concatenate([*before, channels], axis=1)


def prepared(source: Source, width: int, height: int, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Video (1, T, H, W, 3) float32 in [-1, 1] and mask (T, H, W) float32 in [0, 1], of this size and length."""
    if source.video is None:
        return np.zeros((1, num_frames, height, width, 3), np.float32), np.ones((num_frames, height, width), np.float32)
    places = frame_places(len(source.video), num_frames)
    pixels = np.stack([_covering(source.video[place], width, height) for place in places])
    video = pixels.astype(np.float32)[None] / np.float32(127.5) - 1
    if source.mask is None:
        return video, np.ones((num_frames, height, width), np.float32)
    if len(source.mask) not in (1, len(source.video)):
        raise UserError(f"the mask has {len(source.mask)} frames and the source video {len(source.video)}")
    masks = [_covering(source.mask[place if len(source.mask) > 1 else 0], width, height) for place in places]
    return video, np.stack(masks).astype(np.float32) / 255


def frame_places(length: int, count: int) -> list[int]:
    """Which frames of a video of `length` make one of `count` that shows all of it, evenly in time."""
    return [max(math.ceil(moment) - 1, 0) for moment in np.linspace(0, length - 0.5, count)]


def best_count(length: int, stride: int, most: int) -> int:
    """How many frames to make of a video of `length`: as many as it has, but n · stride + 1, and at most `most`."""
    return min((length - 1) // stride * stride + 1, most)


def source_size(width: int, height: int, stride_w: int, stride_h: int, max_area: int) -> tuple[int, int]:
    """The size (width, height) for a source video: of its shape, not larger than it or than `max_area` pixels."""
    area = min(max_area // (stride_w * stride_h), (height // stride_h) * (width // stride_w))
    rows = round(math.sqrt(area * height / width))
    if not rows or not area // rows:
        raise UserError(f"a {width}x{height} source video is too small or too narrow for a video of {max_area} pixels")
    return area // rows * stride_w, rows * stride_h


def mask_channels(mask: np.ndarray, stride: tuple[int, int, int]) -> np.ndarray:
    """(T, H, W) -> (1, t, h, w, rows · columns): the pixels of a latent as its channels, the nearest frame in time."""
    stride_t, stride_h, stride_w = stride
    frames, height, width = mask.shape
    blocks = mask.reshape(frames, height // stride_h, stride_h, width // stride_w, stride_w)
    channels = blocks.transpose(0, 1, 3, 2, 4).reshape(frames, height // stride_h, width // stride_w, -1)
    count = (frames + stride_t - 1) // stride_t
    nearest = np.floor((np.arange(count) + 0.5) * (frames / count)).astype(int)
    return channels[nearest][None]


def on_canvas(picture: Image.Image, width: int, height: int) -> np.ndarray:
    """A picture, whole, in the middle of a white frame (1, 1, height, width, 3) in [-1, 1], as large as it can be."""
    pixels = (np.asarray(picture.convert("RGB"), np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    if picture.size != (width, height):
        scale = min(height / picture.height, width / picture.width)
        rows, columns = int(picture.height * scale), int(picture.width * scale)
        if not rows or not columns:
            raise UserError(f"a {picture.width}x{picture.height} reference picture is too narrow; crop it")
        small = _linear(_linear(pixels, rows).swapaxes(0, 1), columns).swapaxes(0, 1)
        top, left = (height - rows) // 2, (width - columns) // 2
        pixels = np.ones((height, width, 3), np.float32)
        pixels[top : top + rows, left : left + columns] = small
    return pixels[None, None]


def _linear(rows: np.ndarray, count: int) -> np.ndarray:
    """`rows` (n, ·, ·) to `count` of them, each mixed of two, without smoothing, as torch's `interpolate`."""
    where = (np.arange(count) + 0.5) * (len(rows) / count) - 0.5
    where = np.maximum(where, 0).astype(np.float32)
    low = where.astype(int)
    high = np.minimum(low + 1, len(rows) - 1)
    part = (where - low)[:, None, None]
    return (1 - part) * rows[low] + part * rows[high]


def _covering(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 (H, W, ·) or (H, W) scaled until it covers the size, and cropped about its centre."""
    rows, columns = pixels.shape[:2]
    if (columns, rows) == (width, height):
        return pixels
    scale = max(width / columns, height / rows)
    size = max(round(scale * columns), width), max(round(scale * rows), height)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
