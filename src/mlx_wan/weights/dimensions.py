"""Dimensions and defaults of a checkpoint: what its configuration says, what its tensors are, and that both agree."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.models.clip import ImageEncoderConfig
from mlx_wan.models.transformer import TransformerConfig
from mlx_wan.models.umt5 import TextEncoderConfig
from mlx_wan.models.vae21 import VAE21Config
from mlx_wan.models.vae22 import VAEConfig
from mlx_wan.schedulers.flow import listed
from mlx_wan.weights.checkpoint import Component
from mlx_wan.weights.shapes import (
    PATCH_SIZE,
    image_encoder_fields,
    text_encoder_fields,
    transformer_fields,
    vae_fields,
)
from mlx_wan.zoo import (
    DISTILLED,
    HEAD_DIM,
    LATENT_STATISTICS,
    LATENTS_MEAN,
    MODELS,
    RELEASES,
    SAMPLING_TYPES,
    ModelSpec,
)

VAE_CONFIGS = {"Wan2.2": VAEConfig, "Wan2.1": VAE21Config}


def _shapes(part: Component) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in part.tensors.items()}


def _agree(path: Path, given: Mapping[str, Any], found: Mapping[str, Any], tensors: Path) -> None:
    """What a config says must be what the tensors are."""
    for name, value in found.items():
        said = given.get(name, value)
        said = tuple(said) if isinstance(said, list) else said
        if said != value or type(said) is not type(value):
            raise CheckpointError(f"{path}: {name} is {said!r}, but the tensors in {tensors.name} say {value!r}")


def transformer_config(path: Path, config: Mapping[str, Any], part: Component) -> TransformerConfig:
    patch_size = config.get("patch_size", PATCH_SIZE)
    try:
        patch_size = tuple(map(int, patch_size))
    except (TypeError, ValueError):
        raise CheckpointError(f"{path}: patch_size cannot be {patch_size!r}") from None
    try:
        found = transformer_fields(_shapes(part), patch_size)
    except CheckpointError as error:
        raise CheckpointError(f"{part.path}: {error}") from error
    _agree(path, config, found, part.path)
    types = {"num_heads": (int,), "text_len": (int,), "eps": (float, int), "model_type": (str,)}
    rest = {name: config[name] for name in types if name in config}
    for name, value in rest.items():
        if type(value) not in types[name] or (name != "model_type" and value <= 0):
            raise CheckpointError(f"{path}: {name} cannot be {value!r}")
    rest.setdefault("model_type", _model_type(found))
    if "num_heads" not in rest and any(part.identity.model == release.name for release in RELEASES):
        rest["num_heads"] = found["dim"] // HEAD_DIM
    if "num_heads" not in rest:
        raise CheckpointError(f"{path}: lacks num_heads, which the tensors do not tell")
    if found["dim"] % (2 * rest["num_heads"]):
        raise CheckpointError(f"{path}: num_heads {rest['num_heads']} does not divide dim {found['dim']} evenly")
    return TransformerConfig(**found, **rest)


def _model_type(found: Mapping[str, Any]) -> str:
    """What an official config.json would say of a transformer that has none."""
    if found["in_dim"] != found["out_dim"]:
        return "flf2v" if found["image_positions"] else "i2v"
    return "ti2v" if found["out_dim"] == len(LATENTS_MEAN) else "t2v"


def text_encoder_config(path: Path, given: Any, part: Component) -> TextEncoderConfig:
    try:
        found = text_encoder_fields(_shapes(part))
    except CheckpointError as error:
        raise CheckpointError(f"{part.path}: {error}") from error
    _agree(path, _section(path, "text_encoder", given, TextEncoderConfig), found, part.path)
    return TextEncoderConfig(**found)


def image_encoder_config(path: Path, given: Any, part: Component | None) -> ImageEncoderConfig | None:
    if part is None:
        return None
    try:
        found = image_encoder_fields(_shapes(part))
    except CheckpointError as error:
        raise CheckpointError(f"{part.path}: {error}") from error
    given = _section(path, "image_encoder", given, ImageEncoderConfig)
    _agree(path, given, found, part.path)
    # Tensors do not tell the heads; those of ViT-H are 80 wide.
    rest = {"num_heads": max(found["dim"] // 80, 1), "eps": ImageEncoderConfig.eps}
    rest |= {name: given[name] for name in rest if name in given}
    if type(rest["num_heads"]) is not int or rest["num_heads"] <= 0 or found["dim"] % rest["num_heads"]:
        raise CheckpointError(f"{path}: {rest['num_heads']!r} heads do not divide the image encoder's {found['dim']}")
    if not isinstance(rest["eps"], float) or rest["eps"] <= 0:
        raise CheckpointError(f"{path}: eps of the image encoder cannot be {rest['eps']!r}")
    return ImageEncoderConfig(**found, **rest)


def vae_config(path: Path, given: Any, part: Component) -> VAEConfig | VAE21Config:
    try:
        found = vae_fields(_shapes(part))
    except CheckpointError as error:
        raise CheckpointError(f"{part.path}: {error}") from error
    family = part.identity.family or ""
    config = VAE_CONFIGS[family]
    given = _section(path, "vae", given, config)
    _agree(path, given, found, part.path)
    z_dim = found["z_dim"]
    # The official files leave the statistics to the code, which knows them for the released width. A model of another
    # width in that layout brings none: its latents are used as they are.
    mean, std = LATENT_STATISTICS[family]
    if z_dim != len(mean):
        mean, std = (0.0,) * z_dim, (1.0,) * z_dim
    mean, std = given.get("latents_mean", mean), given.get("latents_std", std)
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
        if not numbers or len(values) != z_dim or not all(math.isfinite(v) for v in values):
            raise CheckpointError(f"{path}: {name} of the VAE must be {z_dim} numbers")
    if min(std) <= 0:
        raise CheckpointError(f"{path}: latents_std of the VAE must be positive")
    return config(**found, latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std)))


def _section(path: Path, name: str, given: Any, config: type) -> dict[str, Any]:
    """A part of "mlx_wan" in a native config.json, {} in other layouts; unknown keys are errors."""
    known = {f.name for f in fields(config)}
    given = {} if given is None else given
    if not isinstance(given, dict) or not given.keys() <= known:
        raise CheckpointError(f"{path}: unexpected entries under mlx_wan.{name}")
    return given


def check_fit(
    folder: Path,
    transformer: TransformerConfig,
    text_encoder: TextEncoderConfig,
    image_encoder: ImageEncoderConfig | None,
    vae: VAEConfig | VAE21Config,
) -> None:
    """The parts must be made for each other."""
    # What a picture adds: its latents, and a mask with a channel for each frame that one latent stands for.
    with_picture = 2 * vae.z_dim + vae.stride[0]
    if transformer.out_dim != vae.z_dim or transformer.in_dim not in (vae.z_dim, with_picture):
        raise CheckpointError(
            f"{folder}: the transformer takes {transformer.in_dim} and makes {transformer.out_dim} latent channels, "
            f"but the VAE has {vae.z_dim}"
        )
    if transformer.text_dim != text_encoder.dim:
        raise CheckpointError(
            f"{folder}: the transformer wants text of width {transformer.text_dim}, "
            f"but the text encoder makes {text_encoder.dim}"
        )
    width, tokens = (image_encoder.dim, 2 * image_encoder.num_tokens) if image_encoder else (0, 0)
    if transformer.image_dim != width or transformer.image_positions not in (0, tokens):
        raise CheckpointError(
            f"{folder}: the transformer wants image tokens of width {transformer.image_dim}, "
            f"but the image encoder makes {width or 'none'}"
        )


def model_spec(
    path: Path,
    extra: Mapping[str, Any],
    parts: Mapping[str, Component],
    transformer: TransformerConfig,
    vae: VAEConfig | VAE21Config,
) -> tuple[str, ModelSpec]:
    """Which of `MODELS` it is or is like, and that model or, for others, one that is sampled like it unless
    config.json says otherwise."""
    family = parts["vae"].identity.family or ""
    if transformer.in_dim != transformer.out_dim:
        task = "flf2v" if transformer.image_positions else "i2v"
    else:
        task = {"Wan2.2": "ti2v", "Wan2.1": "t2v"}[family]
    traits = (task, family, "transformer_2" in parts)
    alike = [spec for spec in MODELS.values() if spec.traits == traits]
    if not alike:
        experts = "two experts" if traits[2] else "one transformer"
        raise CheckpointError(
            f"{path.parent}: {experts} for {task} with a {family} VAE: no model that this package runs; "
            f"those are {', '.join(MODELS)}"
        )
    known = parts["transformer"].identity.models
    released = next((spec.name for spec in alike if spec.name in known), None)
    name = extra.get("model", released or "custom")
    if name in MODELS and MODELS[name] not in alike:
        raise CheckpointError(f"{path}: says {name}, but the files are those of a model like {alike[0].name}")
    kind = name if name in MODELS else alike[0].name
    spec = MODELS.get(name) or replace(MODELS[kind], name=name, hub_id=None, sizes=())
    sampling = dict(_sampling(path, extra, two_experts=traits[2]))
    if "boundary" in extra:
        spec = replace(spec, boundary=extra["boundary"])
    spec = replace(spec.with_sampling(sampling), vae_stride=vae.stride)
    size = (spec.width, spec.height)
    # A config.json that asks for another size than the zoo knows speaks of a model trained for that size.
    return kind, spec if not spec.sizes or size in spec.sizes else replace(spec, sizes=(size,))


def _sampling(path: Path, extra: Mapping[str, Any], two_experts: bool) -> dict[str, Any]:
    sampling = extra.get("sampling", {})
    if not isinstance(sampling, dict) or not sampling.keys() <= SAMPLING_TYPES.keys() | set(DISTILLED):
        raise CheckpointError(f"{path}: unexpected entries under mlx_wan.sampling")
    values: dict[str, Any] = {}
    for key, value in sampling.items():
        if key in DISTILLED:
            try:
                values[key] = tuple(value)
                listed(value)
            except (TypeError, UserError):
                raise CheckpointError(f"{path}: mlx_wan.sampling.{key} cannot be {value!r}") from None
            continue
        allowed = (int, float) if SAMPLING_TYPES[key] is float else (SAMPLING_TYPES[key],)
        pair = key == "guidance_scale" and two_experts and type(value) is list and len(value) == 2
        if not all(type(v) in allowed for v in (value if pair else [value])):
            raise CheckpointError(f"{path}: mlx_wan.sampling.{key} cannot be {value!r}")
        values[key] = tuple(value) if pair else value
    return values
