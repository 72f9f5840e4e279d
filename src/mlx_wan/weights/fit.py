"""The tensors of a checkpoint as our modules take them: renamed, turned, of the right type, and complete."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_wan.errors import CheckpointError
from mlx_wan.models.autoencoder import WanVAE
from mlx_wan.models.clip import ImageEncoder, ImageEncoderConfig
from mlx_wan.models.transformer import FLOAT32_PARAMETERS, WanTransformer
from mlx_wan.models.umt5 import UMT5Encoder
from mlx_wan.models.vae21 import VAE21Config, WanVAE21
from mlx_wan.models.vae22 import WanVAE22
from mlx_wan.weights.checkpoint import Checkpoint, Component
from mlx_wan.weights.identify import LABELS
from mlx_wan.weights.layouts import KEEP, plan_turns, turn
from mlx_wan.weights.quantize import quantize_module
from mlx_wan.weights.tensors import DTYPES, ByRows, TensorInfo, dtype_name

SHOWN = 4  # tensors listed of each kind in an error
PIECE = 1 << 27  # values unpacked at a time


def make_vae(checkpoint: Checkpoint) -> WanVAE:
    """The module of the checkpoint's VAE, not filled."""
    config = checkpoint.vae_config
    return WanVAE21(config) if isinstance(config, VAE21Config) else WanVAE22(config)


def component_tensors(checkpoint: Checkpoint, name: str, dtype: mx.Dtype | None) -> list[TensorInfo]:
    """The tensors of a part, one of `checkpoint.parts`, as its module takes them, each read when asked for.

    Official names, channels last, types by the policy of the `load_*` functions, or as stored where `dtype` is
    None (but for what is always float32); the VAE in float32. Raises as `locate`.
    """
    modules = {
        "transformer": lambda: WanTransformer(checkpoint.transformer_config),
        "text_encoder": lambda: UMT5Encoder(checkpoint.text_encoder_config),
        "image_encoder": lambda: ImageEncoder(checkpoint.image_encoder_config or ImageEncoderConfig()),
        "vae": lambda: make_vae(checkpoint),
    }
    return fit_tensors(
        checkpoint, name, modules[checkpoint.parts[name].identity.component](), None if name == "vae" else dtype
    )


def fit_tensors(checkpoint: Checkpoint, name: str, module: nn.Module, dtype: mx.Dtype | None) -> list[TensorInfo]:
    """The part's tensors made to fit `module`, whose matrices get packed first where the checkpoint's are.

    The module's own random values are never computed: MLX makes them when they are needed, and they are not.
    """
    part = checkpoint.parts[name]
    component = part.identity.component
    if (how := checkpoint.packing(name)) is not None:
        try:
            quantize_module(module, component, how)
        except ValueError as error:  # MLX: rows that the group size does not divide
            raise CheckpointError(f"{checkpoint.folder}: cannot be quantized as its config.json says") from error
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    wanted = {name: tuple(array.shape) for name, array in parameters.items()}
    found = {name: info.shape for name, info in part.tensors.items()}
    try:
        plan = plan_turns(found, wanted, checkpoint.layout.usual)
    except CheckpointError as error:
        raise CheckpointError(f"{part.path}: {error}") from error
    _check(part, component, parameters, plan)
    return [
        _fitted(info, name, plan[name], wanted[name], _target(component, name, info, dtype))
        for name, info in part.tensors.items()
    ]


def _check(part: Component, component: str, parameters: Mapping[str, mx.array], plan: Mapping[str, str]) -> None:
    problems = {
        "missing": [name for name in parameters if name not in part.tensors],
        "unexpected": [name for name in part.tensors if name not in parameters],
        "misshapen": [
            f"{name} {info.shape} instead of {tuple(parameters[name].shape)}"
            for name, info in part.tensors.items()
            if name in parameters and name not in plan
        ],
        "of a wrong type": [
            f"{name} {info.stored}"
            for name, info in part.tensors.items()
            if name in parameters and not _loadable(info, parameters[name])
        ],
    }
    lines = []
    for problem, names in problems.items():
        if names:
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"{len(names)} {problem} ({', '.join(names[:SHOWN])}{more})")
    if lines:
        raise CheckpointError(f"{part.path}: does not fit the {LABELS[component]}: {'; '.join(lines)}")


def _loadable(info: TensorInfo, parameter: mx.array) -> bool:
    """Floats for floats (those this package can read), packed integers for packed integers."""
    stored = DTYPES[info.dtype][2]
    if mx.issubdtype(parameter.dtype, mx.floating):
        return mx.issubdtype(stored, mx.floating)
    return stored == parameter.dtype


def _target(component: str, name: str, info: TensorInfo, dtype: mx.Dtype | None) -> mx.Dtype:
    stored = DTYPES[info.dtype][2]
    return parameter_dtype(component, name, mx.bfloat16 if info.packed and dtype is None else stored, dtype)


def parameter_dtype(component: str, name: str, stored: mx.Dtype, dtype: mx.Dtype | None) -> mx.Dtype:
    """The type in which a parameter that a file has as `stored` is loaded, matrices in `dtype` (None: as stored)."""
    if not mx.issubdtype(stored, mx.floating):
        return stored
    if component == "vae":
        return mx.float32 if dtype is None or not name.endswith(".weight") else dtype
    always = component == "transformer" and any(fragment in name for fragment in FLOAT32_PARAMETERS)
    return mx.float32 if always else dtype or stored


def _fitted(info: TensorInfo, name: str, way: str, shape: tuple[int, ...], dtype: mx.Dtype) -> TensorInfo:
    type_name = dtype_name(dtype)
    size = DTYPES[type_name][0]
    count = math.prod(info.shape)
    load = info.load

    def fitted() -> mx.array:
        if way == KEEP and count > PIECE and info.packed and isinstance(load, ByRows):
            return _in_pieces(rows, shape, dtype)
        return turn(load(), way, shape).astype(dtype)

    def rows(start: int, stop: int) -> mx.array:
        return info.rows(start, stop).astype(dtype)

    read = ByRows(fitted, rows) if way == KEEP else fitted  # a turned tensor's rows are not the file's
    return replace(info, name=name, shape=shape, dtype=type_name, nbytes=count * size, load=read, packed="")


def _in_pieces(rows: Callable[[int, int], mx.array], shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A tensor so large that all of it in float32 is not to be in memory at once: UMT5's embeddings take 4.2 GB."""
    step = max(1, PIECE // math.prod(shape[1:]))
    whole = mx.zeros(shape, dtype)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        whole[start:stop] = rows(start, stop)
        mx.eval(whole)
    return whole
