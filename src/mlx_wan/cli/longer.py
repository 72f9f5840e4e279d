"""`generate --extend N` and `--extend_from VIDEO`: what these flags ask for."""

import argparse
from typing import TYPE_CHECKING, Any

from mlx_wan.cli.report import note
from mlx_wan.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from mlx_wan.weights.checkpoint import Checkpoint


def parts(args: argparse.Namespace) -> int:
    """How many parts are to be made; 1 of a video that is not extended."""
    return (args.extend or 0) + (args.extend_from is None)


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What a video carries of this."""
    return {"extend": args.extend, "overlap": args.overlap} if args.extend else {}


def read(args: argparse.Namespace, checkpoint: "Checkpoint", image: "Image | None") -> "Image | None":
    """Fills these flags and reads the video that is to go on, of which it returns the last frame; else `image`.

    Its frames a second and, if the model can make it, its size are kept, unless others are asked for.
    """
    if args.extend is None and args.extend_from is None:
        if args.overlap is not None:
            raise UserError("--overlap: is of --extend; give that too, or leave it out")
        return image
    from mlx_wan.extend import OVERLAP

    args.extend = 1 if args.extend is None else args.extend
    args.overlap = OVERLAP if args.overlap is None else args.overlap
    if not 1 <= args.extend <= 1000:
        raise UserError(f"--extend {args.extend}: must be 1 to 1000 more parts")
    if args.extend_from is None:
        return image
    if image is not None:
        raise UserError("--image and --extend_from: a video begins with one or goes on from the other; leave one out")
    from PIL import Image

    from mlx_wan.video import read_video

    args.before, rate = read_video(args.extend_from)
    count, height, width = args.before.shape[:3]
    if count < args.overlap:
        raise UserError(f"{args.extend_from}: has {count} frames, fewer than --overlap {args.overlap}")
    step_w, step_h = checkpoint.size_steps
    if args.size is None and width % step_w == height % step_h == 0:
        args.size, args.exact_size = f"{width}*{height}", True
    args.fps = args.fps or rate
    if abs(rate - checkpoint.spec.fps) > 0.5:
        note(
            f"{args.extend_from} has {rate:g} frames a second and the model makes {checkpoint.spec.fps}: speeds differ"
        )
    return Image.fromarray(args.before[-1])


def check(args: argparse.Namespace, checkpoint: "Checkpoint", options: dict[str, Any]) -> None:
    """UserError if the model's videos cannot go on so; makes the frames of before those of this size."""
    if not args.extend:
        return
    from mlx_wan import extend

    extend.check(checkpoint.spec, options["num_frames"], args.overlap, options.get("last_image") is not None)
    if args.before is not None and args.before.shape[1:3] != (options["height"], options["width"]):
        args.before = resized(args.before, options["width"], options["height"])


def resized(frames: "np.ndarray", width: int, height: int) -> "np.ndarray":
    """Frames uint8 (T, H, W, 3) scaled and cropped to a size, as a first picture is."""
    import numpy as np
    from PIL import Image

    from mlx_wan.conditioning import image_to_frame

    made = [image_to_frame(Image.fromarray(frame), width, height)[0] for frame in frames]
    return np.round((np.concatenate(made) + 1) * 127.5).astype(np.uint8)
