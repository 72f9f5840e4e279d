"""Video and pictures on disk: frames in and out as streams (PyAV), with the settings that made a video inside it."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.codec import Codec
from av.error import FFmpegError
from PIL import Image, ImageOps, UnidentifiedImageError

from mlx_wan.errors import UserError, WanError
from mlx_wan.formats import CODECS, VIDEOS

SUFFIXES = tuple(VIDEOS)
_BT709 = 1  # the code point of primaries, transfer and matrix in H.264
_ITU709 = 1  # the same matrix by swscale's own numbering
_LIMITED_RANGE = 1
SHEET_FRAMES, _GAP = 6, 4  # of a contact sheet: frames a row, pixels between them
_VIDEO_ERRORS = (OSError, FFmpegError, ValueError)


# --- writing -------------------------------------------------------------------------------------------------


def check_writable(path: str | Path) -> None:
    """UserError if no video can be written at `path`; creates nothing. For use before hours of work."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: a video's name ends in {', '.join(SUFFIXES)}")
    check_folder(path)


def check_folder(path: Path) -> None:
    """UserError if no file can be written at `path`, whatever its ending; creates nothing."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give a file name")
        if not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist; create it first")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}); choose another folder") from None


def has_encoder(name: str) -> bool:
    """Whether this build of PyAV can encode with FFmpeg's `name`."""
    try:
        Codec(name, "w")
    except (ValueError, FFmpegError):
        return False
    return True


class VideoWriter:
    """A video (by default H.264, yuv420p, BT.709, near-lossless quality) that grows by pieces.

    A context manager. The frames go to a hidden file in the same folder, renamed on success and removed on any
    error or Ctrl-C, so `path` is either whole or not there.

    Args:
        path: ends as a key of `formats.VIDEOS` does.
        fps: frames a second, > 0.
        metadata: JSON-able facts kept in the file's `comment` tag; `read_metadata` returns them.
        codec: a key of `formats.CODECS` that the container takes; None is its usual one.

    Raises:
        UserError: `path` cannot be written, or frames have an odd side (halved chroma needs even ones).
        WanError: the encoder or the disk failed.
    """

    def __init__(
        self, path: str | Path, fps: float, *, metadata: dict[str, Any] | None = None, codec: str | None = None
    ) -> None:
        check_writable(path)
        self.path = Path(path)
        self._format = VIDEOS[self.path.suffix.lower()]
        self._codec = CODECS[codec or self._format.codecs[0]]
        self.frames_written = 0
        self._fps = Fraction(fps).limit_denominator(1001)
        self._temporary = self.path.with_name(f".mlx-wan-{os.getpid()}-{id(self):x}.partial")
        self._metadata = metadata
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> "VideoWriter":
        try:
            self._container = av.open(
                str(self._temporary),
                "w",
                format=self._format.container,
                container_options={"movflags": "+faststart+use_metadata_tags"},
            )
        except _VIDEO_ERRORS as error:
            raise self._failed(error) from None
        if self._metadata is not None:
            self._container.metadata["comment"] = json.dumps(self._metadata, ensure_ascii=False)
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames: uint8 (t, H, W, 3), RGB; every piece of the same H and W."""
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 (t, H, W, 3), not {frames.dtype} {frames.shape}")
        try:
            if self._stream is None:
                self._stream = self._start(height=frames.shape[1], width=frames.shape[2])
            if frames.shape[1:3] != (self._stream.height, self._stream.width):
                size = (self._stream.height, self._stream.width)
                raise ValueError(f"the video is {size}, a piece {frames.shape[1:3]} (height, width)")
            for frame in frames:
                self._container.mux(self._stream.encode(self._picture(frame)))
                self.frames_written += 1
        except (OSError, FFmpegError) as error:
            raise self._failed(error) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._finish(whole=kind is None)
        finally:
            self._temporary.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes the unfinished file, for a process that ends where no context manager is left."""
        self._temporary.unlink(missing_ok=True)

    def _start(self, height: int, width: int) -> Any:
        rgb = self._codec.pix_fmt == "rgb24"
        if not rgb and (height % 2 or width % 2):
            raise UserError(f"{self.path}: {width}x{height} has an odd side, which such a video cannot have")
        stream = self._container.add_stream(self._codec.encoder, rate=self._fps, options=dict(self._codec.options))
        stream.width, stream.height, stream.pix_fmt = width, height, self._codec.pix_fmt
        stream.bit_rate = 0  # the options set the quality
        codec = stream.codec_context
        if self._codec.tag and self._format.container in ("mp4", "mov"):
            codec.codec_tag = self._codec.tag
        if not rgb:
            codec.color_primaries = codec.color_trc = codec.colorspace = _BT709
            codec.color_range = _LIMITED_RANGE
        return stream

    def _picture(self, frame: np.ndarray) -> av.VideoFrame:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if self._codec.pix_fmt != "rgb24":
            picture = picture.reformat(format=self._codec.pix_fmt, dst_colorspace=_ITU709)
        picture.pts, picture.time_base = self.frames_written, 1 / self._fps
        return picture

    def _finish(self, whole: bool) -> None:
        """Close the file and, if the work ended well, give it its name."""
        try:
            if whole and self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()
            if whole and self._stream is not None:
                os.replace(self._temporary, self.path)
        except _VIDEO_ERRORS as error:
            if whole:
                raise self._failed(error) from None
        if whole and self._stream is None:
            raise WanError(f"{self.path}: no frames were written")

    def _failed(self, error: Exception) -> WanError:
        return WanError(f"{self.path}: writing the video failed: {getattr(error, 'strerror', None) or error}")


