"""`mlx-wan bench`: how fast this machine is at a model of any size, as a table to paste; no checkpoint is needed."""

import argparse
import json
import os
import platform
import sys
import time
from typing import TYPE_CHECKING, Any

from mlx_wan import backend
from mlx_wan.cli import report
from mlx_wan.cli.plan import add_run_flags, planned_model, planned_setting
from mlx_wan.cli.progress import duration
from mlx_wan.errors import UserError

if TYPE_CHECKING:
    from mlx_wan.memory.plan import Dimensions, Setting
    from mlx_wan.speed import Measurement

SUMMARY = "measure this machine: a transformer call, the VAE, the text encoder, with random weights"
PARTS = ("text", "encode", "transformer", "decode")
NAMES = {"text": "text encoder", "encode": "VAE encoder", "transformer": "transformer", "decode": "VAE decoder"}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("bench", help=SUMMARY, description=SUMMARY)
    add_run_flags(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument(
        "--repeat", type=int, default=7, metavar="N", help="calls after the first, at most a minute (%(default)s)"
    )
    parser.add_argument(
        "--pieces", type=int, default=4, metavar="N", help="latent frames of the VAE after the first (%(default)s)"
    )
    parser.add_argument("--ignore_plan", action="store_true", help="measure even if the planner says it does not fit")
    parser.add_argument("--json", action="store_true", help="print JSON, with every single time")
    return parser


def run(args: argparse.Namespace) -> None:
    from mlx_wan.memory.limits import limit_memory
    from mlx_wan.speed import check, measure, planned

    for flag in ("repeat", "pieces"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    model = planned_model(args)
    setting = planned_setting(args, model)
    parts = tuple(part for part in PARTS if part in args.parts)
    memory = sys.maxsize if args.ignore_plan else backend.usable_memory()
    check(model, setting, parts, args.pieces, backend.device_name(), memory)
    sizes = planned(model, setting, args.pieces, backend.device_name(), backend.usable_memory())
    limit_memory()
    about, rows = facts(model, setting), []
    if not args.json:
        print(_head(about), flush=True)
    for found in measure(model, setting, parts, args.repeat, args.pieces):
        rows.append(found)
        if not args.json:
            print(_row(found, sizes[found.part].peak), flush=True)
    if args.json:
        print(json.dumps(about | {"measurements": [_facts_of(row, sizes[row.part].peak) for row in rows]}, indent=2))
    else:
        print(_estimate(model, setting, rows))
        report.note("random weights: times and memory are a model's own, what it draws is noise")


def facts(model: "Dimensions", setting: "Setting") -> dict[str, Any]:
    """What was measured, where and with what."""
    import mlx.core as mx

    import mlx_wan

    how = model.quantization
    info = mx.device_info()
    return {
        "model": model.spec.name,
        "width": setting.width,
        "height": setting.height,
        "num_frames": setting.num_frames,
        "with_image": setting.pictures > 0,
        "dtype": str(setting.dtype).removeprefix("mlx.core."),
        "quantization": None if how is None else vars(how),
        "device": backend.device_name(),
        "device_name": info.get("device_name") or platform.processor() or platform.machine(),
        "memory_bytes": backend.total_memory(),
        "system": f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.platform(),
        "python": platform.python_version(),
        "mlx": backend.version("mlx"),
        "mlx_wheels": backend.wheels(),
        "mlx_wan": mlx_wan.__version__,
        "blas": backend.prepare().library,
        "load_before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
    }


def _facts_of(row: "Measurement", planned: int) -> dict[str, Any]:
    return {**vars(row), "median": row.median, "planned": planned}


def _head(about: dict[str, Any]) -> str:
    how = about["quantization"]
    packed = f", {how['mode']} {how['bits']} bits in groups of {how['group_size']}" if how else ""
    picture = ", first frame given" if about["with_image"] else ""
    setting = f"{about['width']}×{about['height']}, {about['num_frames']} frames{picture}, {about['dtype']}{packed}"
    wheels = ", ".join(f"{name} {version}" for name, version in about["mlx_wheels"].items())
    blas = f" with {about['blas']}" if about["blas"] else ""
    return "\n".join(
        (
            f"**{about['model']}**, {setting}",
            "",
            f"{about['device']} {about['device_name']}, {about['memory_bytes'] / 2**30:.0f} GiB; {about['system']}; "
            f"Python {about['python']}; MLX {about['mlx']}{f' ({wheels})' if wheels else ''}{blas}; mlx-wan "
            f"{about['mlx_wan']}; load {about['load_before']}; {about['date']}",
            "",
            "| part | work | first call | median | fastest–slowest | calls | weights | peak memory | planned |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        )
    )


def _row(row: "Measurement", planned: int) -> str:
    columns = (
        NAMES[row.part],
        row.work,
        _seconds(row.first),
        _seconds(row.median),
        f"{_seconds(min(row.seconds))}–{_seconds(max(row.seconds))}",
        str(len(row.seconds)),
        _size(row.weights),
        _size(row.peak),
        _size(planned),
    )
    return f"| {' | '.join(columns)} |"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def _estimate(model: "Dimensions", setting: "Setting", rows: "list[Measurement]") -> str:
    """What the medians say of a whole video at the model's own number of steps."""
    spec, found = model.spec, {}
    for row in rows:
        found.setdefault(row.part, []).append(row.median)
    parts = []
    if "transformer" in found:
        calls = spec.num_inference_steps * (1 if spec.check_guidance(spec.guidance_scale) == (1, 1) else 2)
        parts.append(f"{calls} calls of the transformer {duration(calls * found['transformer'][0])}")
    if "decode" in found:
        first, *more = found["decode"]
        pieces = (setting.num_frames - 1) // model.vae.stride[0]
        parts.append(f"decoding {duration(first + pieces * (more[0] if more else 0))}")
    if not parts:
        return ""
    return f"\nA video of {spec.num_inference_steps} steps by these medians: {', '.join(parts)}."
