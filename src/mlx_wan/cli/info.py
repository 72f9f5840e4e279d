"""`mlx-wan info`: versions, device, BLAS and memory of this machine, for people and for bug reports."""

import argparse
import json
import sys
from typing import Any

from mlx_wan import backend


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("info", help="what this machine and installation offer")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    backend.check_setting()
    facts = backend.facts()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    _print(facts)
    for advice in (facts["wheel conflict"], facts["blas"]["hint"]):
        if advice:
            print(f"hint: {advice}", file=sys.stderr)


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
