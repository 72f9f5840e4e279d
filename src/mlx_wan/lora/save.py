"""Writes trained adapters to a file that others read too."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_wan.lora.layers import DEFAULT, lora_tensors
from mlx_wan.weights.save import array_tensor, write_safetensors


def save_lora(
    path: str | Path,
    model: nn.Module,
    *,
    name: str = DEFAULT,
    dtype: mx.Dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """The LoRAs called `name` of a model, as `lora_tensors` names them, in one .safetensors file.

    Args:
        dtype: of the factors; None leaves them as they are.
        metadata: free-form strings for the file's header.

    Raises:
        ValueError: the model has no LoRA of that name.
        WanError: the file cannot be written.
    """
    tensors = lora_tensors(model, name)
    if not tensors:
        raise ValueError(f"the model has no LoRA called {name!r}")
    mx.eval(tensors)
    infos = [array_tensor(key, array, None if key.endswith(".alpha") else dtype) for key, array in tensors.items()]
    write_safetensors(Path(path), infos, {"format": "mlx"} | dict(metadata or {}))
    return Path(path)
