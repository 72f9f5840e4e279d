"""A small checkpoint of the Wan2.2 family, made of numbers that anybody can make again.

Shared by the tests and by the scripts in parity/, so that neither weights nor inputs need to be stored:
both come from NumPy's RandomState, whose stream is frozen, seeded by their names. Needs NumPy alone.
"""

import math
import zlib

import numpy as np

TRANSFORMER = {
    "model_type": "ti2v",
    "patch_size": (1, 2, 2),
    "text_len": 512,
    "in_dim": 48,
    "dim": 96,
    "ffn_dim": 160,
    "freq_dim": 256,
    "text_dim": 64,
    "out_dim": 48,
    "num_heads": 3,  # 32 a head: the rotary embedding splits them 12 + 10 + 10
    "num_layers": 2,
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
TEXT_ENCODER = {
    "vocab_size": 656,  # some more than the tokenizer has pieces, as UMT5
    "dim": 64,
    "dim_attn": 96,
    "dim_ffn": 112,
    "num_heads": 4,
    "num_layers": 3,
    "num_buckets": 32,
}
VAE = {
    "dim": 8,
    "dec_dim": 12,
    "z_dim": 48,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "temporal_downsample": (False, True, True),
}
SMALL = {"transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER, "vae": VAE}
# The Wan2.1 kind, which A14B models use too.
VAE21 = {
    "dim": 8,
    "z_dim": 16,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "temporal_downsample": (False, True, True),
}
T2V = TRANSFORMER | {"model_type": "t2v", "in_dim": 16, "out_dim": 16}
I2V = T2V | {"model_type": "i2v", "in_dim": 36}  # latents, 4 channels of mask, latents of the picture

# CLIP's visual half; the official transformer insists on 1280 wide tokens, FLF2V's on 257 of each picture.
IMAGE_ENCODER = {
    "image_size": 224,
    "patch_size": 14,
    "dim": 1280,
    "ffn_dim": 320,
    "out_dim": 64,
    "num_heads": 16,
    "num_layers": 2,
    "eps": 1e-5,
}
I2V21 = I2V | {"image_dim": 1280}
FLF2V21 = I2V21 | {"model_type": "flf2v", "image_positions": 514}

# TI2V-5B: its config.json, wan/configs/wan_ti2v_5B.py, and the defaults in t5.py and vae2_2.py.
RELEASED = {
    "transformer": TRANSFORMER | {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "text_dim": 4096},
    "text_encoder": TEXT_ENCODER
    | {"vocab_size": 256384, "dim": 4096, "dim_attn": 4096, "dim_ffn": 10240, "num_heads": 64, "num_layers": 24},
    "vae": VAE | {"dim": 160, "dec_dim": 256},
}
_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "text_dim": 4096}

# Every model whose parameters' names are in golden/names.json: component -> dimensions.
MODELS = {
    "small": SMALL,
    "small-t2v-A14B": {"transformer": T2V, "transformer_2": T2V, "text_encoder": TEXT_ENCODER, "vae": VAE21},
    "small-i2v-A14B": {"transformer": I2V, "transformer_2": I2V, "text_encoder": TEXT_ENCODER, "vae": VAE21},
    "ti2v-5B": RELEASED,
    # One expert each; wan/configs/wan_*_A14B.py. The text encoder is TI2V-5B's.
    "t2v-A14B": {"transformer": T2V | _14B, "vae": VAE21 | {"dim": 96}},
    "i2v-A14B": {"transformer": I2V | _14B},
}
# Those that the Wan2.1 repository builds.
MODELS21 = {
    "small-t2v-14B": {"transformer": T2V, "text_encoder": TEXT_ENCODER, "vae": VAE21},
    "small-i2v-14B": {
        "transformer": I2V21,
        "text_encoder": TEXT_ENCODER,
        "image_encoder": IMAGE_ENCODER,
        "vae": VAE21,
    },
    "small-flf2v-14B": {
        "transformer": FLF2V21,
        "text_encoder": TEXT_ENCODER,
        "image_encoder": IMAGE_ENCODER,
        "vae": VAE21,
    },
    "i2v-14B": {
        "transformer": I2V21 | _14B,
        "image_encoder": IMAGE_ENCODER | {"ffn_dim": 5120, "out_dim": 1024, "num_layers": 32},
    },
}
MODELS |= MODELS21


def at_scale() -> dict[str, dict]:
    """The released widths with few layers: what a machine with 16 GB compares in a minute or two."""
    return {
        "transformer": RELEASED["transformer"] | {"num_layers": 2},
        "text_encoder": RELEASED["text_encoder"] | {"num_layers": 2, "vocab_size": 656},
        "vae": RELEASED["vae"],
    }


# Text that cleaning or tokenizing could get wrong: entities escaped twice, mojibake, wide blanks, other scripts.
PROMPTS = (
    "a red circle moves right on a black background",
    "  A   blue\tsquare\n\nbounces \u3000 up &amp;amp; down  ",
    "&lt;b&gt;Tom &quot;the cat&quot;&lt;/b&gt; &amp;lt;3 caf\u00c3\u00a9 &#128512; \u201cquoted\u201d\u2026",
    "\u4e00\u53ea\u732b\u5728\u8349\u5730\u4e0a\u8dd1\uff0c\u955c\u5934\u6162\u6162\u5411\u53f3\u79fb\u52a8\uff01",
    "\U0001f431 \U0001f469\u200d\U0001f680 fish & chips \ufb01ne \uff21\uff22\uff23 \u00bd x\u00b2",
    "",
    "red " * 700,
    "<i> keeps ftfy from decoding &amp;lt; and &#38;quot;",
)

# Whole runs, in the words of the pipeline. Text to video takes the default negative prompt, image to video this one.
RUN = {
    "width": 96,
    "height": 64,
    "num_frames": 9,
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
    "shift": 5.0,
}
# Guidance is (low noise, high noise); the schedules cross the boundary after four and after three steps.
EXPERT_RUNS = {
    "t2v-A14B": {
        "width": 64,
        "height": 48,
        "num_frames": 9,
        "num_inference_steps": 6,
        "guidance_scale": (3.0, 4.0),
        "shift": 12.0,
    },
    "i2v-A14B": {
        "width": 64,
        "height": 48,
        "num_frames": 9,
        "num_inference_steps": 6,
        "guidance_scale": (2.5, 3.5),
        "shift": 5.0,
    },
}
# Wan2.1: one transformer. FLF2V's official code takes 81 frames and no other number.
RUNS21 = {
    "t2v-14B": {
        "width": 64,
        "height": 48,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "shift": 5.0,
    },
    "i2v-14B": {
        "width": 64,
        "height": 48,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "shift": 3.0,
    },
    "flf2v-14B": {
        "width": 32,
        "height": 32,
        "num_frames": 81,
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "shift": 16.0,
    },
}
# Timesteps that are given, by sampler; FastWan's first.
FEW_STEPS = {
    "dmd": ((1000, 757, 522), (1000, 850, 650, 500, 250)),
    "euler": ((1000, 750, 500, 250),),
    "dpm++": ((1000, 750, 500, 250),),
}
RUN_PROMPT = "Two small cats &amp; a red ring,  slowly turning"
I2V_NEGATIVE_PROMPT = "blurry"


def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 numbers that depend on `name` and `shape` alone."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def few_step_input(name: str, channels: int = 48) -> np.ndarray:
    """Of the runs of a few steps: the noise "latents", the "context" of 11 tokens, or a first "frame"."""
    shapes = {"latents": (1, 3, 4, 6, channels), "context": (11, 64), "frame": (1, 1, 4, 6, channels)}
    return random(f"few_steps/{name}", shapes[name])


def few_step_noise(step: int, channels: int) -> np.ndarray:
    """What the prediction of a step gets in such a run."""
    return random(f"few_steps/noise/{step}", (1, 3, 4, 6, channels))


def weight(component: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor `name` of a component ("transformer", "text_encoder" or "vae"), in the official layout.

    Scaled so that signals keep their size through the network; nothing is 0 or 1, where a mistake could hide.
    """
    values = random(f"{component}/{name}", shape)
    if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
        return 1 + 0.1 * values
    if name.endswith("bias"):
        return 0.05 * values
    if name.endswith("modulation"):
        return values / math.sqrt(shape[-1])
    if "embedding" in name and component == "text_encoder":
        return values
    values = values / math.sqrt(math.prod(shape[1:]))
    if component == "text_encoder" and name.endswith("attn.q.weight"):
        return values / shape[0] ** 0.25  # T5 does not scale its scores
    if name == "decoder.head.2.weight":
        return 0.4 * values  # pixels stay within [-1, 1], where nothing is cut off
    return values


def spread(array: np.ndarray, count: int = 32) -> np.ndarray:
    """At most `count` of its numbers, evenly spread over its flat order."""
    flat = array.reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(count, flat.size)).astype(int)]


def video(name: str, frames: int, height: int, width: int) -> np.ndarray:
    """(1, frames, height, width, 3) in [-1, 1]: drifting stripes with some noise."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(0.5 * t + (0.21 + 0.05 * c) * x + (0.13 * c - 0.1) * y + c) for c in range(3)]
    clip = 0.7 * np.stack(waves, axis=-1) + 0.1 * random(name, (frames, height, width, 3))
    return np.clip(clip, -1, 1).astype(np.float32)[None]


def picture(height: int = 70, width: int = 100, name: str = "picture") -> np.ndarray:
    """(height, width, 3) uint8: a frame of `video`, of a size that no stride divides."""
    return np.round((video(name, 1, height, width)[0, 0] + 1) * 127.5).astype(np.uint8)
