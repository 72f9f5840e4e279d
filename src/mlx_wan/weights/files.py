"""Headers of tensor files: names, shapes and types of everything in them, without reading a value."""

import json
import math
from pathlib import Path
from typing import Any

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.weights.gguf import read_gguf
from mlx_wan.weights.pickles import read_pth
from mlx_wan.weights.scaled import join_scales
from mlx_wan.weights.tensors import DTYPES, LFS_HINT, LFS_POINTER, TensorInfo, mapped_tensor

__all__ = [
    "INDEX_SUFFIX",
    "SAFETENSORS_DTYPES",
    "TENSOR_SUFFIXES",
    "TensorInfo",
    "read_index",
    "read_metadata",
    "read_tensors",
]

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
TENSOR_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES, ".gguf")
INDEX_SUFFIX = ".safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20  # the format's own limit

SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0",
}


def read_tensors(path: str | Path) -> dict[str, TensorInfo]:
    """Everything in a .safetensors, .gguf or .pth file, or a sharded set (its .safetensors.index.json).

    ComfyUI's quantized matrices are one tensor with their scales (`scaled.join_scales`).

    Only headers are read, and checked against the files' sizes: 10 GB take milliseconds and no memory.

    Raises:
        UserError: no such file, or not a kind of file this reads.
        CheckpointError: truncated, damaged, or (.pth) with anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.name.endswith(INDEX_SUFFIX):
        return join_scales(path, *_read_shards(path))
    if path.suffix == ".safetensors":
        return join_scales(path, *_read_safetensors(path))
    if path.suffix in PICKLE_SUFFIXES:
        return read_pth(path)
    if path.suffix == ".gguf":
        return read_gguf(path)
    raise UserError(f"{path}: not a tensor file ({', '.join((*TENSOR_SUFFIXES, INDEX_SUFFIX))})")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free-form strings in the header of a .safetensors file."""
    return _strings(_read_header(Path(path))[0].get("__metadata__"))


def _strings(metadata: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def read_index(path: Path, *, must_exist: bool = True) -> dict[str, Path]:
    """Tensor name -> shard, of a .safetensors.index.json.

    Raises:
        CheckpointError: not an index, or (if they `must_exist`) shards are missing.
    """
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        shards = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of shards; download it again") from error
    for file in shards.values():
        if Path(file).name != file:
            raise CheckpointError(f"{path}: names a shard outside its folder: {file}")
    missing = sorted({file for file in shards.values() if not (path.parent / file).is_file()})
    if missing and must_exist:
        raise CheckpointError(f"{path.parent}: missing {', '.join(missing)}, listed in {path.name}")
    return {name: path.parent / file for name, file in shards.items()}


def _read_shards(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    index = read_index(path)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(index.values())):
        found, said = _read_safetensors(shard)
        listed = {name for name, file in index.items() if file == shard}
        if wrong := sorted(listed ^ found.keys()):
            raise CheckpointError(f"{shard}: {path.name} lists other tensors, {wrong[0]} is one of {len(wrong)}")
        tensors.update(found)
        metadata.update(said)
    return tensors, metadata


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header as it stands, and the byte where the values begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(f"{path}: {LFS_HINT}")
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size or length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: truncated or not a safetensors file: {size:,} bytes, header claims {length:,}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged safetensors header; download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged safetensors header; download it again")
    return header, 8 + length


def _read_safetensors(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a file, and the strings in its header."""
    header, start = _read_header(path)
    metadata = _strings(header.pop("__metadata__", None))
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _parse_entry(path, name, entry)
        if dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has the unknown type {dtype}")
        dtype = SAFETENSORS_DTYPES[dtype]
        if end - begin != math.prod(shape) * DTYPES[dtype][0]:
            raise CheckpointError(f"{path}: tensor {name} {shape} {dtype} cannot take {end - begin} bytes")
        spans.append((begin, end))
        tensors[name] = mapped_tensor(name, shape, dtype, path, start + begin)
    _check_cover(path, start, spans)
    return tensors, metadata


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            if all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                return dtype, tuple(shape), begin, end
    raise CheckpointError(f"{path}: damaged header entry of tensor {name}; download it again")


def _check_cover(path: Path, start: int, spans: list[tuple[int, int]]) -> None:
    """The tensors must follow each other without gap or overlap up to the end of the file."""
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise CheckpointError(f"{path}: gap or overlap at byte {start + position:,}; download it again")
        position = end
    size = path.stat().st_size
    if size != start + position:
        state = "truncated" if size < start + position else "longer than its header says"
        raise CheckpointError(f"{path}: {state}: {size:,} bytes instead of {start + position:,}; download it again")
