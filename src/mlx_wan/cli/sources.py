"""`generate --src_video --src_mask --src_ref_images --context_scale`: what a VACE model works from."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_wan.errors import UserError
from mlx_wan.formats import ANIMATIONS, VIDEOS

if TYPE_CHECKING:
    import numpy as np

    from mlx_wan.vace import Source
    from mlx_wan.weights.checkpoint import Checkpoint

FLAGS = ("src_video", "src_mask", "src_ref_images", "context_scale")


def references(args: argparse.Namespace) -> list[str]:
    """The files of --src_ref_images, between commas."""
    return [] if args.src_ref_images is None else args.src_ref_images.split(",")


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What a video carries of this, but for the files."""
    return {} if args.source is None else {"context_scale": args.source.scale}


def seen(args: argparse.Namespace) -> dict[str, Any]:
    """What several processes must have alike."""
    source = args.source
    if source is None:
        return {}
    pictures = {f"reference {number}": picture for number, picture in enumerate(source.references, start=1)}
    return {"source video": source.video, "source mask": source.mask, **pictures, "context_scale": source.scale}


def read(args: argparse.Namespace, checkpoint: "Checkpoint") -> "Source | None":
    """What these flags name; None of a model that takes nothing like it.

    The number of frames, if it was not asked for, is the source video's, as far as the model goes, and the frames a
    second are such that it lasts as long. Raises UserError.
    """
    given = [f"--{flag}" for flag in FLAGS if getattr(args, flag) is not None]
    if checkpoint.spec.task != "vace":
        if given:
            raise UserError(f"{given[0]}: {checkpoint.spec.name} takes none; use a VACE model")
        return None
    from mlx_wan.vace import Source, best_count
    from mlx_wan.video import read_image, read_video

    pictures = [read_image(file) for file in references(args)]
    scale = 1.0 if args.context_scale is None else args.context_scale
    video = None
    if args.src_video:
        video, rate = read_video(args.src_video)
        if args.frame_num is None:
            args.frame_num = best_count(len(video), checkpoint.spec.vae_stride[0], checkpoint.spec.num_frames)
        args.fps = args.fps or round(rate * args.frame_num / len(video), 3)
    return Source(video, _mask(args.src_mask) if args.src_mask else None, pictures, scale)


def _mask(file: str) -> "np.ndarray":
    """uint8 (T, H, W): a video's brightness, or a picture's."""
    import numpy as np

    from mlx_wan.video import read_image, read_video

    if Path(file).suffix.lower() in (*VIDEOS, *ANIMATIONS):
        return np.ascontiguousarray(read_video(file)[0][..., 0])
    return np.asarray(read_image(file).convert("L"))[None]
