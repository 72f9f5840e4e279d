"""ComfyUI's quantized matrices, each a few tensors of a file, joined to one tensor.

Older files (`fp8_scaled`) hold `X.scale_weight` beside `X.weight`, and a marker `scaled_fp8`; newer ones
`X.weight_scale` and a JSON text, as a tensor `X.comfy_quant` or under X in the file's own metadata; lightx2v's the
scale alone, beside 8-bit floats or integers. What the formats mean is in `comfy`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_wan.errors import CheckpointError
from mlx_wan.weights.comfy import COMMON, FORMATS, Format
from mlx_wan.weights.tensors import TensorInfo

OWN_NAMES = ("weight_scale", "weight_scale_2", "pre_quant_scale")
SCALES = {"scale_weight": "weight_scale"} | {name: name for name in OWN_NAMES}
UNUSED = ("scale_input", "input_scale")
MARKER, DESCRIPTION = "scaled_fp8", "comfy_quant"
METADATA_KEY = "_quantization_metadata"
MAX_DESCRIPTION = 10_000  # bytes


def join_scales(path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, TensorInfo]:
    """The tensors of a file with every matrix and its scales made one, unpacked when that is loaded.

    metadata: the strings of the file's header.

    Raises:
        CheckpointError: a scale without its weight, of another size or missing, or a format that is not known here.
    """
    said = _in_metadata(path, tensors, metadata)
    scales: dict[str, dict[str, TensorInfo]] = {}
    plain = {}
    for name, info in tensors.items():
        layer, _, last = name.rpartition(".")
        if last in SCALES:
            scales.setdefault(layer, {})[SCALES[last]] = info
        elif last == DESCRIPTION:
            said[layer] = _parsed(path, info)
        elif last not in UNUSED and last != MARKER:
            plain[name] = info
    for layer in scales.keys() | said.keys():
        weight, found = plain.get(f"{layer}.weight"), scales.get(layer, {})
        if weight is None and found:
            raise CheckpointError(f"{path}: {next(iter(found.values())).name} is a scale without its weight")
        if weight is not None:
            plain[weight.name] = _joined(path, weight, found, said.get(layer))
    return plain


def _joined(
    path: Path, weight: TensorInfo, scales: Mapping[str, TensorInfo], options: Mapping[str, Any] | None
) -> TensorInfo:
    if options is None:
        plain = "int8_tensorwise" if weight.stored == "int8" else "float8_e4m3fn"
        if weight.stored not in FORMATS[plain].stored:
            raise CheckpointError(f"{path}: {weight.name} has a scale but is {weight.stored}, which nothing explains")
        options = {"format": plain}
    form = _form(path, weight, options)
    shape = (*weight.shape[:-1], weight.shape[-1] * form.values) if weight.shape else ()
    rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    if missing := form.scales.keys() - scales.keys():
        raise CheckpointError(f"{path}: {weight.name} lacks its {', '.join(sorted(missing))}; get the file again")
    for end, scale in scales.items():
        kind = form.scales.get(end) or form.extra.get(end)
        sizes = kind.sizes(rows, columns) if kind else ()
        if kind is None or math.prod(scale.shape) not in sizes or scale.stored not in kind.types:
            raise CheckpointError(
                f"{path}: {scale.name} {scale.shape} {scale.stored} does not fit {weight.name} {shape} of the format "
                f"{options['format']}" + (f", which has {' or '.join(map(str, sizes))} scales there" if sizes else "")
            )

    def load() -> mx.array:
        return form.unpack(weight.load(), {end: scale.load() for end, scale in scales.items()}, options)

    nbytes = weight.nbytes + sum(scale.nbytes for scale in scales.values())
    packed = f"{weight.packed} scaled" if options["format"].startswith("float8") else options["format"]
    return replace(weight, shape=shape, dtype="float32", nbytes=nbytes, load=load, packed=packed)


def _form(path: Path, weight: TensorInfo, options: Mapping[str, Any]) -> Format:
    """The format that a layer's description names, once the weight is of its kind."""
    name = options["format"]
    form = FORMATS.get(name) if isinstance(name, str) else None
    if form is None:
        raise CheckpointError(f"{path}: {weight.name} says {name!r:.40}, which is not supported ({', '.join(FORMATS)})")
    if unknown := options.keys() - {*COMMON, *form.options}:
        raise CheckpointError(
            f"{path}: {weight.name} is {name} with {', '.join(sorted(unknown))}, which is not supported"
        )
    if weight.stored not in form.stored:
        raise CheckpointError(f"{path}: {weight.name} says {name}, but is stored as {weight.stored}")
    columns, group = weight.shape[-1] * form.values if weight.shape else 1, form.group(options)
    if group != 1 and (len(weight.shape) != 2 or not group or columns % group):
        raise CheckpointError(f"{path}: {weight.name} {weight.shape} has no rows of groups such as {name} has")
    return form


def _in_metadata(path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Layer -> description, of those in the header. Some writers leave ComfyUI's prefix of the layers out."""
    if METADATA_KEY not in metadata:
        return {}
    try:
        layers = json.loads(metadata[METADATA_KEY])["layers"]
        said = {str(layer): _described(options) for layer, options in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {METADATA_KEY} of its header is damaged; get the file again") from error
    prefix = "model.diffusion_model."
    return {
        layer if f"{layer}.weight" in tensors or f"{prefix}{layer}.weight" not in tensors else prefix + layer: options
        for layer, options in said.items()
    }


def _parsed(path: Path, info: TensorInfo) -> Mapping[str, Any]:
    try:
        return _described(json.loads(bytes(np.array(info.load()))) if info.nbytes < MAX_DESCRIPTION else {})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {info.name} is not the description of a format; get the file again") from error


def _described(options: Any) -> Mapping[str, Any]:
    """A description with its nested `params`, which count less, laid flat. KeyError or TypeError if it is none."""
    nested = options["format"] and options.get("params")
    return {**(nested if isinstance(nested, dict) else {}), **options}
