"""ComfyUI's scaled 8-bit floats: a matrix and its scale in two tensors, here joined to one.

Older files (`fp8_scaled`) hold `X.scale_weight` beside `X.weight`, and a marker `scaled_fp8`; newer ones
`X.weight_scale` and a JSON text `X.comfy_quant`. Scales of activations are for hardware that multiplies in 8 bits;
products here are not, so they have no use.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_wan.errors import CheckpointError
from mlx_wan.weights.tensors import TensorInfo

SCALES = ("scale_weight", "weight_scale")
UNUSED = ("scale_input", "input_scale")
MARKER, FORMAT = "scaled_fp8", "comfy_quant"
FORMATS = ("float8_e4m3fn", "float8_e5m2")


def join_scales(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a file with every scale multiplied into the weight it belongs to, when that is loaded.

    Raises:
        CheckpointError: a scale without its weight, of another size, or a format that is not computed here.
    """
    layers = {name: name.rpartition(".") for name in tensors}
    scales = {layer: tensors[name] for name, (layer, _, last) in layers.items() if last in SCALES}
    for name, (_, _, last) in layers.items():
        if last == FORMAT:
            _check_format(path, tensors[name])
    joined = {}
    for name, info in tensors.items():
        layer, _, last = layers[name]
        if last in (*SCALES, *UNUSED, FORMAT) or last == MARKER:
            continue
        joined[name] = _scaled(path, info, scales.pop(layer)) if last == "weight" and layer in scales else info
    if scales:
        raise CheckpointError(f"{path}: {next(iter(scales.values())).name} is a scale without its weight")
    return joined


def _scaled(path: Path, info: TensorInfo, scale: TensorInfo) -> TensorInfo:
    rows = info.shape[0] if info.shape else 1
    if not info.packed.startswith("float8"):
        raise CheckpointError(f"{path}: {info.name} has a scale but is {info.stored}, not an 8-bit float")
    if math.prod(scale.shape) not in (1, rows) or "float" not in scale.dtype:
        raise CheckpointError(
            f"{path}: {scale.name} {scale.shape} is neither one scale nor one for each of {rows} rows"
        )

    def load() -> mx.array:
        factor = scale.load().astype(mx.float32).reshape(-1, *[1] * max(len(info.shape) - 1, 0))
        return info.load() * factor.reshape(factor.shape if info.shape else ())

    return replace(info, load=load, packed=f"{info.packed} scaled")


def _check_format(path: Path, info: TensorInfo) -> None:
    try:
        content = json.loads(bytes(np.array(info.load()))) if info.nbytes < 10_000 else {}
        name = content["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {info.name} is not the description of a format; get the file again") from error
    if name not in FORMATS:
        raise CheckpointError(f"{path}: {info.name} says {name!r:.40}, which is not supported ({', '.join(FORMATS)})")
