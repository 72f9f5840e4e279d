"""Draws the curves of both training stages into one picture, from the logs that `mlx-wan train` wrote.

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
from matplotlib.figure import Figure

# One panel each: stage, number in the log, title, logarithmic axis.
PANELS = (
    (0, "loss", "autoencoder: training loss", True),
    (0, "val_psnr", "autoencoder: held-out PSNR in dB", False),
    (1, "loss", "transformer: training loss", True),
    (1, "val_loss", "transformer: held-out loss", True),
)


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
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), dpi=120, layout="constrained")
    for axis, (stage, name, title, logarithmic) in zip(axes.flat, PANELS, strict=True):
        steps, values = logs[stage].get(name, ([], []))
        axis.plot(steps, values, color="tab:blue" if stage == 0 else "tab:orange", linewidth=1.3)
        if name == "val_psnr" and "val_psnr_min" in logs[stage]:
            axis.plot(*logs[stage]["val_psnr_min"], color="tab:blue", linewidth=1, linestyle=":")
            axis.legend(["mean of the clips", "worst clip"])
        if logarithmic and values:
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3, which="both")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the curves of both training stages into one picture.")
    parser.add_argument("run_vae", type=Path, help="--run folder of stage one")
    parser.add_argument("run_tiny", type=Path, help="--run folder of stage two")
    parser.add_argument("out", type=Path, help="PNG to write")
    args = parser.parse_args()
    figure = draw([read_log(args.run_vae), read_log(args.run_tiny)])
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
