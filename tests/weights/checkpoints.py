"""Small checkpoints in every layout, written with the weights of `small`."""

import json
from functools import cache
from pathlib import Path

import cases
import mlx.core as mx
import numpy as np
import small

from mlx_wan.weights.layouts import WAN22_MLX

from .torch_files import save_pth

PARTS = ("transformer", "text_encoder", "vae")
TOKENIZER = '{"version": "1.0"}'


def official(part: str) -> dict[str, np.ndarray]:
    """A component as the official files hold it: torch order, float32."""
    return dict(_official(part))


@cache
def _official(part: str) -> dict[str, np.ndarray]:
    shapes = cases.official_names("small", part)
    return {name: small.weight(part, name, tuple(shape)) for name, shape in shapes.items()}


def native(part: str) -> dict[str, mx.array]:
    """The same as our modules hold it."""
    return {name: mx.array(cases.native(name, array)) for name, array in official(part).items()}


def official_config() -> dict:
    """Without the fields that the official config.json leaves out."""
    omitted = ("patch_size", "text_dim", "qk_norm", "cross_attn_norm")
    fields = {name: value for name, value in small.TRANSFORMER.items() if name not in omitted}
    return {"_class_name": "WanModel", "_diffusers_version": "0.33.0", **fields}


def save_safetensors(path: Path, weights: dict[str, np.ndarray], dtype: mx.Dtype = mx.float32) -> None:
    mx.save_safetensors(str(path), {name: mx.array(array).astype(dtype) for name, array in weights.items()})


def _write_common(folder: Path) -> None:
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_text(TOKENIZER)
    (folder / "config.json").write_text(json.dumps(official_config()))


def write_official(folder: Path, shards: int = 1, dtype: mx.Dtype = mx.float32) -> Path:
    """The layout of the official repository."""
    _write_common(folder)
    weights = list(official("transformer").items())
    weight_map = {}
    for i in range(shards):
        name = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        name = name if shards > 1 else "diffusion_pytorch_model.safetensors"
        save_safetensors(folder / name, dict(weights[i::shards]), dtype)
        weight_map |= dict.fromkeys(dict(weights[i::shards]), name)
    if shards > 1:
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_pth(folder / "models_t5_umt5-xxl-enc-bf16.pth", official("text_encoder"))
    save_pth(folder / "Wan2.2_VAE.pth", official("vae"))
    return folder


def write_wan22_mlx(folder: Path, turned: bool = False) -> Path:
    """The layout of the Wan2.2-mlx conversion script; `turned`: its convolutions are channels last."""
    _write_common(folder)
    weights = {part: official(part) for part in PARTS}
    if turned:
        weights = {part: {n: cases.native(n, a) for n, a in arrays.items()} for part, arrays in weights.items()}
    weights["transformer"] = {WAN22_MLX.from_official(n): a for n, a in weights["transformer"].items()}
    for part, stem in zip(PARTS, ("wan_model_mlx", "t5_encoder_mlx", "vae_mlx"), strict=True):
        save_safetensors(folder / f"{stem}.safetensors", weights[part])
    (folder / "configuration.json").write_text("{}")
    return folder


def diffusers_golden() -> dict:
    """What diffusers wrote for the small checkpoint: configs, and its tensors' official names."""
    return json.loads((cases.GOLDEN / "diffusers.json").read_text())


def write_diffusers(folder: Path) -> Path:
    """A Diffusers repository: names and configs as diffusers wrote them."""
    golden = diffusers_golden()
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(golden[part]["config"]))
        weights = official(part)
        tensors = {own: weights[name] for own, name in golden[part]["tensors"].items()}
        save_safetensors(folder / part / golden[part]["file"], tensors)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(TOKENIZER)
    (folder / "model_index.json").write_text(json.dumps(golden["model_index"]))
    return folder


def edit_json(path: Path, **changes) -> None:
    """Sets fields of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def edit_safetensors(path: Path, change) -> None:
    """Rewrites a .safetensors file after change(dict of arrays)."""
    weights = dict(mx.load(str(path)))
    mx.eval(list(weights.values()))
    change(weights)
    mx.save_safetensors(str(path), weights)
