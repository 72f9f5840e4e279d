"""The released Wan models: what each is made of, how it is sampled by default, and how to tell it by its shapes.

Numbers come from `wan/configs`, `wan/modules/vae2_1.py` and `vae2_2.py` of the official repository (Wan-Video/Wan2.2)
and, for Wan2.1, from `wan/configs` and `generate.py` of Wan-Video/Wan2.1. Nothing here reads a file.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_wan.errors import UserError

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
# And of the Wan2.1 VAE's 16.
LATENTS_MEAN_21 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632,
    -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENTS_STD_21 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579,
    1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on
# VAE family -> mean and standard deviation of its released latents.
LATENT_STATISTICS = {"Wan2.2": (LATENTS_MEAN, LATENTS_STD), "Wan2.1": (LATENTS_MEAN_21, LATENTS_STD_21)}


@dataclass(frozen=True)
class ModelSpec:
    """A model this package runs.

    Attributes:
        name: what `--task` and a native config.json call it.
        task: "t2v": text to video; "i2v": text and a first frame to video; "ti2v": either; "flf2v": text, a first and a
            last frame.
        hub_id: its repository on the Hugging Face Hub; None when it ships with the package.
        vae_stride: frames, rows and columns of video for one latent.
        sizes: (width, height) pairs it was trained for; other sizes work but may look worse.
        width, height, num_frames, fps: the clip made when nothing is asked for.
        num_inference_steps, guidance_scale, shift, scheduler, negative_prompt: how it is sampled by default. With two
            experts guidance may be a pair, (low noise, high noise).
        vae: the family of its autoencoder, "Wan2.1" or "Wan2.2".
        shift_480p: the default shift up to the area of 832x480; None for the same.
        takes_last: whether a picture may be given as the last frame too.
        boundary: share of the 1000 timesteps from which on the high-noise expert works; None for one transformer.
        timesteps: those it was distilled for and is sampled at, in place of steps and shift; () for any.
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
    guidance_scale: float | tuple[float, float]
    shift: float
    scheduler: str = "unipc"
    negative_prompt: str = NEGATIVE_PROMPT
    vae: str = "Wan2.2"
    shift_480p: float | None = None
    takes_last: bool = False
    boundary: float | None = None
    timesteps: tuple[float, ...] = ()

    @property
    def traits(self) -> tuple[str, str, bool]:
        """What files can tell of it: task, family of the VAE, whether there are two experts."""
        return self.task, self.vae, self.boundary is not None

    def check_pictures(self, first: bool, last: bool) -> None:
        """UserError if the model cannot do without a picture for the first or last frame, or not with one."""
        if self.task in ("i2v", "flf2v") and not first:
            raise UserError(f"{self.name} makes a video of a picture: give an image")
        if self.task == "t2v" and (first or last):
            raise UserError(f"{self.name} takes no picture: leave the image out, or use an I2V or TI2V model")
        if self.task == "flf2v" and not last:
            raise UserError(f"{self.name} makes a video between two pictures: give the last frame too")
        if last and not self.takes_last:
            raise UserError(f"{self.name} takes no last frame: leave it out, or use I2V-A14B or FLF2V-14B")

    def shift_for(self, width: int, height: int) -> float:
        """The default shift of the noise schedule for a video of this size."""
        small = width * height <= 832 * 480
        return self.shift_480p if small and self.shift_480p is not None else self.shift

    def check_guidance(self, scale: float | tuple[float, float]) -> tuple[float, float]:
        """Guidance as a pair, (low noise, high noise). UserError for what is no number or, without experts, a pair."""
        given = isinstance(scale, list | tuple)
        if given and (self.boundary is None or len(scale) != 2):
            raise UserError(f"guidance_scale is {scale!r}; a pair (low noise, high noise) is for models of two experts")
        low, high = scale if given else (scale, scale)
        if not all(isinstance(number, numbers.Real) and math.isfinite(number) for number in (low, high)):
            raise UserError(f"guidance_scale is {scale!r}; it must be a number")
        return float(low), float(high)

    def check_timesteps(
        self, timesteps: Sequence[float] | None, num_inference_steps: int | None, shift: float | None
    ) -> tuple[float, ...] | None:
        """The timesteps to take: those given or, if nothing else is, the model's own; None for steps and shift.

        UserError for a list beside a shift or another number of steps.
        """
        if timesteps is None:
            return self.timesteps if self.timesteps and num_inference_steps is None and shift is None else None
        if num_inference_steps not in (None, len(timesteps)):
            raise UserError(f"{len(timesteps)} timesteps and {num_inference_steps} steps: give one or the other")
        if shift is not None:
            raise UserError("a list of timesteps has no shift: give one or the other")
        return tuple(timesteps)

    def sampling(self) -> dict[str, Any]:
        """The defaults that a native config.json records."""
        listed = {"timesteps": self.timesteps} if self.timesteps else {}
        return {name: getattr(self, name) for name in SAMPLING_TYPES} | listed

    def with_sampling(self, values: Mapping[str, Any]) -> "ModelSpec":
        """This model with other defaults, whose keys are those of `sampling()`."""
        return replace(self, **values)


