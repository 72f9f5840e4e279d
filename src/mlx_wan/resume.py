"""A run that stopped half-way, on disk: latents, the sampler's state and all settings; whole or not there."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.sampling import Point
from mlx_wan.schedulers import Scheduler
from mlx_wan.step_cache import nothing_kept
from mlx_wan.weights.files import read_metadata, read_tensors
from mlx_wan.weights.whole import is_whole, write_arrays

FORMAT = 1
DONE = "done."
KEY, CHECK = "mlx_wan.run", "mlx_wan.run.crc32"


def save_point(path: str | Path, point: Point, record: dict[str, Any], done: Sequence[mx.array] = ()) -> None:
    """Writes a point and what it belongs to, a JSON object, as one safetensors file that replaces an earlier one whole.

    done: latents of the parts before this one, of a longer video (`extend`). WanError if it cannot be written.
    """
    arrays = arrays_of(point) | {f"{DONE}{number}": latents for number, latents in enumerate(done)}
    mx.eval(arrays)
    about = json.dumps({"format": FORMAT, "step": point.step, "record": record}, ensure_ascii=False)
    metadata = {KEY: about, CHECK: str(zlib.crc32(about.encode()))}  # the arrays have a checksum of their own
    write_arrays(Path(path), arrays, metadata, "make room; the run can go on from what was saved before")


def read_record(path: str | Path) -> dict[str, Any]:
    """What `save_point` was given as record.

    Raises:
        UserError: no such file, or another kind of file.
        CheckpointError: a damaged one.
    """
    return _read(Path(path))["record"]


def load_point(path: str | Path, scheduler: Scheduler, cached: bool = False) -> Point:
    """The point in a file, for the scheduler it was made with, with a step cache or not. Raises as `read_record`."""
    path = Path(path)
    step, tensors = _read(path)["step"], read_tensors(path)
    tensors = {name: info for name, info in tensors.items() if not name.startswith(DONE)}
    if step > len(scheduler.timesteps):
        raise CheckpointError(f"{path}: is after step {step}, and the run has {len(scheduler.timesteps)}")
    shape = tensors["latents"].shape if "latents" in tensors else ()
    like = expected(scheduler, step, shape, cached)
    wanted = {name: (array.shape, "float32") for name, array in arrays_of(like).items()}
    if not shape or {name: (info.shape, info.dtype) for name, info in tensors.items()} != wanted:
        raise CheckpointError(f"{path}: does not hold the state of this sampler after step {step}; start again")
    arrays = {name: info.load() for name, info in tensors.items()}
    return with_arrays(like, arrays)


def load_done(path: str | Path) -> list[mx.array]:
    """The latents of the parts before, in order. Raises as `read_record`."""
    _read(Path(path))
    tensors = {name: info for name, info in read_tensors(path).items() if name.startswith(DONE)}
    if tensors.keys() != {f"{DONE}{number}" for number in range(len(tensors))}:
        raise CheckpointError(f"{path}: lacks a part of its video; start again")
    return [tensors[f"{DONE}{number}"].load() for number in range(len(tensors))]


def expected(scheduler: Scheduler, step: int, shape: tuple[int, ...] = (1,), cached: bool = False) -> Point:
    """A point after so many steps on latents of `shape`, as trees of arrays go; its values mean nothing."""
    latents, state = mx.zeros(shape), scheduler.init()
    for _ in range(step):
        latents, state = scheduler.step(latents, latents, state)
    return Point(step, latents, state, nothing_kept(shape) if cached else None)


def with_arrays(point: Point, arrays: dict[str, mx.array]) -> Point:
    """The point with these arrays in place of its own."""
    return tree_map_with_path(lambda name, old: arrays[_name(name)] if isinstance(old, mx.array) else old, point)


def arrays_of(point: Point) -> dict[str, mx.array]:
    """The arrays of a point under the names that `with_arrays` and the file have for them."""
    found: dict[str, mx.array] = {}

    def keep(name: str, value: Any) -> None:
        if isinstance(value, mx.array):
            found[_name(name)] = value

    tree_map_with_path(keep, point)
    return found


def _name(place: str) -> str:
    """The name in a file of what lies at a place in the tree: 1 are the latents, 2.i the state's i-th field,
    3.i the step cache's."""
    first, _, rest = place.partition(".")
    return {"1": "latents", "2": "state", "3": "kept"}[first] + (f".{rest}" if rest else "")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    metadata = read_metadata(path) if is_whole(path) else None
    about = "null" if metadata is None else metadata.get(KEY, "null")
    if metadata is None or metadata.get(CHECK, "0") != str(zlib.crc32(about.encode()) if KEY in metadata else 0):
        raise CheckpointError(f"{path}: is damaged, or not the state of a run; start the run again")
    try:
        found = json.loads(about)
    except (ValueError, RecursionError):
        found = None
    match found:
        case {"format": 1, "step": int(step), "record": dict()} if not isinstance(step, bool) and 0 < step <= 1000:
            return found
        case {"format": other} if other != FORMAT:
            raise UserError(f"{path}: was written by another version of mlx-wan (format {other}); start the run again")
    raise UserError(f"{path}: is not the state of a run of mlx-wan")
