"""What several processes on this machine cost and save: NCCL between its GPUs, or MLX's ring backend on loopback.

uv run python benchmarks/distributed.py links           # all_gather between 2, 3 and 4 processes
uv run python benchmarks/distributed.py weights         # memory of each of 2 processes with --dit_fsdp, and time
uv run python benchmarks/distributed.py steps           # two GPUs: guided steps of TI2V-5B at its true size
uv run python benchmarks/distributed.py tiles           # why the decoder is not split into overlapping tiles

Random weights; float32, but for `steps`, which takes the device's usual type.
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
from functools import partial

import numpy as np
from mlx.utils import tree_flatten

from mlx_wan import backend
from mlx_wan.models.transformer import FLOAT32_PARAMETERS, TransformerConfig, WanTransformer
from mlx_wan.parallel.plan import ALONE, Parallel
from mlx_wan.parallel.spread import Spread
from mlx_wan.parallel.team import Team
from mlx_wan.parallel.tokens import TokenShare
from mlx_wan.sampling import guided_velocity
from mlx_wan.weights.load import fill
from mlx_wan.weights.tensors import mapped_tensor

FIVE_B = TransformerConfig()
WIDE = TransformerConfig(dim=1536, ffn_dim=7168, num_heads=12, num_layers=12)  # half of the 5B's width, fewer blocks
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure several processes on this machine.")
    parser.add_argument("what", choices=("links", "weights", "steps", "tiles"))
    parser.add_argument("--small", action="store_true", help="steps: two blocks and few tokens, to try it anywhere")
    parser.add_argument("--file", help=argparse.SUPPRESS)  # given to the processes that are started
    args = parser.parse_args()
    if args.what == "tiles":
        tiles()
    elif args.what == "steps":
        if "MLX_RANK" in os.environ:
            steps(mx.distributed.init(strict=True), args.small)
        else:
            start(2, ["steps", *(["--small"] if args.small else [])])
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
        ports = [holder.getsockname()[1] for holder in sockets]
        json.dump([[f"127.0.0.1:{port}"] for port in ports], hosts)
        hosts.flush()
        held.close()
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        if mx.cuda.is_available():
            environment |= {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(ports[0]), "MLX_WORLD_SIZE": str(count)}
        else:
            environment["MLX_HOSTFILE"] = hosts.name
        command = [sys.executable, __file__, *arguments]
        processes = []
        for rank in range(count):
            own = {"MLX_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank)}
            processes.append(subprocess.Popen(command, env=environment | own))
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


# --- two ranks at the 5B's size --------------------------------------------------------------------------------------


def steps(world: mx.distributed.Group, small: bool) -> None:
    """Seconds of a guided step (two calls) alone and shared, how far results are apart, and weights a rank."""
    config = TransformerConfig(dim=384, ffn_dim=768, num_heads=3, num_layers=2) if small else FIVE_B
    shape = (1, 5, 8, 8, 48) if small else (1, 31, 44, 80, 48)  # of 1280×704×121
    dtype = backend.default_dtype()
    say = partial(print, flush=True) if world.rank() == 0 else lambda *_: None
    say(f"{world.size()} ranks, {shape[1] * shape[2] * shape[3] // 4} tokens, {config.num_layers} blocks, {dtype}")
    exactness(world)
    model = WanTransformer(config, dtype)
    draw(model, dtype)
    keys = mx.random.split(mx.random.key(1), 3)
    latents = mx.random.normal(shape, key=keys[0])
    contexts = [mx.random.normal((1, config.text_len, config.text_dim), key=key) for key in keys[1:]]

    def timed(name: str, model: WanTransformer, passes, count: int = 2) -> tuple[float, mx.array]:
        times = []
        mx.reset_peak_memory()
        for i in range(count + 1):
            mx.eval(mx.distributed.all_sum(mx.array(1.0)))  # together
            begin = time.perf_counter()
            velocity = guided_velocity((model, 5.0), latents, mx.array([500.0]), *contexts, passes=passes)
            mx.eval(velocity)
            mx.eval(mx.distributed.all_sum(mx.array(1.0)))
            if i:  # the first one compiles
                times.append(time.perf_counter() - begin)
        say(f"{name}: {min(times):.3f} s a step, peak {mx.get_peak_memory() / 2**30:.1f} GiB")
        return min(times), velocity

    alone, want = timed("alone", model, ALONE.passes)
    ways = {
        "guidance shared": (None, Parallel(world, cfg_parallel=True).passes),
        "tokens shared": (partial(TokenShare, Team(world)), ALONE.passes),
    }
    for name, (share, passes) in ways.items():
        whole, model.share_of = model.share_of, share or model.share_of
        seconds, got = timed(name, model, passes)
        model.share_of = whole
        error = float(mx.linalg.norm(got - want) / mx.linalg.norm(want))
        say(f"  {alone / seconds:.2f} times faster than alone; relative difference {error:.1e}")
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    del model
    mx.clear_cache()
    with tempfile.TemporaryDirectory() as folder:
        spread_weights(world, config, dtype, Path(folder) / "weights", size, (latents, contexts[0]), say)


def draw(model: WanTransformer, dtype: mx.Dtype) -> None:
    """Fills a model with the same random values in every rank, one tensor after the other."""
    for i, (name, array) in enumerate(tree_flatten(model.parameters())):
        kept = any(part in name for part in FLOAT32_PARAMETERS)
        value = mx.ones(array.shape) if "norm" in name else 0.02 * mx.random.normal(array.shape, key=mx.random.key(i))
        value = value.astype(mx.float32 if kept else dtype)
        mx.eval(value)
        model.load_weights([(name, value)], strict=False)


def exactness(world: mx.distributed.Group) -> None:
    """How far a small float32 model's velocity is from that of one rank alone, tokens being shared."""
    config = TransformerConfig(dim=384, ffn_dim=768, num_heads=3, num_layers=4)
    model = WanTransformer(config)
    draw(model, mx.float32)
    latents = mx.random.normal((1, 5, 10, 14, 48), key=mx.random.key(2))
    inputs = latents, mx.array([500.0]), mx.random.normal((1, 512, 4096), key=mx.random.key(3))
    want = model(*inputs)
    model.share_of = partial(TokenShare, Team(world))
    error = mx.linalg.norm(model(*inputs) - want) / mx.linalg.norm(want)
    mx.eval(error)  # in every rank
    if world.rank() == 0:
        print(
            f"float32, {config.num_layers} blocks of {config.dim}: relative difference {error.item():.1e}", flush=True
        )


