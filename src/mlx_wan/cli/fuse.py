"""`mlx-wan fuse`: a checkpoint with LoRAs in its weights."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from mlx_wan.cli.convert import add_storage_flags, write
from mlx_wan.cli.parts import add_part_flags, given_parts
from mlx_wan.errors import UserError

SUMMARY = "write a checkpoint with LoRAs merged into its weights"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("fuse", help=SUMMARY, description=SUMMARY)
    parser.add_argument("--model", "--ckpt_dir", metavar="DIR", required=True, help="checkpoint folder, or Hub id")
    add_part_flags(parser)
    add_lora_flags(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write, in the native layout")
    add_storage_flags(parser)
    return parser


def add_lora_flags(parser: Any) -> None:
    """--lora PATH [SCALE], which may come several times, and the same for one of two experts."""
    whom = {"lora": "every transformer", "lora_high": "the high-noise expert", "lora_low": "the low-noise expert"}
    for flag, target in whom.items():
        parser.add_argument(
            f"--{flag}",
            nargs="+",
            action="append",
            default=[],
            metavar=("PATH", "SCALE"),
            help=f"a LoRA of any dialect for {target}, and its strength (default 1): a file, or OWNER/NAME or "
            "OWNER/NAME/FILE on the Hub; may be repeated",
        )


class LoraFlag(NamedTuple):
    """What a flag names, a file or one on the Hub; expert is "high", "low" or None."""

    path: str
    scale: float
    expert: str | None = None

    def facts(self) -> dict[str, Any]:
        """What a video's metadata tell of it."""
        from mlx_wan.weights.hub import file_name

        facts = {"file": file_name(self.path), "scale": self.scale}
        return facts if self.expert is None else facts | {"expert": self.expert}


def parse_loras(args: argparse.Namespace) -> list[LoraFlag]:
    """What the flags were given, as files and strengths. Raises UserError for anything else than PATH [SCALE]."""
    loras = []
    for flag, expert in (("lora", None), ("lora_high", "high"), ("lora_low", "low")):
        for path, *rest in getattr(args, flag):
            try:
                (scale,) = map(float, rest or ["1"])
            except ValueError:
                words = " ".join([path, *rest])
                raise UserError(f"--{flag} {words}: must be PATH or PATH SCALE, such as 0.8") from None
            if not path or not math.isfinite(scale):
                raise UserError(f"--{flag} {path or repr(path)} {scale:g}: must be a file and a finite strength")
            loras.append(LoraFlag(path, scale, expert))
    return loras


def run(args: argparse.Namespace) -> None:
    from mlx_wan.lora.fuse import fuse

    loras = parse_loras(args)
    if not loras:
        raise UserError("the following arguments are required: --lora")
    files = given_parts(args)
    write(args, args.model, lambda **options: fuse(args.model, args.out, loras, note=note, files=files, **options))


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
