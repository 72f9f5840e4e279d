"""Clips and captions as people have them: a folder with .txt files, JSON lines or CSV -> clips that training can show.

Nothing here needs MLX. What cannot be used is named with its reason and left out; it never stops a run.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_wan.conditioning import image_to_frame
from mlx_wan.errors import UserError
from mlx_wan.training.buckets import Bucket, bucket_sizes, longest, nearest_size
from mlx_wan.video import probe_video, read_frames, read_image

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".m4v", ".avi", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SAMPLINGS = ("head", "uniform", "slide")
SPLITS = {"train": ("train",), "valid": ("valid", "validation")}  # and what they are called
# Columns of a row: one of each pair. And those of tables that came with a data set of others, whose further columns
# are passed over: metadata.jsonl and metadata.csv beside the files, parquet.
_MEDIA, _TEXT = ("video", "image"), ("caption", "prompt")
MEDIA, TEXT = ("video", "image", "file_name", "mp4", "jpg", "png"), ("caption", "prompt", "text")
METADATA = ("metadata.jsonl", "metadata.csv")
_UTF8 = "utf-8-sig"  # Windows' editors begin a file with a mark that is no part of it


@dataclass(frozen=True)
class Source:
    """A file and what it shows. kind: "video" or "image"."""

    path: Path
    kind: str
    caption: str


@dataclass(frozen=True)
class Skipped:
    """Something that training does without, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return self.reason if self.reason.startswith(str(self.path)) else f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Sampling:
    """How clips are cut from sources.

    Attributes:
        num_frames: lengths of clips, 4n + 1 each; a video gets the longest it fills, a picture is 1 frame.
        width, height: area of a clip, and its shape where `aspect_buckets` is off.
        steps: what width and height must be multiples of.
        fps: frames a second the model is trained at; a video is resampled to it by nearest frames.
        frames: "head" (the first frames), "uniform" (`windows` spread evenly over the video) or "slide" (a window
            every `stride` frames; 0: one after the other).
        aspect_buckets: whether clips keep their own aspect ratio, roughly, instead of being cropped to width×height.
        flip: whether every clip is shown mirrored too.
    """

    num_frames: tuple[int, ...]
    width: int
    height: int
    steps: tuple[int, int]
    fps: float
    frames: str = "head"
    windows: int = 4
    stride: int = 0
    aspect_buckets: bool = True
    flip: bool = False

    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the buckets."""
        whole = [(self.width, self.height)]
        return bucket_sizes(self.width, self.height, self.steps) if self.aspect_buckets else whole

    def starts(self, available: int, length: int) -> list[int]:
        """First frames of the clips of `length` that a video of `available` frames gives."""
        last = available - length
        if self.frames == "uniform":
            return sorted(set(np.linspace(0, last, self.windows).round().astype(int).tolist()))
        if self.frames == "slide":
            return list(range(0, last + 1, self.stride or length))
        return [0]


@dataclass(frozen=True)
class Clip:
    """One example.

    Attributes:
        source: where it comes from.
        bucket: its size and length.
        frames: places of its frames in the video, ascending; (0,) for a picture.
        flip: mirrored.
    """

    source: Source
    bucket: Bucket
    frames: tuple[int, ...]
    flip: bool = False

    @property
    def name(self) -> str:
        window = f" frames {self.frames[0]}-{self.frames[-1]}" if len(self.frames) > 1 else ""
        return f"{self.source.path}{window}{' mirrored' if self.flip else ''}"


# --- sources ---------------------------------------------------------------------------------------------------------


def find_sources(data: Path, split: str = "train") -> tuple[list[Source], list[Skipped]]:
    """The files of a data set with their captions, in a fixed order, and what is not usable.

    Args:
        data: a .jsonl or .csv file (for "train"), or a folder with train.jsonl or train.csv, with a folder train/, or
            with the files themselves, in subfolders too. Rows name `video` or `image`, relative to their file, and
            `caption` or `prompt`; in folders the caption of a.mp4 is a.txt beside it.
            A folder with metadata.jsonl or metadata.csv, as the Hub's image and video folders have, is read by that:
            `file_name` and `caption`, `prompt` or `text`, and other columns are passed over.
        split: "train" or "valid": valid.jsonl, valid.csv or valid/, or the same called validation; with none of these
            there is nothing to validate.

    Raises:
        UserError: nothing there, two that contradict each other, or a table with wrong columns.
    """
    if data.is_file():
        return _read_table(data) if split == "train" else ([], [])
    if not data.is_dir():
        raise UserError(f"{data}: no such folder or file; give --data a folder of clips, a .jsonl or a .csv")
    names = SPLITS[split]
    found = [path for name in names for path in (data / f"{name}.jsonl", data / f"{name}.csv", data / name)]
    found = [path for path in found if path.exists()]
    if len(found) > 1:
        raise UserError(f"{data}: has both {found[0].name} and {found[1].name}; keep one")
    if found:
        return _read_folder(found[0]) if found[0].is_dir() else _read_table(found[0])
    return _read_folder(data, without=tuple(data / name for name in SPLITS["valid"])) if split == "train" else ([], [])


def _read_folder(folder: Path, without: tuple[Path, ...] = ()) -> tuple[list[Source], list[Skipped]]:
    tables = [folder / name for name in METADATA if (folder / name).is_file()]
    if tables:
        return _read_table(tables[0])
    sources: list[Source] = []
    skipped: list[Skipped] = []
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    for path in files:
        kind = _kind(path)
        if kind is None or not set(without).isdisjoint(path.parents):
            continue
        text = path.with_suffix(".txt")
        if not text.is_file():
            skipped.append(Skipped(path, f"has no caption: {text.name} is missing"))
            continue
        try:
            caption = text.read_text(encoding=_UTF8).strip()
        except (OSError, UnicodeDecodeError):
            skipped.append(Skipped(path, f"its caption {text.name} is not UTF-8 text"))
            continue
        if caption:
            sources.append(Source(path, kind, caption))
        else:
            skipped.append(Skipped(path, f"its caption {text.name} is empty"))
    return sources, skipped


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return "video" if suffix in VIDEOS else "image" if suffix in IMAGES else None


def _read_table(path: Path) -> tuple[list[Source], list[Skipped]]:
    readers = {".jsonl": _json_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: a table of clips is a .jsonl or a .csv file")
    sources: list[Source] = []
    skipped: list[Skipped] = []
    try:
        for line, row in readers[path.suffix.lower()](path):
            source = _row(path, line, _own_columns(path, line, row) if path.name in METADATA else row)
            if source.path.is_file():
                sources.append(source)
            else:
                skipped.append(Skipped(source.path, f"no such file (line {line} of {path.name})"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    return sources, skipped


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    # Not `splitlines`: it would part a caption at U+2028 and its like, which JSON leaves as they are.
    for line, text in enumerate(path.read_text(encoding=_UTF8).split("\n"), start=1):
        if text.strip():
            try:
                yield line, json.loads(text)
            except ValueError:
                raise UserError(f"{path}: line {line} is not JSON") from None


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding=_UTF8, newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}: line {reader.line_num} has another number of columns than the first")
            yield reader.line_num, {name: value for name, value in row.items() if value}


def _own_columns(path: Path, line: int, row: Any) -> Any:
    """A row of a table of others in our words: what `file_name` is shows in its ending."""
    if not isinstance(row, dict):
        return row
    ours = {name: row[name] for name in (*_MEDIA, *_TEXT) if name in row}
    file = row.get("file_name")
    if isinstance(file, str):
        kind = _kind(Path(file))
        if kind is None:
            raise UserError(f"{path}: line {line}: {file} is neither a video nor a picture by its name")
        ours[kind] = file
    if "text" in row and not ours.keys() & set(_TEXT):
        ours["caption"] = row["text"]
    return ours


def _row(path: Path, line: int, row: Any) -> Source:
    where = f"{path}: line {line}"
    if not isinstance(row, dict):
        raise UserError(f"{where} is no row of keys and values")
    if unknown := sorted(map(str, row.keys() - {*_MEDIA, *_TEXT})):
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join((*_MEDIA, *_TEXT))}")
    picked = []
    for names in (_MEDIA, _TEXT):
        given = [name for name in names if name in row]
        if len(given) != 1 or not isinstance(row[given[0]], str) or not row[given[0]].strip():
            raise UserError(f"{where}: must have exactly one of {' and '.join(names)}, a text")
        picked += [given[0], row[given[0]].strip()]
    kind, file, _, caption = picked
    return Source(path.parent / Path(file).expanduser(), kind, caption)


# --- clips -----------------------------------------------------------------------------------------------------------


def plan_clips(sources: list[Source], sampling: Sampling) -> tuple[list[Clip], list[Skipped]]:
    """The clips that `sources` give, without decoding more than a frame of each, and the sources that give none."""
    clips: list[Clip] = []
    skipped: list[Skipped] = []
    sizes = sampling.sizes()
    for source in sources:
        try:
            clips += _PLANS[source.kind](source, sampling, sizes)
        except UserError as error:
            skipped.append(Skipped(source.path, str(error)))
    return clips, skipped


def _plan_video(source: Source, sampling: Sampling, sizes: list[tuple[int, int]]) -> list[Clip]:
    facts = probe_video(source.path)
    index = resample(facts.times, sampling.fps)
    length = longest(len(index), sampling.num_frames)
    if length is None:
        raise UserError(
            f"is too short: {len(index)} frames at {sampling.fps:g} fps, and num_frames is {min(sampling.num_frames)}"
        )
    bucket = Bucket(length, *nearest_size(facts.width, facts.height, sizes))
    flips = (False, True) if sampling.flip else (False,)
    return [
        Clip(source, bucket, tuple(index[start : start + length].tolist()), flip)
        for start in sampling.starts(len(index), length)
        for flip in flips
    ]


def _plan_image(source: Source, sampling: Sampling, sizes: list[tuple[int, int]]) -> list[Clip]:
    image = read_image(source.path)
    bucket = Bucket(1, *nearest_size(image.width, image.height, sizes))
    return [Clip(source, bucket, (0,), flip) for flip in ((False, True) if sampling.flip else (False,))]


_PLANS: dict[str, Callable[[Source, Sampling, list[tuple[int, int]]], list[Clip]]] = {
    "video": _plan_video,
    "image": _plan_image,
}


def resample(times: np.ndarray, fps: float) -> np.ndarray:
    """Which frames to show so that frames shown at `times` (seconds, from 0) play at `fps`: the nearest in time."""
    count = int(times[-1] * fps + 1e-3) + 1
    targets = np.arange(count) / fps
    after = np.clip(np.searchsorted(times, targets), 1, max(1, len(times) - 1))
    before = after - 1
    after = np.minimum(after, len(times) - 1)
    return np.where(targets - times[before] <= times[after] - targets, before, after)


def read_clip(clip: Clip) -> np.ndarray:
    """Pixels of a clip: float32 (1, T, H, W, 3) in [-1, 1], each frame scaled to cover and cropped about its centre.

    UserError if the file cannot be decoded.
    """
    _, width, height = clip.bucket
    path = clip.source.path
    pictures = [read_image(path)] if clip.source.kind == "image" else read_frames(path, clip.frames)
    pixels = np.concatenate([image_to_frame(picture, width, height) for picture in pictures], axis=1)
    return np.ascontiguousarray(pixels[:, :, :, ::-1]) if clip.flip else pixels
