"""`mlx-wan info`: this machine's versions, device, BLAS and memory; `mlx-wan info VIDEO`: how a video was made."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mlx_wan import backend
from mlx_wan.errors import UserError

SUMMARY = "what this machine and installation offer, or how a video was made"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("info", help=SUMMARY, description=SUMMARY)
    parser.add_argument("video", nargs="?", metavar="VIDEO", help="a video, picture, folder of frames or .json of ours")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.video is not None:
        _describe(args.video, args.json)
        return
    backend.check_setting()
    facts = backend.facts()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    _print(facts)
    for advice in (facts["wheel conflict"], facts["blas"]["hint"]):
        if advice:
            print(f"hint: {advice}", file=sys.stderr)


def _describe(name: str, as_json: bool) -> None:
    from mlx_wan.outputs import read_settings

    settings = read_settings(Path(name))
    if settings is None:
        raise UserError(f"{name}: carries no settings of mlx-wan")
    if as_json:
        print(json.dumps(settings, indent=2, ensure_ascii=False))
        return
    width = max(map(len, settings))
    for key, value in settings.items():
        print(f"{key:<{width}} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")


def _print(facts: dict[str, Any]) -> None:
    blas, memory = facts["blas"], facts["memory"]
    installed = ", ".join(f"{name} {version}" for name, version in facts["mlx wheels"].items())
    chip = facts["device info"].get("device_name", "")
    rows = {
        "mlx-wan": facts["mlx-wan"],
        "MLX": f"{facts['mlx']}" + (f" ({installed})" if installed else ""),
        "device": f"{facts['device']} {chip}".rstrip() + f", computes in {facts['default dtype']} by default",
        "BLAS": f"{blas['library'] or 'MLX default'} ({blas['reason']})",
        "product": f"{blas['gflops']} GFLOP/s in float32, relative error {blas['relative error']:.1e}",
        "memory": f"{memory['total bytes'] / 2**30:.1f} GiB",
        "cache": facts["cache"],
        "Python": f"{facts['python']} on {facts['system']}",
        "packages": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
    }
    for name, value in rows.items():
        print(f"{name:<9} {value}")
