"""What several processes on this machine cost and save: MLX's ring backend on loopback, float32, random weights.

uv run python benchmarks/distributed.py links           # all_gather between 2, 3 and 4 processes
uv run python benchmarks/distributed.py weights         # memory of each of 2 processes with --dit_fsdp, and time
uv run python benchmarks/distributed.py tiles           # why the decoder is not split into overlapping tiles
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import mlx_wan  # first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
import os

import numpy as np
from mlx.utils import tree_flatten

from mlx_wan import backend
from mlx_wan.models.transformer import TransformerConfig, WanTransformer
from mlx_wan.parallel.spread import Spread
from mlx_wan.parallel.team import Team
from mlx_wan.weights.load import fill
from mlx_wan.weights.tensors import mapped_tensor

WIDE = TransformerConfig(dim=1536, ffn_dim=7168, num_heads=12, num_layers=12)  # half of the 5B's width, fewer blocks
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure several processes on this machine.")
    parser.add_argument("what", choices=("links", "weights", "tiles"))
    parser.add_argument("--file", help=argparse.SUPPRESS)  # given to the processes that are started
    args = parser.parse_args()
    if args.what == "tiles":
        tiles()
    elif "MLX_RANK" in os.environ:
        {"links": links, "weights": weights}[args.what](mx.distributed.init(strict=True), args.file)
    elif args.file:
        weights(mx.distributed.init(), args.file)  # alone
    elif args.what == "links":
        for count in (2, 3, 4):
            start(count, ["links"])
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "weights"
            write_weights(file)
            subprocess.run([sys.executable, __file__, "weights", "--file", str(file)], check=True)
            start(2, ["weights", "--file", str(file)])


def start(count: int, arguments: list[str]) -> None:
    """Run this script as `count` processes."""
    with ExitStack() as held, tempfile.NamedTemporaryFile("w", suffix=".json") as hosts:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for holder in sockets:
            holder.bind(("127.0.0.1", 0))
        json.dump([[f"127.0.0.1:{holder.getsockname()[1]}"] for holder in sockets], hosts)
        hosts.flush()
        held.close()
        environment = {**os.environ, "MLX_HOSTFILE": hosts.name, "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *arguments]
        processes = [subprocess.Popen(command, env={**environment, "MLX_RANK": str(rank)}) for rank in range(count)]
        for process in processes:
            if process.wait():
                sys.exit(f"a process failed: {process.returncode}")


def links(world: mx.distributed.Group, _: str | None) -> None:
    """Time of an all_gather by the size of each rank's part."""
    for size in (1024, MIB, 32 * MIB):
        x = mx.zeros((size // 4,))
        mx.eval(x, mx.distributed.all_gather(x))
        times = []
        for _ in range(10):
            begin = time.perf_counter()
            mx.eval(mx.distributed.all_gather(x))
            times.append(time.perf_counter() - begin)
        if world.rank() == 0:
            median = float(np.median(times))
            rate = size * (world.size() - 1) / median / 1e9
            print(f"{world.size()} ranks, {size:>9} bytes each: {median * 1e3:8.3f} ms, {rate:.2f} GB/s into each")


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in tree_flatten(WanTransformer(WIDE).parameters())}


def write_weights(file: Path) -> None:
    """A transformer's values, small random numbers, one tensor after the other."""
    generator = np.random.default_rng(0)
    with file.open("wb") as out:
        for shape in shapes().values():
            out.write((0.02 * generator.standard_normal(shape, np.float32)).tobytes())


def weights(world: mx.distributed.Group, file: str | None) -> None:
    """Memory before and during a call, with the weights spread over the ranks."""
    assert file is not None
    tensors, position = [], 0
    for name, shape in shapes().items():
        tensors.append(mapped_tensor(name, shape, "float32", Path(file), position))
        position += tensors[-1].nbytes
    model, spread = WanTransformer(WIDE), Spread(Team(world))
    mx.reset_peak_memory()
    fill(model, tensors, spread.read)
    if world.size() > 1:
        spread.wrap(model, tensors)
    loaded, peak = mx.get_active_memory(), mx.get_peak_memory()
    inputs = mx.zeros((1, 3, 8, 8, 48)), mx.array([500.0]), mx.zeros((1, 16, 4096))
    mx.eval(model(*inputs))
    begin = time.perf_counter()
    mx.eval(model(*inputs))
    seconds = time.perf_counter() - begin
    print(
        f"rank {world.rank()} of {world.size()}: {loaded / MIB:.0f} MiB of {position / MIB:.0f} held "
        f"({loaded / position:.1%}), peak while loading {peak / MIB:.0f}, in a call {mx.get_peak_memory() / MIB:.0f}; "
        f"{seconds:.2f} s a call; peak of the process {backend.peak_memory() / MIB:.0f}"
    )


def tiles() -> None:
    """Decode the upper half of a clip with more and more rows below it, and compare with the whole clip."""
    pipe = mlx_wan.WanPipeline.from_pretrained("tiny")
    prompt = "a red circle moves right on a black background"
    latents = pipe(prompt, num_frames=5, width=384, height=384, num_inference_steps=4, seed=1, output_type="latent")
    rows, factor = latents.latents.shape[2], pipe.vae.config.stride[1]
    upper = pipe.vae.decode(latents.latents)[:, :, : rows // 2 * factor]
    for halo in (0, 1, 2, 4, 8):
        part = pipe.vae.decode(latents.latents[:, :, : rows // 2 + halo])[:, :, : rows // 2 * factor]
        error = float(mx.linalg.norm(part - upper) / mx.linalg.norm(upper))
        print(f"{halo} of {rows // 2} rows of latents more: relative error {error:.1e}")


if __name__ == "__main__":
    main()
