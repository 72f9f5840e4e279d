"""How well a model shows what it is told: generates clips for held-out prompts and judges them without a network.

    uv run python benchmarks/adherence.py                       # text to video, 200 prompts, the embedded model
    uv run python benchmarks/adherence.py --i2v                 # from a picture: the first frame of the true clip
    uv run python benchmarks/adherence.py --ground-truth        # the ceiling: judges renderings of the scenes

The prompts name (colour, shape, motion) combinations that training never shows (mlx_wan.training.world).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx_wan  # first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
import numpy as np
from PIL import Image

from mlx_wan.conditioning import to_uint8
from mlx_wan.errors import UserError, WanError
from mlx_wan.training.captions import heldout_prompts, names_background
from mlx_wan.training.judge import judge, summarise
from mlx_wan.training.scenes import encode_scenes, render
from mlx_wan.training.world import Scene

# What the embedded model was asked to reach: share of clips, and dB.
GOALS = {"colour": 0.97, "shape": 0.92, "motion": 0.92, "all": 0.85}
GOALS_I2V = {"motion": 0.85, "first_frame_psnr": 28.0}

Generate = Callable[[str, Scene, int], np.ndarray]  # prompt, scene, seed -> uint8 (T, H, W, 3)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.prompts < 1:
            raise UserError(f"--prompts {args.prompts}: give at least 1")
        report = evaluate(_generator(args), args.prompts, args.seed, i2v=args.i2v, sheet=args.sheet)
    except WanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    report = {
        "model": "ground truth" if args.ground_truth else args.model,
        "i2v": args.i2v,
        "seed": args.seed,
        **report,
    }
    print(table(report))
    if args.json:
        _write_whole(args.json, (json.dumps(report, indent=2) + "\n").encode())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Judge how well a model's clips show their prompts.")
    parser.add_argument("--model", default="tiny", help="the embedded 'tiny' model or a checkpoint folder")
    parser.add_argument("--prompts", type=int, default=200, help="how many held-out prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; clip i is generated from seed + i")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--i2v", action="store_true", help="give the first frame of the true clip as the picture")
    parser.add_argument("--ground-truth", action="store_true", help="judge renderings of the scenes, no model")
    parser.add_argument("--json", type=Path, help="write the report, with every verdict, to this file")
    parser.add_argument("--sheet", type=Path, help="write a picture of the first 24 clips to this file")
    return parser


def evaluate(
    generate: Generate, prompts: int, seed: int = 0, *, i2v: bool = False, sheet: Path | None = None
) -> dict[str, Any]:
    """Generate and judge a clip for each held-out prompt; see summarise for what comes back, and "verdicts"."""
    verdicts, psnrs, strips = [], [], []
    started = time.perf_counter()
    for i, (prompt, scene) in enumerate(heldout_prompts(prompts, seed)):
        frames = generate(prompt, scene, seed + i)
        verdict = judge(frames, scene)
        verdict.update(prompt=prompt, seed=seed + i, names_background=names_background(prompt, scene))
        if i2v:
            verdict["first_frame_psnr"] = psnr(frames[0], first_frame(scene, *frames.shape[1:3]))
            psnrs.append(verdict["first_frame_psnr"])
        verdicts.append(verdict)
        if sheet and i < 24:
            strips.append(np.concatenate(frames[:: max(1, (len(frames) - 1) // 6)][:7], axis=1))
        if sys.stderr.isatty():
            done = np.mean([v["all"] for v in verdicts])
            print(f"\r{i + 1}/{prompts}  all {done:.1%}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    report = summarise(verdicts)
    named = [v["background"] for v in verdicts if v["names_background"]]
    report["rates"]["background"] = float(np.mean(named)) if named else None
    if i2v:
        report["first_frame_psnr"] = {"mean": float(np.mean(psnrs)), "least": float(np.min(psnrs))}
    report["seconds_per_clip"] = (time.perf_counter() - started) / prompts
    if sheet:
        _write_sheet(sheet, strips)
    return {**report, "verdicts": verdicts}


def _generator(args: argparse.Namespace) -> Generate:
    if args.ground_truth:
        return lambda prompt, scene, seed: to_uint8(render(mx.array(encode_scenes([scene])))[0])
    pipe = mlx_wan.WanPipeline.from_pretrained(args.model)
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}

    def generate(prompt: str, scene: Scene, seed: int) -> np.ndarray:
        image = Image.fromarray(first_frame(scene, pipe.spec.height, pipe.spec.width)) if args.i2v else None
        return pipe(prompt, image=image, seed=seed, **options).frames

    return generate


def first_frame(scene: Scene, height: int, width: int) -> np.ndarray:
    """The first frame of the scene's true clip at a video's size, uint8 (height, width, 3)."""
    return to_uint8(render(mx.array(encode_scenes([scene])), 1, height, width)[0, 0])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; 99 when they are equal."""
    if a.shape != b.shape:
        raise WanError(f"the first frame is {a.shape[1]}x{a.shape[0]}, the picture {b.shape[1]}x{b.shape[0]}")
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


# ---- the report --------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report for people: rates beside their goals, rates by value, and what was taken for what."""
    goals = GOALS_I2V if report["i2v"] else GOALS
    task = "image to video" if report["i2v"] else "text to video"
    lines = [f"{report['model']}, {task}: {report['clips']} held-out prompts", ""]
    for name, rate in report["rates"].items():
        if rate is None:
            continue
        goal = f"  goal {goals[name]:.0%}" if name in goals else ""
        note = "  (where the prompt names it)" if name == "background" else ""
        lines.append(f"  {name:<12}{rate:7.1%}{goal}{note}")
    if report["i2v"]:
        found = report["first_frame_psnr"]
        goal = GOALS_I2V["first_frame_psnr"]
        lines.append(f"  first frame  mean {found['mean']:.1f} dB, least {found['least']:.1f} dB  goal {goal:.0f} dB")
    lines.append(f"  {report['seconds_per_clip']:.2f} s a clip")
    for name, values in report["by_value"].items():
        lines += ["", f"by {name}, over objects"]
        lines += [
            f"  {value:<10}{right:4d} of {of:<4d}{right / of:7.1%}" for value, (right, of) in sorted(values.items())
        ]
    lines += ["", "taken for another"]
    lines += list(_mistakes(report["confusion"])) or ["  nothing"]
    return "\n".join(lines)


def _mistakes(confusion: dict[str, dict[str, dict[str, int]]]) -> Iterator[str]:
    for name, rows in confusion.items():
        wrong = [(n, want, got) for want, row in rows.items() for got, n in row.items() if got != want]
        for n, want, got in sorted(wrong, reverse=True):
            yield f"  {name:<8}{want:>10} as {got:<10}{n:4d}"


def _write_sheet(path: Path, strips: list[np.ndarray]) -> None:
    """Two columns of clips, seven frames each."""
    if len(strips) % 2:
        strips = [*strips, np.zeros_like(strips[0])]
    rows = [np.concatenate(strips[i : i + 2], axis=1) for i in range(0, len(strips), 2)]
    part = path.with_name(path.name + ".part")
    Image.fromarray(np.concatenate(rows)).save(part, format="PNG")
    os.replace(part, path)


def _write_whole(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
