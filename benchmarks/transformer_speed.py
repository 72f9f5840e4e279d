"""One call of TI2V-5B's transformer at its true size: this project beside the official code and mlx-video, on one GPU.

    python benchmarks/transformer_speed.py compare --official Wan2.2 --mlx_video mlx-video   # a table; two checkouts
    python benchmarks/transformer_speed.py scaling                     # time and memory from 5,000 to 75,000 tokens
    python benchmarks/transformer_speed.py plot FILE.json PICTURE.png  # of what `scaling --json FILE.json` wrote

Weights and inputs are drawn from one hash, the same in every framework, and matrices rounded to bfloat16 for all.
Each contestant is a process of its own: one call to warm up, then the median of the timed ones, and the peak memory of
its own framework. Errors are relative (RMS) to the official code in float32 on float32 weights. The official code gets
cuDNN's attention through PyTorch, its fastest here, and runs in bfloat16 under autocast as `generate.py` does.
PyTorch has to be installed beside MLX for it. mlx-video has all weights in bfloat16, as its own conversion does.
`--toy` tries everything on a small model, on the CPU if need be.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import types
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

TRUE = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "text_dim": 4096, "freq_dim": 256}
TOY = {"dim": 64, "ffn_dim": 128, "num_heads": 4, "num_layers": 2, "text_dim": 32, "freq_dim": 32}
CHANNELS, TEXT = 48, 512
FRAMES = {"5k": 6, "10k": 11, "20k": 23, "27k": 31, "50k": 57, "75k": 85}  # of 22 × 40 tokens each
FLOAT32 = ("time_embedding.", "time_projection.", "modulation", "head.head.", "norm")
CONTESTANTS = {
    "float32": "the official code in float32",
    "torch": "the official code",
    "ours": "mlx-wan",
    "mlx-video": "mlx-video",
    "mlx-video-compiled": "mlx-video, compiled",
    "float32-two": "the official code in float32, two timesteps",
    "torch-two": "the official code, two timesteps",
    "ours-two": "mlx-wan, two timesteps",
    "mlx-video-two": "mlx-video, two timesteps",
    "mlx-video-compiled-two": "mlx-video, compiled, two timesteps",
}
CHECKOUTS = {"float32": "official", "torch": "official", "mlx": "mlx_video"}  # by the beginning of a name


# --- the same numbers in every framework -------------------------------------------------------------------------


def drawn(xp: Any, name: str, shape: tuple[int, ...], bound: float, **where: Any) -> Any:
    """Numbers spread evenly over ±bound, float32, that depend on `name` and their place alone.

    A multiplicative hash in 32 bits: uint32 wraps in MLX, and torch, which has no uint32 arithmetic, masks int64.
    """
    is_mlx = xp.__name__ == "mlx.core"
    h = xp.arange(math.prod(shape), dtype=xp.uint32 if is_mlx else xp.int64, **where)

    def low(x: Any) -> Any:
        return x if is_mlx else x & 0xFFFFFFFF

    def number(value: int) -> Any:
        return xp.array(value, dtype=xp.uint32) if is_mlx else value

    h = low(h + number(zlib.crc32(name.encode()) & 0x7FFFFFFF))
    for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13), (0xC2B2AE3D, 16)):
        h = low(h * number(factor))
        h = h ^ (h >> number(shift))
    unit = (h.astype(xp.float32) if is_mlx else h.to(xp.float32)) * (1 / 2**32)
    return ((unit - 0.5) * (2 * bound)).reshape(shape)


def bound_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(mean, bound) of a parameter; `shape` as the official code has it."""
    if name.endswith("weight") and "norm" in name:
        return 1.0, 0.2
    if name.endswith("modulation"):
        return 0.0, (3 / shape[-1]) ** 0.5
    if len(shape) == 1:
        return 0.0, 0.05
    return 0.0, (3 / math.prod(shape[1:])) ** 0.5


def inputs(xp: Any, dims: dict[str, int], frames: int, rows: int, columns: int, **where: Any) -> tuple[Any, Any]:
    """Noise (t, h, w, C) and a text embedding (512, text_dim), float32, of standard deviation 1."""
    shape = (frames, 2 * rows, 2 * columns, CHANNELS)
    text = TEXT if dims is TRUE else 16
    return drawn(xp, "noise", shape, 3**0.5, **where), drawn(xp, "text", (text, dims["text_dim"]), 3**0.5, **where)


# --- contestants -------------------------------------------------------------------------------------------------


