"""`mlx-wan inspect`: what is in a tensor file or a checkpoint folder."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

SUMMARY = "list the tensors of a file or folder and say which model it is"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("inspect", help=SUMMARY, description=SUMMARY)
    parser.add_argument("path", metavar="FILE_OR_DIR", help=".safetensors, .gguf, .pth, .index.json, a folder, or tiny")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the description; 1 if files of a folder are damaged or missing."""
    from mlx_wan.weights.inspect import describe

    found = describe(args.path)
    print(json.dumps(found, indent=2) if args.json else render(found))
    for problem in found["problems"]:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found["problems"] else 0


def render(found: dict[str, Any]) -> str:
    """The description as text: all tensors, then totals by block and by component, then what it is."""
    sections = []
    for component, part in found["components"].items():
        own = [tensor for tensor in found["tensors"] if tensor["component"] == component]
        rows = [(t["name"], _shape(t["shape"]), t["dtype"], _size(t["bytes"]), t["file"]) for t in own]
        title = f"{_label(component)}: {part['model']}"
        sections.append(f"{title}\n" + _table(("tensor", "shape", "type", "size", "file"), rows))
        blocks = [(name, *_counts(block)) for name, block in part["blocks"].items()]
        sections.append(_table(("block", "tensors", "parameters", "size"), blocks))
    totals = [
        (_label(name), *_counts(part), ", ".join(f"{dtype} {_size(n)}" for dtype, n in part["dtypes"].items()))
        for name, part in found["components"].items()
    ]
    totals.append(("total", *_counts(found["total"]), ""))
    sections.append(_table(("component", "tensors", "parameters", "size", "types"), totals))
    facts = [
        ("path", found["path"]),
        ("model", found["model"]),
        ("layout", found["layout"] or "-"),
        ("to use it", found["use"] or "-"),
        ("quantization", _quantization(found["quantization"], found["components"])),
    ]
    sections.append("\n".join(f"{name:<13} {value}" for name, value in facts))
    return "\n\n".join(sections)


def _label(component: str) -> str:
    return component.replace("_", " ")


def _counts(part: dict[str, Any]) -> tuple[str, str, str]:
    return str(part["tensors"]), f"{part['parameters']:,}", _size(part["bytes"])


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _quantization(how: dict[str, Any] | None, components: dict[str, Any]) -> str:
    from mlx_wan.weights.tensors import DTYPES

    if how is None:
        types = sorted({dtype for part in components.values() for dtype in part["dtypes"]})
        packed = ", ".join(dtype for dtype in types if dtype not in DTYPES or dtype.startswith("float8"))
        return f"{packed}; unpacked when loaded" if packed else "none"
    if not how:
        return "packed, in a way that the file does not tell"
    return f"{how.get('bits')} bits, groups of {how.get('group_size')}, {how.get('mode', 'affine')}"


def _size(nbytes: int) -> str:
    size, units = float(nbytes), ["kB", "MB", "GB", "TB"]
    if size < 1000:
        return f"{nbytes} B"
    while units:
        size, unit = size / 1000, units.pop(0)
        if size < 999.5 or not units:
            break
    return f"{size:.3g} {unit}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    numbers = {"tensors", "parameters", "size"}
    cells = [
        [
            cell.rjust(w) if name in numbers else cell.ljust(w)
            for cell, w, name in zip(line, widths, header, strict=True)
        ]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in cells)
