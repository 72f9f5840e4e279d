"""MLX's peak memory of one forward and backward pass, against the estimate of `mlx-wan train --dry-run`.

    uv run python benchmarks/training_memory.py

A transformer 256 wide with 6 blocks and LoRAs of rank 8, one clip at a time, float32.
"""

from types import SimpleNamespace

import mlx_wan  # noqa: F401  before mlx.core: it chooses the BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn

from mlx_wan.lora.layers import add_lora
from mlx_wan.models.transformer import TransformerConfig, WanTransformer
from mlx_wan.training.buckets import Bucket
from mlx_wan.training.objective import flow_loss
from mlx_wan.training.plan import activations

CONFIG = TransformerConfig(
    in_dim=16, out_dim=16, dim=256, ffn_dim=1024, num_heads=4, num_layers=6, freq_dim=64, text_dim=64, text_len=64
)
SHAPES = SimpleNamespace(transformer_config=CONFIG, size_steps=(32, 32), vae_config=SimpleNamespace(stride=(4, 16, 16)))


def measure(frames: int, side: int, checkpointing: bool) -> None:
    mx.random.seed(0)
    model = WanTransformer(CONFIG)
    model.freeze()
    add_lora(model, lambda name: name.startswith("blocks"), 8)
    model.save_memory(checkpointing)
    shape = (1, (frames - 1) // 4 + 1, side // 16, side // 16, 16)
    latents, noise, context = mx.random.normal(shape), mx.random.normal(shape), mx.random.normal((1, 64, 64))
    mx.eval(model.parameters(), latents, noise, context)

    def loss(model):
        return flow_loss(model, latents, context, noise, mx.array([0.5]), mx.array([False])).mean()

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(model, loss)(model))
    peak = (mx.get_peak_memory() - before) / 2**20
    estimate = activations(SHAPES, Bucket(frames, side, side), checkpointing, 4) / 2**20
    tokens = shape[1] * (side // 32) ** 2
    print(f"| {tokens} | {'yes' if checkpointing else 'no'} | {peak:.0f} | {estimate:.0f} | {peak / estimate:.2f} |")


if __name__ == "__main__":
    print("| tokens | checkpointing | measured MiB | estimated MiB | ratio |\n| --- | --- | --- | --- | --- |")
    for clip in ((9, 256), (17, 256), (33, 256), (17, 512)):
        for checkpointing in (False, True):
            measure(*clip, checkpointing)
