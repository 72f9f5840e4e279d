"""`mlx-wan generate`: from a prompt, or a prompt and a picture, to a video file.

Flags carry the names of Wan's official generate.py, with shorter ones beside them. Everything that can be wrong
with a request is found out before weights are loaded.
"""

import argparse
import math
import re
import secrets
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_wan import backend
from mlx_wan.cli.fuse import add_lora_flags, parse_loras
from mlx_wan.cli.progress import Progress
from mlx_wan.errors import UserError
from mlx_wan.zoo import MODELS

if TYPE_CHECKING:
    from mlx_wan.memory.plan import Plan
    from mlx_wan.pipeline import Event
    from mlx_wan.video import VideoWriter
    from mlx_wan.weights.checkpoint import Checkpoint

SUMMARY = "make a video from a prompt, or from a prompt and a picture"
TASKS = tuple(name for name, spec in MODELS.items() if spec.hub_id)
OTHER_TASKS = ("animate-14B", "s2v-14B")
FILES = ("transformer", "transformer_2", "text_encoder", "image_encoder", "vae", "tokenizer")
SOLVERS = ("unipc", "dpm++", "euler")
DTYPES = ("bfloat16", "float16", "float32")
LARGEST_SEED = 2**63 - 1


# --- flags ---------------------------------------------------------------------------------------------------


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("generate", help=SUMMARY, description=SUMMARY)
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", required=True, help="what the video shows")
    what.add_argument("--negative_prompt", "--n_prompt", help="what it must not show (default: the model's own)")
    what.add_argument(
        "--image", "--first_frame", metavar="FILE", help="a picture to start from: the video's first frame"
    )
    what.add_argument("--last_frame", metavar="FILE", help="a picture to end with (flf2v-14B, i2v-A14B)")
    what.add_argument("--size", metavar="W*H", help="width*height in pixels; with --image only the area counts")
    what.add_argument("--frame_num", "--num_frames", type=int, metavar="N", help="number of frames, 4n+1")
    what.add_argument("--fps", type=float, help="frames a second of the file (default: the model's own)")
    what.add_argument("--save_file", "--output", "-o", metavar="FILE", help="default: a telling name in this folder")
    model = parser.add_argument_group("which model")
    model.add_argument("--task", help=f"which model it must be: {', '.join(TASKS)} (default: what --ckpt_dir holds)")
    model.add_argument(
        "--ckpt_dir", "--model", metavar="DIR", help="model folder or Hub id (default: the small embedded model)"
    )
    for part in FILES:
        model.add_argument(f"--{part}", metavar="FILE", help=f"a {part.replace('_', ' ')} in place of the folder's own")
    model.add_argument("--dtype", choices=DTYPES, help="of weights and products (default: by device)")
    add_lora_flags(model)
    model.add_argument("--fuse", action="store_true", help="add the LoRAs to the weights instead of beside them")
    how = parser.add_argument_group("how (defaults: the model's own)")
    how.add_argument("--base_seed", "--seed", type=int, default=-1, metavar="N", help="-1 for a random one")
    how.add_argument("--sample_solver", "--scheduler", choices=SOLVERS, help="the sampler")
    how.add_argument("--sample_steps", "--steps", type=int, metavar="N", help="denoising steps")
    how.add_argument("--sample_shift", "--shift", type=float, metavar="X", help="shift of the noise schedule")
    how.add_argument(
        "--sample_guide_scale",
        "--guidance",
        type=_guidance,
        metavar="X",
        help="guidance; 1 is none; LOW,HIGH noise for a model of two experts",
    )
    how.add_argument(
        "--keep_both_experts",
        action="store_true",
        help="keep both experts of an A14B model in memory, instead of loading the second when its turn comes",
    )
    how.add_argument(
        "--text_cache", metavar="DIR", help="keep embeddings of prompts there; one that comes again loads no encoder"
    )
    how.add_argument("--ignore_plan", action="store_true", help="run even if `mlx-wan plan` says that it does not fit")
    old = parser.add_argument_group("accepted from the official script, without effect here")
    old.add_argument("--offload_model", nargs="?", const=True, type=_boolean, metavar="BOOL", help="memory is shared")
    old.add_argument("--t5_cpu", action="store_true", help="memory is shared, and the text encoder freed after use")
    old.add_argument("--convert_model_dtype", action="store_true", help="weights are converted as they are loaded")
    return parser


