# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "numpy>=2", "safetensors", "sentencepiece",
#   "einops", "easydict", "ftfy==6.3.1", "regex", "tqdm", "pillow",
# ]
# ///
"""What diffusers and transformers write to a Diffusers repository of the small checkpoint: tests/golden/diffusers.json.

    uv run parity/make_layouts.py

For each folder its config.json as written, and every tensor of its files with the official name whose numbers it
holds (weights of tests/small.py, so the numbers themselves need not be stored). The renaming is cross_check.py's,
which cross_check.py proves by running the models.
"""

import json
import tempfile
from pathlib import Path

import cross_check
import numpy as np
import small
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.numpy import load_file
from transformers import UMT5Config, UMT5EncoderModel

GOLDEN = cross_check.GOLDEN
MODELS = {}


def models():
    """The three networks with the small weights, in float32."""
    t, e, v, vae = small.TRANSFORMER, small.TEXT_ENCODER, small.VAE, np.load(GOLDEN / "vae.npz")
    transformer = WanTransformer3DModel(
        patch_size=t["patch_size"], num_attention_heads=t["num_heads"], attention_head_dim=t["dim"] // t["num_heads"],
        in_channels=t["in_dim"], out_channels=t["out_dim"], text_dim=t["text_dim"], freq_dim=t["freq_dim"],
        ffn_dim=t["ffn_dim"], num_layers=t["num_layers"], cross_attn_norm=True, eps=t["eps"],
    )  # fmt: skip
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=e["vocab_size"], d_model=e["dim"], d_kv=e["dim_attn"] // e["num_heads"], d_ff=e["dim_ffn"],
            num_layers=e["num_layers"], num_heads=e["num_heads"], relative_attention_num_buckets=e["num_buckets"],
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    autoencoder = AutoencoderKLWan(
        base_dim=v["dim"], decoder_base_dim=v["dec_dim"], z_dim=v["z_dim"], dim_mult=list(v["dim_mult"]),
        num_res_blocks=v["num_res_blocks"], temperal_downsample=list(v["temporal_downsample"]), is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
        latents_mean=vae["latents_mean"].tolist(), latents_std=vae["latents_std"].tolist(),
    )  # fmt: skip
    return {
        "transformer": (transformer, cross_check.TRANSFORMER_NAMES),
        "text_encoder": (text_encoder, cross_check.TEXT_NAMES),
        "vae": (autoencoder, cross_check.VAE_NAMES),
    }


def experts():
    """The same of what a T2V-A14B repository has otherwise: its index, a transformer's config, and the Wan2.1 VAE.

    The renaming is diffusers' own; the VAE is also run, against the official numbers.
    """
    t, v, vae = small.T2V, small.VAE21, np.load(GOLDEN / "vae21.npz")
    autoencoder = AutoencoderKLWan(
        base_dim=v["dim"], z_dim=v["z_dim"], dim_mult=list(v["dim_mult"]), num_res_blocks=v["num_res_blocks"],
        temperal_downsample=list(v["temporal_downsample"]),
        latents_mean=vae["latents_mean"].tolist(), latents_std=vae["latents_std"].tolist(),
    )  # fmt: skip
    shapes = json.loads((GOLDEN / "names.json").read_text())["small-t2v-A14B"]["vae"]
    weights = {n: torch.from_numpy(small.weight("vae", n, tuple(shape))) for n, shape in shapes.items()}
    renamed = convert_wan_vae_to_diffusers(dict(weights))
    autoencoder.load_state_dict(renamed, strict=True)
    frames = torch.from_numpy(small.video("vae/clip", 13, 32, 48)).permute(0, 4, 1, 2, 3)
    mean = autoencoder.eval().encode(frames).latent_dist.mean.permute(0, 2, 3, 4, 1).numpy()
    off = (mean - vae["latents_mean"]) / vae["latents_std"] - vae["clip/encoded"]
    assert np.abs(off).max() < 1e-4, np.abs(off).max()
    transformers = [
        WanTransformer3DModel(
            patch_size=t["patch_size"], num_attention_heads=t["num_heads"], num_layers=t["num_layers"],
            attention_head_dim=t["dim"] // t["num_heads"], in_channels=t["in_dim"], out_channels=t["out_dim"],
            text_dim=t["text_dim"], freq_dim=t["freq_dim"], ffn_dim=t["ffn_dim"],
        )
        for _ in range(2)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipe = WanPipeline(
            tokenizer=None, text_encoder=None, vae=autoencoder, transformer=transformers[0],
            transformer_2=transformers[1], boundary_ratio=0.875,
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0),
        )  # fmt: skip
        pipe.save_pretrained(folder)
        names = {own: next(n for n, w in weights.items() if w is a) for own, a in renamed.items()}
        return {
            "model_index": json.loads((folder / "model_index.json").read_text()),
            "transformer": {"config": json.loads((folder / "transformer_2" / "config.json").read_text())},
            "vae": {"config": json.loads((folder / "vae" / "config.json").read_text()), "tensors": names},
        }


def main():
    stored = {"experts": experts()}
    official = json.loads((GOLDEN / "names.json").read_text())["small"]
    built = {}
    for part, (module, names) in models().items():
        built[part] = cross_check.fill(module, part, names)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipe = WanPipeline(
            tokenizer=None, scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                                              flow_shift=5.0),
            expand_timesteps=True, **built,
        )  # fmt: skip
        pipe.save_pretrained(folder)
        stored["model_index"] = json.loads((folder / "model_index.json").read_text())
        for part in built:
            (file,) = (folder / part).glob("*.safetensors")
            tensors = load_file(file)
            weights = {n: small.weight(part, n, tuple(s)) for n, s in official[part].items()}
            found = {
                own: next(n for n, w in weights.items() if w.shape == a.shape and np.array_equal(w, a))
                for own, a in tensors.items()
            }
            assert set(found.values()) == set(weights), part
            config = json.loads((folder / part / "config.json").read_text())
            stored[part] = {"file": file.name, "config": config, "tensors": found}
    path = GOLDEN / "diffusers.json"
    path.write_text(json.dumps(stored, indent=1) + "\n")
    print(path, path.stat().st_size)


if __name__ == "__main__":
    with torch.no_grad():
        main()
