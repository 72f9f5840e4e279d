"""What a LoRA beside the weights costs: one TI2V-5B transformer block with and without, random weights.

uv run python benchmarks/lora.py                       # a small clip, for CPUs
uv run python benchmarks/lora.py --size 1280*704 --frames 121 --repeat 10   # the real one, for GPUs
uv run python benchmarks/lora.py --bits 4 --rank 128
"""

import argparse
import statistics
import time

import mlx_wan  # noqa: F401  first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip

from mlx_wan import backend
from mlx_wan.lora.layers import LoRALinear, add_lora
from mlx_wan.models.transformer import Block, TransformerConfig, rope_table
from mlx_wan.weights.quantize import Quantization, is_quantized


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a transformer block with adapters.")
    parser.add_argument("--size", default="256*256", help="of the video, in pixels")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=1, help="how many at once")
    parser.add_argument("--bits", type=int, help="quantize the matrices")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    width, height = map(int, args.size.split("*"))
    grid = ((args.frames - 1) // 4 + 1, height // 32, width // 32)
    config, dtype = TransformerConfig(num_layers=1), backend.default_dtype()
    block = Block(config, dtype)
    block.apply(lambda a: a.astype(dtype) if a.ndim == 2 else a)
    if args.bits:
        quantize(block, Quantization(args.bits))
    inputs = arguments(config, grid, dtype)
    for i in range(args.adapters):
        add_lora(block, lambda name: True, args.rank, name=str(i), dtype=dtype)
    mx.eval(block.parameters(), inputs)
    spent: dict[float, list[float]] = {0.0: [], 1.0: []}
    for _ in range(args.repeat + 1):  # in turns, so that other work on the machine hits both
        for strength, times in spent.items():
            set_strength(block, strength)
            start = time.perf_counter()
            mx.eval(block(*inputs))
            times.append(time.perf_counter() - start)
    plain, beside = (statistics.median(times[1:]) for times in spent.values())
    what = f"{args.adapters} adapters of rank {args.rank}, {args.bits or str(dtype).removeprefix('mlx.core.')}"
    print(f"{grid[0] * grid[1] * grid[2]:,} tokens, {what}: {1e3 * plain:.2f} ms without, {1e3 * beside:.2f} ms with")
    print(f"{100 * (beside / plain - 1):+.1f} %")


def quantize(block: Block, how: Quantization) -> None:
    import mlx.nn as nn

    nn.quantize(
        block,
        how.group_size,
        how.bits,
        class_predicate=lambda name, layer: (
            isinstance(layer, nn.Linear) and is_quantized("transformer", f"blocks.0.{name}")
        ),
    )


def arguments(config: TransformerConfig, grid: tuple[int, int, int], dtype: mx.Dtype) -> tuple:
    x = mx.random.normal((1, grid[0] * grid[1] * grid[2], config.dim))
    context = mx.random.normal((1, config.text_len, config.dim)).astype(dtype)
    return x, context, mx.random.normal((1, 1, 6, config.dim)), rope_table(grid, config.dim // config.num_heads)


def set_strength(block: Block, strength: float) -> None:
    for module in block.modules():
        if isinstance(module, LoRALinear):
            for adapter in module.adapters.values():
                adapter.strength = strength


if __name__ == "__main__":
    main()
