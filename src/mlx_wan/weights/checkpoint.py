"""What a checkpoint is: the layouts of its folder, and the parts found in one."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_wan.models.clip import ImageEncoderConfig
from mlx_wan.models.transformer import TransformerConfig
from mlx_wan.models.umt5 import TextEncoderConfig
from mlx_wan.models.vae21 import VAE21Config
from mlx_wan.models.vae22 import VAEConfig
from mlx_wan.weights.diffusers import INDEX
from mlx_wan.weights.files import INDEX_SUFFIX
from mlx_wan.weights.identify import Identity
from mlx_wan.weights.layouts import KEEP, TURN
from mlx_wan.weights.quantize import Quantization
from mlx_wan.weights.tensors import TensorInfo
from mlx_wan.zoo import LATENTS_MEAN, ModelSpec

PARTS = ("transformer", "transformer_2", "text_encoder", "image_encoder", "vae")
EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"  # the small model in this package, native layout


@dataclass(frozen=True)
class Layout:
    """Where a kind of checkpoint folder keeps what.

    Attributes:
        files: part or "tokenizer" -> its file, relative to the folder; the first name that exists counts.
        usual: order of its convolutions where shapes do not tell (`layouts.KEEP` or `TURN`), None if unknown.
        model: what it holds, in messages.
        vae: the family its VAE must be of; None if it may be of any.
        configs: part -> its config.json.
    """

    name: str
    files: Mapping[str, tuple[str, ...]]
    usual: str | None
    model: str = "Wan model"
    vae: str | None = None
    configs: Mapping[str, str] = field(default_factory=lambda: {"transformer": "config.json"})


def _either(stem: str) -> tuple[str, ...]:
    """One file or the index of several."""
    return f"{stem}.safetensors", f"{stem}{INDEX_SUFFIX}"


def _pth(stem: str) -> tuple[str, ...]:
    return f"{stem}.pth", f"{stem}.safetensors"


def native_layout(extra: Mapping[str, Any]) -> Layout:
    """The native layout of a model whose config.json has `extra` under "mlx_wan"."""
    optional = {"transformer_2": "boundary", "image_encoder": "image_encoder"}
    parts = [part for part in PARTS if part not in optional or optional[part] in extra]
    return Layout("native", {part: _either(part) for part in parts} | {"tokenizer": ("tokenizer.json",)}, KEEP)


NATIVE = native_layout({})
UMT5_TOKENIZER = "google/umt5-xxl/tokenizer.json"
WAN22_MLX = Layout(
    "Wan2.2-mlx",
    {
        "transformer": _either("wan_model_mlx"),
        "text_encoder": ("t5_encoder_mlx.safetensors",),
        "vae": ("vae_mlx.safetensors",),
        "tokenizer": (UMT5_TOKENIZER,),
    },
    None,
)
_TEXT_FILES = {"text_encoder": _pth("models_t5_umt5-xxl-enc-bf16"), "tokenizer": (UMT5_TOKENIZER,)}
OFFICIAL = Layout(
    "official",
    {"transformer": _either("diffusion_pytorch_model"), "vae": _pth("Wan2.2_VAE"), **_TEXT_FILES},
    TURN,
    "Wan2.2 TI2V model",
    "Wan2.2",
)
OFFICIAL_21 = Layout(
    "official",
    {"transformer": _either("diffusion_pytorch_model"), "vae": _pth("Wan2.1_VAE"), **_TEXT_FILES},
    TURN,
    "Wan2.1 model",
    "Wan2.1",
)
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
OFFICIAL_21_I2V = replace(OFFICIAL_21, files={**OFFICIAL_21.files, "image_encoder": _pth(CLIP)})
EXPERT_FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
OFFICIAL_EXPERTS = Layout(
    "official",
    {
        **{part: _either(f"{name}/diffusion_pytorch_model") for part, name in EXPERT_FOLDERS.items()},
        "vae": _pth("Wan2.1_VAE"),
        **_TEXT_FILES,
    },
    TURN,
    "Wan2.2 A14B model",
    "Wan2.1",
    {part: f"{name}/config.json" for part, name in EXPERT_FOLDERS.items()},
)
DIFFUSERS = Layout(
    "Diffusers",
    {
        "transformer": _either("transformer/diffusion_pytorch_model"),
        "text_encoder": _either("text_encoder/model"),
        "vae": _either("vae/diffusion_pytorch_model"),
        "tokenizer": ("tokenizer/tokenizer.json",),
    },
    TURN,
    configs={},
)
DIFFUSERS_EXPERTS = replace(
    DIFFUSERS, files={**DIFFUSERS.files, "transformer_2": _either("transformer_2/diffusion_pytorch_model")}
)
DIFFUSERS_IMAGE = replace(DIFFUSERS, files={**DIFFUSERS.files, "image_encoder": _either("image_encoder/model")})
# Files of any names, told by what is in them: ComfyUI's folders, GGUF, or parts given one by one.
SINGLE_FILES = Layout("single files", {}, TURN, configs={})
LAYOUTS = (NATIVE, WAN22_MLX, OFFICIAL, OFFICIAL_21, OFFICIAL_21_I2V, OFFICIAL_EXPERTS)
LAYOUTS += (DIFFUSERS, DIFFUSERS_EXPERTS, DIFFUSERS_IMAGE)


def layout_for(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout that files of these names have, at least in part; None if they have nothing of any.

    names: relative to the folder, with forward slashes. config: its config.json.
    """

    def has(folder: str) -> bool:
        return any(name.startswith(f"{folder}/") for name in names)

    if "mlx_wan" in config:
        extra = config["mlx_wan"]
        return native_layout(extra if isinstance(extra, dict) else {})
    if INDEX in names:
        return diffusers_layout(has("transformer_2"), has("image_encoder"))
    if any(map(has, EXPERT_FOLDERS.values())):
        return OFFICIAL_EXPERTS
    for layout in (WAN22_MLX, official_layout(names, config), NATIVE):
        if any(name in names for part, files in layout.files.items() if part != "tokenizer" for name in files):
            return layout
    return None


