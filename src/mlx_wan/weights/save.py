"""Writes the native layout: config.json, a set of safetensors for each part and tokenizer.json in one folder.

Tensors pass one at a time from where they come from to the file, so that a model larger than memory can be written.
Files appear under their names only when they are complete, and config.json last of all: a folder without it is
half-written.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_wan.errors import WanError
from mlx_wan.models.clip import ImageEncoderConfig
from mlx_wan.models.transformer import TransformerConfig, WanTransformer
from mlx_wan.models.umt5 import TextEncoderConfig, UMT5Encoder
from mlx_wan.models.vae21 import VAE21Config, WanVAE21
from mlx_wan.models.vae22 import VAEConfig, WanVAE22
from mlx_wan.weights.checkpoint import PARTS
from mlx_wan.weights.files import INDEX_SUFFIX, SAFETENSORS_DTYPES
from mlx_wan.weights.quantize import Quantization
from mlx_wan.weights.tensors import DTYPES, TensorInfo, dtype_name
from mlx_wan.zoo import DISTILLED, SAMPLING_TYPES

FORMAT = 1
MAX_SHARD_BYTES = 5 * 10**9
DTYPE_CODES = {name: code for code, name in SAFETENSORS_DTYPES.items()}


def save_native(
    folder: str | Path,
    *,
    model: str,
    transformer: WanTransformer,
    text_encoder: UMT5Encoder,
    vae: WanVAE22 | WanVAE21,
    tokenizer_json: str | Path,
    sampling: Mapping[str, Any],
    transformer_2: WanTransformer | None = None,
    boundary: float | None = None,
    dtype: mx.Dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes modules into `folder` (made if needed), replacing a native model that is there.

    Args:
        model: a name from `zoo.MODELS`, or any other for a model of one's own.
        tokenizer_json: the tokenizer as text, or the Path of its file.
        sampling: how to sample it by default: values for keys of `zoo.SAMPLING_TYPES` and `zoo.DISTILLED`.
        transformer_2, boundary: the low-noise expert of a model that has two, and from which share of the timesteps on
            `transformer`, the high-noise one, works; both or neither.
        dtype: that floats are stored in; None keeps each parameter's own.
        max_shard_bytes: a component larger than this is split into several files with an index.
    """
    if (transformer_2 is None) != (boundary is None):
        raise ValueError("transformer_2 and boundary belong together")
    modules: dict[str, nn.Module] = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    if transformer_2 is not None:
        modules["transformer_2"] = transformer_2
    config = native_config(
        model,
        transformer=transformer.config,
        text_encoder=text_encoder.config,
        vae=vae.config,
        sampling=sampling,
        boundary=boundary,
    )
    parts = {name: module_tensors(module, dtype) for name, module in modules.items()}
    write_native(Path(folder), parts, tokenizer_json, config, max_shard_bytes)


def native_config(
    model: str,
    *,
    transformer: TransformerConfig,
    text_encoder: TextEncoderConfig,
    vae: VAEConfig | VAE21Config,
    sampling: Mapping[str, Any],
    boundary: float | None = None,
    image_encoder: ImageEncoderConfig | None = None,
    quantization: Quantization | None = None,
) -> dict[str, Any]:
    """The config.json of the native layout: the official transformer fields, and the rest under "mlx_wan"."""
    if unknown := sampling.keys() - SAMPLING_TYPES.keys() - set(DISTILLED):
        raise ValueError(f"unknown sampling settings: {', '.join(sorted(unknown))}")
    extra = {
        "format": FORMAT,
        "model": model,
        **({} if boundary is None else {"boundary": boundary}),
        "vae": asdict(vae),
        "text_encoder": asdict(text_encoder),
        **({} if image_encoder is None else {"image_encoder": asdict(image_encoder)}),
        "sampling": dict(sampling),
    }
    if quantization is not None:
        extra["quantization"] = asdict(quantization)
    fields = {name: value for name, value in asdict(transformer).items() if not name.startswith("image_")}
    return {"_class_name": "WanModel", **fields, "mlx_wan": extra}


