"""What each quantization mode costs and saves: bytes, error of one transformer call, PSNR of a whole run.

    uv run python benchmarks/quantization.py                  # the embedded model, or --model DIR, against float32
    uv run python benchmarks/quantization.py --true_size      # TI2V-5B's widths, random weights; wants a GPU
    uv run python benchmarks/quantization.py --true_size --layers 1 --size 64 --frames 5    # small enough for a CPU

At the true size there is no whole run: one transformer call is compared with the same call in the dtype of the device
before packing, and timed, second call. Random weights have no outliers, which trained ones have: they are the easier.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx_wan  # first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
import numpy as np
from mlx.utils import tree_flatten

from mlx_wan import backend
from mlx_wan.models.transformer import FLOAT32_PARAMETERS, TransformerConfig, WanTransformer
from mlx_wan.weights.convert import convert
from mlx_wan.weights.quantize import MODES, Quantization, quantize_module

PROMPTS = ("a red circle moves right on a black background", "a blue square bounces on a white background")
# Every mode at its default group size; rows of the embedded model's text encoder are multiples of 32 alone.
WAYS = tuple(Quantization(bits, None, mode) for mode, (all_bits, _) in MODES.items() for bits in all_bits)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what quantization costs and saves.")
    parser.add_argument("--true_size", action="store_true", help="TI2V-5B's widths with random weights")
    parser.add_argument("--model", default="tiny", metavar="DIR", help="instead of the embedded model")
    parser.add_argument("--layers", type=int, default=30, help="true size: transformer blocks")
    parser.add_argument("--size", type=int, help="side of the frames, a multiple of 32 (704; whole runs: the model's)")
    parser.add_argument("--frames", type=int, help="frames of the clip, 4n+1 (121; whole runs: the model's)")
    parser.add_argument("--steps", type=int, default=20, help="whole runs: denoising steps")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    if args.true_size:
        true_size(args.layers, args.size or 704, args.frames or 121)
    else:
        embedded(args.model, args.size, args.frames, args.steps)
    print(f"\n{backend.device_name()}, {time.perf_counter() - start:.0f} s")
    return 0


def embedded(model: str, size: int | None, frames: int | None, steps: int) -> None:
    """The model of this package, or a small one: files, one call, and whole runs."""
    options = {"width": size, "height": size, "num_frames": frames, "num_inference_steps": steps}
    exact = mlx_wan.WanPipeline.from_pretrained(model, dtype=mx.float32, low_memory=False)
    call, videos = one_call(exact), [clip(exact, prompt, **options) for prompt in PROMPTS]
    print("| mode | transformer, MB | text encoder, MB | error of one call | PSNR of a run, dB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    print(f"| float32 | {mb(exact.transformer)} | {mb(exact.text_encoder)} | 0 | ∞ |")
    for how in (replace(way, group_size=min(way.group_size, 32)) for way in WAYS):
        with tempfile.TemporaryDirectory() as name:
            folder = convert(model, Path(name) / "model", mx.float32, how.bits, how.group_size, how.mode)
            pipe = mlx_wan.WanPipeline.from_pretrained(folder, dtype=mx.float32, low_memory=False)
            error = relative(one_call(pipe), call)
            ratios = [psnr(clip(pipe, prompt, **options), video) for prompt, video in zip(PROMPTS, videos, strict=True)]
            sizes = f"{mb(pipe.transformer)} | {mb(pipe.text_encoder)}"
            print(f"| {label(how)} | {sizes} | {error:.4f} | {np.mean(ratios):.1f} |", flush=True)


def true_size(layers: int, size: int, frames: int) -> None:
    """TI2V-5B's transformer: bytes, error and time of one call."""
    dtype = backend.default_dtype()
    config = TransformerConfig(num_layers=layers)
    shape = (1, (frames - 1) // 4 + 1, size // 16, size // 16, config.in_dim)
    inputs = mx.random.normal(shape), mx.array([500.0]), mx.random.normal((1, config.text_len, config.text_dim))
    model = random_transformer(config, dtype)
    exact, seconds = timed(lambda model=model: model(*inputs))
    print(f"{layers} blocks, {shape[1] * (size // 32) ** 2} tokens\n")
    print("| mode | transformer, MB | error of one call | seconds | peak, GiB |\n| --- | ---: | ---: | ---: | ---: |")
    print(f"| {str(dtype).removeprefix('mlx.core.')} | {mb(model)} | 0 | {seconds:.2f} | |", flush=True)
    del model
    for how in WAYS:
        packed = random_transformer(config, dtype, how)
        mx.clear_cache()
        mx.reset_peak_memory()
        result, seconds = timed(lambda packed=packed: packed(*inputs))
        peak = mx.get_peak_memory() / 2**30
        error = relative(result, exact)
        print(f"| {label(how)} | {mb(packed)} | {error:.4f} | {seconds:.2f} | {peak:.2f} |", flush=True)
        del packed


def random_transformer(config: TransformerConfig, dtype: mx.Dtype, how: Quantization | None = None) -> WanTransformer:
    """The same random weights each time, in the types that loading gives them, packed if asked."""
    mx.random.seed(0)
    model = WanTransformer(config, dtype)
    names = [
        (name, array if any(part in name for part in FLOAT32_PARAMETERS) else array.astype(dtype))
        for name, array in tree_flatten(model.parameters())
    ]
    model.load_weights(names)
    if how is not None:
        quantize_module(model, "transformer", how)
    for block in model.blocks:
        mx.eval(block.parameters())
    mx.eval(model.parameters())
    model.eval()  # as the pipeline runs it
    return model


def one_call(pipe: mlx_wan.WanPipeline) -> mx.array:
    """The transformer's answer to noise, halfway."""
    shape = pipe._latent_shape(pipe.spec.width, pipe.spec.height, pipe.spec.num_frames, None)
    context = pipe._padded(mx.random.normal((8, pipe.transformer.config.text_dim), key=mx.random.key(1)))
    return pipe.transformer(mx.random.normal(shape, key=mx.random.key(0)), mx.array([500.0]), context)


def clip(pipe: mlx_wan.WanPipeline, prompt: str, **options: int | None) -> np.ndarray:
    frames = pipe(prompt, seed=7, **options).frames  # pyright: ignore[reportArgumentType]
    assert frames is not None
    return frames


def relative(got: mx.array, want: mx.array) -> float:
    """Norm of the difference over the norm."""
    return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()  # pyright: ignore[reportReturnType]


def psnr(got: np.ndarray, want: np.ndarray) -> float:
    """In dB, of 8-bit frames."""
    error = np.mean((got.astype(np.float64) - want) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def mb(module: object) -> str:
    return f"{sum(array.nbytes for _, array in tree_flatten(module.parameters())) / 1e6:.1f}"  # pyright: ignore


def label(how: Quantization) -> str:
    return f"{how.mode}, {how.bits} bits, groups of {how.group_size}"


def timed(call: Callable[[], mx.array]) -> tuple[mx.array, float]:
    """The result, and the seconds of the second call."""
    mx.eval(call())
    start = time.perf_counter()
    result = call()
    mx.eval(result)
    return result, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