def write_sheet(path: str | Path, clips: Iterable[np.ndarray]) -> None:
    """A PNG with a row for each clip, uint8 (T, H, W, 3): SHEET_FRAMES frames from its first to its last.

    Narrower rows are filled up with grey. WanError if it cannot be written.
    """
    path, rows = Path(path), []
    for clip in clips:
        chosen = clip[np.linspace(0, len(clip) - 1, SHEET_FRAMES).round().astype(int)]
        padded = np.pad(chosen, ((0, 0), (_GAP, 0), (_GAP, 0), (0, 0)), constant_values=128)
        rows.append(np.concatenate(list(padded), axis=1))
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=128) for row in rows]
    partial = path.with_name(f".mlx-wan-{os.getpid()}.partial")
    try:
        Image.fromarray(np.concatenate(rows)).save(partial, format="PNG")
        os.replace(partial, path)
    except OSError as error:
        raise WanError(f"{path}: writing the picture failed: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


# --- reading -------------------------------------------------------------------------------------------------


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """All frames, uint8 (T, H, W, 3) RGB and upright, and the frames a second. UserError if it is no video."""
    frames = []
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            for frame in container.decode(stream):
                frames.append(_upright(frame))
    except (OSError, FFmpegError) as error:
        raise UserError(f"{path}: cannot be read as a video ({_short(error)})") from None
    if not frames or fps <= 0:
        raise UserError(f"{path}: has no frames in it")
    return np.stack(frames), fps


@dataclass(frozen=True)
class VideoFacts:
    """width, height: upright, in pixels. times: when each frame is shown, in seconds, from its first, ascending."""

    width: int
    height: int
    times: np.ndarray


def probe_video(path: str | Path) -> VideoFacts:
    """Size and frame times of a video, decoding only its first frame. UserError if it is damaged or no video."""
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            stamps = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            base, announced = stream.time_base, stream.frames
        with av.open(str(path)) as container:
            first = next(container.decode(_video_stream(container, path)), None)
    except (OSError, FFmpegError) as error:
        raise UserError(f"{path}: cannot be read as a video ({_short(error)})") from None
    if first is None or not stamps or base is None:
        raise UserError(f"{path}: has no frames in it")
    if len(stamps) < announced:
        raise UserError(f"{path}: is cut short: {len(stamps)} of {announced} frames are there")
    width, height = (first.width, first.height) if round(first.rotation / 90) % 2 == 0 else (first.height, first.width)
    times = np.sort(np.array(stamps, np.float64)) * float(base)
    return VideoFacts(width, height, times - times[0])


def read_frames(path: str | Path, indices: Sequence[int]) -> Iterator[Image.Image]:
    """Frames of a video by their places in its order of display, ascending, as upright RGB pictures, one at a time.

    A repeated index hands out its frame again. UserError if one cannot be decoded.
    """
    wanted, done = list(indices), 0
    try:
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(_video_stream(container, path))):
                if done < len(wanted) and wanted[done] == index:
                    picture = Image.fromarray(_upright(frame))
                    while done < len(wanted) and wanted[done] == index:
                        yield picture
                        done += 1
                if done == len(wanted):
                    return
    except (OSError, FFmpegError) as error:
        raise UserError(f"{path}: cannot be decoded ({_short(error)})") from None
    raise UserError(f"{path}: frame {wanted[done]} cannot be decoded; the file is damaged")


def _video_stream(container: Any, path: str | Path) -> Any:
    if not container.streams.video:
        raise UserError(f"{path}: has no video in it")
    return container.streams.video[0]


def _upright(frame: Any) -> np.ndarray:
    turns = round(frame.rotation / 90)  # phones film sideways and note it down
    return np.rot90(frame.to_ndarray(format="rgb24"), turns)


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """What `VideoWriter(metadata=...)` stored in the file, or None if it stored nothing."""
    try:
        with av.open(str(path)) as container:
            tags = {name.lower(): value for name, value in container.metadata.items()}
    except (OSError, FFmpegError) as error:
        raise UserError(f"{path}: cannot be read as a video ({_short(error)})") from None
    try:
        facts = json.loads(tags.get("comment", ""))
    except json.JSONDecodeError:
        return None
    return facts if isinstance(facts, dict) else None


def read_image(path: str | Path) -> Image.Image:
    """A picture file as RGB, upright (EXIF orientation applied). UserError if it is missing or no whole picture."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such picture file")
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        raise UserError(f"{path}: is not a picture that can be read (JPEG, PNG, WebP, ...)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: the picture is damaged or cut short ({_short(error)})") from None
    with image:
        return to_rgb(image, str(path))


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """A picture as RGB of 8 bits, upright (EXIF orientation applied).

    UserError, which calls it `name`, if it cannot be decoded or its values have no known range (32 bits a pixel).
    """
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: the picture is damaged or cut short ({_short(error)})") from None
    if upright.mode in ("I", "F"):
        raise UserError(f"{name}: has 32 bits a pixel; save it as an 8-bit or 16-bit picture")
    if upright.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white
        upright = Image.fromarray((np.asarray(upright, dtype=np.uint16) >> 8).astype(np.uint8))
    return upright.convert("RGB")


def _short(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