def timed(call: Callable[[], Any], runs: int, warm: bool = True) -> list[float]:
    """Seconds of `runs` calls, which return when they are done; warm: one more comes first."""
    seconds = []
    if warm:
        call()
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def our_transformer(dims: dict[str, int]) -> Any:
    import mlx_wan  # noqa: F401  first: it chooses the BLAS

    import mlx.core as mx  # isort: skip
    from mlx.utils import tree_flatten, tree_unflatten

    from mlx_wan.models.transformer import TransformerConfig, WanTransformer

    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    dtype = mx.bfloat16 if on_gpu else mx.float32
    model = WanTransformer(TransformerConfig(**dims, text_len=TEXT if dims is TRUE else 16), dtype)
    filled = []
    for name, array in tree_flatten(model.parameters()):
        shape = array.shape
        if name == "patch_embedding.weight":
            shape = (shape[0], shape[-1], *shape[1:-1])  # the official order
        mean, bound = bound_of(name, shape)
        value = mean + drawn(mx, name, shape, bound)
        if name == "patch_embedding.weight":
            value = mx.moveaxis(value, 1, -1)
        if not any(part in name for part in FLOAT32):
            value = value.astype(mx.bfloat16).astype(dtype)
        mx.eval(value)
        filled.append((name, value))
    model.update(tree_unflatten(filled))
    model.eval()
    mx.clear_cache()
    return model


def ours(dims: dict[str, int], grid: tuple[int, int, int], two: bool, runs: int) -> tuple[dict[str, Any], np.ndarray]:
    model = our_transformer(dims)
    return our_call(model, dims, grid, two, runs)


def our_call(
    model: Any, dims: dict[str, int], grid: tuple[int, int, int], two: bool, runs: int
) -> tuple[dict[str, Any], np.ndarray]:
    import mlx.core as mx

    noise, text = inputs(mx, dims, *grid)
    timesteps = mx.full((1, grid[0] if two else 1), 700.0)
    if two:
        timesteps[:, 0] = 0
    mx.eval(noise, text, timesteps)
    mx.clear_cache()
    mx.reset_peak_memory()
    context = getattr(model, "read", lambda x: x)(text[None])
    seconds = timed(lambda: mx.eval(model(noise[None], timesteps, context)), runs)
    peak = mx.get_peak_memory()
    out = model(noise[None], timesteps, context)[0]
    return {"seconds": seconds, "peak": peak, "version": f"MLX {mx.__version__}"}, np.array(out)


