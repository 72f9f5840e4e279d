"""What several processes on this machine cost and save: NCCL between its GPUs, or MLX's ring backend on loopback.

uv run python benchmarks/distributed.py links           # all_gather between 2, 3 and 4 processes
uv run python benchmarks/distributed.py weights         # memory of each of 2 processes with --dit_fsdp, and time
uv run python benchmarks/distributed.py steps           # two GPUs: guided steps of TI2V-5B at its true size
uv run python benchmarks/distributed.py steps --small   # the same on two processes of any machine, with a toy
uv run python benchmarks/distributed.py tiles           # why the decoder is not split into overlapping tiles

Random weights; float32, but for `steps`, which takes the device's usual type. It is six measurements, each in new
processes that are ended if they hang; each may be named in its place: links, calls, decode, spread, exact, clip.
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
from mlx_wan.models.vae22 import VAEConfig, WanVAE22
from mlx_wan.parallel import team
from mlx_wan.parallel.guard import Guard, check_agreement
from mlx_wan.parallel.plan import ALONE, Parallel
from mlx_wan.parallel.spread import Spread
from mlx_wan.parallel.team import Team
from mlx_wan.parallel.tokens import TokenShare
from mlx_wan.sampling import Expert, guided_velocity
from mlx_wan.weights.load import fill
from mlx_wan.weights.tensors import mapped_tensor

FIVE_B = TransformerConfig()
WIDE = TransformerConfig(dim=1536, ffn_dim=7168, num_heads=12, num_layers=12)  # half of the 5B's width, fewer blocks
MIB = 2**20


# What `steps` measures, each in processes of its own, and the seconds after which these count as hanging.
STEPS = {"links": 25, "calls": 60, "decode": 40, "spread": 40, "exact": 40, "clip": 40}
COUNTS = (2,) if mx.cuda.is_available() else (2, 3, 4)  # of processes


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure several processes on this machine.")
    parser.add_argument("what", choices=("links", "weights", "steps", "tiles", *STEPS))
    parser.add_argument("--small", action="store_true", help="steps: two blocks and few tokens, to try it anywhere")
    parser.add_argument("--file", help=argparse.SUPPRESS)  # given to the processes that are started
    args = parser.parse_args()
    small = ["--small"] if args.small else []
    if args.what == "tiles":
        tiles()
    elif "MLX_RANK" in os.environ:
        world = mx.distributed.init(strict=True)
        one = {"exact": exact, "calls": calls, "decode": decode, "spread": spread_weights, "clip": clip}
        if args.what in one:
            one[args.what](world, args.small)
        else:
            {"links": links, "weights": weights}[args.what](world, args.file)
    elif args.what == "steps":
        failed = [what for what, seconds in STEPS.items() if not start(2, [what, *small], seconds)]
        sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
    elif args.what == "links":
        sys.exit(not all(start(count, ["links"]) for count in COUNTS))
    elif args.what in STEPS:
        sys.exit(not start(2, [args.what, *small], STEPS[args.what]))
    elif args.file:
        weights(mx.distributed.init(), args.file)  # alone
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "weights"
            write_weights(file)
            subprocess.run([sys.executable, __file__, "weights", "--file", str(file)], check=True)
            sys.exit(not start(2, ["weights", "--file", str(file)]))


def start(count: int, arguments: list[str], seconds: float = 3600) -> bool:
    """Run this script as `count` processes; whether all ended well, within `seconds`."""
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
        if arguments[0] in ("exact", "clip"):
            environment["MLX_ENABLE_TF32"] = "0"
        command = [sys.executable, __file__, *arguments]
        processes, begin = [], time.monotonic()
        for rank in range(count):
            own = {"MLX_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank)}
            processes.append(subprocess.Popen(command, env=environment | own))
        try:
            codes = [process.wait(max(begin + seconds - time.monotonic(), 0.1)) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [None]
            print(f"{arguments[0]}: not done after {seconds} s", flush=True)
        for process in processes:
            process.kill()
            process.wait()
        print(f"{arguments[0]}: ended with {codes} after {time.monotonic() - begin:.0f} s", flush=True)
        return not any(codes) and None not in codes


def links(world: mx.distributed.Group, _: str | None) -> None:
    """Time of an all_gather by the size of each rank's part: one that is waited for, and each of ten in a row."""
    for size in (1024, MIB, 32 * MIB, 80 * MIB):  # the last: keys of a block of the 5B, in bfloat16
        x = mx.zeros((size // 4,))
        mx.eval(x, mx.distributed.all_gather(x))
        for row in (1, 10):
            times = []
            for _ in range(10 if row == 1 or mx.cuda.is_available() else 1):
                begin = time.perf_counter()
                mx.eval([mx.distributed.all_gather(x) for _ in range(row)])
                times.append((time.perf_counter() - begin) / row)
            if world.rank() == 0:
                median = float(np.median(times))
                rate = size * (world.size() - 1) / median / 1e9
                how = f"{world.size()} ranks, {size:>9} bytes each, {row:>2} in a row"
                print(f"{how}: {median * 1e3:8.3f} ms, {rate:.2f} GB/s into each", flush=True)


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

SMALL = TransformerConfig(dim=384, ffn_dim=768, num_heads=3, num_layers=2)
CLIP = (1, 31, 44, 80, 48)  # latents of 1280×704×121
PASSES_SCALE = 5.0


def calls(world: mx.distributed.Group, small: bool) -> None:
    """Seconds and memory of a guided step (two calls) alone and shared, and how far results are apart."""
    config, shape = (SMALL, (1, 5, 8, 8, 48)) if small else (FIVE_B, CLIP)
    compare(world, config, shape, backend.default_dtype(), count=2)


def exact(world: mx.distributed.Group, small: bool) -> None:
    """How far results are apart in float32, without TF32: attention's scores are whole there, so a shorter clip."""
    config, shape = (SMALL, (1, 5, 10, 14, 48)) if small else (FIVE_B, (1, 2, 44, 80, 48))
    compare(world, config, shape, mx.float32, count=0)


def compare(world, config: TransformerConfig, shape: tuple[int, ...], dtype: mx.Dtype, count: int) -> None:
    """One guided step alone, with its passes and with its tokens shared: `count` are timed after a first one."""
    say = partial(print, flush=True) if world.rank() == 0 else lambda *_: None
    say(f"{world.size()} ranks, {shape[1] * shape[2] * shape[3] // 4} tokens, {config.num_layers} blocks, {dtype}")
    model = WanTransformer(config, dtype)
    draw(model, dtype)
    model.eval()
    keys = mx.random.split(mx.random.key(1), 3)
    latents = mx.random.normal(shape, key=keys[0])
    contexts = [mx.random.normal((1, config.text_len, config.text_dim), key=key) for key in keys[1:]]
    mx.eval(latents, contexts)

    def timed(name: str, share_of, passes) -> tuple[list[float], mx.array]:
        """Seconds of each rank's fastest step; all ranks begin each at the same time."""
        whole, model.share_of = model.share_of, share_of or model.share_of
        texts = [model.read(context) for context in contexts]
        times = []
        mx.reset_peak_memory()
        for _ in range(count + 1):
            mx.eval(mx.distributed.all_sum(mx.array(1.0)))
            begin = time.perf_counter()
            velocity = guided_velocity(Expert(model, PASSES_SCALE), latents, mx.array([500.0]), *texts, passes=passes)
            mx.eval(velocity)
            times.append(time.perf_counter() - begin)
        model.share_of = whole
        seconds = min(times[1:] or times)
        ranks = mx.distributed.all_gather(mx.array([[seconds, mx.get_peak_memory() / 2**30]])).tolist()
        shown = ", ".join(f"rank {rank} {s:.3f} s, peak {gib:.1f} GiB" for rank, (s, gib) in enumerate(ranks))
        say(f"{name}: {shown}")
        return [s for s, _ in ranks], velocity

    alone, want = timed("alone", None, ALONE.passes)
    ways = {
        "guidance shared": (None, Parallel(world, cfg_parallel=True).passes),
        "tokens shared": (partial(TokenShare, Team(world)), ALONE.passes),
        "tokens shared, exchange and work in turn": (partial(TokenShare, Team(world)), ALONE.passes),
    }
    beside = team._beside
    for name, way in ways.items():
        team._beside = (lambda: None) if "in turn" in name else beside
        seconds, got = timed(name, *way)
        error = float(mx.linalg.norm(got - want) / mx.linalg.norm(want))
        faster = min(alone) / max(seconds)
        say(f"  {faster:.3f} times faster than the faster rank alone; relative difference {error:.1e}")


def decode(world: mx.distributed.Group, small: bool) -> None:
    """Seconds of a piece (four frames) of the 5B's decoder alone and with rows shared, and how far frames are apart."""
    dtype, channels = backend.vae_dtype(backend.default_dtype()), 48
    sizes = {"dim": 8, "dec_dim": 16} if small else {}
    mx.random.seed(0)  # the same values in every rank
    vae = WanVAE22(VAEConfig(**sizes, latents_mean=(0.0,) * channels, latents_std=(1.0,) * channels))
    vae.set_dtype(dtype)
    mx.eval(vae.parameters())
    latents = mx.random.normal((1, 6, 8, 8, channels) if small else (1, 6, 44, 80, channels), key=mx.random.key(1))
    want, alone = None, 0.0
    for name, parallel in (("alone", ALONE), ("rows shared", Parallel(world, world.size()))):
        times, pieces, begin = [], [], 0.0
        mx.reset_peak_memory()
        for piece in parallel.stream_decode(vae, latents):
            times.append(time.perf_counter() - begin)
            pieces.append(np.array(piece))
            begin = time.perf_counter()
        seconds, got = float(np.median(times[3:])), np.concatenate(pieces, axis=1)
        want, alone = (got, seconds) if want is None else (want, alone)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        if world.rank() == 0:
            peak = f"peak {mx.get_peak_memory() / 2**30:.1f} GiB"
            how = f"{alone / seconds:.2f} times as fast, relative difference {error:.1e}"
            print(f"decoder, {dtype}, {name}: {seconds:.3f} s a piece, {peak}, {how}", flush=True)


def draw(model: WanTransformer, dtype: mx.Dtype) -> None:
    """Fills a model with the same random values in every rank, one tensor after the other."""
    for i, (name, array) in enumerate(tree_flatten(model.parameters())):
        kept = any(part in name for part in FLOAT32_PARAMETERS)
        value = mx.ones(array.shape) if "norm" in name else 0.02 * mx.random.normal(array.shape, key=mx.random.key(i))
        value = value.astype(mx.float32 if kept else dtype)
        mx.eval(value)
        model.load_weights([(name, value)], strict=False)


def spread_weights(world: mx.distributed.Group, small: bool) -> None:
    """Memory a rank with the weights spread, and a call's seconds; of a file with holes for values: zeros."""
    config, shape, dtype = (SMALL if small else FIVE_B), ((1, 5, 8, 8, 48) if small else CLIP), backend.default_dtype()
    with tempfile.TemporaryDirectory() as folder:
        file, tensors, position = Path(folder) / "weights", [], 0
        model = WanTransformer(config, dtype)
        for name, array in tree_flatten(model.parameters()):
            kept = any(part in name for part in FLOAT32_PARAMETERS)
            kind = "float32" if kept else str(dtype).removeprefix("mlx.core.")
            tensors.append(mapped_tensor(name, tuple(array.shape), kind, file, position))
            position += tensors[-1].nbytes
        with file.open("wb") as out:
            out.truncate(position)
        del array  # of the values that nobody will draw
        spread, before = Spread(Team(world)), mx.get_active_memory()
        fill(model, tensors, spread.read)
        spread.wrap(model, tensors)
        model.eval()
        held = mx.get_active_memory() - before
    latents, context = mx.zeros(shape), mx.zeros((1, config.text_len, config.text_dim))
    say = partial(print, flush=True) if world.rank() == 0 else lambda *_: None
    say(f"weights spread: {held / MIB:.0f} of {position / MIB:.0f} MiB held by a rank ({held / position:.1%})")
    for name, share in (("all tokens", model.share_of), ("tokens shared", partial(TokenShare, Team(world)))):
        model.share_of, times = share, []
        mx.reset_peak_memory()
        for _ in range(3):
            begin = time.perf_counter()
            mx.eval(model(latents, mx.array([500.0]), context))
            times.append(time.perf_counter() - begin)
        say(f"  {name}: {min(times[1:]):.3f} s a call, peak {mx.get_peak_memory() / 2**30:.1f} GiB")


def clip(world: mx.distributed.Group, small: bool) -> None:
    """A clip of the embedded model, in float32, of every way of sharing against one process's; under the guard."""
    request = {"num_inference_steps": 2 if small else 20, "seed": 1} | ({"num_frames": 5} if small else {})
    prompt, want = "a red circle moves right on a black background", None
    ways = {
        "alone": ALONE,
        "tokens": Parallel(world, world.size()),
        "tokens, weights": Parallel(world, world.size(), dit_fsdp=True, t5_fsdp=True),
        "guidance, weights": Parallel(world, cfg_parallel=True, dit_fsdp=True, t5_fsdp=True),
    }
    with Guard(world) as guard:
        check_agreement(world, {"seed": "1"}, guard.hosts)
        for name, parallel in ways.items():
            pipe = mlx_wan.WanPipeline.from_pretrained("tiny", mx.float32, parallel=parallel)
            pipe(prompt, **request | {"num_inference_steps": 1})
            begin = time.perf_counter()
            got = pipe(prompt, **request)
            mx.eval(got.latents)
            seconds = time.perf_counter() - begin
            want = got if want is None else want
            if world.rank() == 0:
                error = float(mx.linalg.norm(got.latents - want.latents) / mx.linalg.norm(want.latents))
                pixels = np.abs(got.frames.astype(int) - want.frames.astype(int)).max()
                how = f"{seconds:.2f} s, relative difference {error:.1e}, of frames at most {pixels} of 255"
                print(f"clip of the embedded model, {name}: {how}", flush=True)


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
