"""Arrays on disk that are whole or noticed not to be, and training states made of them, the newest found again."""

import contextlib
import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_wan.errors import CheckpointError, WanError

_NAME = re.compile(r"state-(\d{8})\.safetensors")
_CHUNK = 1 << 24  # bytes read at a time


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes the tree of arrays `state` of `step`, and leaves the newest `keep` states in the folder.

    WanError if it cannot be written whole; the states of before are then still there.
    """
    path = folder / f"state-{step:08d}.safetensors"
    write_arrays(path, flat(state), {"step": str(step)}, "make room, then go on with --resume")
    older = [other for other in _states(folder) if step_of(other) < step]
    for other in older[: len(older) - (keep - 1)]:
        other.unlink(missing_ok=True)
    for left in folder.glob(".state-*.partial.safetensors"):  # of a process that was killed
        left.unlink(missing_ok=True)
    return path


def write_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str], remedy: str) -> None:
    """A safetensors file with a checksum, whole under its name or not there, in a folder that is made if needed.

    WanError, which ends in `remedy`, if it cannot be written.
    """
    partial = path.with_name(f".{path.stem}.partial.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(partial), arrays, metadata={**metadata, "crc32": str(_checksum(arrays))})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        raise WanError(f"{path}: cannot be written ({_reason(error)}); {remedy}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def load_state(path: Path, like: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(step, state): what `save_state` was given, evaluated, in a tree built as `like` is.

    CheckpointError if the file is damaged or its names, shapes or types are not those of `like`.
    """
    if not is_whole(path):
        raise CheckpointError(f"{path} is damaged; remove it, and --resume goes on from the one before")
    arrays: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    want = flat(like)
    names = arrays.keys() | want.keys()
    wrong = sorted(name for name in names if _kind(arrays.get(name)) != _kind(want.get(name)))
    if wrong:
        raise CheckpointError(
            f"{path} is of another configuration: {len(wrong)} arrays differ, {', '.join(wrong[:3])} among them; "
            "use the recipe it was made with or another --run folder"
        )
    mx.eval(arrays)
    return step_of(path), tree_map_with_path(lambda name, _: arrays[name], like)


def is_whole(path: Path) -> bool:
    """Whether the file is there, as long as its header says and, where it has a checksum, holds what was written."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                return False
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            ends = [entry["data_offsets"][1] for entry in header.values()]
            if path.stat().st_size != 8 + length + max(ends, default=0):
                return False
            return "crc32" not in metadata or int(metadata["crc32"]) == _file_checksum(file, header, 8 + length)
    except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError):
        return False


def newest_state(folder: Path) -> Path | None:
    """The newest state whose file is whole; None if there is none."""
    return next((path for path in reversed(_states(folder)) if is_whole(path)), None)


def damaged_states(folder: Path) -> list[Path]:
    """States that are cut short or changed on disk, and so passed over."""
    return [path for path in _states(folder) if not is_whole(path)]


def step_of(path: Path) -> int:
    """The number of steps that the state in `path` has behind it, from its name."""
    return int(path.stem.split("-")[1])


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("state-*.safetensors") if _NAME.fullmatch(path.name))


def flat(tree: Any) -> dict[str, mx.array]:
    """Arrays of a tree by their names."""
    return dict(tree_flatten(tree))  # type: ignore[arg-type]


def _kind(array: mx.array | None) -> tuple | None:
    return None if array is None else (array.shape, array.dtype)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _checksum(arrays: dict[str, mx.array]) -> int:
    """CRC-32 over names and values, in the order of the names."""
    crc = 0
    for name, array in sorted(arrays.items()):
        bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array  # NumPy knows no bfloat16
        crc = zlib.crc32(np.ascontiguousarray(np.array(bits)).data, zlib.crc32(name.encode(), crc))
    return crc


def _file_checksum(file: Any, header: dict[str, Any], start: int) -> int:
    crc = 0
    for name, entry in sorted(header.items()):
        crc = zlib.crc32(name.encode(), crc)
        begin, end = entry["data_offsets"]
        file.seek(start + begin)
        while begin < end:
            part = file.read(min(_CHUNK, end - begin))
            if not part:
                raise ValueError("cut short")
            crc, begin = zlib.crc32(part, crc), begin + len(part)
    return crc
