"""What a LoRA beside the weights costs: a call of TI2V-5B's transformer with and without, random weights.

uv run python benchmarks/lora.py                       # one block and a small clip, for CPUs
uv run python benchmarks/lora.py --layers 30 --size 1280*704 --frames 121   # the real one, for GPUs
uv run python benchmarks/lora.py --bits 4 --rank 128
"""

import argparse
import math
import statistics
import time

import mlx_wan  # noqa: F401  first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
import mlx.nn as nn

from mlx_wan import backend
from mlx_wan.lora.layers import LoRALinear, add_lora
from mlx_wan.models.transformer import TransformerConfig, WanTransformer
from mlx_wan.speed import random_module
from mlx_wan.weights.quantize import QUANTIZED, Quantization

MATRICES = QUANTIZED["transformer"]  # all of attention and feed-forward


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a transformer call with adapters.")
    parser.add_argument("--layers", type=int, default=1, help="transformer blocks")
    parser.add_argument("--size", default="256*256", help="of the video, in pixels")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=1, help="how many at once")
    parser.add_argument("--bits", type=int, help="quantize the matrices")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    width, height = map(int, args.size.split("*"))
    config, dtype = TransformerConfig(num_layers=args.layers), backend.default_dtype()
    how = Quantization(args.bits) if args.bits else None
    model = random_module(WanTransformer(config, dtype), "transformer", how, dtype)
    for i in range(args.adapters):
        add_lora(model, lambda name: bool(MATRICES.fullmatch(name)), args.rank, name=str(i), dtype=dtype)
    model.eval()
    latents = mx.random.normal((1, (args.frames - 1) // 4 + 1, height // 16, width // 16, config.in_dim))
    context = model.read(mx.random.normal((1, config.text_len, config.text_dim)).astype(dtype))
    mx.eval(model.parameters(), latents)
    spent: dict[float, list[float]] = {0.0: [], 1.0: []}
    for _ in range(args.repeat + 1):  # in turns, so that other work on the machine hits both
        for strength, times in spent.items():
            set_strength(model, strength)
            start = time.perf_counter()
            mx.eval(model(latents, mx.array([500.0]), context))
            times.append(time.perf_counter() - start)
    plain, beside = (statistics.median(times[1:]) for times in spent.values())
    tokens = math.prod(model.token_grid(latents.shape))
    what = f"{args.adapters} adapters of rank {args.rank}, {args.bits or str(dtype).removeprefix('mlx.core.')}"
    print(f"{args.layers} blocks, {tokens:,} tokens, {what}: {1e3 * plain:.2f} ms without, {1e3 * beside:.2f} ms with")
    print(
        f"{100 * (beside / plain - 1):+.1f} %; all: {[[round(1e3 * t, 1) for t in times] for times in spent.values()]}"
    )


def set_strength(model: nn.Module, strength: float) -> None:
    for module in model.modules():
        if isinstance(module, LoRALinear):
            for adapter in module.adapters.values():
                adapter.strength = strength


if __name__ == "__main__":
    main()
