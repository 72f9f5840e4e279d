"""`mlx-wan scenes`: draws sample clips of the embedded model's training world and prints their captions."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SUMMARY = "draw sample clips of the embedded model's training world"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("scenes", help=SUMMARY, description=SUMMARY)
    parser.add_argument("out", type=Path, metavar="OUT", help=".png: a row of frames a clip; .mp4: clip after clip")
    parser.add_argument("--count", type=int, default=16, help="how many clips (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other clips (default 0)")
    parser.add_argument("--held-out", action="store_true", help="only combinations that training never shows")
    parser.add_argument("--size", type=int, default=128, help="side of the square frames in pixels (default 128)")
    return parser


def run(args: argparse.Namespace) -> int:
    check(args)
    import numpy as np

    from mlx_wan.training.scenes import sample_batch

    _, params, captions = sample_batch(np.random.default_rng(args.seed), args.count, args.held_out)
    clips = draw(params, args.size)
    if args.out.suffix.lower() == ".png":
        from mlx_wan.video import write_sheet

        write_sheet(args.out, clips)
    else:
        write_video(args.out, clips)
    for number, caption in enumerate(captions, start=1):
        print(f"{number:3}  {caption}")
    print(f"saved {args.out}", file=sys.stderr)
    return 0


def check(args: argparse.Namespace) -> None:
    """UserError before any work."""
    from mlx_wan.errors import UserError
    from mlx_wan.video import SUFFIXES, check_writable

    if args.count < 1 or args.seed < 0:
        raise UserError(f"--count is {args.count} and --seed {args.seed}; give at least 1 clip and a seed from 0 up")
    if args.size < 16 or args.size % 2:
        raise UserError(f"--size is {args.size}; give an even number from 16 up")
    if args.out.suffix.lower() != ".png":
        if args.out.suffix.lower() not in SUFFIXES:
            raise UserError(f"{args.out}: the name must end in .png (contact sheet) or {', '.join(SUFFIXES)} (video)")
        check_writable(args.out)
    elif args.out.is_dir():
        raise UserError(f"{args.out}: is a folder; give a file name")
    elif not args.out.parent.is_dir():
        raise UserError(f"{args.out}: the folder {args.out.parent} does not exist; create it first")


def draw(params: "np.ndarray", size: int) -> "Iterator[np.ndarray]":
    """One clip at a time, uint8 (T, size, size, 3), of scene parameters (B, objects, NUM_PARAMS)."""
    import mlx.core as mx

    from mlx_wan.conditioning import to_uint8
    from mlx_wan.training.scenes import render

    for row in params:
        video = render(mx.array(row[None]), height=size, width=size)[0]
        yield to_uint8(video)


def write_video(path: Path, clips: "Iterator[np.ndarray]") -> None:
    from mlx_wan.training.world import CLIP_FPS
    from mlx_wan.video import VideoWriter

    with VideoWriter(path, CLIP_FPS) as video:
        for clip in clips:
            video.write(clip)
