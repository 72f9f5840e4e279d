"""The VAE's speed, memory and error beside the official PyTorch code and mlx-video, at true size with random weights.

    python benchmarks/vae_speed.py --official Wan2.2                 # TI2V's, 121 frames of 1280x704; a GPU and torch
    python benchmarks/vae_speed.py --official Wan2.2 --vae 2.1 --size 832*480 --frames 81
    uv run python benchmarks/vae_speed.py --width 16 --size 64*64 --frames 9            # small enough for a CPU

`--official` is a checkout of the official repository, which is not part of this one, `--mlx_video` one of mlx-video
(for TI2V's alone); without them only this project runs.
Each row is a process of its own. Weights, latents and video follow from their names, so all rows compute the same.
Seconds are medians over whole clips, after a warm-up of the first pieces. Errors are of these pieces, against the
official code in float32 without TF32 (without `--official`: against this project in float32): norm of the difference
over the norm, and for the decoder PSNR over the range [-1, 1].
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np

COMPARED = 3  # pieces
REFERENCE = "official float32, exact"
Shape = tuple[int, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the VAE beside the official code.")
    parser.add_argument("--official", type=Path, help="checkout of the official repository")
    parser.add_argument("--mlx_video", type=Path, help="checkout of mlx-video")
    parser.add_argument("--vae", choices=("2.2", "2.1"), default="2.2")
    parser.add_argument("--size", default="1280*704", help="WIDTH*HEIGHT")
    parser.add_argument("--frames", type=int, default=121, help="4n+1")
    parser.add_argument("--width", type=int, help="base width of the encoder, of small models")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", nargs="+", help="which to measure; all by default")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(args, *args.child)
        return 0
    rows = args.rows or ["mlx-wan float32", "mlx-wan bfloat16", "mlx-wan float16"]
    if args.official and not args.rows:
        rows = ["official float32", "official bfloat16", *rows]
    if args.mlx_video and not args.rows:
        rows.append("mlx-video float32")
    with tempfile.TemporaryDirectory() as folder:
        if args.official:
            child(REFERENCE, folder)
        print("| | decode, s | peak, GiB | error | PSNR, dB | encode, s | peak, GiB | error |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        wanted = None
        for row in ([REFERENCE] if args.official else []) + rows:
            found = Path(folder, row)
            try:
                if row != REFERENCE:
                    child(row, folder)
            except subprocess.CalledProcessError:  # out of memory, as a rule
                print(f"| {row} | failed | | | | | | |", flush=True)
                continue
            decoded, encoded = np.load(f"{found}.decoded.npy"), np.load(f"{found}.encoded.npy")
            wanted = wanted or (decoded, encoded)
            told = json.loads(Path(f"{found}.json").read_text())
            psnr = 10 * np.log10(4 / max(np.mean((decoded - wanted[0]) ** 2), 1e-20))
            print(
                f"| {row} | {told['decode']:.2f} | {told['decode peak']:.2f} | {relative(decoded, wanted[0]):.1e} | "
                f"{psnr:.1f} | {told['encode']:.2f} | {told['encode peak']:.2f} | {relative(encoded, wanted[1]):.1e} |",
                flush=True,
            )
    return 0


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def child(row: str, folder: str) -> None:
    subprocess.run([sys.executable, *sys.argv, "--child", row, folder], check=True)


def measure(args: argparse.Namespace, row: str, folder: str) -> None:
    """What one row of the table needs, into files."""
    width, height = map(int, args.size.split("*"))
    space, channels = (16, 48) if args.vae == "2.2" else (8, 16)
    latents = drawn("latents", (1, (args.frames - 1) // 4 + 1, height // space, width // space, channels))
    video = np.clip(drawn("video", (1, args.frames, height // 8, width // 8, 3)), -1, 1)
    video = video.repeat(8, axis=2).repeat(8, axis=3)  # squares, not noise of single pixels
    kind, precision = row.split(" ", 1)
    runner = {"official": Official, "mlx-video": MLXVideo, "mlx-wan": Ours}[kind](args, precision)
    exact = row == REFERENCE
    told: dict[str, float] = {}
    for name, call, given in (("decode", runner.decode, latents), ("encode", runner.encode, video)):
        few = 1 + 4 * (COMPARED - 1)
        result = call(given[:, :COMPARED] if name == "decode" else given[:, :few])
        np.save(Path(folder, f"{row}.{name}d.npy"), result[:, :, ::2, ::2].astype(np.float32))
        seconds = []
        for _ in range(0 if exact else args.repeat):
            runner.reset()
            start = time.perf_counter()
            call(given, False)
            seconds.append(time.perf_counter() - start)
        told |= {name: statistics.median(seconds or [float("nan")]), f"{name} peak": runner.peak()}
    Path(folder, f"{row}.json").write_text(json.dumps(told))


def drawn(name: str, shape: Shape) -> np.ndarray:
    """Standard normal float32 values that follow from the name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)