def spread_weights(world, config: TransformerConfig, dtype: mx.Dtype, file: Path, size: int, inputs, say) -> None:
    """Memory a rank with the weights spread, and a call's seconds; of a file with holes for values: zeros."""
    tensors, position, model = [], 0, WanTransformer(config, dtype)
    for name, array in tree_flatten(model.parameters()):
        kept = any(part in name for part in FLOAT32_PARAMETERS)
        kind = "float32" if kept else str(dtype).removeprefix("mlx.core.")
        tensors.append(mapped_tensor(name, tuple(array.shape), kind, file, position))
        position += tensors[-1].nbytes
    with file.open("wb") as out:
        out.truncate(position)
    spread, before = Spread(Team(world)), mx.get_active_memory()
    fill(model, tensors, spread.read)
    spread.wrap(model, tensors)
    held = mx.get_active_memory() - before
    mx.eval(model(inputs[0], mx.array([500.0]), inputs[1]))
    mx.reset_peak_memory()
    begin = time.perf_counter()
    mx.eval(model(inputs[0], mx.array([500.0]), inputs[1]))
    say(
        f"weights spread: {held / 2**30:.2f} of {size / 2**30:.2f} GiB held ({held / size:.1%}); one call "
        f"{time.perf_counter() - begin:.3f} s, peak {mx.get_peak_memory() / 2**30:.1f} GiB"
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
