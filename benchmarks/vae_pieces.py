"""The Wan2.2 VAE piece by piece on a GPU: what strips, working ahead and the way from the host cost, kernel by kernel.

    python benchmarks/vae_pieces.py --json pieces.json       # 1280x704 in bfloat16, random weights
    python benchmarks/vae_pieces.py --toy                    # a small model, for a CPU

Strips and kernels are first compared with whole frames and plain functions, in float32 (`MLX_ENABLE_TF32=0` for exact
products). Milliseconds are medians over the pieces of a stream after the third, peaks those of MLX, weights included.
Where PyTorch is installed beside MLX, its profiler lists the kernels of one piece, ours and cuDNN's alike.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx_wan  # noqa: F401  first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_wan.models import autoencoder
from mlx_wan.models.autoencoder import FeatureCache
from mlx_wan.models.vae22 import VAEConfig, WanVAE22

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the pieces of the VAE's streams.")
    parser.add_argument("--strips", type=int, nargs="+", default=[4, 1, 2, 3, 6, 8])
    parser.add_argument("--pieces", type=int, default=10)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}

    def tell(name: str, what: Any) -> None:
        found[name] = what
        print(f"{name}: {json.dumps(what)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))

    tell("relative errors in float32", errors())
    mx.clear_cache()
    rows, columns, dtype = (16, 4, mx.float32) if args.toy else (44, 80, mx.bfloat16)
    vae = made(dtype, **({"dim": 16, "dec_dim": 16} if args.toy else {}))
    latents = mx.random.normal((1, args.pieces, rows, columns, 48))
    mx.eval(latents)
    timed(vae.stream_decode(latents))  # compiles
    for number in args.strips:
        with strips(number):
            tell(f"decode, {number} strips", timed(vae.stream_decode(latents)))
    rng, frames = np.random.default_rng(0), 1 + 4 * (args.pieces - 1)
    video = np.clip(rng.standard_normal((1, frames, 16 * rows, 16 * columns, 3), dtype=np.float32), -1, 1)
    timed(vae.stream_encode(video[:, :9]))
    tell("encode, from the host", timed(vae.stream_encode(video)))
    there = mx.array(video) + 0
    mx.eval(there)
    tell("encode, on the device", timed(vae.stream_encode(there)))
    for name, stream in (
        ("decode", lambda: vae.stream_decode(latents[:, :3])),
        ("encode", lambda: vae.stream_encode(there[:, :9])),
    ):
        kernels = profiled(lambda stream=stream: mx.eval(list(stream())))
        if kernels is not None:
            tell(f"kernels of three pieces, {name}", kernels)


def made(dtype: mx.Dtype, **sizes: int) -> WanVAE22:
    """Convolutions with the random weights they are made with, of `dtype`."""
    mx.random.seed(0)
    vae = WanVAE22(VAEConfig(**sizes, latents_mean=(0.0,) * 48, latents_std=(1.0,) * 48))
    named: list[tuple[str, Any]] = tree_flatten(vae.parameters())
    named = [(name, array.astype(dtype) if array.ndim > 1 else array) for name, array in named]
    vae.update(tree_unflatten(named))
    for _, array in named:
        mx.eval(array)
    mx.clear_cache()
    return vae


@contextmanager
def strips(number: int) -> Iterator[None]:
    """Inside, wide frames pass in so many strips, or as many as they are high enough for."""
    count = FeatureCache.strip_count
    FeatureCache.strip_count = lambda self, x, least: min(number, x.shape[2] // least) if self.streaming else 1
    try:
        yield
    finally:
        FeatureCache.strip_count = count


def errors() -> dict[str, float]:
    """Of streams, against whole clips by plain functions."""
    vae = made(mx.float32, dim=32, dec_dim=32)
    latents = mx.random.normal((1, 3, 16, 12, 48))
    video = mx.clip(mx.random.normal((1, 9, 64, 96, 3)), -1, 1)
    pixels = autoencoder.clipped(vae.pixels(vae.denormalise(latents), FeatureCache()))
    codes = vae.normalise(vae.moments(video, FeatureCache())[0])
    found = {
        "encode": relative(vae.encode(video), codes),
        "from the host": relative(vae.encode(np.array(video)), codes),
    }
    for number in (1, 2, 4):
        with strips(number):
            found[f"decode, {number} strips"] = relative(vae.decode(latents), pixels)
    return found


def relative(got: mx.array, want: mx.array) -> float:
    """Norm of the difference over the norm."""
    a, b = (np.array(x, np.float64) for x in (got, want))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def timed(pieces: Iterator[mx.array]) -> dict[str, float]:
    """Of a stream that works one piece ahead: a piece is what came between two, neither the first nor the last."""
    mx.clear_cache()
    mx.reset_peak_memory()
    start = last = time.perf_counter()
    between = []
    for _ in pieces:
        now = time.perf_counter()
        between.append(now - last)
        last = now
    middle = between[2:-1] or between
    peak = mx.get_peak_memory() / GIB
    return {"ms a piece": round(1e3 * statistics.median(middle), 1), "s": round(last - start, 3), "GiB": round(peak, 2)}


def profiled(call: Callable[[], None]) -> list[tuple[str, int, float]] | None:
    """(kernel, how often, ms together), the longest first; None without PyTorch and a GPU."""
    try:
        from torch.profiler import ProfilerActivity, profile
    except ImportError:
        return None
    if mx.default_device() != mx.Device(mx.gpu):
        return None
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        watched.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    rows: dict[str, list[float]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            rows.setdefault(event["name"], []).append(event["dur"] / 1e3)
    table = [(name[:120], len(times), round(sum(times), 2)) for name, times in rows.items()]
    return sorted(table, key=lambda row: -row[2])[:30]


if __name__ == "__main__":
    main()