def write_native(
    folder: Path,
    parts: Mapping[str, Sequence[TensorInfo]],
    tokenizer_json: str | Path | bytes,
    config: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`save_native` for tensors that need not be in memory: part -> tensors as its module takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "config.json"
    config_file.unlink(missing_ok=True)
    remove_tensors(folder)
    quantization = config["mlx_wan"].get("quantization")
    metadata = {"format": "mlx"} | ({"quantization": json.dumps(quantization)} if quantization else {})
    for stem, tensors in parts.items():
        write_sharded(folder, stem, tensors, max_shard_bytes, metadata)
    if isinstance(tokenizer_json, Path):
        tokenizer_json = tokenizer_json.read_bytes()
    content = tokenizer_json if isinstance(tokenizer_json, bytes) else tokenizer_json.encode()
    _write(folder / "tokenizer.json", content)
    write_json(config_file, config)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole."""
    _write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)


def remove_tensors(folder: Path) -> None:
    """Deletes the tensor files of a native model, and nothing else, from `folder`."""
    for stem in PARTS:
        for pattern in (f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors", f"{stem}{INDEX_SUFFIX}"):
            for file in folder.glob(pattern):
                file.unlink()


def module_tensors(module: nn.Module, dtype: mx.Dtype | None = None) -> list[TensorInfo]:
    """The parameters of a module dressed as tensors of a file, floats in `dtype` if one is given.

    Raises:
        ValueError: the module is quantized; `convert` writes quantized models.
    """
    if any(isinstance(layer, nn.QuantizedLinear) for layer in module.modules()):
        raise ValueError("a quantized module cannot be saved; save the original and convert it with bits=")
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))  # pyright: ignore[reportArgumentType]
    return [array_tensor(name, array, dtype) for name, array in parameters.items()]


def array_tensor(name: str, array: mx.array, dtype: mx.Dtype | None = None) -> TensorInfo:
    """An array dressed as a tensor of a file, in `dtype` if one is given and it holds floats."""
    target = dtype if dtype is not None and mx.issubdtype(array.dtype, mx.floating) else array.dtype
    nbytes = array.size * target.size
    return TensorInfo(name, tuple(array.shape), dtype_name(target), nbytes, Path(), lambda: array.astype(target))


def write_sharded(
    folder: Path, stem: str, tensors: Sequence[TensorInfo], max_shard_bytes: int, metadata: Mapping[str, str]
) -> None:
    """Writes `stem`.safetensors, or several shards of at most `max_shard_bytes` and their index."""
    shards: list[list[TensorInfo]] = [[]]
    for info in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + info.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(info)
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", shards[0], metadata)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, metadata)
        weight_map |= {info.name: name for info in shard}
    index = {"metadata": {"total_size": sum(info.nbytes for info in tensors)}, "weight_map": weight_map}
    write_json(folder / f"{stem}{INDEX_SUFFIX}", index)


def write_safetensors(path: Path, tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file, loading and releasing one tensor after the other."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for info in tensors:
        end = position + math.prod(info.shape) * DTYPES[info.dtype][0]
        offsets = [position, end]
        header[info.name] = {"dtype": DTYPE_CODES[info.dtype], "shape": info.shape, "data_offsets": offsets}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # values start at a multiple of 8 bytes
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for info in tensors:
            file.write(tensor_bytes(info))


def tensor_bytes(info: TensorInfo) -> memoryview:
    """The values of a tensor as files have them: little-endian, row by row."""
    array = info.load()
    dtype = dtype_name(array.dtype)
    if dtype != info.dtype or tuple(array.shape) != info.shape:
        raise ValueError(f"{info.name} was announced as {info.dtype} {info.shape}, came as {dtype} {array.shape}")
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(bits)).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place if the block ends well and vanishes if not."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise WanError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
