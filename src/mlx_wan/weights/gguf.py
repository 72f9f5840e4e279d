"""Reads GGUF files: headers first, values dequantized when they are asked for.

The format: magic, version, counts; metadata of typed keys; one record a tensor (name, dimensions innermost first, type,
offset); then the values, aligned. Block formats are those of ggml: a run of 32 or 256 values shares scales, which stand
in the block with the packed values.
"""

import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_wan.errors import CheckpointError
from mlx_wan.weights import spiece
from mlx_wan.weights.tensors import LFS_HINT, LFS_POINTER, ByRows, TensorInfo, mapped_tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TRANSFORMER, TEXT_ENCODER = "wan", "t5encoder"  # architectures
MAX_HEADER_BYTES = 100 << 20
MAX_ENTRIES = 1_000_000  # of metadata, of one array in it, and of tensors
MAX_DIMENSIONS = 8
CHUNK_BLOCKS = 1 << 16  # blocks dequantized at a time
SHAPE_KEY = "comfy.gguf.orig_shape."  # metadata that keeps the shape of a tensor stored flat
TOKENS, CHARSMAP = "tokenizer.ggml.tokens", "tokenizer.ggml.precompiled_charsmap"

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

Blocks = np.ndarray  # (n, bytes of a block) uint8


def _half(blocks: Blocks, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block, (n, 1) float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray, run: int) -> np.ndarray:
    """Of every `run` bytes all low halves, then all high ones: (n, 2 · bytes)."""
    groups = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(len(packed), -1)


def _bits(packed: np.ndarray, run: int, width: int) -> np.ndarray:
    """Of every `run` bytes first the lowest `width` bits of each, then the next, ...: (n, bytes · 8 / width)."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    groups = packed.reshape(len(packed), -1, 1, run)
    return ((groups >> shifts) & np.uint8((1 << width) - 1)).reshape(len(packed), -1)


def _fifth_bits(blocks: Blocks, at: int) -> np.ndarray:
    """(n, 32): bit i of the 32 that begin at byte `at`, where it counts in a 5-bit value."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _q4_0(blocks: Blocks) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).astype(np.float32) - 8)


def _q4_1(blocks: Blocks) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Blocks) -> np.ndarray:
    values = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (values.astype(np.float32) - 16)


def _q5_1(blocks: Blocks) -> np.ndarray:
    values = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * values.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Blocks) -> np.ndarray:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q2_k(blocks: Blocks) -> np.ndarray:
    """Scale and minimum of a run of 16 are the halves of one byte."""
    runs, values = blocks[:, :16], _bits(blocks[:, 16:80], 32, 2).reshape(-1, 16, 16).astype(np.float32)
    scale = _half(blocks, 80) * (runs & 15).astype(np.float32)
    minimum = _half(blocks, 82) * (runs >> 4).astype(np.float32)
    return (scale[:, :, None] * values - minimum[:, :, None]).reshape(-1, 256)


def _q3_k(blocks: Blocks) -> np.ndarray:
    """The third bit of each value stands apart. Sixteen scales of 6 bits: their lower four, then their upper two."""
    values = _bits(blocks[:, 32:96], 32, 2) | (_bits(blocks[:, :32], 32, 1) << 2)
    scales = _nibbles(blocks[:, 96:104], 8) | (_bits(blocks[:, 104:108], 4, 2) << 4)
    scale = _half(blocks, 108) * (scales.astype(np.float32) - 32)
    return (scale[:, :, None] * (values.reshape(-1, 16, 16).astype(np.float32) - 4)).reshape(-1, 256)


