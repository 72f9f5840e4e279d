"""`mlx-wan evaluate`: losses and reconstruction of a model, or of a model with LoRAs, on clips."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

SUMMARY = "measure a model, or a LoRA, on clips: loss by timestep band, VAE reconstruction, adherence"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("evaluate", help=SUMMARY, description=SUMMARY)
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, Hub id or tiny")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="clips, as for training; its valid set if it has one"
    )
    parser.add_argument(
        "--lora", action="append", default=[], type=Path, metavar="FILE", help="adapters; may be repeated"
    )
    parser.add_argument("--expert", help="of an A14B model: high or low, with its LoRAs and at its noise levels")
    parser.add_argument("--num-frames", type=int, nargs="+", default=[], metavar="N", help="lengths of clips")
    parser.add_argument("--width", type=int, help="with --height: area of a clip")
    parser.add_argument("--height", type=int, help="with --width: area of a clip")
    parser.add_argument("--fps", type=float, help="frames a second to which videos are resampled")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N clips")
    parser.add_argument(
        "--adherence", type=int, default=0, metavar="N", help="of the embedded model: judge clips of N unseen prompts"
    )
    parser.add_argument("--cache", metavar="DIR", help="folder of encoded clips; beside the data if left out")
    parser.add_argument("--dtype", help="of computing: float32, bfloat16 or float16")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    from mlx_wan.cli.train import Encoding
    from mlx_wan.errors import UserError
    from mlx_wan.training.evaluate import evaluate
    from mlx_wan.training.options import FinetuneRecipe

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}; it must be at least 1")
    if args.adherence < 0:
        raise UserError(f"--adherence is {args.adherence}; it must not be negative")
    recipe = FinetuneRecipe(
        model=args.model,
        data=args.data,
        expert=args.expert,
        num_frames=tuple(args.num_frames),
        width=args.width,
        height=args.height,
        fps=args.fps,
        cache=args.cache,
        dtype=args.dtype,
    )
    found = evaluate(recipe, args.lora, args.limit, Encoding(), args.adherence)
    for one in found.skipped:
        print(f"skipped {one}", file=sys.stderr)
    facts = {"model": args.model, "lora": [str(path) for path in args.lora], "data": args.data, "split": found.split}
    facts |= {"clips": found.clips, "skipped": len(found.skipped), **found.numbers}
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{found.clips} clips of the {found.split} set, {len(found.skipped)} files skipped")
    for name, value in found.numbers.items():
        print(f"{name:22} {value:.4f}")
    return 0
