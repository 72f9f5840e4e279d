"""ComfyUI's quantized matrices: which tensors one consists of, and how they become float32 again.

Each layer says its format in JSON. The layouts are those that ComfyUI's loader takes (comfy/ops.py) and that the
package comfy-kitchen, whose kernels ComfyUI calls, writes. Activations are not quantized here: their scales are unused.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_wan.weights.tensors import FLOAT8

HALF_BYTES = mx.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])  # e2m1: what 4 bits stand for
TILE_ROWS, TILE_COLUMNS = 128, 4  # of block scales, as NVIDIA's matrix units want them


@dataclass(frozen=True)
class Scale:
    """A tensor of scales beside a matrix.

    Attributes:
        types: how it may be stored.
        sizes: how many numbers it may have, of (rows, columns) of the matrix.
    """

    types: tuple[str, ...]
    sizes: Callable[[int, int], tuple[int, ...]]


@dataclass(frozen=True)
class Format:
    """How a matrix is stored.

    Attributes:
        stored: types of its tensor `weight`.
        values: of the matrix in one of `weight`.
        scales: end of the name -> the scales that must be beside it.
        extra: the same of what may be there.
        unpack: (weight, scales, the layer's JSON) -> the matrix, float32.
        options: what the JSON may say about it; other entries are errors.
        group: of how many values a row is made, by the JSON; the matrix must have two dimensions if it is more than 1.
    """

    stored: tuple[str, ...]
    values: int
    scales: Mapping[str, Scale]
    unpack: Callable[[mx.array, Mapping[str, mx.array], Mapping[str, Any]], mx.array]
    extra: Mapping[str, Scale] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    group: Callable[[Mapping[str, Any]], Any] = lambda options: 1


def tiled_size(rows: int, columns: int) -> int:
    """How many block scales are stored for so many: whole tiles."""
    return math.ceil(rows / TILE_ROWS) * TILE_ROWS * math.ceil(columns / TILE_COLUMNS) * TILE_COLUMNS


def untiled(scales: mx.array, rows: int, columns: int) -> mx.array:
    """Block scales in rows and columns, out of tiles of 128 × 4 in which row 32 i + r, column c is at (r, i, c)."""
    down, across = math.ceil(rows / TILE_ROWS), math.ceil(columns / TILE_COLUMNS)
    tiles = scales.reshape(down, across, 32, TILE_ROWS // 32, TILE_COLUMNS).transpose(0, 3, 2, 1, 4)
    return tiles.reshape(down * TILE_ROWS, across * TILE_COLUMNS)[:rows, :columns]


def unrotated(matrix: mx.array, group: int) -> mx.array:
    """Each `group` of a row times the orthogonal matrix that it was multiplied with, which is its own inverse.

    It is the Kronecker power ("ConvRot"; a power of 4 wide) of four rows of ones with -1 from corner to corner.
    """
    corner = (mx.ones((4, 4)) - 2 * mx.eye(4)[::-1]) / 2
    whole = corner
    while whole.shape[0] < group:
        whole = mx.kron(whole, corner)
    turned = mx.matmul(matrix.reshape(-1, group), whole, stream=mx.cpu)  # a GPU may multiply in fewer bits
    return turned.reshape(matrix.shape)


def _numbers(scales: mx.array, kind: str) -> mx.array:
    """8-bit floats, which some writers store as bytes, as float32."""
    return mx.array(FLOAT8[kind])[scales] if scales.dtype == mx.uint8 else scales


def _blocks(matrix: mx.array, scales: mx.array, size: int) -> mx.array:
    rows, columns = matrix.shape
    return (matrix.reshape(rows, -1, size) * untiled(scales, rows, columns // size)[..., None]).reshape(rows, columns)


def _by_rows(weight: mx.array, scales: Mapping[str, mx.array], _: Mapping[str, Any]) -> mx.array:
    scale = scales["weight_scale"].astype(mx.float32).reshape(-1, *[1] * max(weight.ndim - 1, 0))
    return weight.astype(mx.float32) * scale.reshape(scale.shape if weight.ndim else ())


def _mxfp8(weight: mx.array, scales: Mapping[str, mx.array], _: Mapping[str, Any]) -> mx.array:
    return _blocks(weight, _numbers(scales["weight_scale"], "float8_e8m0"), 32)


def _nvfp4(weight: mx.array, scales: Mapping[str, mx.array], _: Mapping[str, Any]) -> mx.array:
    """The upper half of a byte comes first. `pre_quant_scale` is for the input; here it is the columns'."""
    halves = HALF_BYTES[mx.stack([weight >> 4, weight & 15], axis=-1).reshape(weight.shape[0], -1)]
    whole = scales["weight_scale_2"].astype(mx.float32).reshape(())
    matrix = _blocks(halves, whole * _numbers(scales["weight_scale"], "float8_e4m3"), 16)
    return matrix * scales["pre_quant_scale"].astype(mx.float32).reshape(-1) if "pre_quant_scale" in scales else matrix


def _int8(weight: mx.array, scales: Mapping[str, mx.array], options: Mapping[str, Any]) -> mx.array:
    matrix = _by_rows(weight, scales, options)
    return unrotated(matrix, rotation(options)) if options.get("convrot") else matrix


def _int4(weight: mx.array, scales: Mapping[str, mx.array], options: Mapping[str, Any]) -> mx.array:
    """The lower half of a byte comes first; both are from -8 to 7."""
    nibbles = mx.stack([weight << 4, weight], axis=-1).reshape(weight.shape[0], -1) >> 4  # int8: the sign comes along
    return unrotated(_by_rows(nibbles, scales, options), rotation(options))


def rotation(options: Mapping[str, Any]) -> int:
    """How wide the groups of a rotated row are; 0 if they cannot be as wide as is said."""
    width = options.get("convrot_groupsize", 256)
    return width if width in (4**k for k in range(1, 8)) else 0


def _maybe_rotated(options: Mapping[str, Any]) -> int:
    return rotation(options) if options.get("convrot") else 1


_FLOATS = ("float32", "float16", "bfloat16")
_ROWS = {"weight_scale": Scale(_FLOATS, lambda rows, columns: (1, rows))}
_MXFP8 = {"weight_scale": Scale(("float8_e8m0", "uint8"), lambda rows, columns: (tiled_size(rows, columns // 32),))}
_NVFP4 = {
    "weight_scale": Scale(("float8_e4m3", "uint8"), lambda rows, columns: (tiled_size(rows, columns // 16),)),
    "weight_scale_2": Scale(_FLOATS, lambda rows, columns: (1,)),
}
_SMOOTHED = {"pre_quant_scale": Scale(_FLOATS, lambda rows, columns: (columns,))}
_ROTATED = ("convrot_groupsize", "quant_group_size", "linear_dtype")
_FLOAT8 = Format(("float8_e4m3", "float8_e5m2"), 1, _ROWS, _by_rows)
_INT8 = Format(("int8",), 1, _ROWS, _int8, options=("convrot", *_ROTATED), group=_maybe_rotated)
_INT4 = Format(("int8",), 2, _ROWS, _int4, options=_ROTATED, group=rotation)
FORMATS = {
    "float8_e4m3fn": _FLOAT8,
    "float8_e5m2": _FLOAT8,
    "mxfp8": Format(("float8_e4m3",), 1, _MXFP8, _mxfp8, group=lambda options: 32),
    "nvfp4": Format(("uint8",), 2, _NVFP4, _nvfp4, _SMOOTHED, group=lambda options: 16),
    "int8_tensorwise": _INT8,
    "convrot_w4a4": _INT4,
    "int4_tensorwise": _INT4,
}
# What a layer's JSON may say of every format: how to compute with it, and what its tensors say anyway.
COMMON = ("format", "full_precision_matrix_mult", "group_size", "orig_dtype", "orig_shape", "params")