def official(
    source: Path, dims: dict[str, int], grid: tuple[int, int, int], two: bool, runs: int, full: bool
) -> tuple[dict[str, Any], np.ndarray]:
    """The official code; full: in float32, with attention in float32 too."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    module = official_module(source)
    kernel = SDPBackend.EFFICIENT_ATTENTION if full else SDPBackend.CUDNN_ATTENTION
    dtype = torch.float32 if full or not gpu else torch.bfloat16

    def attention(q: Any, k: Any, v: Any, **_: Any) -> Any:
        q, k, v = (a.to(v.dtype).transpose(1, 2) for a in (q, k, v))
        with sdpa_kernel([kernel] if gpu else [SDPBackend.MATH]):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    module.flash_attention = attention
    with torch.device("meta"):
        model = module.WanModel(
            model_type="ti2v",
            in_dim=CHANNELS,
            out_dim=CHANNELS,
            text_len=TEXT if dims is TRUE else 16,
            **dims,
        )
    model = model.to(dtype).to_empty(device=device)
    head = dims["dim"] // dims["num_heads"]
    widths = head - 4 * (head // 6), 2 * (head // 6), 2 * (head // 6)
    model.freqs = torch.cat([module.rope_params(1024, width) for width in widths], dim=1).to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, bound = bound_of(name, tuple(parameter.shape))
            value = mean + drawn(torch, name, tuple(parameter.shape), bound, device=device)
            if not any(part in name for part in FLOAT32):
                value = value.to(torch.bfloat16)
            parameter.copy_(value)
    noise, text = inputs(torch, dims, *grid, device=device)
    noise, text = noise.permute(3, 0, 1, 2).contiguous(), text.to(dtype)
    tokens = math.prod(grid)
    timesteps = torch.full((1, tokens), 700.0, device=device)
    if two:
        timesteps[:, : tokens // grid[0]] = 0
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def call() -> Any:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
            (out,) = model([noise], t=timesteps, context=[text], seq_len=tokens)
        if gpu:
            torch.cuda.synchronize()
        return out

    outs: list[Any] = []
    seconds = timed(lambda: outs.append(call()), runs, warm=not full)
    peak = torch.cuda.max_memory_allocated() if gpu else 0
    return {"seconds": seconds, "peak": peak, "version": f"PyTorch {torch.__version__}"}, np.moveaxis(
        outs[-1].float().cpu().numpy(), 0, -1
    )


def mlx_video(
    source: Path, dims: dict[str, int], grid: tuple[int, int, int], two: bool, runs: int, compiled: bool
) -> tuple[dict[str, Any], np.ndarray]:
    """mlx-video's transformer, called as its generate.py does: text and rotary tables are prepared before."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    for name in (
        "mlx_video",
        "mlx_video.models",
        "mlx_video.models.ltx_2",
    ):  # their own import what a call does not need
        package = types.ModuleType(name)
        package.__path__ = [str(source.joinpath(*name.split(".")))]
        sys.modules[name] = package
    from mlx_video.models.wan_2.config import WanModelConfig
    from mlx_video.models.wan_2.wan_2 import WanModel

    text_len = TEXT if dims is TRUE else 16
    model = WanModel(WanModelConfig(model_type="ti2v", in_dim=CHANNELS, out_dim=CHANNELS, text_len=text_len, **dims))
    dtype = mx.bfloat16 if mx.default_device() == mx.Device(mx.gpu) else mx.float32
    official_names = {"patch_embedding_proj.": "patch_embedding.", "time_projection.": "time_projection.1."}
    official_names |= {"fc1.": "0.", "fc2.": "2.", "embedding_0.": "embedding.0.", "embedding_1.": "embedding.2."}
    filled = []
    for name, array in tree_flatten(model.parameters()):
        if name == "freqs" or name.startswith("_"):
            continue
        said, shape = name, array.shape
        for theirs, true_name in official_names.items():
            said = said.replace(theirs, true_name)
        if said == "patch_embedding.weight":
            shape = (shape[0], CHANNELS, 1, 2, 2)
        mean, bound = bound_of(said, shape)
        value = mean + drawn(mx, said, shape, bound).reshape(array.shape)
        if not any(part in said for part in FLOAT32):
            value = value.astype(mx.bfloat16)
        value = value.astype(dtype)
        mx.eval(value)
        filled.append((name, value))
    model.update(tree_unflatten(filled))
    noise, text = inputs(mx, dims, *grid)
    noise, tokens = noise.transpose(3, 0, 1, 2), math.prod(grid)
    timesteps = mx.full((1, tokens) if two else (1,), 700.0)
    if two:
        timesteps[:, : tokens // grid[0]] = 0
    context = model.embed_text([text.astype(dtype)])
    known = {"cross_kv_caches": model.prepare_cross_kv(context), "rope_cos_sin": model.prepare_rope([grid])}
    mx.eval(noise, timesteps, context, known)
    call = mx.compile(model) if compiled else model
    mx.clear_cache()
    mx.reset_peak_memory()

    def run() -> mx.array:
        (out,) = call([noise], t=timesteps, context=context, seq_len=tokens, **known)
        mx.eval(out)
        return out

    seconds = timed(run, runs)
    peak = mx.get_peak_memory()
    return {"seconds": seconds, "peak": peak, "version": f"MLX {mx.__version__}"}, np.moveaxis(np.array(run()), 0, -1)


def official_module(source: Path) -> Any:
    """wan/modules/model.py alone: the package around it wants libraries that a transformer call does not."""

    def keep(function: Any) -> Any:
        return function

    names = {
        "diffusers.configuration_utils": {"ConfigMixin": type("ConfigMixin", (), {}), "register_to_config": keep},
        "diffusers.models.modeling_utils": {},
    }
    import torch

    names["diffusers.models.modeling_utils"]["ModelMixin"] = torch.nn.Module
    for name, members in names.items():
        for part in (name.split(".")[0], name.rpartition(".")[0], name):
            sys.modules.setdefault(part, types.ModuleType(part))
        vars(sys.modules[name]).update(members)
    folder = source / "wan" / "modules"
    package = types.ModuleType("official")
    package.__path__ = [str(folder)]
    sys.modules["official"] = package
    spec = importlib.util.spec_from_file_location("official.model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["official.model"] = module
    spec.loader.exec_module(module)
    return module


# --- commands ----------------------------------------------------------------------------------------------------


def contest(args: argparse.Namespace) -> None:
    """One contestant in this process: a line of JSON, and its output in a file."""
    dims, grid = (TOY, (2, 4, 4)) if args.toy else (TRUE, (FRAMES["27k"], 22, 40))
    two = args.name.endswith("-two")
    if args.name.startswith("ours"):
        row, out = ours(dims, grid, two, args.runs)
    elif args.name.startswith("mlx-video"):
        row, out = mlx_video(Path(args.mlx_video), dims, grid, two, args.runs, "compiled" in args.name)
    else:
        full = args.name.startswith("float32")
        row, out = official(Path(args.official), dims, grid, two, 1 if full else args.runs, full)
    np.save(args.out, out)
    print(json.dumps(row), flush=True)


def compare(args: argparse.Namespace) -> None:
    """Every contestant in a process of its own, and the table."""
    print(f"{device_name()}, Python {sys.version.split()[0]}\n")
    print("| work | median, s | peak, GiB | relative error | |\n| --- | ---: | ---: | ---: | --- |", flush=True)
    names = args.only.split(",") if args.only else [name for name in CONTESTANTS if is_there(name, args)]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(args.keep or folder)
        kept.mkdir(exist_ok=True)
        for name in names:
            command = [sys.executable, __file__, "contest", name, "--out", str(kept / f"{name}.npy")]
            command += ["--runs", str(args.runs)]
            for option in ("official", "mlx_video"):
                command += [f"--{option}", getattr(args, option)] if getattr(args, option) else []
            done = subprocess.run([*command, *(["--toy"] if args.toy else [])], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"| {CONTESTANTS[name]} | failed | | | |", flush=True)
                continue
            row = json.loads(done.stdout.strip().splitlines()[-1])
            reference, error = kept / ("float32-two.npy" if name.endswith("-two") else "float32.npy"), ""
            if reference.exists() and not name.startswith("float32"):
                error = f"{relative(np.load(kept / f'{name}.npy'), np.load(reference)):.2e}"
            seconds, peak = statistics.median(row["seconds"]), row["peak"] / 2**30
            print(f"| {CONTESTANTS[name]} | {seconds:.3f} | {peak:.1f} | {error} | {row['version']} |", flush=True)


def is_there(name: str, args: argparse.Namespace) -> bool:
    """Whether the checkout that a contestant needs was given."""
    checkout = CHECKOUTS.get(name.split("-")[0])
    return checkout is None or getattr(args, checkout) is not None


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def scaling(args: argparse.Namespace) -> None:
    """Our call at several numbers of tokens, and a fit of seconds by a · tokens + b · tokens²."""
    dims = TOY if args.toy else TRUE
    model, rows = our_transformer(dims), []
    print("| tokens | median, s | peak, GiB |\n| ---: | ---: | ---: |", flush=True)
    for frames in FRAMES.values():
        grid = (frames, 2, 2) if args.toy else (frames, 22, 40)
        row, _ = our_call(model, dims, grid, False, args.runs)
        seconds, peak = statistics.median(row["seconds"]), row["peak"] / 2**30
        rows.append({"tokens": math.prod(grid), "seconds": seconds, "peak": peak})
        print(f"| {math.prod(grid):,} | {seconds:.3f} | {peak:.1f} |", flush=True)
    linear, quadratic = fitted(rows)
    print(f"\nseconds = {linear:.4g} · tokens + {quadratic:.4g} · tokens²", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"device": device_name(), "rows": rows}))


