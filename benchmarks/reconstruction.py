"""How well the embedded model's VAE gives back held-out clips: PSNR over 64 of them, in dB.

uv run python benchmarks/reconstruction.py [--model tiny] [--clips 64]
"""

import argparse

import mlx_wan  # first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
import numpy as np

from mlx_wan.training.objective import psnr
from mlx_wan.training.scenes import render, sample_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clips", type=int, default=64)
    args = parser.parse_args()
    pipe = mlx_wan.WanPipeline.from_pretrained(args.model)
    _, scenes, _ = sample_batch(np.random.default_rng(1_000_000), args.clips, held_out=True)
    scores = []
    for params in scenes:
        video = render(mx.array(params[None]), pipe.spec.num_frames, pipe.spec.height, pipe.spec.width)
        error = pipe.vae.decode(pipe.vae.encode(video)) - video
        scores.append(psnr(mx.square(error).mean().item()))
    print(f"{len(scores)} clips: mean {np.mean(scores):.1f} dB, worst {min(scores):.1f}, best {max(scores):.1f}")


if __name__ == "__main__":
    main()
