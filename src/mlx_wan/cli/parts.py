"""`--transformer`, `--vae`, …: single files in place of a model folder's own."""

import argparse
from typing import Any

PARTS = ("transformer", "transformer_2", "text_encoder", "image_encoder", "vae", "tokenizer")


def add_part_flags(parser: Any) -> None:
    """A flag a part, of a parser or a group of one."""
    for part in PARTS:
        what = f"a {part.replace('_', ' ')} in place of the folder's own: a file, or OWNER/NAME/FILE on the Hub"
        parser.add_argument(f"--{part}", metavar="FILE", help=what)


def given_parts(args: argparse.Namespace) -> dict[str, str]:
    """Part -> file, of those that were given."""
    return {part: file for part in PARTS if (file := getattr(args, part))}
