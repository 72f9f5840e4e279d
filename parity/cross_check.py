# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "numpy>=2", "einops", "easydict", "ftfy==6.3.1",
#   "regex", "tqdm", "pillow",
# ]
# ///
"""How far the second public implementation, diffusers and transformers, is from the official code's goldens.

    uv run parity/cross_check.py

A yardstick for docs/parity.md: it shares no code with the official one, nor with this project, and guards against
a mistake in the way parity/official.py runs the official code. Reads tests/golden/, changes nothing.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import small
from diffusers_names import TRANSFORMER_NAMES

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"

TEXT_NAMES = [
    (r"^token_embedding", "shared"),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.", r"encoder.block.\1.layer."),
    (r"norm1", "0.layer_norm"),
    (r"attn\.", "0.SelfAttention."),
    (r"pos_embedding\.embedding", "0.SelfAttention.relative_attention_bias"),
    (r"norm2", "1.layer_norm"),
    (r"ffn\.gate\.0", "1.DenseReluDense.wi_0"),
    (r"ffn\.fc1", "1.DenseReluDense.wi_1"),
    (r"ffn\.fc2", "1.DenseReluDense.wo"),
]
VAE_NAMES = [
    (r"^conv1", "quant_conv"),
    (r"^conv2", "post_quant_conv"),
    (r"coder\.conv1", "coder.conv_in"),
    (r"head\.0", "norm_out"),
    (r"head\.2", "conv_out"),
    (r"middle\.1\.", "mid_block.attentions.0."),
    (r"middle\.([02])", lambda m: f"mid_block.resnets.{int(m[1]) // 2}"),
    (r"downsamples\.(\d)\.downsamples\.2\.(resample|time)", r"down_blocks.\1.downsampler.\2"),
    (r"downsamples\.(\d)\.downsamples\.(\d)", r"down_blocks.\1.resnets.\2"),
    (r"upsamples\.(\d)\.upsamples\.3\.(resample|time)", r"up_blocks.\1.upsampler.\2"),
    (r"upsamples\.(\d)\.upsamples\.(\d)", r"up_blocks.\1.resnets.\2"),
    (r"residual\.0", "norm1"),
    (r"residual\.2", "conv1"),
    (r"residual\.3", "norm2"),
    (r"residual\.6", "conv2"),
    (r"shortcut", "conv_shortcut"),
]


def fill(module, part, names):
    """The module with the small checkpoint's weights, all of them and no others."""
    shapes, state = json.loads((GOLDEN / "names.json").read_text())["small"][part], {}
    for name, shape in shapes.items():
        renamed = name
        for pattern, replacement in names:
            renamed = re.sub(pattern, replacement, renamed)
        state[renamed] = torch.from_numpy(small.weight(part, name, tuple(shape)))
    if part == "text_encoder":
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    module.load_state_dict(state)
    return module.eval()


def transformer():
    c, stored = small.TRANSFORMER, np.load(GOLDEN / "transformer.npz")
    model = WanTransformer3DModel(
        patch_size=c["patch_size"], num_attention_heads=c["num_heads"], attention_head_dim=c["dim"] // c["num_heads"],
        in_channels=c["in_dim"], out_channels=c["out_dim"], text_dim=c["text_dim"], freq_dim=c["freq_dim"],
        ffn_dim=c["ffn_dim"], num_layers=c["num_layers"], cross_attn_norm=True, eps=c["eps"],
    )  # fmt: skip
    fill(model, "transformer", TRANSFORMER_NAMES)
    for case in ("scalar", "mixed"):
        want = np.moveaxis(stored[f"{case}/velocity"], -1, 1)
        latents = [small.random(f"transformer/{case}/{i}", (1, *want.shape[2:], 48))[0] for i in range(len(want))]
        context = np.zeros((len(want), c["text_len"], c["text_dim"]), np.float32)
        for i in range(len(want)):
            context[i, : 9 + 20 * i] = small.random(f"context/{case}/{i}", (9 + 20 * i, 64))
        latents = torch.from_numpy(np.moveaxis(np.stack(latents), -1, 1).copy())
        got = model(latents, torch.from_numpy(stored[f"{case}/timesteps"]), torch.from_numpy(context)).sample
        yield f"transformer, {case} timesteps", got.numpy(), want


def text_encoder():
    c, stored = small.TEXT_ENCODER, np.load(GOLDEN / "text_encoder.npz")
    config = UMT5Config(
        vocab_size=c["vocab_size"], d_model=c["dim"], d_kv=c["dim_attn"] // c["num_heads"], d_ff=c["dim_ffn"],
        num_layers=c["num_layers"], num_heads=c["num_heads"], relative_attention_num_buckets=c["num_buckets"],
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = fill(UMT5EncoderModel(config), "text_encoder", TEXT_NAMES)
    ids, mask = torch.from_numpy(stored["ids"]).long(), torch.from_numpy(stored["mask"])
    got = model(ids, mask).last_hidden_state
    yield "text embeddings", got[mask.bool()].numpy(), stored["embeddings"]


def vae():
    c, stored = small.VAE, np.load(GOLDEN / "vae.npz")
    model = AutoencoderKLWan(
        base_dim=c["dim"], decoder_base_dim=c["dec_dim"], z_dim=c["z_dim"], dim_mult=list(c["dim_mult"]),
        num_res_blocks=c["num_res_blocks"], temperal_downsample=list(c["temporal_downsample"]), is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
    )  # fmt: skip
    fill(model, "vae", VAE_NAMES)
    mean, std = (torch.from_numpy(stored[f"latents_{k}"]).view(1, -1, 1, 1, 1) for k in ("mean", "std"))
    for case, (frames, height, width) in {"clip": (13, 32, 48), "frame": (1, 64, 32)}.items():
        video = torch.from_numpy(np.moveaxis(small.video(f"vae/{case}", frames, height, width), -1, 1).copy())
        got = (model.encode(video).latent_dist.mode() - mean) / std
        want = np.moveaxis(stored[f"{case}/encoded"], -1, 1)
        yield f"VAE, encode {case}", got.numpy(), want
        shape = (want.shape[2], want.shape[3], want.shape[4], 48)
        latents = torch.from_numpy(np.moveaxis(small.random(f"vae/{case}/latents", shape)[None], -1, 1).copy())
        got = model.decode(latents * std + mean).sample
        yield f"VAE, decode {case}", got.numpy(), np.moveaxis(stored[f"{case}/decoded"], -1, 1)


def main():
    torch.set_num_threads(2)
    with torch.no_grad():
        for label, got, want in (*text_encoder(), *transformer(), *vae()):
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            print(f"| {label} | {error:.1e} |")


if __name__ == "__main__":
    main()
