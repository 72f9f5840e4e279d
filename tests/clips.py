"""Small data sets on disk: real MP4s written by PyAV, pictures and captions."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from mlx_wan.video import VideoWriter


def pixels(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """A bright bar that moves over a dark ground: (frames, height, width, 3) uint8, grey that rises by frame."""
    clip = np.full((frames, height, width, 3), 20 + 10 * (seed % 5), np.uint8)
    for t in range(frames):
        left = (seed * 7 + t) % max(1, width - 8)
        clip[t, :, left : left + 8] = 160 + min(5 * t, 90)
    return clip


def write_video(path: Path, frames: int = 9, height: int = 32, width: int = 32, fps: float = 12, seed: int = 0) -> Path:
    with VideoWriter(path, fps) as video:
        video.write(pixels(seed, frames, height, width))
    return path


def write_uneven(path: Path, times: list[int], height: int = 32, width: int = 32) -> Path:
    """A video with variable frame rate: frame i is shown at times[i] milliseconds and is of grey 20 + 12·i."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 20 + 12 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_image(path: Path, height: int = 32, width: int = 32, seed: int = 0) -> Path:
    Image.fromarray(pixels(seed, 1, height, width)[0]).save(path)
    return path


def write_folder(folder: Path, count: int = 4, **options) -> Path:
    """`count` videos with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        write_video(folder / f"clip{i}.mp4", seed=i, **options)
        (folder / f"clip{i}.txt").write_text(f"a bar number {i} moves right\n")
    return folder
