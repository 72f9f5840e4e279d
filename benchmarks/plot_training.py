"""Draws the curves of training runs into one picture, a row each, from the logs that `mlx-wan train` wrote.

uv run python benchmarks/plot_training.py RUN_VAE RUN_TINY docs/images/training.png
"""

import argparse
import json
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# What a run of either stage has in its log: number held out, name of the stage, title, logarithmic axis, colour.
KINDS = {
    "val_psnr": ("autoencoder", "held-out PSNR in dB", False, "tab:blue"),
    "val_loss": ("transformer", "held-out loss", True, "tab:orange"),
}


def read_log(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """name -> (steps, values) of RUN/log.jsonl; a step that is there twice counts as it was done last."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise SystemExit(f"error: {path} does not exist; give the --run folder of mlx-wan train")
    curves: dict[str, dict[int, float]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            step = row.pop("step")
        except (ValueError, KeyError, AttributeError):
            print(f"note: {path}, line {number} is no row of a log; passed over", file=sys.stderr)
            continue
        for name, value in row.items():
            curves.setdefault(name, {})[step] = value
    return {name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in curves.items()}


def draw(logs: list[dict[str, tuple[list[int], list[float]]]]) -> Figure:
    """One row a run: its training loss, and what it reached on held-out clips."""
    figure, axes = plt.subplots(len(logs), 2, figsize=(10, 3 * len(logs)), dpi=120, layout="constrained", squeeze=False)
    for row, log in zip(axes, logs, strict=True):
        number = next(name for name in KINDS if name in log)
        stage, title, logarithmic, colour = KINDS[number]
        _curve(row[0], log["loss"], f"{stage}: training loss", True, colour)
        _curve(row[1], log[number], f"{stage}: {title}", logarithmic, colour)
        if "val_psnr_min" in log:
            row[1].plot(*log["val_psnr_min"], color=colour, linewidth=1, linestyle=":")
            row[1].legend(["mean of the clips", "worst clip"])
    return figure


def _curve(axis: Axes, points: tuple[list[int], list[float]], title: str, logarithmic: bool, colour: str) -> None:
    axis.plot(*points, color=colour, linewidth=1.3)
    if logarithmic:
        axis.set_yscale("log")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3, which="both")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the curves of training runs into one picture.")
    parser.add_argument("runs", type=Path, nargs="+", help="--run folders of either stage")
    parser.add_argument("out", type=Path, help="PNG to write")
    args = parser.parse_args()
    figure = draw([read_log(run) for run in args.runs])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_name(f".{args.out.name}.partial")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, args.out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
