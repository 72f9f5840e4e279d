"""`mlx-wan fuse`: a checkpoint with LoRAs in its weights."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from mlx_wan.cli.convert import add_storage_flags, write
from mlx_wan.errors import UserError

SUMMARY = "write a checkpoint with LoRAs merged into its weights"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("fuse", help=SUMMARY, description=SUMMARY)
    parser.add_argument("--model", "--ckpt_dir", metavar="DIR", required=True, help="checkpoint folder, or Hub id")
    add_lora_flag(parser, required=True)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write, in the native layout")
    add_storage_flags(parser)
    return parser


def add_lora_flag(parser: Any, required: bool = False) -> None:
    """--lora PATH [SCALE], which may come several times."""
    parser.add_argument(
        "--lora",
        nargs="+",
        action="append",
        default=[],
        required=required,
        metavar=("PATH", "SCALE"),
        help="a LoRA file of any dialect and its strength (default 1); may be repeated",
    )


def parse_loras(given: list[list[str]]) -> list[tuple[str, float]]:
    """What --lora was given, as files and strengths. Raises UserError for anything else than PATH [SCALE]."""
    loras = []
    for path, *rest in given:
        try:
            (scale,) = map(float, rest or ["1"])
        except ValueError:
            raise UserError(f"--lora {' '.join([path, *rest])}: must be PATH or PATH SCALE, such as 0.8") from None
        if not path or not math.isfinite(scale):
            raise UserError(f"--lora {path or repr(path)} {scale:g}: must be a file and a finite strength")
        loras.append((path, scale))
    return loras


def run(args: argparse.Namespace) -> None:
    from mlx_wan.lora.fuse import fuse

    loras = parse_loras(args.lora)
    write(args, lambda **options: fuse(args.model, args.out, loras, note=note, **options))


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