def parameter(name: str, shape: Shape) -> np.ndarray:
    """A convolution (O, ..., I) that keeps its input's size, a small bias, or a scale near 1."""
    values = drawn(name, shape)
    if len(shape) > 1:
        return values / np.float32(np.prod(shape[1:])) ** 0.5
    return 1 + values / 10 if name.endswith("gamma") else values / 10


class Ours:
    """This project's VAE; frames leave as they come, nothing else of the clip is kept."""

    def __init__(self, args: argparse.Namespace, precision: str) -> None:
        import mlx_wan  # noqa: F401  first: it chooses the BLAS before mlx.core is loaded

        import mlx.core as mx  # isort: skip
        from mlx.utils import tree_flatten, tree_unflatten

        from mlx_wan.models.vae21 import VAE21Config, WanVAE21
        from mlx_wan.models.vae22 import VAEConfig, WanVAE22

        self.mx = mx
        if args.vae == "2.2":
            sizes = {"dim": args.width, "dec_dim": args.width} if args.width else {}
            self.vae = WanVAE22(VAEConfig(**sizes, latents_mean=(0.0,) * 48, latents_std=(1.0,) * 48))
        else:
            sizes = {"dim": args.width} if args.width else {}
            self.vae = WanVAE21(VAE21Config(**sizes, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16))
        dtype, named = getattr(mx, precision), []
        for name, array in tree_flatten(self.vae.parameters()):
            value = mx.array(parameter(name, array.shape))
            named.append((name, value.astype(dtype) if value.ndim > 1 else value))
            mx.eval(named[-1][1])
        self.vae.update(tree_unflatten(named))

    def decode(self, latents: np.ndarray, kept: bool = True) -> np.ndarray:
        return self._take(self.vae.stream_decode(self.mx.array(latents)), kept)

    def encode(self, video: np.ndarray, kept: bool = True) -> np.ndarray:
        return self._take(self.vae.stream_encode(video), kept)

    def _take(self, pieces: Any, kept: bool) -> np.ndarray:
        arrays = []
        for piece in pieces:
            self.mx.eval(piece)
            corner = piece[:, :1, :1, :1] + 0  # an array of its own: the piece is to leave
            arrays.append(np.array(piece if kept else corner))
        return np.concatenate(arrays, axis=1)

    def reset(self) -> None:
        self.mx.clear_cache()
        self.mx.reset_peak_memory()

    def peak(self) -> float:
        return self.mx.get_peak_memory() / 2**30


