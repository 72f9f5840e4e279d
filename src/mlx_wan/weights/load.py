"""Builds the modules of a checkpoint and fills them, strictly: every tensor of one is a tensor of the other."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_wan.models.autoencoder import WanVAE
from mlx_wan.models.clip import ImageEncoder
from mlx_wan.models.transformer import WanTransformer
from mlx_wan.models.umt5 import UMT5Encoder
from mlx_wan.weights.checkpoint import Checkpoint
from mlx_wan.weights.fit import fit_tensors, make_vae
from mlx_wan.weights.locate import locate
from mlx_wan.weights.tensors import TensorInfo

__all__ = ["Checkpoint", "load_image_encoder", "load_text_encoder", "load_transformer", "load_vae", "locate"]

Module = TypeVar("Module", bound=nn.Module)


def load_transformer(
    checkpoint: Checkpoint, dtype: mx.Dtype, part: str = "transformer", weights: mx.Dtype | None = None
) -> WanTransformer:
    """The transformer, evaluated; it computes in `dtype`, what `FLOAT32_PARAMETERS` names in float32.

    Args:
        part: "transformer", or "transformer_2", the low-noise expert of two.
        weights: type of the matrices, for training that keeps more digits than it computes with; None: `dtype`.

    Raises:
        CheckpointError: the file changed since `locate`.
    """
    return _fill(checkpoint, part, WanTransformer(checkpoint.transformer_config, dtype), weights or dtype)


def load_text_encoder(checkpoint: Checkpoint, dtype: mx.Dtype) -> UMT5Encoder:
    """The text encoder, evaluated, all of it in `dtype`. Raises as `load_transformer`."""
    return _fill(checkpoint, "text_encoder", UMT5Encoder(checkpoint.text_encoder_config), dtype)


def load_image_encoder(checkpoint: Checkpoint, dtype: mx.Dtype) -> ImageEncoder:
    """The image encoder of a model that has one, evaluated, all of it in `dtype`. Raises as `load_transformer`."""
    assert checkpoint.image_encoder_config is not None
    return _fill(checkpoint, "image_encoder", ImageEncoder(checkpoint.image_encoder_config), dtype)


def load_vae(checkpoint: Checkpoint, dtype: mx.Dtype = mx.float32) -> WanVAE:
    """The VAE, evaluated; its convolutions in `dtype`, biases and norms in float32. Raises as `load_transformer`."""
    return _fill(checkpoint, "vae", make_vae(checkpoint), dtype)


def fill(module: nn.Module, tensors: list[TensorInfo], read: Callable[[TensorInfo], mx.array]) -> None:
    """Puts what `read` makes of each tensor into `module`, evaluated; `fit_tensors` has found them complete."""
    weights = []
    for info in tensors:
        array = read(info)
        mx.eval(array)  # one by one: the peak stays one tensor above the final size
        weights.append((info.name, array))
    module.update(cast(Any, tree_unflatten(weights)))


def _fill(checkpoint: Checkpoint, part: str, module: Module, dtype: mx.Dtype) -> Module:
    fill(module, fit_tensors(checkpoint, part, module, dtype), lambda info: info.load())
    return module
