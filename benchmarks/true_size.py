"""What a small machine can try of TI2V-5B at its true size, with random weights.

    uv run python benchmarks/true_size.py headers   # inspect and locate a sparse folder of all 34 GB
    uv run python benchmarks/true_size.py block     # one transformer block, 3072 wide
    uv run python benchmarks/true_size.py decoder   # the VAE at its full width, one latent frame

Each is a process of its own, so that its peak memory is its own; float32 unless a GPU is there.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import mlx_wan  # noqa: F401  first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip

from mlx_wan import backend
from mlx_wan.models.transformer import Block, TransformerConfig, rope_table
from mlx_wan.models.vae22 import VAEConfig, WanVAE22
from mlx_wan.weights.inspect import describe
from mlx_wan.weights.locate import locate
from mlx_wan.weights.save import DTYPE_CODES
from mlx_wan.weights.tensors import DTYPES
from mlx_wan.zoo import LATENTS_MEAN, LATENTS_STD

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
# The official files' types; .safetensors in place of .pth for the VAE and the text encoder, which the layout allows.
FILES = {
    "transformer": ("diffusion_pytorch_model.safetensors", "float32"),
    "text_encoder": ("models_t5_umt5-xxl-enc-bf16.safetensors", "bfloat16"),
    "vae": ("Wan2.2_VAE.safetensors", "float32"),
}
CONFIG = {"_class_name": "WanModel", "model_type": "ti2v", "num_heads": 24, "num_layers": 30, "text_len": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description="Try parts of TI2V-5B at its true size.")
    parser.add_argument("part", choices=("headers", "block", "decoder"))
    parser.add_argument("--size", type=int, default=64, help="block, decoder: side of the picture, a multiple of 32")
    parser.add_argument("--frames", type=int, default=5, help="block: frames of the clip, 4n+1")
    args = parser.parse_args()
    if args.part == "headers":
        headers()
    elif args.part == "block":
        block(args.size, args.frames)
    else:
        decoder(args.size)
    print(f"peak memory of the process {backend.peak_memory() / 2**30:.2f} GiB")


def headers() -> None:
    """Time what reads headers alone on a folder whose files are as long as the real ones, and empty."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_sparse(Path(name))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for call in (describe, locate):
            start = time.perf_counter()
            call(folder)
            print(f"{call.__name__} of {size / 1e9:.1f} GB: {time.perf_counter() - start:.2f} s")
        print(f"which is {locate(folder).spec.name}")


def write_sparse(folder: Path) -> Path:
    """A TI2V-5B folder in the official layout whose tensor files have headers, and holes instead of values."""
    names = json.loads((GOLDEN / "names.json").read_text())["ti2v-5B"]
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for part, (file, dtype) in FILES.items():
        header, position = {}, 0
        for name, shape in names[part].items():
            end = position + math.prod(shape) * DTYPES[dtype][0]
            header[name] = {"dtype": DTYPE_CODES[dtype], "shape": shape, "data_offsets": [position, end]}
            position = end
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + position)
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_bytes((GOLDEN / "tokenizer.json").read_bytes())
    return folder


def block(size: int, frames: int) -> None:
    """One block of the transformer on the tokens of a small clip."""
    config, dtype = TransformerConfig(), backend.default_dtype()  # the defaults are the 5B's
    grid = ((frames - 1) // 4 + 1, size // 32, size // 32)
    tokens = grid[0] * grid[1] * grid[2]
    layer = Block(config, dtype)
    layer.set_dtype(dtype, lambda kind: mx.issubdtype(kind, mx.floating))
    mx.eval(layer.parameters())
    x = mx.random.normal((1, tokens, config.dim))
    context = mx.random.normal((1, config.text_len, config.dim)).astype(dtype)
    rope = rope_table(grid, config.dim // config.num_heads)
    seconds = timed(lambda: layer(x, context, mx.zeros((1, 1, 6, config.dim)), rope))
    print(f"one block of {config.num_layers}, {tokens} tokens, {dtype}: {seconds:.2f} s, on {backend.device_name()}")


def decoder(size: int) -> None:
    """Decode one latent frame, the first of a clip, with the VAE at its full width."""
    vae = WanVAE22(VAEConfig(latents_mean=LATENTS_MEAN, latents_std=LATENTS_STD))
    mx.eval(vae.decoder.parameters(), vae.conv2.parameters())
    latents = mx.random.normal((1, 1, size // 16, size // 16, 48))
    seconds = timed(lambda: next(vae.stream_decode(latents)))
    print(f"one latent frame to {size}x{size} pixels, float32: {seconds:.2f} s, on {backend.device_name()}")


def timed(call) -> float:
    """Seconds of the second of two calls."""
    mx.eval(call())
    start = time.perf_counter()
    mx.eval(call())
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
