"""A whole model of random weights in the native layout, small enough that a training step takes milliseconds.

Clips of 2n+1 frames, sides in multiples of 8; latents of 4 channels.
"""

from pathlib import Path

import mlx.core as mx
from checkpoint import GOLDEN

from mlx_wan.models.transformer import TransformerConfig, WanTransformer
from mlx_wan.models.umt5 import TextEncoderConfig, UMT5Encoder
from mlx_wan.models.vae22 import VAEConfig, WanVAE22
from mlx_wan.weights.save import save_native

SAMPLING = {
    "width": 16,
    "height": 16,
    "num_frames": 5,
    "fps": 12,
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
    "shift": 3.0,
    "scheduler": "unipc",
    "negative_prompt": "",
}


def write_model(folder: Path, seed: int = 0) -> Path:
    """Matrices of 32 columns or more, so that they can be quantized in groups of 32."""
    mx.random.seed(seed)
    transformer = WanTransformer(
        TransformerConfig(
            in_dim=4, out_dim=4, dim=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=32, text_len=16
        )
    )
    text_encoder = UMT5Encoder(
        TextEncoderConfig(vocab_size=656, dim=32, dim_attn=32, dim_ffn=64, num_heads=2, num_layers=1)
    )
    vae = WanVAE22(
        VAEConfig(
            dim=4,
            dec_dim=4,
            z_dim=4,
            dim_mult=(2, 2),
            num_res_blocks=1,
            temporal_downsample=(True,),
            patch_size=2,
            latents_mean=(0.0,) * 4,
            latents_std=(1.0,) * 4,
        )
    )
    for module in (transformer, text_encoder, vae):
        module.init_weights()
    # The official start is a zero output layer, behind which nothing but that layer has a gradient.
    head = transformer.head.head
    head.weight = 0.1 * mx.random.normal(head.weight.shape)
    save_native(
        folder,
        model="toy",
        transformer=transformer,
        text_encoder=text_encoder,
        vae=vae,
        tokenizer_json=GOLDEN / "tokenizer.json",
        sampling=SAMPLING,
    )
    return folder
