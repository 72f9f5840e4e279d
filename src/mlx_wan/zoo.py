"""The released Wan models: what each is made of, how it is sampled by default, and how to tell it by its shapes.

Numbers come from `wan/configs` and `wan/modules/vae2_2.py` of the official repository (Wan-Video/Wan2.2) and, for
Wan2.1, from Wan-Video/Wan2.1. Nothing here reads a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# Chinese, as the official code has it: over-saturated, over-exposed, static, blurred details, subtitles, ...
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
    "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，"
    "畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，"
    "倒着走"
)

# Mean and standard deviation of each of the Wan2.2 VAE's 48 latent channels.
# fmt: off
LATENTS_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENTS_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


@dataclass(frozen=True)
class ModelSpec:
    """A model this package runs.

    Attributes:
        name: what `--task` and a native config.json call it.
        task: "ti2v": text, or text and a first frame, to video.
        hub_id: its repository on the Hugging Face Hub; None when it ships with the package.
        vae_stride: frames, rows and columns of video for one latent.
        sizes: (width, height) pairs it was trained for; other sizes work but may look worse.
        width, height, num_frames, fps: the clip made when nothing is asked for.
        num_inference_steps, guidance_scale, shift, scheduler, negative_prompt: how it is sampled by default.
    """

    name: str
    task: str
    hub_id: str | None
    vae_stride: tuple[int, int, int]
    sizes: tuple[tuple[int, int], ...]
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    shift: float
    scheduler: str = "unipc"
    negative_prompt: str = NEGATIVE_PROMPT

    def sampling(self) -> dict[str, Any]:
        """The defaults that a native config.json records."""
        return {name: getattr(self, name) for name in SAMPLING_TYPES}

    def with_sampling(self, values: Mapping[str, Any]) -> "ModelSpec":
        """This model with other defaults, whose keys are those of `sampling()`."""
        return replace(self, **values)


# Keys of a native config.json's "sampling", and what their values are.
SAMPLING_TYPES: dict[str, type] = {
    "width": int,
    "height": int,
    "num_frames": int,
    "fps": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "shift": float,
    "scheduler": str,
    "negative_prompt": str,
}

MODELS: dict[str, ModelSpec] = {
    "ti2v-5B": ModelSpec(
        name="ti2v-5B",
        task="ti2v",
        hub_id="Wan-AI/Wan2.2-TI2V-5B",
        vae_stride=(4, 16, 16),
        sizes=((1280, 704), (704, 1280)),
        width=1280,
        height=704,
        num_frames=121,
        fps=24,
        num_inference_steps=50,
        guidance_scale=5.0,
        shift=5.0,
    ),
    # The embedded model; its own config.json has the last word on how it is sampled.
    "tiny": ModelSpec(
        name="tiny",
        task="ti2v",
        hub_id=None,
        vae_stride=(4, 16, 16),
        sizes=((128, 128),),
        width=128,
        height=128,
        num_frames=25,
        fps=12,
        num_inference_steps=20,
        guidance_scale=3.0,
        shift=3.0,
        negative_prompt="",
    ),
}


HEAD_DIM = 128  # of every released transformer, which its tensors do not tell


@dataclass(frozen=True)
class Release:
    """A released set of weights, told from others by shapes alone.

    Attributes:
        name: what people call it.
        component: "transformer", "text_encoder" or "vae".
        dims: fields that `weights.shapes` reads off its tensors and their values.
        runs: whether this package can use it.
    """

    name: str
    component: str
    dims: Mapping[str, Any] = field(default_factory=dict)
    runs: bool = False


def _transformer(name: str, sizes: tuple[int, int, int], in_dim: int, out_dim: int, runs: bool = False) -> Release:
    dim, ffn_dim, num_layers = sizes
    dims = {"dim": dim, "ffn_dim": ffn_dim, "num_layers": num_layers, "in_dim": in_dim, "out_dim": out_dim}
    return Release(name, "transformer", dims, runs)


_5B, _14B, _1_3B = (3072, 14336, 30), (5120, 13824, 40), (1536, 8960, 30)

RELEASES: tuple[Release, ...] = (
    _transformer("Wan2.2 TI2V-5B", _5B, 48, 48, runs=True),
    # Same names and shapes: only what a folder holds besides tells these two apart.
    _transformer("Wan2.2 T2V-A14B (one expert) or Wan2.1 T2V-14B", _14B, 16, 16),
    _transformer("Wan2.2 I2V-A14B (one expert)", _14B, 36, 16),
    _transformer("Wan2.1 T2V-1.3B", _1_3B, 16, 16),
    Release(
        "UMT5-XXL encoder",
        "text_encoder",
        {"vocab_size": 256384, "dim": 4096, "dim_attn": 4096, "dim_ffn": 10240, "num_heads": 64, "num_layers": 24},
        runs=True,
    ),
    Release("Wan2.2 VAE", "vae", {"dim": 160, "dec_dim": 256, "z_dim": 48, "dim_mult": (1, 2, 4, 4)}, runs=True),
)
