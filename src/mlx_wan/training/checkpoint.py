"""Training states on disk: one safetensors file each, written whole, the newest whole one found again."""

import json
import os
import re
import struct
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_wan.errors import CheckpointError

_NAME = re.compile(r"state-(\d{8})\.safetensors")


def save_state(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Writes the tree of arrays `state` of `step` and removes all but the newest `keep` states."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"state-{step:08d}.safetensors"
    partial = folder / f".{path.stem}.partial.safetensors"
    arrays = dict(tree_flatten(state))
    mx.save_safetensors(str(partial), arrays, metadata={"step": str(step)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    for old in _states(folder)[:-keep]:
        old.unlink()
    return path


def load_state(path: Path) -> tuple[int, dict]:
    """(step, state) as `save_state` was given them, evaluated."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    return int(metadata["step"]), tree_unflatten(list(arrays.items()))


def newest_state(folder: Path) -> Path | None:
    """The newest state whose file is whole; None if there is none."""
    whole = [path for path in _states(folder) if _is_whole(path)]
    return whole[-1] if whole else None


def check_matches(state: dict, expected: dict, path: Path) -> None:
    """Raises CheckpointError if `state`, read from `path`, has other names or shapes than `expected`."""
    have = {name: array.shape for name, array in tree_flatten(state)}
    want = {name: array.shape for name, array in tree_flatten(expected)}
    wrong = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
    if wrong:
        raise CheckpointError(
            f"{path} is of another configuration: {len(wrong)} arrays differ, {', '.join(wrong[:3])} among them; "
            "use the recipe it was made with or another --run folder"
        )


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("state-*.safetensors") if _NAME.fullmatch(path.name))


def _is_whole(path: Path) -> bool:
    # A safetensors file is its header's length, the header and the arrays, whose end the header tells.
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, struct.error, ValueError, MemoryError):
        return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return path.stat().st_size == 8 + length + max(ends, default=0)