def _k_scales(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum, each (n, 8, 1), of the eight runs of a Q4_K or Q5_K block.

    Twelve bytes from byte 4 hold them in 6 bits: four scales, four minima, and the low halves of four more of each,
    whose upper two bits are those the first eight bytes have left.
    """
    first, second, third = (blocks[:, 4 + 4 * i : 8 + 4 * i] for i in range(3))
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return (
        (_half(blocks, 0) * scales.astype(np.float32))[:, :, None],
        (_half(blocks, 2) * minima.astype(np.float32))[:, :, None],
    )


def _q4_k(blocks: Blocks) -> np.ndarray:
    scale, minimum = _k_scales(blocks)
    values = _nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32).astype(np.float32)
    return (scale * values - minimum).reshape(-1, 256)


def _q5_k(blocks: Blocks) -> np.ndarray:
    scale, minimum = _k_scales(blocks)
    values = _nibbles(blocks[:, 48:], 32) | (_bits(blocks[:, 16:48], 32, 1) << 4)
    return (scale * values.reshape(-1, 8, 32).astype(np.float32) - minimum).reshape(-1, 256)


def _q6_k(blocks: Blocks) -> np.ndarray:
    low, high, scales = blocks[:, :128], blocks[:, 128:192], np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    values = _nibbles(low, 64) | (_bits(high, 32, 2) << 4)
    scale = _half(blocks, 208) * scales.astype(np.float32)
    return (scale[:, :, None] * (values.reshape(-1, 16, 16).astype(np.float32) - 32)).reshape(-1, 256)


# What the four bits of the "non-linear" formats stand for.
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _iq4_nl(blocks: Blocks) -> np.ndarray:
    return _half(blocks, 0) * LEVELS[_nibbles(blocks[:, 2:], 16)]


def _iq4_xs(blocks: Blocks) -> np.ndarray:
    """Eight scales of 6 bits: upper two in bytes 2 and 3, lower four in the four after them."""
    scales = _nibbles(blocks[:, 4:8], 1) | (_bits(blocks[:, 2:4], 1, 2) << 4)
    scale = _half(blocks, 0) * (scales.astype(np.float32) - 32)
    return (scale[:, :, None] * LEVELS[_nibbles(blocks[:, 8:], 16)].reshape(-1, 8, 32)).reshape(-1, 256)


class Packing(NamedTuple):
    """A block format: values and bytes a block, and how a block becomes float32; None if it is only described."""

    name: str
    values: int
    nbytes: int
    unpack: Callable[[Blocks], np.ndarray] | None = None


PLAIN = {0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 30: "bfloat16"}
PACKED = {
    2: Packing("Q4_0", 32, 18, _q4_0),
    3: Packing("Q4_1", 32, 20, _q4_1),
    6: Packing("Q5_0", 32, 22, _q5_0),
    7: Packing("Q5_1", 32, 24, _q5_1),
    8: Packing("Q8_0", 32, 34, _q8_0),
    10: Packing("Q2_K", 256, 84, _q2_k),
    11: Packing("Q3_K", 256, 110, _q3_k),
    12: Packing("Q4_K", 256, 144, _q4_k),
    13: Packing("Q5_K", 256, 176, _q5_k),
    14: Packing("Q6_K", 256, 210, _q6_k),
    16: Packing("IQ2_XXS", 256, 66),
    17: Packing("IQ2_XS", 256, 74),
    18: Packing("IQ3_XXS", 256, 98),
    19: Packing("IQ1_S", 256, 50),
    20: Packing("IQ4_NL", 32, 18, _iq4_nl),
    21: Packing("IQ3_S", 256, 110),
    22: Packing("IQ2_S", 256, 82),
    23: Packing("IQ4_XS", 256, 136, _iq4_xs),
    29: Packing("IQ1_M", 256, 56),
}


def read_gguf(path: str | Path) -> dict[str, TensorInfo]:
    """The tensors of a GGUF file whose architecture is "wan", "t5encoder" or not said, in file order.

    The tokenizer of a text encoder is one of them, as in ComfyUI's files (`spiece.TENSOR`).

    Raises:
        CheckpointError: truncated, damaged, of another architecture, or with a type that has no name here.
    """
    path = Path(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise CheckpointError(LFS_HINT)
            if start[:4] != MAGIC:
                raise CheckpointError("is not a GGUF file")
            file.seek(0)
            reader = _Reader(file.read(min(size, MAX_HEADER_BYTES)))
        return _tensors(path, size, reader)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); download it again") from error


class _Reader:
    """Walks through a header and never past its end."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 4

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise CheckpointError(f"is cut off in its header at byte {self.at:,}; download it again")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, what: str) -> int:
        n = self.number("Q")
        if n > MAX_ENTRIES:
            raise CheckpointError(f"claims {n:,} {what}; its header is damaged")
        return n

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int, nested: bool = False) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind == ARRAY and not nested:
            kind, n = self.number("I"), self.count("values of an array")
            return [self.value(kind, nested=True) for _ in range(n)]
        raise CheckpointError(f"has metadata of the unknown type {kind}; its header is damaged")