def diffusers_layout(experts: bool, image_encoder: bool) -> Layout:
    """The Diffusers layout of a model with these parts; none has both."""
    return DIFFUSERS_EXPERTS if experts else DIFFUSERS_IMAGE if image_encoder else DIFFUSERS


def official_layout(names: Collection[str], config: Mapping[str, Any]) -> Layout:
    """The official layout of a model with one transformer: Wan2.2's, whose latents are wider, or Wan2.1's."""
    if config:
        kind = config.get("model_type")
        if kind == "ti2v" or config.get("out_dim") == len(LATENTS_MEAN):
            return OFFICIAL
        return OFFICIAL_21_I2V if kind in ("i2v", "flf2v") else OFFICIAL_21
    ours, older = (any(name in names for name in layout.files["vae"]) for layout in (OFFICIAL, OFFICIAL_21))
    return OFFICIAL_21 if older and not ours else OFFICIAL


@dataclass(frozen=True)
class Component:
    """One part of a checkpoint: its file (or index of shards) and its tensors by official name."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    identity: Identity


def is_packed(component: Component) -> bool:
    """Whether some of its matrices have scales beside them."""
    return any(name.endswith(".scales") for name in component.tensors)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are in order.

    Attributes:
        layout: which files it is made of.
        folder: where it is.
        config: its config.json.
        kind: which of `zoo.MODELS` it is, or is a model of unreleased size of the kind of.
        spec: how the model is sampled by default.
        transformer, text_encoder, vae: its parts.
        transformer_2: the low-noise expert where there are two; `transformer` is the high-noise one then.
        image_encoder: of a model that takes image embeddings.
        tokenizer: its tokenizer.json, or what such a file would hold.
        *_config: dimensions of the parts; both experts have the same.
        quantization: how its matrices are packed; None if they are not.
    """

    layout: Layout
    folder: Path
    config: Mapping[str, Any]
    kind: str
    spec: ModelSpec
    transformer: Component
    text_encoder: Component
    vae: Component
    tokenizer: Path | bytes
    transformer_config: TransformerConfig
    text_encoder_config: TextEncoderConfig
    vae_config: VAEConfig | VAE21Config
    transformer_2: Component | None = None
    image_encoder: Component | None = None
    image_encoder_config: ImageEncoderConfig | None = None
    quantization: Quantization | None = None

    def tokenizer_json(self) -> bytes:
        """What its tokenizer.json holds."""
        return self.tokenizer if isinstance(self.tokenizer, bytes) else self.tokenizer.read_bytes()

    @property
    def parts(self) -> dict[str, Component]:
        """The parts that are there, by the names of their fields."""
        found = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in found.items() if part is not None}

    def packing(self, part: str) -> Quantization | None:
        """How a part's matrices are packed. Of single files those alone are that have scales: mlx-video packs the
        transformers and leaves the text encoder."""
        loose = self.layout is SINGLE_FILES and not is_packed(getattr(self, part))
        return None if loose else self.quantization

    @property
    def size_steps(self) -> tuple[int, int]:
        """What a video's width and height must be multiples of: VAE stride times patch."""
        (_, stride_h, stride_w), (_, patch_h, patch_w) = self.vae_config.stride, self.transformer_config.patch_size
        return stride_w * patch_w, stride_h * patch_h
