"""Pictures -> what the model is given."""

import math

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
