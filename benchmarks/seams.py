"""How visible the seams of `--extend` are: the jump at each, as a multiple of the usual difference of two frames.

    uv run python benchmarks/seams.py                       # the embedded model
    uv run python benchmarks/seams.py --ckpt_dir DIR --overlaps 1 5 --parts 2

A seam of 1 cannot be told from any other step. `joined` puts two parts side by side of which neither knows the other:
a seam that is certainly seen.
"""

import argparse
import time

import numpy as np

import mlx_wan
from mlx_wan import extend

PROMPTS = (
    "a red circle moves right on a black background",
    "a blue square bounces on a white background",
    "a green triangle moves up on a grey background",
)


def make(pipe: mlx_wan.WanPipeline, prompt: str, overlap: int, parts: int, **options: int) -> np.ndarray:
    """Frames (T, H, W, 3) of a video of several parts."""
    spec = pipe.spec
    defaults = {"width": spec.width, "height": spec.height, "num_frames": spec.num_frames}
    defaults["num_inference_steps"] = spec.num_inference_steps
    events = extend.stream(pipe, prompt, parts, overlap, **defaults | options)
    return np.concatenate([event.value for event in events if event.stage == "frames"])


def seams(frames: np.ndarray, num_frames: int, overlap: int) -> list[float]:
    """The jump at each seam of such a video."""
    return [extend.seam(frames, at) for at in range(num_frames, len(frames), num_frames - overlap)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the seams of extended videos.")
    parser.add_argument("--ckpt_dir", default="tiny")
    parser.add_argument("--overlaps", type=int, nargs="+", default=[1, 5, 9])
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--frames", type=int)
    args = parser.parse_args()
    pipe = mlx_wan.WanPipeline.from_pretrained(args.ckpt_dir)
    options = {"num_inference_steps": args.steps, "num_frames": args.frames}
    options = {name: value for name, value in options.items() if value}
    length = args.frames or pipe.spec.num_frames
    rows: dict[str, list[float]] = {}
    start = time.perf_counter()
    for number, prompt in enumerate(PROMPTS):
        for overlap in args.overlaps:
            frames = make(pipe, prompt, overlap, args.parts, seed=number, **options)
            rows.setdefault(f"{overlap}", []).extend(seams(frames, length, overlap))
        alone = [make(pipe, prompt, 1, 1, seed=number + 100 * i, **options) for i in range(2)]
        rows.setdefault("joined", []).append(extend.seam(np.concatenate(alone), length))
    print("| overlap | seams | mean | largest |\n| --- | --- | --- | --- |")
    for name, found in rows.items():
        print(f"| {name} | {len(found)} | {np.mean(found):.2f} | {max(found):.2f} |")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
