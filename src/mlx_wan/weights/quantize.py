"""Quantization of matrices, and the one place that says which ones.

The large matrices of attention and feed-forward are packed to 4 or 8 bits in groups along their input dimension.
Everything else keeps its precision: embeddings, norms, modulation, the time path, the output head, and the whole
VAE, where rounding is visible for little gain in size.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.models.packed import PackedLinear
from mlx_wan.weights.tensors import DTYPES, TensorInfo

QUANTIZED = {
    "transformer": re.compile(r"(vace_)?blocks\.\d+\.((self_attn|cross_attn)\.[qkvo]|cross_attn\.[kv]_img|ffn\.[02])"),
    "text_encoder": re.compile(r"blocks\.\d+\.(attn\.[qkvo]|ffn\.(gate\.0|fc1|fc2))"),
}
# mode -> the bits and the group sizes it has, its default first. The floating-point ones share one 8-bit scale a group.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True)
class Quantization:
    """How matrices are packed: `bits` a value, and for every `group_size` values of a row (None: the mode's default)
    one scale, and in the mode "affine" one bias."""

    bits: int
    group_size: int | None = None
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"cannot quantize in the mode {self.mode!r}; choose one of {', '.join(MODES)}")
        bits, group_sizes = MODES[self.mode]
        if self.group_size is None:
            object.__setattr__(self, "group_size", group_sizes[0])
        if self.bits not in bits or self.group_size not in group_sizes:
            raise UserError(
                f"cannot quantize to {self.bits} bits in groups of {self.group_size}: {self.mode} has "
                f"{_either(bits)} bits and groups of {_either(group_sizes)}"
            )

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "Quantization":
        """From a native config.json. Raises CheckpointError for values this version cannot read."""
        try:
            return cls(**values)
        except (TypeError, UserError) as error:
            raise CheckpointError(f"config.json: quantization {values!r} is not supported") from error


def _either(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def is_quantized(component: str, module_name: str) -> bool:
    """Whether the module with this official name, of "transformer", "text_encoder" or "vae", gets packed."""
    pattern = QUANTIZED.get(component)
    return pattern is not None and pattern.fullmatch(module_name) is not None


def quantize_module(module: nn.Module, component: str, how: Quantization) -> nn.Module:
    """Replaces the matrices of `module` that `QUANTIZED` names by packed ones, in place.

    ValueError for a row that the group size does not divide.
    """

    def packed(name: str, layer: nn.Module) -> nn.Module:
        if not (isinstance(layer, nn.Linear) and is_quantized(component, name)):
            return layer
        return PackedLinear.from_linear(layer, how.group_size, how.bits, how.mode)  # pyright: ignore[reportArgumentType]

    leaves = tree_map_with_path(packed, module.leaf_modules(), is_leaf=nn.Module.is_module)
    module.update_modules(leaves)  # pyright: ignore[reportArgumentType]
    return module


def quantize_tensors(tensors: list[TensorInfo], component: str, how: Quantization) -> list[TensorInfo]:
    """The tensors as they are stored packed: each matrix becomes `weight`, `scales` and `biases`.

    Values are packed when they are loaded, one matrix at a time.

    Raises:
        UserError: a matrix whose rows the group size does not divide.
    """
    packed: list[TensorInfo] = []
    for info in tensors:
        module_name, _, parameter = info.name.rpartition(".")
        if parameter == "weight" and is_quantized(component, module_name):
            packed += _pack(info, module_name, how)
        else:
            packed.append(info)
    return packed


def _pack(info: TensorInfo, module_name: str, how: Quantization) -> list[TensorInfo]:
    rows, columns = info.shape
    assert how.group_size is not None
    if columns % how.group_size:
        sizes = ", ".join(map(str, MODES[how.mode][1]))
        raise UserError(
            f"cannot quantize {info.name} {info.shape}: its {columns} columns are not a multiple of the group size "
            f"{how.group_size}; choose another one or another mode ({how.mode} has {sizes})"
        )
    groups = (rows, columns // how.group_size)
    scale = info.dtype if how.mode == "affine" else "uint8"
    layout = {
        "weight": ((rows, columns * how.bits // 32), "uint32"),
        "scales": (groups, scale),
        "biases": (groups, scale),
    }
    if how.mode != "affine":
        del layout["biases"]
    memory: list[tuple[mx.array, ...]] = []  # the parts are asked for one after the other: pack once

    def part(i: int) -> mx.array:
        if not memory:
            memory.append(tuple(mx.quantize(info.load(), how.group_size, how.bits, mode=how.mode)))
        return memory.pop()[i] if i == len(layout) - 1 else memory[0][i]

    return [
        TensorInfo(
            f"{module_name}.{name}",
            shape,
            dtype,
            shape[0] * shape[1] * DTYPES[dtype][0],
            info.file,
            lambda i=i: part(i),
        )
        for i, (name, (shape, dtype)) in enumerate(layout.items())
    ]
