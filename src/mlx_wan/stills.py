"""Frames as pictures (Pillow): a PNG, a folder of PNGs, a GIF or a WebP, with the settings that made them inside."""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from mlx_wan.errors import UserError, WanError
from mlx_wan.formats import ANIMATIONS, is_pattern

_DESCRIPTION = 0x010E  # EXIF ImageDescription
_WEBP_QUALITY = 90


class AnimationWriter:
    """A GIF or WebP that loops. Frames are kept until the end: Pillow compares each with the one before.

    A context manager with `write(frames)` as `video.VideoWriter`, and as whole or not there. Frames that do not
    differ become one that is shown longer.
    """

    def __init__(
        self, path: Path, fps: float, *, metadata: dict[str, Any] | None = None, lossless: bool = False
    ) -> None:
        self.path = path
        self.frames_written = 0
        self._fps, self._metadata, self._lossless = fps, metadata, lossless
        self._format = ANIMATIONS[path.suffix.lower()].container
        self._frames: list[Image.Image] = []

    def __enter__(self) -> "AnimationWriter":
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames: uint8 (t, H, W, 3), RGB."""
        for frame in frames:
            picture = Image.fromarray(frame)
            self._frames.append(picture.quantize(colors=256) if self._format == "GIF" else picture)
            self.frames_written += 1

    def discard(self) -> None:
        """As `VideoWriter.discard`: nothing is on disk before the end."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        if not self._frames:
            raise WanError(f"{self.path}: no frames were written")
        first, rest = self._frames[0], self._frames[1:]
        with _partial(self.path) as partial:
            options = {"save_all": True, "append_images": rest, "duration": self._durations(), "loop": 0}
            first.save(partial, self._format, **options, **self._own_options())

    def _durations(self) -> list[int]:
        """Milliseconds of each frame, whole hundredths of a second for GIF, which add up to the video's length."""
        unit = 10 if self._format == "GIF" else 1
        ends = [round(i * 1000 / self._fps / unit) * unit for i in range(len(self._frames) + 1)]
        return [end - start for start, end in itertools.pairwise(ends)]

    def _own_options(self) -> dict[str, Any]:
        text = None if self._metadata is None else json.dumps(self._metadata)  # ASCII: EXIF knows nothing else
        if self._format == "GIF":
            return {} if text is None else {"comment": text.encode()}
        exif = Image.Exif()
        if text is not None:
            exif[_DESCRIPTION] = text
        return {"quality": _WEBP_QUALITY, "lossless": self._lossless, "exif": exif}


class PictureWriter:
    """PNG pictures: one, or one a frame where the path is a pattern such as `frames/%04d.png`, counted from 1.

    Pictures go to a hidden folder and get their names when all are there. A folder that does not exist appears whole.
    """

    def __init__(self, path: Path, *, metadata: dict[str, Any] | None = None) -> None:
        self.path = path
        self.frames_written = 0
        self._many = is_pattern(path)
        self._new_folder = not path.parent.exists()
        self._info = PngImagePlugin.PngInfo()
        if metadata is not None:
            self._info.add_itxt("comment", json.dumps(metadata, ensure_ascii=False))
        near = path.parent.parent if self._new_folder else path.parent
        self._folder = near / f".mlx-wan-{os.getpid()}-{id(self):x}.partial"

    def __enter__(self) -> "PictureWriter":
        with _named(self.path):
            self._folder.mkdir()
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames: uint8 (t, H, W, 3), RGB. UserError for a second one where there is one name."""
        for frame in frames:
            if self.frames_written and not self._many:
                raise UserError(f"{self.path}: holds one picture, and there are more frames")
            self.frames_written += 1
            with _named(self.path):
                Image.fromarray(frame).save(self._folder / self._name(self.frames_written), "PNG", pnginfo=self._info)

    def discard(self) -> None:
        """As `VideoWriter.discard`."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self.discard()

    def _name(self, number: int) -> str:
        return self.path.name % number if self._many else self.path.name

    def _finish(self) -> None:
        if not self.frames_written:
            raise WanError(f"{self.path}: no frames were written")
        with _named(self.path):
            if self._new_folder:
                os.replace(self._folder, self.path.parent)
                return
            for number in range(1, self.frames_written + 1):
                os.replace(self._folder / self._name(number), self.path.parent / self._name(number))


def picture_comment(path: Path) -> str | None:
    """The text that the writers above left in a picture or in a folder's first, None if there is none.

    Raises UserError if `path` is no picture.
    """
    if path.is_dir():
        pictures = sorted(path.glob("*.png"))
        if not pictures:
            raise UserError(f"{path}: has no PNG pictures in it")
        path = pictures[0]
    try:
        with Image.open(path) as image:
            image.load()
            comment = image.info.get("comment") or image.getexif().get(_DESCRIPTION)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({getattr(error, 'strerror', None) or error})") from None
    return comment.decode(errors="replace") if isinstance(comment, bytes) else comment


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """A failure of the disk or of Pillow as one line about `path`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise WanError(f"{path}: writing failed: {getattr(error, 'strerror', None) or error}") from None


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` that takes its place if all goes well."""
    partial = path.with_name(f".mlx-wan-{os.getpid()}.partial")
    try:
        with _named(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