def fitted(rows: Iterable[dict[str, float]]) -> tuple[float, float]:
    """Least squares of the relative deviation."""
    tokens, seconds = (np.array([row[key] for row in rows]) for key in ("tokens", "seconds"))
    terms = np.stack([tokens, tokens**2.0], axis=1) / seconds[:, None]
    linear, quadratic = np.linalg.lstsq(terms, np.ones(len(tokens)), rcond=None)[0]
    return float(linear), float(quadratic)


def plot(args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = json.loads(Path(args.file).read_text())
    rows = found["rows"]
    linear, quadratic = fitted(rows)
    tokens = np.linspace(0, 1.05 * max(row["tokens"] for row in rows), 200)
    thousands = [row["tokens"] / 1000 for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.plot(thousands, [row["seconds"] for row in rows], "o", label="measured")
    left.plot(tokens / 1000, linear * tokens + quadratic * tokens**2, label="both terms")
    left.plot(tokens / 1000, linear * tokens, "--", label="linear term: matrices, norms")
    left.set(xlabel="thousand tokens", ylabel="seconds a call", title="TI2V-5B, one call, bfloat16")
    left.legend(frameon=False)
    right.plot(thousands, [row["peak"] for row in rows], "o-")
    right.set(xlabel="thousand tokens", ylabel="GiB", title="peak memory, weights included", ylim=(0, None))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(found["device"], fontsize=9)
    figure.tight_layout()
    figure.savefig(args.picture, dpi=110)


def device_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "no NVIDIA GPU"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time one call of TI2V-5B's transformer.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("compare", compare), ("scaling", scaling), ("contest", contest)):
        command = commands.add_parser(name)
        command.set_defaults(run=function)
        command.add_argument("--official", help="the official repository of Wan2.2")
        command.add_argument("--mlx_video", help="the repository of mlx-video")
        command.add_argument("--runs", type=int, default=5, help="timed calls of each")
        command.add_argument("--only", help="compare: some of them, with commas: " + ",".join(CONTESTANTS))
        command.add_argument("--keep", help="compare: a folder for everybody's outputs, and where references lie")
        command.add_argument("--toy", action="store_true")
        command.add_argument("--json", help="scaling: a file for its numbers")
        if name == "contest":
            command.add_argument("name", choices=tuple(CONTESTANTS))
            command.add_argument("--out", required=True)
    command = commands.add_parser("plot")
    command.set_defaults(run=plot)
    command.add_argument("file")
    command.add_argument("picture")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
