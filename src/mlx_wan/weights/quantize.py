"""Affine quantization of matrices, and the one place that says which ones.

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

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.weights.tensors import TensorInfo

QUANTIZED = {
    "transformer": re.compile(r"blocks\.\d+\.((self_attn|cross_attn)\.[qkvo]|cross_attn\.[kv]_img|ffn\.[02])"),
    "text_encoder": re.compile(r"blocks\.\d+\.(attn\.[qkvo]|ffn\.(gate\.0|fc1|fc2))"),
}
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Quantization:
    """How matrices are packed: `bits` a value, one scale and bias for every `group_size` values of a row."""

    bits: int
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group_size not in GROUP_SIZES or self.mode != "affine":
            raise UserError(
                f"cannot quantize to {self.bits} bits in groups of {self.group_size} ({self.mode}): "
                f"bits must be one of {BITS}, group size one of {GROUP_SIZES}, mode affine"
            )

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> "Quantization":
        """From a native config.json. Raises CheckpointError for values this version cannot read."""
        try:
            return cls(**values)
        except (TypeError, UserError) as error:
            raise CheckpointError(f"config.json: quantization {values!r} is not supported") from error


def is_quantized(component: str, module_name: str) -> bool:
    """Whether the module with this official name, of "transformer", "text_encoder" or "vae", gets packed."""
    pattern = QUANTIZED.get(component)
    return pattern is not None and pattern.fullmatch(module_name) is not None


def quantize_module(module: nn.Module, component: str, how: Quantization) -> nn.Module:
    """Replaces the matrices of `module` that `QUANTIZED` names by packed ones, in place."""
    nn.quantize(
        module,
        group_size=how.group_size,
        bits=how.bits,
        mode=how.mode,
        class_predicate=lambda name, layer: isinstance(layer, nn.Linear) and is_quantized(component, name),
    )
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
    if columns % how.group_size:
        raise UserError(
            f"cannot quantize {info.name} {info.shape}: its {columns} columns are not a multiple of the group size "
            f"{how.group_size}; choose another one ({', '.join(map(str, GROUP_SIZES))})"
        )
    groups = (rows, columns // how.group_size)
    scale_bytes = groups[0] * groups[1] * (info.nbytes // (rows * columns))
    memory: list[tuple[mx.array, ...]] = []  # the three parts are asked for one after the other: pack once

    def part(i: int) -> mx.array:
        if not memory:
            memory.append(tuple(mx.quantize(info.load(), how.group_size, how.bits, mode=how.mode)))
        return memory.pop()[i] if i == 2 else memory[0][i]

    def tensor(i: int, name: str, shape: tuple[int, int], dtype: str, nbytes: int) -> TensorInfo:
        return TensorInfo(f"{module_name}.{name}", shape, dtype, nbytes, info.file, lambda: part(i))

    return [
        tensor(0, "weight", (rows, columns * how.bits // 32), "uint32", rows * columns * how.bits // 8),
        tensor(1, "scales", groups, info.dtype, scale_bytes),
        tensor(2, "biases", groups, info.dtype, scale_bytes),
    ]
