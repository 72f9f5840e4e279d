"""What the dials of sampling gain and cost: calls, time, PSNR to the run without them, and adherence.

    OPENBLAS_NUM_THREADS=1 uv run python benchmarks/step_cache.py                  # the embedded model, 24 prompts
    uv run python benchmarks/step_cache.py --cache 0.05 0.1 --prompts 200 --json dials.json

Every setting makes the same held-out prompts from the same seeds. PSNR is of the 8-bit frames to those of the run of
all steps, averaged over clips; adherence is the judge's share of clips where everything is right, and of each thing.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx_wan  # first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
import numpy as np

from mlx_wan import backend
from mlx_wan.training.captions import heldout_prompts, names_background
from mlx_wan.training.judge import judge

JUDGED = ("all", "colour", "shape", "motion", "background")


@dataclass
class Row:
    """A setting and what came of it. seconds: of denoising alone."""

    name: str
    options: dict[str, Any]
    calls: int = 0
    seconds: float = 0.0
    psnr: list[float] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure step caching and guidance on a part of the steps.")
    parser.add_argument("--model", default="tiny", help="the embedded 'tiny' model or a checkpoint folder of its kind")
    parser.add_argument("--prompts", type=int, default=24, help="how many held-out prompts (%(default)s)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("--size", type=int, help="side of the frames, a multiple of 32 (default: the model's)")
    parser.add_argument("--frames", type=int, help="frames of a clip, 4n+1 (default: the model's)")
    parser.add_argument("--cache", type=float, nargs="*", default=[0.03, 0.05, 0.1, 0.2], help="thresholds")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    args = parser.parse_args(argv)
    pipe = mlx_wan.WanPipeline.from_pretrained(args.model, low_memory=False)
    options = {"width": args.size, "height": args.size, "num_frames": args.frames, "num_inference_steps": args.steps}
    table = measure(pipe, rows(args.cache), args.prompts, options)
    print("\n".join(shown(table)))
    print(f"\n{args.prompts} prompts, {backend.device_name()}")
    if args.json:
        args.json.write_text(json.dumps([summary(row, table[0]) for row in table], indent=2) + "\n")
    return 0


def rows(thresholds: list[float]) -> list[Row]:
    """All steps first; then caches, parts of the guidance, fewer steps to compare with, and both dials together."""
    found = [Row("every step", {})]
    found += [Row(f"--cache {x:g}", {"cache": x}) for x in thresholds]
    for low, high in ((0.3, 1), (0.6, 1), (0.3, 0.95)):
        found.append(Row(f"--guidance_interval {low:g} {high:g}", {"guidance_interval": (low, high)}))
    both = {"cache": 0.1, "guidance_interval": (0.3, 1)}
    return [
        *found,
        Row("--cache 0.1 --guidance_interval 0.3 1", both),
        *(Row(f"--sample_steps {n}", {"num_inference_steps": n}) for n in (15, 10)),
    ]


def measure(pipe: mlx_wan.WanPipeline, table: list[Row], prompts: int, options: dict[str, Any]) -> list[Row]:
    """Fills the rows, prompt by prompt, so that each setting meets the same load of the machine."""
    counted = Counted(pipe)
    pipe("a red circle", num_inference_steps=1, output_type="latent")  # loads and compiles
    for i, (prompt, scene) in enumerate(heldout_prompts(prompts, 0)):
        exact = None
        for row in table:
            counted.calls, begun = 0, time.perf_counter()
            latents = pipe(prompt, seed=i, output_type="latent", **(options | row.options)).latents
            row.seconds += time.perf_counter() - begun
            row.calls += counted.calls
            frames = np.round((np.clip(np.array(pipe.vae.decode(latents)[0]), -1, 1) + 1) * 127.5).astype(np.uint8)
            exact = frames if exact is None else exact
            if row is not table[0]:
                row.psnr.append(psnr(frames, exact))
            row.verdicts.append(judge(frames, scene) | {"names_background": names_background(prompt, scene)})
        if sys.stderr.isatty():
            print(f"\r{i + 1}/{prompts}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return table


class Counted:
    """A pipeline's transformer that counts its calls, in all runs."""

    def __init__(self, pipe: mlx_wan.WanPipeline) -> None:
        self.calls, self._transformer = 0, pipe.transformer
        self.read = self._transformer.read
        pipe._load_transformer = lambda part: self  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, *inputs: Any) -> mx.array:
        self.calls += 1
        return self._transformer(*inputs)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of 8-bit frames, in dB; 99 when they are equal."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 99.0 if error == 0 else min(10 * float(np.log10(255**2 / error)), 99.0)


def summary(row: Row, every: Row) -> dict[str, Any]:
    """A row's numbers; times and calls by clip, and faster than the run of all steps by `speed`."""
    clips = len(row.verdicts)
    named = [v["background"] for v in row.verdicts if v["names_background"]]
    rates = {name: float(np.mean([v[name] for v in row.verdicts])) for name in JUDGED[:-1]}
    return {
        "setting": row.name,
        "calls": row.calls / clips,
        "seconds": row.seconds / clips,
        "speed": every.seconds / row.seconds,
        "psnr": float(np.mean(row.psnr)) if row.psnr else None,
        "psnr_least": float(np.min(row.psnr)) if row.psnr else None,
        "adherence": rates | {"background": float(np.mean(named)) if named else None},
    }


def shown(table: list[Row]) -> list[str]:
    """The table in Markdown."""
    lines = [
        f"| setting | calls | s a clip | faster | PSNR, dB (least) | {' | '.join(JUDGED)} |",
        f"| --- {'| ---: ' * (4 + len(JUDGED))}|",
    ]
    for row in table:
        found = summary(row, table[0])
        db = "" if found["psnr"] is None else f"{found['psnr']:.1f} ({found['psnr_least']:.1f})"
        rates = ["–" if (r := found["adherence"][name]) is None else f"{r:.0%}" for name in JUDGED]
        name, faster = f"`{row.name}`" if row.options else row.name, f"{found['speed']:.2f}×"
        cells = [name, f"{found['calls']:.1f}", f"{found['seconds']:.2f}", faster, db, *rates]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