# Keys of a native config.json's "sampling", and what their values are (guidance may also be a pair of them).
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
# What models distilled to a few steps have besides: `ModelSpec.timesteps`.
DISTILLED = ("timesteps",)
# How FastVideo samples its FastWan models.
FASTWAN: dict[str, Any] = {
    "scheduler": "dmd",
    "timesteps": (1000, 757, 522),
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
}

_SIZES_14B = ((1280, 720), (720, 1280), (832, 480), (480, 832))


def _vae21_model(name: str, hub_id: str, **values: Any) -> ModelSpec:
    """What the models with Wan2.1's autoencoder have in common."""
    common = {
        "vae": "Wan2.1",
        "vae_stride": (4, 8, 8),
        "sizes": _SIZES_14B,
        "width": 1280,
        "height": 720,
        "num_frames": 81,
        "fps": 16,
    }
    return ModelSpec(name=name, task=name.split("-")[0], hub_id=f"Wan-AI/{hub_id}", **common | values)


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
    "t2v-A14B": _vae21_model(
        "t2v-A14B",
        "Wan2.2-T2V-A14B",
        num_inference_steps=40,
        guidance_scale=(3.0, 4.0),
        shift=12.0,
        boundary=0.875,
    ),
    "i2v-A14B": _vae21_model(
        "i2v-A14B",
        "Wan2.2-I2V-A14B",
        num_inference_steps=40,
        guidance_scale=(3.5, 3.5),
        shift=5.0,
        boundary=0.9,
        takes_last=True,
    ),
    "t2v-1.3B": _vae21_model(
        "t2v-1.3B",
        "Wan2.1-T2V-1.3B",
        sizes=((832, 480), (480, 832)),
        width=832,
        height=480,
        num_inference_steps=50,
        guidance_scale=5.0,
        shift=5.0,
    ),
    "t2v-14B": _vae21_model("t2v-14B", "Wan2.1-T2V-14B", num_inference_steps=50, guidance_scale=5.0, shift=5.0),
    # The 480P and the 720P model have the same shapes and are sampled alike but for the size.
    "i2v-14B": _vae21_model(
        "i2v-14B",
        "Wan2.1-I2V-14B-720P",
        num_inference_steps=40,
        guidance_scale=5.0,
        shift=5.0,
        shift_480p=3.0,
        negative_prompt=f"镜头晃动，{NEGATIVE_PROMPT}",  # a shaking camera
    ),
    "flf2v-14B": _vae21_model(
        "flf2v-14B",
        "Wan2.1-FLF2V-14B-720P",
        num_inference_steps=50,
        guidance_scale=5.0,
        shift=16.0,
        takes_last=True,
        negative_prompt=f"镜头切换，镜头晃动，{NEGATIVE_PROMPT}",  # cuts
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
        component: "transformer", "text_encoder", "image_encoder" or "vae".
        dims: fields that `weights.shapes` reads off its tensors and their values.
        models: for transformers, the `MODELS` that it may belong to; only the folder tells which.
    """

    name: str
    component: str
    dims: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()


def _transformer(
    name: str, sizes: tuple[int, int, int], in_dim: int, out_dim: int, *models: str, **image: int
) -> Release:
    dim, ffn_dim, num_layers = sizes
    dims = {"dim": dim, "ffn_dim": ffn_dim, "num_layers": num_layers, "in_dim": in_dim, "out_dim": out_dim}
    return Release(name, "transformer", dims | image, models)


_5B, _14B, _1_3B = (3072, 14336, 30), (5120, 13824, 40), (1536, 8960, 30)

RELEASES: tuple[Release, ...] = (
    _transformer("Wan2.2 TI2V-5B", _5B, 48, 48, "ti2v-5B"),
    # Same names and shapes: only what a folder holds besides tells these two apart.
    _transformer("Wan2.2 T2V-A14B (one expert) or Wan2.1 T2V-14B", _14B, 16, 16, "t2v-A14B", "t2v-14B"),
    _transformer("Wan2.2 I2V-A14B (one expert)", _14B, 36, 16, "i2v-A14B", image_dim=0),
    _transformer("Wan2.1 I2V-14B", _14B, 36, 16, "i2v-14B", image_dim=1280, image_positions=0),
    _transformer("Wan2.1 FLF2V-14B", _14B, 36, 16, "flf2v-14B", image_dim=1280, image_positions=514),
    _transformer("Wan2.1 T2V-1.3B", _1_3B, 16, 16, "t2v-1.3B"),
    Release(
        "UMT5-XXL encoder",
        "text_encoder",
        {"vocab_size": 256384, "dim": 4096, "dim_attn": 4096, "dim_ffn": 10240, "num_heads": 64, "num_layers": 24},
    ),
    Release(
        "CLIP ViT-H/14 image encoder",
        "image_encoder",
        {"image_size": 224, "patch_size": 14, "dim": 1280, "ffn_dim": 5120, "num_layers": 32},
    ),
    Release("Wan2.2 VAE", "vae", {"dim": 160, "dec_dim": 256, "z_dim": 48, "dim_mult": (1, 2, 4, 4)}),
    Release("Wan2.1 VAE", "vae", {"dim": 96, "z_dim": 16, "dim_mult": (1, 2, 4, 4)}),
)