def _tensors(path: Path, size: int, reader: _Reader) -> dict[str, TensorInfo]:
    version = reader.number("I")
    if version not in VERSIONS:
        raise CheckpointError(f"is GGUF of version {version}, not one of {VERSIONS}")
    num_tensors, num_keys = reader.count("tensors"), reader.count("entries of metadata")
    metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(num_keys)}
    architecture = metadata.get("general.architecture", TRANSFORMER)
    if architecture not in (TRANSFORMER, TEXT_ENCODER):
        raise CheckpointError(
            f"is a GGUF model of the architecture {architecture!r}, not {TRANSFORMER!r} or {TEXT_ENCODER!r}"
        )
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment > 1 << 20:
        raise CheckpointError(f"has the alignment {alignment!r}; its header is damaged")
    records = [_record(reader) for _ in range(num_tensors)]
    start = -(-reader.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in records:
        if name in tensors:
            raise CheckpointError(f"holds the tensor {name} twice")
        tensors[name] = _info(path, size, name, _own_shape(name, shape, metadata), kind, start + offset)
    if architecture == TEXT_ENCODER and spiece.TENSOR not in tensors and TOKENS in metadata:
        tensors[spiece.TENSOR] = _tokenizer(path, metadata)
    return tensors


def _tokenizer(path: Path, metadata: dict[str, Any]) -> TensorInfo:
    tokens, scores, kinds, charsmap = (
        metadata.get(key, []) for key in (TOKENS, "tokenizer.ggml.scores", "tokenizer.ggml.token_type", CHARSMAP)
    )
    if not all(isinstance(some, list) for some in (tokens, scores, kinds, charsmap)) or not (
        len(tokens) == len(scores) == len(kinds)
        and all(isinstance(token, str) for token in tokens)
        and all(isinstance(number, int | float) for number in (*scores, *kinds, *charsmap))
    ):
        raise CheckpointError("has a damaged tokenizer; download it again")
    model = spiece.model(zip(tokens, scores, map(int, kinds), strict=True), bytes(int(n) & 255 for n in charsmap))
    return TensorInfo(
        spiece.TENSOR, (len(model),), "uint8", len(model), path, lambda: mx.array(np.frombuffer(model, np.uint8))
    )


def _record(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name = reader.text()
    dimensions = reader.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise CheckpointError(f"has a tensor {name:.80} of {dimensions} dimensions; its header is damaged")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
    return name, shape, reader.number("I"), reader.number("Q")


def _own_shape(name: str, shape: tuple[int, ...], metadata: dict[str, Any]) -> tuple[int, ...]:
    """The shape a tensor had before it was laid flat for formats that know four dimensions."""
    said = metadata.get(f"{SHAPE_KEY}{name}")
    if said is None:
        return shape
    if not isinstance(said, list) or not all(type(n) is int and n >= 0 for n in said):
        raise CheckpointError(f"has the shape {said!r:.80} for {name}; its header is damaged")
    if math.prod(said) != math.prod(shape):
        raise CheckpointError(f"says that {name} {shape} has the shape {tuple(said)}; its header is damaged")
    return tuple(said)


def _info(path: Path, size: int, name: str, shape: tuple[int, ...], kind: int, at: int) -> TensorInfo:
    if any(n >= 2**31 for n in shape) or math.prod(shape) >= 2**40:
        raise CheckpointError(f"has a tensor {name:.80} of the impossible shape {shape}")
    if kind in PLAIN:
        info = mapped_tensor(name, shape, PLAIN[kind], path, at)
    elif kind in PACKED:
        info = _packed(path, name, shape, PACKED[kind], at)
    else:
        raise CheckpointError(
            f"has the tensor {name:.80} of the unknown type {kind}; use a Q4_K, Q5_K, Q6_K or Q8_0 file"
        )
    if at + info.nbytes > size:
        raise CheckpointError(f"is cut off within tensor {name:.80}; download it again")
    return info


def _packed(path: Path, name: str, shape: tuple[int, ...], packing: Packing, at: int) -> TensorInfo:
    count = math.prod(shape)
    if count % packing.values:
        raise CheckpointError(f"has {name:.80} {shape} in blocks of {packing.values}, which do not divide it")
    blocks = count // packing.values

    def values(first: int, last: int, shape: tuple[int, ...]) -> mx.array:
        """Of some blocks."""
        if packing.unpack is None:
            raise CheckpointError(f"{path}: tensor {name} is {packing.name}, which is not supported; use a Q4_K file")
        out = np.empty((last - first, packing.values), np.float32)
        if blocks:
            try:
                stored = np.memmap(path, np.uint8, "r", at, (blocks, packing.nbytes))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot read tensor {name}: {error}") from error
            with np.errstate(invalid="ignore"):  # scales that are not finite: the run will find the NaN
                for i in range(first, last, CHUNK_BLOCKS):
                    chunk = np.asarray(stored[i : min(i + CHUNK_BLOCKS, last)])
                    out[i - first : i - first + len(chunk)] = packing.unpack(chunk)
        return mx.array(out.reshape(shape))

    def rows(start: int, stop: int) -> mx.array:
        return values(start * row, stop * row, (stop - start, *shape[1:]))

    load, row = partial(values, 0, blocks, shape), blocks // shape[0] if shape and shape[0] else 0
    read = ByRows(load, rows) if row and blocks == row * shape[0] else load  # a block may begin within a row
    return TensorInfo(name, shape, "float32", blocks * packing.nbytes, path, read, packing.name)
