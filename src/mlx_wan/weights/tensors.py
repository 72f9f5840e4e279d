"""One tensor of a checkpoint file: what its header says, and how to fetch its values from the mapped file."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_wan.errors import CheckpointError

# dtype name -> (bytes an element, NumPy type the bytes are read as, MLX type). NumPy has no bfloat16, so its bits
# travel as uint16. MLX has float64 on the CPU alone: it becomes float32 on loading.
DTYPES: dict[str, tuple[int, np.dtype, mx.Dtype]] = {
    "bool": (1, np.dtype(np.bool_), mx.bool_),
    "uint8": (1, np.dtype("<u1"), mx.uint8),
    "int8": (1, np.dtype("<i1"), mx.int8),
    "uint16": (2, np.dtype("<u2"), mx.uint16),
    "int16": (2, np.dtype("<i2"), mx.int16),
    "uint32": (4, np.dtype("<u4"), mx.uint32),
    "int32": (4, np.dtype("<i4"), mx.int32),
    "uint64": (8, np.dtype("<u8"), mx.uint64),
    "int64": (8, np.dtype("<i8"), mx.int64),
    "float16": (2, np.dtype("<f2"), mx.float16),
    "bfloat16": (2, np.dtype("<u2"), mx.bfloat16),
    "float32": (4, np.dtype("<f4"), mx.float32),
    "float64": (8, np.dtype("<f8"), mx.float32),
    "complex64": (8, np.dtype("<c8"), mx.complex64),
    "float8_e4m3": (1, np.dtype("<u1"), mx.float32),
    "float8_e5m2": (1, np.dtype("<u1"), mx.float32),
    "float8_e8m0": (1, np.dtype("<u1"), mx.float32),
}


def _e4m3(byte: int) -> float:
    """Sign, four bits of exponent with bias 7, three of mantissa; no infinities, both all-ones are NaN."""
    sign, exponent, mantissa = (-1.0 if byte & 128 else 1.0), (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


# The value of each byte. An e5m2 is the upper half of a float16, an e8m0 a power of two, its last byte NaN.
FLOAT8 = {
    "float8_e4m3": np.array([_e4m3(byte) for byte in range(256)], np.float32),
    "float8_e5m2": (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32),
    "float8_e8m0": np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan)),
}

LFS_POINTER = b"version https://git-lfs.github.com/"
LFS_HINT = "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"  # what a plain git clone leaves


@dataclass(frozen=True)
class ByRows:
    """Reads a tensor: all of it when called, or some rows of its first dimension."""

    whole: Callable[[], mx.array]
    rows: Callable[[int, int], mx.array]

    def __call__(self) -> mx.array:
        return self.whole()


@dataclass(frozen=True)
class TensorInfo:
    """A tensor known from its file's header; nothing is read before `load()`.

    Attributes:
        name: its name in the file.
        shape: its dimensions.
        dtype: a key of `DTYPES`, of what `load` returns.
        nbytes: size of its values in the file, in bytes.
        file: where it is.
        load: reads the values. Raises CheckpointError for types that are only described.
        packed: how the file holds it where that is not `dtype`: "Q4_K", "float8_e4m3", ...; else "".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    load: Callable[[], mx.array]
    packed: str = ""

    @property
    def stored(self) -> str:
        """How the file holds it: `packed` or `dtype`."""
        return self.packed or self.dtype

    def rows(self, start: int, stop: int) -> mx.array:
        """`load()[start:stop]`, reading no more than that where `load` can."""
        return self.load.rows(start, stop) if isinstance(self.load, ByRows) else self.load()[start:stop]


def mapped_tensor(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    file: Path,
    offset: int,
    strides: tuple[int, ...] | None = None,
) -> TensorInfo:
    """A tensor whose little-endian values start at byte `offset` of `file`.

    Args:
        strides: in elements; None for row-major order without gaps. The caller has checked that they stay
            in the file.

    Raises:
        CheckpointError: larger than any array of MLX.
    """
    if any(n >= 2**31 for n in shape):
        raise CheckpointError(f"{file}: tensor {name} has an impossible shape {shape}")
    size = DTYPES[dtype][0]

    def whole() -> mx.array:
        return _read(name, shape, dtype, file, offset, strides)

    def rows(start: int, stop: int) -> mx.array:
        steps = row_major(shape) if strides is None else strides
        return _read(name, (stop - start, *shape[1:]), dtype, file, offset + start * steps[0] * size, steps)

    return TensorInfo(
        name=name,
        shape=shape,
        dtype="float32" if dtype in FLOAT8 else dtype,
        packed=dtype if dtype in FLOAT8 else "",
        nbytes=math.prod(shape) * size,
        file=file,
        load=ByRows(whole, rows) if shape else whole,
    )


def _read(
    name: str, shape: tuple[int, ...], dtype: str, file: Path, offset: int, strides: tuple[int, ...] | None
) -> mx.array:
    itemsize, numpy_dtype, mlx_dtype = DTYPES[dtype]
    if math.prod(shape) == 0:
        return mx.zeros(shape, mlx_dtype)
    strides = row_major(shape) if strides is None else strides
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    try:
        flat = np.memmap(file, numpy_dtype, mode="r", offset=offset, shape=(span,))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot read tensor {name}: {error}") from error
    steps = [s * itemsize for s in strides]
    values = np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)
    values = FLOAT8[dtype][values] if dtype in FLOAT8 else values
    array = mx.array(np.ascontiguousarray(values).reshape(shape))  # copies: the mapping ends here
    return array.view(mlx_dtype) if dtype == "bfloat16" else array


def dtype_name(dtype: mx.Dtype) -> str:
    """The key of `DTYPES` for a type of MLX."""
    return str(dtype).removeprefix("mlx.core.").rstrip("_")


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of an array without gaps whose last dimension runs fastest."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
