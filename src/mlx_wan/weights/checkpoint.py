"""What a checkpoint is: the layouts of its folder, and the parts found in one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_wan.models.transformer import TransformerConfig
from mlx_wan.models.umt5 import TextEncoderConfig
from mlx_wan.models.vae22 import VAEConfig
from mlx_wan.weights.files import INDEX_SUFFIX
from mlx_wan.weights.identify import Identity
from mlx_wan.weights.layouts import KEEP, TURN
from mlx_wan.weights.quantize import Quantization
from mlx_wan.weights.tensors import TensorInfo
from mlx_wan.zoo import ModelSpec

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"  # the small model in this package, native layout


@dataclass(frozen=True)
class Layout:
    """Where a kind of checkpoint folder keeps what.

    Attributes:
        files: component or "tokenizer" -> its file, relative to the folder; the first name that exists counts.
        usual: order of its convolutions where shapes do not tell (`layouts.KEEP` or `TURN`), None if unknown.
    """

    name: str
    files: Mapping[str, tuple[str, ...]]
    usual: str | None


def _files(transformer: str, text_encoder: tuple[str, ...], vae: tuple[str, ...], tokenizer: str) -> dict:
    return {
        "transformer": (f"{transformer}.safetensors", f"{transformer}{INDEX_SUFFIX}"),
        "text_encoder": text_encoder,
        "vae": vae,
        "tokenizer": (tokenizer,),
    }


NATIVE = Layout(
    "native",
    _files(
        "transformer",
        ("text_encoder.safetensors", f"text_encoder{INDEX_SUFFIX}"),
        ("vae.safetensors", f"vae{INDEX_SUFFIX}"),
        "tokenizer.json",
    ),
    KEEP,
)
UMT5_TOKENIZER = "google/umt5-xxl/tokenizer.json"
WAN22_MLX = Layout(
    "Wan2.2-mlx",
    _files("wan_model_mlx", ("t5_encoder_mlx.safetensors",), ("vae_mlx.safetensors",), UMT5_TOKENIZER),
    None,
)
OFFICIAL = Layout(
    "official",
    _files(
        "diffusion_pytorch_model",
        ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors"),
        ("Wan2.2_VAE.pth", "Wan2.2_VAE.safetensors"),
        UMT5_TOKENIZER,
    ),
    TURN,
)
DIFFUSERS = Layout(
    "Diffusers",
    _files(
        "transformer/diffusion_pytorch_model",
        ("text_encoder/model.safetensors", f"text_encoder/model{INDEX_SUFFIX}"),
        ("vae/diffusion_pytorch_model.safetensors", f"vae/diffusion_pytorch_model{INDEX_SUFFIX}"),
        "tokenizer/tokenizer.json",
    ),
    TURN,
)
# Files of any names, told by what is in them: ComfyUI's folders, GGUF, or parts given one by one.
SINGLE_FILES = Layout("single files", {}, TURN)
LAYOUTS = (NATIVE, WAN22_MLX, OFFICIAL, DIFFUSERS)


@dataclass(frozen=True)
class Component:
    """One part of a checkpoint: its file (or index of shards) and its tensors by official name."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    identity: Identity


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are in order.

    Attributes:
        layout: which files it is made of.
        folder: where it is.
        config: its config.json.
        spec: how the model is sampled by default.
        transformer, text_encoder, vae: its parts.
        tokenizer: its tokenizer.json, or what such a file would hold.
        *_config: dimensions of the parts.
        quantization: how its matrices are packed; None if they are not.
    """

    layout: Layout
    folder: Path
    config: Mapping[str, Any]
    spec: ModelSpec
    transformer: Component
    text_encoder: Component
    vae: Component
    tokenizer: Path | bytes
    transformer_config: TransformerConfig
    text_encoder_config: TextEncoderConfig
    vae_config: VAEConfig
    quantization: Quantization | None = None

    def tokenizer_json(self) -> bytes:
        """What its tokenizer.json holds."""
        return self.tokenizer if isinstance(self.tokenizer, bytes) else self.tokenizer.read_bytes()

    @property
    def size_steps(self) -> tuple[int, int]:
        """What a video's width and height must be multiples of: VAE stride times patch."""
        (_, stride_h, stride_w), (_, patch_h, patch_w) = self.vae_config.stride, self.transformer_config.patch_size
        return stride_w * patch_w, stride_h * patch_h
