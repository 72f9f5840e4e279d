# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "numpy>=2", "einops", "easydict", "ftfy==6.3.1",
#   "regex", "tqdm", "pillow",
# ]
# ///
"""The embedded model on the CPU: this package beside the official PyTorch code with the same weights and inputs.

    git clone https://github.com/Wan-Video/Wan2.2 && git -C Wan2.2 checkout 42bf4cf
    uv run python benchmarks/cpu_vs_torch.py mlx cpu.npz                    # times MLX, writes weights and answers
    uv run benchmarks/cpu_vs_torch.py torch cpu.npz --official Wan2.2       # times torch, prints the table

A transformer call and a VAE decode of a whole clip, float32. Both sides take `--threads`, and each line carries wall
time and the CPU time of all threads, of which the second says something on a machine that has other work too; the load
before each side's run is printed. The official decoder gives 12 channels whatever its dimensions: its last layer is
replaced by one with as many as the embedded VAE has.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

CASES = {"transformer": "one transformer call", "decode": "VAE decode of a clip"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare this package's CPU time with PyTorch's.")
    parser.add_argument("side", choices=("mlx", "torch"))
    parser.add_argument("file", type=Path, help="written by mlx, read by torch")
    parser.add_argument("--official", type=Path, metavar="DIR", help="torch: the Wan2.2 repository")
    parser.add_argument("--model", default="tiny", help="mlx: a checkpoint of the embedded model's kind")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the BLAS or of torch")
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    if args.side == "mlx":
        mlx_side(args)
    elif args.official is None:
        parser.error("torch needs --official DIR")
    else:
        torch_side(args)


def timed(call, repeat: int) -> dict[str, float]:
    """Medians over `repeat` calls, after one apart: seconds of wall time, and of all threads together."""
    call()
    walls, cpus = [], []
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"wall": statistics.median(walls), "cpu": statistics.median(cpus)}


def load() -> float:
    return round(os.getloadavg()[0], 2)


# --- here ----------------------------------------------------------------------------------------------------


def mlx_side(args: argparse.Namespace) -> None:
    import mlx_wan

    import mlx.core as mx  # isort: skip
    import numpy as np
    from mlx.utils import tree_flatten

    before = load()
    pipe = mlx_wan.WanPipeline.from_pretrained(args.model, dtype=mx.float32)
    spec, config, vae = pipe.spec, pipe.checkpoint.transformer_config, pipe.checkpoint.vae_config
    stride_t, stride_h, stride_w = vae.stride
    shape = ((spec.num_frames - 1) // stride_t + 1, spec.height // stride_h, spec.width // stride_w)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, *shape, vae.z_dim), dtype=np.float32)
    context = rng.standard_normal((1, config.text_len, config.text_dim), dtype=np.float32)
    x, t, text = mx.array(latents), mx.array([500.0]), mx.array(context)
    calls = {"transformer": lambda: pipe.transformer(x, t, text), "decode": lambda: pipe.vae.decode(x)}
    times = {name: timed(lambda call=call: mx.eval(call()), args.repeat) for name, call in calls.items()}
    arrays = {f"answer/{name}": np.array(call()) for name, call in calls.items()}
    for part, module in {"transformer": pipe.transformer, "vae": pipe.vae}.items():
        arrays |= {f"{part}/{name}": np.array(w) for name, w in tree_flatten(module.parameters())}
    about = {
        "transformer": vars(config),
        "vae": vars(vae),
        "times": times,
        "load": before,
        "threads": args.threads,
        "mlx": mlx_wan.backend.version("mlx"),
        "blas": mlx_wan.backend.prepare().library,
    }
    np.savez(args.file, latents=latents, context=context, about=json.dumps(about), **arrays)
    for name, found in times.items():
        print(f"{CASES[name]}: {1e3 * found['wall']:.1f} ms, {1e3 * found['cpu']:.1f} ms of CPU (load {before})")


# --- there ---------------------------------------------------------------------------------------------------


def torch_side(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "parity"))
    import numpy as np
    import official
    import torch

    before = load()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    with np.load(args.file) as stored:
        arrays = dict(stored)
    about = json.loads(str(arrays.pop("about")))
    wan = official.load(args.official)
    wan.model.flash_attention = attention
    known = {key: v for key, v in about["transformer"].items() if not key.startswith(("image_", "vace_"))}
    transformer = wan.model.WanModel(**known)
    fill(transformer, arrays, "transformer")
    decode = decoder(wan, about["vae"], arrays)
    latents = torch.from_numpy(np.moveaxis(arrays["latents"][0], -1, 0).copy())
    context = torch.from_numpy(arrays["context"][0])
    grid = [size // patch for size, patch in zip(latents.shape[1:], about["transformer"]["patch_size"], strict=True)]
    tokens = grid[0] * grid[1] * grid[2]
    calls = {
        "transformer": lambda: transformer([latents], torch.tensor([500.0]), [context], tokens)[0],
        "decode": lambda: decode(latents[None])[0],
    }
    times = {name: timed(call, args.repeat) for name, call in calls.items()}
    print(f"mlx {about['mlx']} with {about['blas'] or 'its own BLAS'}, load {about['load']}")
    print(f"torch {torch.__version__}, load {before}; {about['threads']} and {args.threads} threads\n")
    print("| what | MLX, ms | torch, ms | ratio | MLX, CPU ms | torch, CPU ms | ratio | relative difference |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, call in calls.items():
        ours, theirs = about["times"][name], times[name]
        columns = [CASES[name]]
        for kind in ("wall", "cpu"):
            columns += [f"{1e3 * ours[kind]:.1f}", f"{1e3 * theirs[kind]:.1f}", f"{ours[kind] / theirs[kind]:.2f}"]
        got, want = arrays[f"answer/{name}"][0], np.moveaxis(call().numpy(), 0, -1)
        columns.append(f"{np.linalg.norm(got - want) / np.linalg.norm(want):.1e}")
        print(f"| {' | '.join(columns)} |")


def attention(q, k, v, q_lens=None, k_lens=None, window_size=(-1, -1), **_):
    """In place of flash attention: torch's own, without the mask that hides nothing here, which would cost time."""
    import torch

    assert k_lens is None or bool((k_lens == k.size(1)).all())
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def fill(module, arrays, part: str) -> None:
    """The arrays of a part, channels last, as the weights of the official module; all of both must be used."""
    import numpy as np
    import torch

    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    state = {}
    for name, array in arrays.items():
        if name.startswith(f"{part}/"):
            array = np.moveaxis(array, -1, 1) if array.ndim > 3 else array
            name = name.removeprefix(f"{part}/")
            state[name] = torch.from_numpy(np.ascontiguousarray(array)).reshape(shapes[name])
    module.load_state_dict(state, strict=True)
    module.eval()


def decoder(wan, config, arrays):
    """latents (1, C, t, h, w) -> pixels, by the official streaming decoder."""
    import torch

    size, side = dict(config), config["patch_size"]
    mean, std = (torch.tensor(size.pop(f"latents_{k}")) for k in ("mean", "std"))
    size["temperal_downsample"] = size.pop("temporal_downsample")
    del size["patch_size"]
    network = wan.vae.WanVAE_(**size)
    first, last, channels = network.encoder.conv1, network.decoder.head[2], 3 * side**2
    network.encoder.conv1 = wan.vae.CausalConv3d(channels, first.out_channels, 3, padding=1)
    network.decoder.head[2] = wan.vae.CausalConv3d(last.in_channels, channels, 3, padding=1)
    fill(network, arrays, "vae")
    unpatchify = wan.vae.unpatchify
    wan.vae.unpatchify = lambda x, patch_size: unpatchify(x, side)  # 2 in the official code, whatever was built
    return lambda latents: network.decode(latents, [mean, 1 / std]).clamp(-1, 1)


if __name__ == "__main__":
    main()
