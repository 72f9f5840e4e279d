"""`mlx-wan convert`: a checkpoint of any layout to the native one."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_wan.cli.parts import add_part_flags, given_parts

SUMMARY = "convert a checkpoint to the native layout, or back, without PyTorch"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("convert", help=SUMMARY, description=SUMMARY)
    parser.add_argument("src", metavar="SRC", help="checkpoint folder, ComfyUI's file, or Hub id")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder to write")
    parser.add_argument(
        "--to",
        choices=("native", "official", "diffusers"),
        default="native",
        help="layout to write: this package's (default), Wan's own, or a Diffusers repository",
    )
    add_part_flags(parser)
    add_storage_flags(parser)
    return parser


def add_storage_flags(parser: argparse.ArgumentParser) -> None:
    """How a model is stored; `mlx-wan fuse` takes the same."""
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the matrices (default: as they are stored)"
    )
    parser.add_argument("-q", "--bits", type=int, metavar="BITS", help="quantize the matrices to 4 or 8 bits")
    parser.add_argument(
        "--q-mode", default="affine", metavar="MODE", help="affine (default), mxfp4, mxfp8 or nvfp4, of -q bits"
    )
    parser.add_argument(
        "--q-group-size",
        "--group-size",
        type=int,
        metavar="N",
        help="values a scale: 64 (default), 32 or 128 in the mode affine, one number in the others",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a converted model that is there")
    parser.add_argument(
        "--upload-repo", metavar="OWNER/NAME", help="then send it to this repository of the Hugging Face Hub"
    )


def run(args: argparse.Namespace) -> None:
    from mlx_wan.weights.convert import convert

    write(args, args.src, lambda **options: convert(args.src, args.dst, to=args.to, files=given_parts(args), **options))


def write(args: argparse.Namespace, source: str, work: Callable[..., Path]) -> None:
    """Calls `work` with the storage flags as `convert` takes them, under a progress bar, and says what came out.

    source: what is converted, for the model card of what is uploaded.
    """
    import mlx.core as mx
    from tqdm import tqdm

    from mlx_wan.weights.upload import check_upload, model_card, upload

    if args.upload_repo is not None:
        check_upload(args.upload_repo)
    start = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        folder = work(
            dtype=getattr(mx, args.dtype) if args.dtype else None,
            bits=args.bits,
            group_size=args.q_group_size,
            mode=args.q_mode,
            overwrite=args.overwrite,
            progress=progress,
        )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(folder)
    print(f"{size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")
    if args.upload_repo is not None:
        from mlx_wan.weights.locate import locate

        print(upload(folder, args.upload_repo, model_card(args.upload_repo, source, locate(folder).spec.task)))