class MLXVideo(Ours):
    """mlx-video's, as its generate.py calls it: in the tiles that it chooses by itself."""

    def __init__(self, args: argparse.Namespace, precision: str) -> None:
        super().__init__(args, precision)
        for name in ("mlx_video", "mlx_video.models", "mlx_video.models.ltx_2", "mlx_video.models.ltx_2.video_vae"):
            package = types.ModuleType(name)  # whose own files import much more
            package.__path__ = [str(args.mlx_video.joinpath(*name.split(".")))]
            sys.modules[name] = package
        module = importlib.import_module("mlx_video.models.wan_2.vae22")
        tiling = importlib.import_module("mlx_video.models.ltx_2.video_vae.tiling")
        width, height = map(int, args.size.split("*"))
        self.tiles = tiling.TilingConfig.auto(height, width, args.frames)
        self.mean, self.std = module.VAE22_MEAN, module.VAE22_STD
        from mlx.utils import tree_flatten

        parameters, mx = dict(tree_flatten(self.vae.parameters())), self.mx
        weights = {name: mx.moveaxis(array, -1, 1) if array.ndim > 1 else array for name, array in parameters.items()}
        weights = module.sanitize_wan22_vae_weights(weights, include_encoder=True)
        sizes = {"dim": args.width} if args.width else {}
        self.encoder = module.Wan22VAEEncoder(**sizes)
        self.decoder = module.Wan22VAEDecoder(**sizes, **({"dec_dim": args.width} if args.width else {}))
        for half, own in ((self.encoder, ("encoder.", "conv1.")), (self.decoder, ("decoder.", "conv2."))):
            half.load_weights([(name, array) for name, array in weights.items() if name.startswith(own)])
            mx.eval(half.parameters())
        del self.vae

    def decode(self, latents: np.ndarray, kept: bool = True) -> np.ndarray:
        given = self.mx.array(latents)
        return self._take(
            [self.decoder(given) if self.tiles is None else self.decoder.decode_tiled(given, self.tiles)], kept
        )

    def encode(self, video: np.ndarray, kept: bool = True) -> np.ndarray:
        return self._take([self.encoder.encode(self.mx.array(video)) * self.std + self.mean], kept)


class Official:
    """The official VAE in PyTorch, called as the official pipeline calls it."""

    def __init__(self, args: argparse.Namespace, precision: str) -> None:
        import torch

        self.torch = torch
        torch.backends.cudnn.allow_tf32 = "exact" not in precision
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, precision.split(",")[0])
        file = args.official / "wan" / "modules" / ("vae2_2.py" if args.vae == "2.2" else "vae2_1.py")
        spec = importlib.util.spec_from_file_location("official_vae", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        wide = {"dim": args.width or (160 if args.vae == "2.2" else 96), "z_dim": 48 if args.vae == "2.2" else 16}
        if args.vae == "2.2" and args.width:
            wide["dec_dim"] = args.width
        model = module.WanVAE_(**wide, temperal_downsample=[False, True, True]).eval()
        state = {}
        for name, old in model.state_dict().items():
            shape = tuple(old.shape)
            turned = (shape[0], *shape[2:], shape[1]) if name.endswith("weight") else (shape[0],)
            value = np.moveaxis(parameter(name, turned), -1, 1) if len(turned) > 1 else parameter(name, turned)
            state[name] = torch.from_numpy(np.ascontiguousarray(value)).reshape(shape)
        model.load_state_dict(state)
        self.model = model.to(self.device, self.dtype)
        self.scale = [torch.zeros(wide["z_dim"]).to(self.device, self.dtype)]
        self.scale.append(torch.ones(wide["z_dim"]).to(self.device, self.dtype))

    def decode(self, latents: np.ndarray, kept: bool = True) -> np.ndarray:
        return self._call(lambda x: self.model.decode(x, self.scale).float().clamp_(-1, 1), latents, kept)

    def encode(self, video: np.ndarray, kept: bool = True) -> np.ndarray:
        return self._call(lambda x: self.model.encode(x, self.scale).float(), video, kept)

    def _call(self, work: Any, given: np.ndarray, kept: bool) -> np.ndarray:
        with self.torch.no_grad():
            x = self.torch.from_numpy(np.moveaxis(given, -1, 1).copy()).to(self.device, self.dtype)
            out = work(x)
            if self.device == "cuda":
                self.torch.cuda.synchronize()
            return np.moveaxis((out if kept else out[..., :1, :1]).cpu().numpy(), 1, -1)

    def reset(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        return self.torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else float("nan")


if __name__ == "__main__":
    sys.exit(main())
