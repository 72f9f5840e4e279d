"""Reads a YAML recipe into the dataclasses that training works with."""

from pathlib import Path
from typing import Any

import yaml

from mlx_wan.errors import UserError
from mlx_wan.models.transformer import TransformerConfig
from mlx_wan.models.umt5 import TextEncoderConfig
from mlx_wan.models.vae22 import VAEConfig
from mlx_wan.training.tiny import AutoencoderRecipe, Clips, TransformerRecipe, build
from mlx_wan.training.trainer import TrainConfig

_STAGES = {
    "autoencoder": (AutoencoderRecipe, {"model": VAEConfig, "crops": Clips}),
    "transformer": (TransformerRecipe, {"transformer": TransformerConfig, "text_encoder": TextEncoderConfig}),
}


def read_recipe(path: Path, train: dict[str, Any] | None = None) -> AutoencoderRecipe | TransformerRecipe:
    """The recipe in `path`; `train` replaces values of its train section. UserError says what is wrong and where."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict) or values.get("stage") not in _STAGES:
        raise UserError(f"{path}: stage must be one of {', '.join(_STAGES)}")
    cls, sections = _STAGES[values.pop("stage")]
    values["train"] = {**values.get("train", {}), **(train or {})}
    for name, section in {**sections, "clips": Clips, "train": TrainConfig}.items():
        if name in values:
            values[name] = build(section, values[name], f"{path}, {name}")
    return build(cls, values, str(path))