def _boolean(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return words[text.lower()]


def _guidance(text: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or two with a comma between them") from None
    return numbers[0] if len(numbers) == 1 else numbers


# --- the run -------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Check the request, make the video, and print where it is and what it took."""
    _check_flags(args)
    from mlx_wan.video import check_writable, read_image
    from mlx_wan.weights.locate import locate

    image = read_image(args.image) if args.image else None
    last = read_image(args.last_frame) if args.last_frame else None
    if args.save_file:
        check_writable(args.save_file)
    files = {part: getattr(args, part) for part in FILES}
    alone = not args.ckpt_dir and not any(files.values())
    checkpoint = locate("tiny" if alone else args.ckpt_dir, task=args.task, **files)
    _check_task(args.task, checkpoint)
    checkpoint.spec.check_pictures(image is not None, last is not None)
    if alone:
        _note("no --ckpt_dir: the small embedded model draws this (coloured shapes that move)")
    options = _options(args, checkpoint, image) | ({} if last is None else {"last_image": last})
    path = Path(args.save_file) if args.save_file else _free_name(args.prompt, checkpoint.spec.name, options)
    check_writable(path)
    plan = _plan(args, checkpoint, options, pictures=sum(picture is not None for picture in (image, last)))
    _check_loras(args, checkpoint)
    _say_what_is_pointless(args)
    seconds = _make(args, checkpoint, options, path, plan.low_memory)
    print(path)
    print(f"seed {options['seed']}")
    stages = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in seconds.items())
    print(f"{stages}, together {sum(seconds.values()):.1f} s")
    print(f"peak memory {backend.peak_memory() / 2**30:.2f} GiB")


def _make(
    args: argparse.Namespace, checkpoint: "Checkpoint", options: dict[str, Any], path: Path, low_memory: bool
) -> dict[str, float]:
    """Load, generate and write, under one progress bar; returns the seconds each stage took."""
    import mlx.core as mx

    import mlx_wan
    from mlx_wan.video import VideoWriter

    pieces = (options["num_frames"] - 1) // checkpoint.spec.vae_stride[0] + 1
    with Progress(options["num_inference_steps"], pieces) as progress:
        progress.stage("load")
        dtype = getattr(mx, args.dtype) if args.dtype else None
        pipe = mlx_wan.WanPipeline.from_pretrained(checkpoint, dtype, low_memory, args.keep_both_experts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # _check_loras has said it
            for lora in parse_loras(args):
                pipe.load_lora_weights(lora.path, scale=lora.scale, expert=lora.expert)
        if args.fuse:
            pipe.fuse_lora()
        pipe.text_cache = Path(args.text_cache) if args.text_cache else None
        if not pipe.low_memory:  # else each part is loaded in the stage that needs it
            _ = (
                pipe.text_cache or pipe.text_encoder,
                pipe.vae,
                args.keep_both_experts and pipe.transformer_2,
                pipe.transformer,
            )
        events = pipe.stream(args.prompt, **options)
        metadata = _facts(args, checkpoint, options, str(pipe.dtype))
        with VideoWriter(path, args.fps or checkpoint.spec.fps, metadata=metadata) as writer:
            progress.stage("text")
            for event in events:
                _follow(event, progress, writer, with_image=args.image is not None)
    return progress.seconds


def _follow(event: "Event", progress: Progress, writer: "VideoWriter", with_image: bool) -> None:
    """An event says what is finished: show what comes next, and write frames as they come."""
    if event.stage == "text" and event.index == event.total:
        progress.stage("image" if with_image else "denoise")
    elif event.stage == "image":
        progress.stage("denoise")
    elif event.stage == "denoise":
        progress.step_done()
    elif event.stage == "latents":
        progress.stage("decode")
    elif event.stage == "frames":
        writer.write(event.value)
        progress.piece_done()


# --- the request ---------------------------------------------------------------------------------------------


def _check_flags(args: argparse.Namespace) -> None:
    """What can be judged without knowing the model."""
    for flag in ("image", "last_frame", "save_file", "ckpt_dir", "text_cache", *FILES):
        if getattr(args, flag) == "":  # an unset variable of a script: no reason to do something else silently
            raise UserError(f"--{flag} is empty; give a name, or leave the flag out")
    loras = parse_loras(args)
    if args.fuse and not loras:
        raise UserError("--fuse: there is no --lora to fuse")
    if args.task is not None and args.task not in TASKS:
        what = "is not supported" if args.task in OTHER_TASKS else "is unknown"
        raise UserError(f"--task {args.task} {what}; use one of {', '.join(TASKS)}")
    if args.sample_steps is not None and not 1 <= args.sample_steps <= 1000:
        raise UserError(f"--sample_steps {args.sample_steps}: must be 1 to 1000")
    if args.sample_shift is not None and not 0 < args.sample_shift < math.inf:
        raise UserError(f"--sample_shift {args.sample_shift}: must be above 0")
    scales = args.sample_guide_scale if isinstance(args.sample_guide_scale, tuple) else (args.sample_guide_scale,)
    if not all(scale is None or math.isfinite(scale) for scale in scales):
        raise UserError(f"--sample_guide_scale {args.sample_guide_scale}: must be a number")
    if args.fps is not None and not 1 <= args.fps <= 240:
        raise UserError(f"--fps {args.fps:g}: must be 1 to 240")
    if args.base_seed > LARGEST_SEED:
        raise UserError(f"--base_seed {args.base_seed}: must be at most {LARGEST_SEED}")


def _check_task(task: str | None, checkpoint: "Checkpoint") -> None:
    """A task that is named must be the one that the files are for."""
    if task is None:
        return
    alike = MODELS[task].traits == MODELS[checkpoint.kind].traits
    if not alike or (checkpoint.spec.name in TASKS and checkpoint.spec.name != task):
        raise UserError(f"--task {task}: {checkpoint.folder} holds a model of the kind {checkpoint.kind}")


def _options(args: argparse.Namespace, checkpoint: "Checkpoint", image: Any) -> dict[str, Any]:
    """The pipeline's arguments, with the model's own values where nothing was asked for."""
    spec = checkpoint.spec
    width, height = _size(args, checkpoint, image)
    frames = spec.num_frames if args.frame_num is None else args.frame_num
    stride = spec.vae_stride[0]
    guidance = spec.guidance_scale if args.sample_guide_scale is None else args.sample_guide_scale
    spec.check_guidance(guidance)
    if frames < 1 or (frames - 1) % stride:
        near = max(round((frames - 1) / stride), 0) * stride + 1
        raise UserError(f"--frame_num {frames}: must be {stride}n+1, for instance {near}")
    return {
        "image": image,
        "negative_prompt": spec.negative_prompt if args.negative_prompt is None else args.negative_prompt,
        "width": width,
        "height": height,
        "num_frames": frames,
        "num_inference_steps": args.sample_steps or spec.num_inference_steps,
        "guidance_scale": guidance,
        "shift": args.sample_shift or spec.shift_for(width, height),
        "scheduler": args.sample_solver or spec.scheduler,
        "seed": secrets.randbelow(2**32) if args.base_seed < 0 else args.base_seed,
    }


def _size(args: argparse.Namespace, checkpoint: "Checkpoint", image: Any) -> tuple[int, int]:
    spec = checkpoint.spec
    width, height = (spec.width, spec.height) if args.size is None else parse_size(args.size)
    step_w, step_h = checkpoint.size_steps
    if spec.name == "i2v-14B" and args.size is None:
        _note(f"the 480P and the 720P model look the same: {width}*{height} is assumed; --size 832*480 for the other")
    if spec.sizes and (width, height) not in spec.sizes:
        trained = " and ".join(f"{w}*{h}" for w, h in spec.sizes)
        _note(f"the model was trained for {trained}; {width}*{height} may look worse")
    if image is not None:
        from mlx_wan.conditioning import SIZE_RULES

        return SIZE_RULES[spec.task](image.width, image.height, step_w, step_h, width * height)
    if width % step_w or height % step_h or not width or not height:
        near = "*".join(str(max(round(n / step), 1) * step) for n, step in ((width, step_w), (height, step_h)))
        raise UserError(f"--size {args.size}: width must be a multiple of {step_w}, height of {step_h}; try {near}")
    return width, height


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of a size such as 1280*704; UserError for anything else."""
    match = re.fullmatch(r"(\d{1,5})\s*[*xX×]\s*(\d{1,5})", text.strip())
    if not match:
        raise UserError(f"--size {text}: must be width*height in pixels, such as 1280*704")
    return int(match[1]), int(match[2])


def _free_name(prompt: str, model: str, options: dict[str, Any]) -> Path:
    """A name in the current folder that tells what the video is and is not taken yet."""
    words = re.sub(r"[^\w-]+", "_", prompt)[:50].strip("_") or "video"
    stem = f"{model}_{options['width']}x{options['height']}_{words}_{time.strftime('%Y%m%d_%H%M%S')}"
    path, number = Path(f"{stem}.mp4"), 1
    while path.exists():
        number += 1
        path = Path(f"{stem}_{number}.mp4")
    return path


def _plan(args: argparse.Namespace, checkpoint: "Checkpoint", options: dict[str, Any], pictures: int) -> "Plan":
    """Whether the run fits this machine and what has to leave memory on the way; UserError if it cannot fit."""
    import mlx.core as mx

    from mlx_wan.memory.plan import Dimensions, Setting, choose

    dtype = getattr(mx, args.dtype) if args.dtype else backend.default_dtype()
    size = options["width"], options["height"], options["num_frames"]
    setting = Setting(*size, dtype, pictures, keep_both_experts=args.keep_both_experts)
    memory = sys.maxsize if args.ignore_plan else backend.usable_memory()
    return choose(Dimensions.of_checkpoint(checkpoint), setting, backend.device_name(), memory)


def _check_loras(args: argparse.Namespace, checkpoint: "Checkpoint") -> None:
    """Read the LoRAs' headers before any weight, and say what of them finds no place."""
    if not (loras := parse_loras(args)):
        return
    from mlx_wan.lora.fuse import QUANTIZED, expert_part
    from mlx_wan.lora.load import read_lora, transformer_shapes

    if args.fuse and checkpoint.quantization is not None:
        raise UserError(QUANTIZED)
    shapes = transformer_shapes(checkpoint.transformer_config)
    for path, _, expert in loras:
        expert_part(checkpoint, expert)
        if (lora := read_lora(path, shapes)).note:
            _note(str(lora.note))


def _facts(args: argparse.Namespace, checkpoint: "Checkpoint", options: dict[str, Any], dtype: str) -> dict[str, Any]:
    """What is stored in the video: all that is needed to make it again."""
    import mlx_wan

    files = {"image": args.image, "last_image": args.last_frame}
    picture = {name: Path(file).name for name, file in files.items() if file}
    settings = {name: value for name, value in options.items() if name not in files}
    if loras := parse_loras(args):
        settings["loras"] = [lora.facts() for lora in loras]
    model = {"model": checkpoint.spec.name, "dtype": dtype.removeprefix("mlx.core.")}
    return {"prompt": args.prompt, **picture, **settings, **model, "mlx_wan": mlx_wan.__version__}


def _say_what_is_pointless(args: argparse.Namespace) -> None:
    given = [f"--{flag}" for flag in ("t5_cpu", "convert_model_dtype") if getattr(args, flag)]
    if args.offload_model is not None:
        given.insert(0, "--offload_model")
    if given:
        _note(f"{', '.join(given)}: no effect here, because CPU and GPU share their memory")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
