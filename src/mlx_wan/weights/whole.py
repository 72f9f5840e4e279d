"""Arrays in a file that is whole or not there, and noticed when it has changed: by a checksum in its header."""

import contextlib
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_wan.errors import WanError

_CHUNK = 1 << 24  # bytes read at a time


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


def is_whole(path: Path) -> bool:
    """Whether the file is there, as long as its header says and, where it has a checksum, holds what was written."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                return False
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None) or {}
            ends = [entry["data_offsets"][1] for entry in header.values()]
            if path.stat().st_size != 8 + length + max(ends, default=0):
                return False
            return "crc32" not in metadata or int(metadata["crc32"]) == _file_checksum(file, header, 8 + length)
    except (OSError, struct.error, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return False


def flat(tree: Any) -> dict[str, mx.array]:
    """Arrays of a tree by their names."""
    return dict(tree_flatten(tree))  # type: ignore[arg-type]


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
