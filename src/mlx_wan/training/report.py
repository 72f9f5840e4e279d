"""How a run went, as one HTML page that needs nothing else: curves drawn as SVG, previews inside."""

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

from mlx_wan.errors import UserError
from mlx_wan.weights.save import replacing

# Curves of the page: title, and the beginnings of the names of the numbers that it shows.
CHARTS = (
    ("Loss", ("loss",)),
    ("Validation loss", ("val_",)),
    ("Learning rate", ("learning_rate",)),
    ("Gradient norm before clipping", ("grad_norm",)),
    ("Clips a second", ("clips_per_s",)),
    ("Peak memory, GiB", ("peak_gib",)),
)
_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 240, 64, 24
_STYLE = (
    "body{font:14px system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1e293b}"
    "svg{width:100%;height:auto}img{max-width:100%}table{border-collapse:collapse}td{padding:.1rem .8rem .1rem 0;"
    "vertical-align:top}td+td{overflow-wrap:anywhere}text{font:11px system-ui,sans-serif;fill:#64748b}"
)


def write_report(run: Path) -> Path:
    """RUN/report.html of a run's log.jsonl, run.json and previews. UserError if there is no log."""
    log = run / "log.jsonl"
    try:
        rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    except OSError as error:
        raise UserError(f"{log}: cannot be read ({error.strerror}); give the folder of a run") from None
    except ValueError:
        raise UserError(f"{log}: is not a log of this program") from None
    path = run / "report.html"
    with replacing(path) as partial:
        partial.write_text(page(run, rows), encoding="utf-8")
    return path


def page(run: Path, rows: list[dict[str, float]]) -> str:
    """The page as text."""
    title = f"Training run {run.resolve().name}"
    parts = [f"<h1>{html.escape(title)}</h1>", _summary(rows)]
    for name, beginnings in CHARTS:
        lines = _lines(rows, beginnings)
        if lines:
            parts.append(f"<h2>{name}</h2>{chart(lines)}")
    for picture in sorted((run / "previews").glob("*.png")):
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<h2>Previews at step {int(picture.stem)}</h2><img alt="" src="data:image/png;base64,{data}">')
    parts.append(_settings(run / "run.json"))
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>\n{body}\n</html>\n'
    )


def _lines(rows: list[dict[str, float]], beginnings: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(beginnings))
    lines = {
        name: [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))] for name in names
    }
    return {name: line for name, line in lines.items() if line}


def _summary(rows: list[dict[str, float]]) -> str:
    if not rows:
        return "<p>No step has been logged yet.</p>"
    last: dict[str, float] = {}
    for row in rows:
        last |= row
    numbers = "".join(f"<tr><td>{html.escape(name)}</td><td>{value:.6g}</td></tr>" for name, value in last.items())
    return f"<h2>Latest numbers</h2><table>{numbers}</table>"


def _settings(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return ""
    cells = "".join(f"<tr><td>{html.escape(n)}</td><td>{html.escape(str(v))}</td></tr>" for n, v in _leaves(facts))
    return f"<h2>Settings</h2><table>{cells}</table>"


def _leaves(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    leaves = []
    for name, value in tree.items():
        leaves += _leaves(value) if isinstance(value, dict) else [(name, value)]
    return leaves


def chart(lines: dict[str, list[tuple[float, float]]]) -> str:
    """An SVG of curves of (x, y) points, by name; noisy ones have their running mean over them."""
    points = [point for line in lines.values() for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    right, high = right if right > left else left + 1, high if high > low else low + (abs(low) or 1)

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - 8)
        up = (y - low) / (high - low) * (_HEIGHT - _BOTTOM - 16)
        return f"{across:.1f},{_HEIGHT - _BOTTOM - up:.1f}"

    parts = []
    for tick in range(5):
        y = low + (high - low) * tick / 4
        x, height = place(left, y).split(",")
        parts.append(f'<line x1="{x}" x2="{_WIDTH - 8}" y1="{height}" y2="{height}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{height}" dy="4" text-anchor="end">{y:.4g}</text>')
    for x, anchor in ((left, "start"), (right, "end")):
        across = place(x, low).split(",")[0]
        parts.append(f'<text x="{across}" y="{_HEIGHT - 6}" text-anchor="{anchor}">step {x:.0f}</text>')
    for i, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        noisy = len(line) > 40
        for curve, opacity in ((line, 0.3 if noisy else 1), (running_mean(line) if noisy else [], 1)):
            path = " ".join(place(x, y) for x, y in curve)
            if path:
                parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" opacity="{opacity}"/>')
        if len(line) == 1:
            x, y = place(*line[0]).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        if len(lines) > 1:
            parts.append(f'<text x="{_LEFT + 100 * i + 8}" y="10" style="fill:{colour}">{html.escape(name)}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def running_mean(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential mean over about a tenth of the points, corrected for its start."""
    decay, mean, weight, smooth = 1 - min(1.0, 20 / len(line)), 0.0, 0.0, []
    for x, y in line:
        mean, weight = decay * mean + (1 - decay) * y, decay * weight + (1 - decay)
        smooth.append((x, mean / weight))
    return smooth
