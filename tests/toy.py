"""Recipes so small that a run of them takes a second: 5 frames of 16x16 pixels, 3x4x4 latents of 4 channels."""

from copy import deepcopy
from pathlib import Path

import yaml

TRAIN = {
    "steps": 4,
    "batch_size": 2,
    "learning_rate": 2e-3,
    "warmup_steps": 1,
    "optimizer": "muon",
    "ema_decay": 0.5,
    "compile": False,
    "report_every": 1,
    "eval_every": 4,
    "save_every": 2,
}
AUTOENCODER = {
    "stage": "autoencoder",
    "model": {
        "dim": 4,
        "dec_dim": 4,
        "z_dim": 4,
        "dim_mult": [2, 2],
        "num_res_blocks": 1,
        "temporal_downsample": [True],
        "patch_size": 2,
    },
    "clips": {"num_frames": 5, "width": 16, "height": 16},
    "validation_clips": 2,
    "train": TRAIN,
}
TRANSFORMER = {
    "stage": "transformer",
    "transformer": {
        "in_dim": 4,
        "out_dim": 4,
        "dim": 16,
        "ffn_dim": 32,
        "num_heads": 2,
        "num_layers": 2,
        "freq_dim": 16,
        "text_dim": 8,
        "text_len": 48,
    },
    "text_encoder": {"vocab_size": 480, "dim": 8, "dim_attn": 8, "dim_ffn": 16, "num_heads": 2, "num_layers": 1},
    "clips": {"num_frames": 5, "width": 16, "height": 16},
    "pool": 6,
    "captions": 2,
    "validation_clips": 4,
    "sampling": {
        "width": 16,
        "height": 16,
        "num_frames": 5,
        "fps": 12,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "shift": 3.0,
        "scheduler": "unipc",
        "negative_prompt": "",
    },
    "train": TRAIN,
}


def changed(recipe: dict, **changes) -> dict:
    """A copy of the recipe with values replaced; "train__steps" reaches into a section, ... removes a key."""
    recipe = deepcopy(recipe)
    for name, value in changes.items():
        *sections, key = name.split("__")
        part = recipe
        for section in sections:
            part = part[section]
        if value is ...:
            del part[key]
        else:
            part[key] = value
    return recipe


def write(path: Path, recipe: dict) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path
