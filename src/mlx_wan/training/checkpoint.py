"""Training states on disk, the newest whole one found again."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path

from mlx_wan.errors import CheckpointError
from mlx_wan.weights.whole import flat, is_whole, write_arrays

_NAME = re.compile(r"state-(\d{8})\.safetensors")


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


def load_state(path: Path, like: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(step, state): what `save_state` was given, not evaluated yet, in a tree built as `like` is.

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
    return step_of(path), tree_map_with_path(lambda name, _: arrays[name], like)


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


def _kind(array: mx.array | None) -> tuple | None:
    return None if array is None else (array.shape, array.dtype)
