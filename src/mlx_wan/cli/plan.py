"""`mlx-wan plan`: what a run will hold in memory, stage by stage, and whether it fits; nothing is loaded."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_wan import backend
from mlx_wan.cli.flags import DTYPE_BYTES, TASKS
from mlx_wan.cli.parts import add_part_flags, given_parts
from mlx_wan.cli.request import parse_size
from mlx_wan.errors import UserError

if TYPE_CHECKING:
    from mlx_wan.memory.plan import Dimensions, Setting

SUMMARY = "say what a run will hold in memory, before anything is loaded"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("plan", help=SUMMARY, description=SUMMARY)
    add_run_flags(parser)
    parser.add_argument("--keep_both_experts", action="store_true", help="as in `mlx-wan generate`")
    return parser


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """What run of which model is meant; `mlx-wan bench` takes the same."""
    parser.add_argument("--task", choices=TASKS, help="a released model, of which no file is needed")
    parser.add_argument("--ckpt_dir", "--model", metavar="DIR", help="a model folder (default: the embedded model)")
    add_part_flags(parser)
    parser.add_argument("--size", metavar="W*H", help="width*height in pixels (default: the model's own)")
    parser.add_argument("--frame_num", "--num_frames", type=int, metavar="N", help="number of frames, 4n+1")
    parser.add_argument("--with_image", action="store_true", help="a first frame is given (TI2V; I2V has one always)")
    parser.add_argument("--overlap", type=int, metavar="N", help="as of a video that goes on (generate --extend)")
    parser.add_argument("--references", type=int, default=0, metavar="N", help="pictures given to a VACE model")
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="of weights and products (default: by device)")
    parser.add_argument(
        "-q", "--bits", type=int, metavar="BITS", help="as if `mlx-wan convert -q` had packed the model"
    )
    parser.add_argument("--q-mode", default="affine", metavar="MODE", help="and its --q-mode")
    parser.add_argument("--q-group-size", type=int, metavar="N", help="and its --q-group-size")


def run(args: argparse.Namespace) -> int:
    from mlx_wan.memory.plan import gib, limited, nearest, plans

    model = planned_model(args)
    setting = planned_setting(args, model, keep_both_experts=args.keep_both_experts)
    device, memory = backend.device_name(), backend.usable_memory()
    needed = plans(model, setting, device)
    low_memory = needed[0].peak > memory
    fits = needed[low_memory].peak <= memory
    plan = limited(model, setting, device, memory, low_memory) if fits else needed[low_memory]
    packed = f", {model.quantization.bits} bits" if model.quantization else ""
    dtype = str(setting.dtype).removeprefix("mlx.core.")
    print(
        f"{model.spec.name}, {setting.width}*{setting.height}, {setting.num_frames} frames, {dtype}{packed}, {device}"
    )
    print(f"{'stage':<8} {'weights':>11} {'work':>11} {'together':>11}")
    for stage in plan.stages:
        print(f"{stage.name:<8} {gib(stage.weights):>11} {gib(stage.work):>11} {gib(stage.peak):>11}")
    how = "parts leave memory when their work is done" if plan.low_memory else "everything stays loaded"
    print(f"peak {gib(plan.peak)} of {gib(memory)} that can be used: {'fits' if fits else 'does not fit'}, {how}")
    if fits:
        return 0
    print(f"nearest: {nearest(model, setting, device, memory) or 'nothing smaller fits either'}")
    return 1


def planned_model(args: argparse.Namespace) -> "Dimensions":
    """The model that these flags mean."""
    from mlx_wan.memory.plan import Dimensions
    from mlx_wan.weights.locate import locate
    from mlx_wan.weights.quantize import Quantization

    files = given_parts(args)
    if args.task and (args.ckpt_dir or files):
        raise UserError("--task is for a model without files; leave it or --ckpt_dir out")
    where = args.ckpt_dir or (None if files else "tiny")
    model = Dimensions.of_release(args.task) if args.task else Dimensions.of_checkpoint(locate(where, **files))
    if args.bits is None:
        return model
    if model.quantization is not None:
        raise UserError(f"{args.ckpt_dir}: is quantized already; leave -q out")
    return replace(model, quantization=Quantization(args.bits, args.q_group_size, args.q_mode))


def planned_setting(args: argparse.Namespace, model: "Dimensions", keep_both_experts: bool = False) -> "Setting":
    """The run of it."""
    import mlx.core as mx

    from mlx_wan.memory.plan import Setting

    spec = model.spec
    width, height = parse_size(args.size) if args.size else (spec.width, spec.height)
    frames = spec.num_frames if args.frame_num is None else args.frame_num
    (stride_t, stride_h, stride_w), (_, patch_h, patch_w) = model.vae.stride, model.transformer.patch_size
    if not width or not height or width % (stride_w * patch_w) or height % (stride_h * patch_h):
        steps = f"width must be a multiple of {stride_w * patch_w}, height of {stride_h * patch_h}"
        raise UserError(f"--size {args.size}: {steps}")
    if frames < 1 or (frames - 1) % stride_t:
        raise UserError(f"--frame_num {frames}: must be {stride_t}n+1")
    pictures = {"t2v": 0, "ti2v": int(args.with_image), "i2v": 1, "flf2v": 2, "vace": 0}[spec.task]
    if args.with_image and spec.task in ("t2v", "vace"):
        raise UserError(f"{spec.name} takes no picture: leave --with_image out")
    if args.overlap is not None:
        from mlx_wan import extend

        extend.check(spec, frames, args.overlap, last=False)
        pictures = 1
    dtype = getattr(mx, args.dtype) if args.dtype else backend.default_dtype()
    more = {"keep_both_experts": keep_both_experts, "references": args.references, "begins": args.overlap or 1}
    return Setting(width, height, frames, dtype, pictures, **more)
