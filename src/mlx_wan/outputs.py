"""A file's name -> its writer: video, animation, picture or pictures; what cannot be written is said beforehand."""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mlx_wan.errors import UserError
from mlx_wan.formats import ANIMATIONS, CODECS, FORMATS, PICTURES, VIDEOS, is_pattern
from mlx_wan.stills import AnimationWriter, PictureWriter, picture_comment
from mlx_wan.video import VideoWriter, check_folder, has_encoder, read_metadata
from mlx_wan.weights.save import replacing

Writer = VideoWriter | AnimationWriter | PictureWriter


def check_output(path: Path, codec: str | None = None, frames: int | None = None) -> str:
    """The codec that `path` will be written with; creates nothing. For use before hours of work.

    Args:
        codec: a name of `formats.CODEC_NAMES`; None takes the usual one for the path's ending.
        frames: how many there will be, if that is known.

    Raises UserError if the ending is unknown, the codec does not go into such a file, this build of PyAV lacks the
    encoder, the number of frames does not fit, or nothing can be written there.
    """
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise UserError(f"{path}: a video's name ends in {', '.join(FORMATS)}, or in / for a folder of PNG frames")
    chosen = codec or form.codecs[0]
    if chosen not in form.codecs:
        fitting = [suffix for suffix, other in FORMATS.items() if chosen in other.codecs]
        raise UserError(
            f"--codec {chosen}: does not go into {path.suffix.lower()} files (these take {', '.join(form.codecs)}); "
            f"use a name that ends in {' or '.join(fitting)}"
        )
    if path.suffix.lower() in VIDEOS and not has_encoder(CODECS[chosen].encoder):
        others = [name for name in form.codecs if name != chosen and has_encoder(CODECS[name].encoder)]
        instead = f"use --codec {others[0]}" if others else "use another ending"
        raise UserError(
            f"--codec {chosen}: this build of PyAV has no encoder for it ({CODECS[chosen].encoder}); {instead}"
        )
    if path.suffix.lower() in PICTURES:
        _check_pictures(path, frames)
    else:
        check_folder(path)
    return chosen


def _check_pictures(path: Path, frames: int | None) -> None:
    if not is_pattern(path):
        if "%" in path.name:
            raise UserError(f"{path}: a pattern for frames has one number in it, such as shot_%04d.png")
        if frames is not None and frames > 1:
            raise UserError(
                f"{path}: a picture holds one frame and there will be {frames}; give --frame_num 1, or a "
                f"pattern such as {path.stem}_%04d.png"
            )
        check_folder(path)
        return
    if path.parent.exists():
        before, after = path.name.split("%", 1)[0], path.suffix
        taken = path.parent.glob(f"{before}[0-9]*{after}") if path.parent.is_dir() else ()
        if there := next(iter(sorted(taken)), None):
            raise UserError(f"{there}: frames of such names are there already; remove them or choose another name")
        check_folder(path)
    else:
        check_folder(path.parent)  # the folder itself will be made


def open_output(path: Path, fps: float, codec: str | None = None, metadata: dict[str, Any] | None = None) -> Writer:
    """A context manager with `write(frames)`, frames uint8 (t, H, W, 3); the file is whole afterwards or not there.

    Args as `check_output`, which is asked first; `metadata` is kept in the file and read by `read_settings`.
    """
    codec, suffix = check_output(path, codec), path.suffix.lower()
    if suffix in ANIMATIONS:
        return AnimationWriter(path, fps, metadata=metadata, lossless=codec == "lossless")
    if suffix in PICTURES:
        return PictureWriter(path, metadata=metadata)
    return VideoWriter(path, fps, metadata=metadata, codec=codec)


class Behind:
    """Writes in a thread of its own: while a piece is encoded the caller makes the next one.

    A context manager within the writer's own. One piece is on its way at a time; `write` waits for the one before it,
    and raises what went wrong with it, as the end of the `with` does. After an error or Ctrl-C that piece is finished
    and then forgotten.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer, self._thread = writer, ThreadPoolExecutor(1, "mlx-wan-writer")
        self._on_its_way: Future[None] | None = None

    def __enter__(self) -> "Behind":
        return self

    def write(self, frames: np.ndarray) -> None:
        """As the writer's. The frames must not be changed afterwards."""
        self._wait()
        self._on_its_way = self._thread.submit(self._writer.write, frames)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._thread.shutdown()

    def _wait(self) -> None:
        if self._on_its_way is not None:
            self._on_its_way.result()


def save_settings(path: Path, facts: dict[str, Any]) -> None:
    """Writes the facts as JSON; `read_settings` reads them."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_settings(path: Path) -> dict[str, Any] | None:
    """What `open_output(metadata=...)` stored in a file or folder, or what a .json or the state of
    a run beside it says; None if nothing.

    Raises UserError if there is no such file or it is none of these.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        from mlx_wan.resume import read_record

        return read_record(path).get("settings")
    if suffix == ".json":
        text = path.read_text(encoding="utf-8", errors="replace")
    elif path.is_dir() or suffix in ANIMATIONS or suffix in PICTURES:
        text = picture_comment(path)
    else:
        return read_metadata(path)
    try:
        facts = json.loads(text or "")
    except json.JSONDecodeError:
        return None
    return facts if isinstance(facts, dict) else None
