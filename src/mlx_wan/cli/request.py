"""What `generate` is asked for: flags -> checked options. All that can be wrong is found before weights are loaded."""

import argparse
import math
import re
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_wan import backend
from mlx_wan.cli import sources
from mlx_wan.cli.flags import DTYPE_BYTES, TASKS
from mlx_wan.cli.fuse import parse_loras
from mlx_wan.cli.parts import PARTS
from mlx_wan.cli.report import note
from mlx_wan.errors import UserError
from mlx_wan.zoo import MODELS

if TYPE_CHECKING:
    from mlx_wan.parallel.plan import Parallel
    from mlx_wan.weights.checkpoint import Checkpoint, Component

OTHER_TASKS = ("animate-14B", "s2v-14B")
LARGEST_SEED = 2**63 - 1


def check_flags(args: argparse.Namespace) -> None:
    """What can be judged without knowing the model."""
    if args.prompt is None:
        raise UserError("the following arguments are required: --prompt (see mlx-wan generate --help)")
    if args.save_every is not None and args.save_every < 1:
        raise UserError(f"--save_every {args.save_every}: must be at least 1")
    for flag in ("image", "last_frame", "save_file", "ckpt_dir", "text_cache", *sources.FLAGS[:3], *PARTS):
        if getattr(args, flag) == "":  # an unset variable of a script: no reason to do something else silently
            raise UserError(f"--{flag} is empty; give a name, or leave the flag out")
    if args.use_prompt_extend and args.crew.is_first:  # who asks, for all
        from mlx_wan.prompting.extend import check

        check(args.prompt_extend_method, args.prompt_extend_model, args.prompt, args.image)
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
    for seed in args.base_seed or ():
        if seed > LARGEST_SEED:
            raise UserError(f"--base_seed {seed}: must be at most {LARGEST_SEED}")


def check_task(task: str | None, checkpoint: "Checkpoint") -> None:
    """A task that is named must be the one that the files are for."""
    if task is None:
        return
    alike = MODELS[task].traits == MODELS[checkpoint.kind].traits
    if not alike or (checkpoint.spec.name in TASKS and checkpoint.spec.name != task):
        raise UserError(f"--task {task}: {checkpoint.folder} holds a model of the kind {checkpoint.kind}")


def options_of(args: argparse.Namespace, checkpoint: "Checkpoint", image: Any) -> dict[str, Any]:
    """The pipeline's arguments, with the model's own values where nothing was asked for."""
    from mlx_wan.request import checked_interval
    from mlx_wan.schedulers import make_scheduler
    from mlx_wan.step_cache import StepCache

    spec = checkpoint.spec
    width, height = _size(args, checkpoint, image)
    frames = spec.num_frames if args.frame_num is None else args.frame_num
    stride = spec.vae_stride[0]
    guidance = spec.guidance_scale if args.sample_guide_scale is None else args.sample_guide_scale
    spec.check_guidance(guidance)
    if frames < 1 or (frames - 1) % stride:
        near = max(round((frames - 1) / stride), 0) * stride + 1
        raise UserError(f"--frame_num {frames}: must be {stride}n+1, for instance {near}")
    timesteps = spec.check_timesteps(args.sample_timesteps, args.sample_steps, args.sample_shift)
    levels = {
        "num_inference_steps": args.sample_steps or spec.num_inference_steps,
        "shift": args.sample_shift or spec.shift_for(width, height),
    }
    if timesteps is not None:
        levels = {"num_inference_steps": len(timesteps), "timesteps": timesteps}
    solver = args.sample_solver or spec.scheduler
    dials: dict[str, Any] = {}
    if args.guidance_interval is not None:
        dials["guidance_interval"] = checked_interval(args.guidance_interval)
    if args.cache is not None:
        StepCache(args.cache)
        dials["cache"] = args.cache
    make_scheduler(solver, levels["num_inference_steps"], levels.get("shift", 1.0), timesteps)
    return {
        "image": image,
        "negative_prompt": spec.negative_prompt if args.negative_prompt is None else args.negative_prompt,
        "width": width,
        "height": height,
        "num_frames": frames,
        "guidance_scale": guidance,
        **levels,
        **dials,
        "scheduler": solver,
        "seed": secrets.randbelow(2**32) if args.base_seed < 0 else args.base_seed,
    }


def _size(args: argparse.Namespace, checkpoint: "Checkpoint", image: Any) -> tuple[int, int]:
    spec = checkpoint.spec
    width, height = (spec.width, spec.height) if args.size is None else parse_size(args.size)
    source = args.source.video if args.source else None
    step_w, step_h = checkpoint.size_steps
    if spec.name == "i2v-14B" and args.size is None:
        note(f"the 480P and the 720P model look the same: {width}*{height} is assumed; --size 832*480 for the other")
    if spec.sizes and (width, height) not in spec.sizes:
        trained = " and ".join(f"{w}*{h}" for w, h in spec.sizes)
        note(f"the model was trained for {trained}; {width}*{height} may look worse")
    if image is not None and not args.exact_size:
        from mlx_wan.conditioning import SIZE_RULES

        return SIZE_RULES[spec.task](image.width, image.height, step_w, step_h, width * height)
    if source is not None and not args.exact_size:
        from mlx_wan.vace import source_size

        return source_size(source.shape[2], source.shape[1], step_w, step_h, width * height)
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


def free_name(prompt: str, model: str, options: dict[str, Any], taken: "set[Path] | None" = None) -> Path:
    """A name in the current folder that tells what the video is, is not there yet and not among `taken`.

    One frame is a picture.
    """
    words = re.sub(r"[^\w-]+", "_", prompt)[:50].strip("_") or "video"
    stem = f"{model}_{options['width']}x{options['height']}_{words}_{time.strftime('%Y%m%d_%H%M%S')}"
    suffix = ".png" if options["num_frames"] == 1 else ".mp4"
    path, number = Path(f"{stem}{suffix}"), 1
    while path.exists() or path in (taken or ()):
        number += 1
        path = Path(f"{stem}_{number}{suffix}")
    return path


def low_memory(args: argparse.Namespace, checkpoint: "Checkpoint", options: dict[str, Any]) -> bool | None:
    """Whether parts have to leave memory on the way, None to let the pipeline decide; UserError if the run cannot fit.

    MLX's limits are set for that.

    The planner knows of one process with whole parts. Where weights are spread over several, only they are counted.
    """
    from mlx_wan.memory.limits import limit_memory

    parallel = args.crew.parallel
    if min(parallel.share_of_transformer, parallel.share_of_text_encoder) < 1:
        _check_memory(checkpoint, args.dtype, args.keep_both_experts, parallel)
        limit_memory()
        return None
    import mlx.core as mx

    from mlx_wan.memory.plan import Dimensions, Setting, choose

    dtype = getattr(mx, args.dtype) if args.dtype else backend.default_dtype()
    size = options["width"], options["height"], options["num_frames"]
    pictures = sum(options.get(name) is not None for name in ("image", "last_image"))
    begins = args.overlap if args.extend else 1
    both = args.keep_both_experts
    references = len(args.source.references) if args.source else 0
    pictures = max(pictures, bool(args.extend))
    setting = Setting(*size, dtype, pictures, keep_both_experts=both, references=references, begins=begins)
    memory = sys.maxsize if args.ignore_plan else backend.usable_memory()
    plan = choose(Dimensions.of_checkpoint(checkpoint), setting, backend.device_name(), memory)
    limit_memory(plan)
    return plan.low_memory


def _check_memory(checkpoint: "Checkpoint", dtype: str | None, both_experts: bool, parallel: "Parallel") -> None:
    """Refuse a model whose weights alone are more than the memory; warn when they leave little of it.

    The text encoder is freed before the transformer comes, and the VAE stays with either. Of two experts one is
    there at a time, unless both are to be kept.
    """
    size = DTYPE_BYTES[dtype or str(backend.default_dtype()).removeprefix("mlx.core.")]
    vae = _weight_bytes(checkpoint.vae, 4)
    experts = [
        _weight_bytes(part, size) * parallel.share_of_transformer
        for name, part in checkpoint.parts.items()
        if name.startswith("transformer")
    ]
    text_encoder = _weight_bytes(checkpoint.text_encoder, size) * parallel.share_of_text_encoder
    needed = vae + max(text_encoder, sum(experts) if both_experts else max(experts))
    total = backend.total_memory()
    sizes = f"the weights take {needed / 2**30:.1f} GiB of {total / 2**30:.1f} GiB of memory"
    if needed > total:
        raise UserError(
            f"{checkpoint.folder}: {sizes}; convert the model to fewer bits first (mlx-wan convert -q 8), "
            "spread it over several machines (--dit_fsdp --t5_fsdp), or use a larger one"
        )
    if needed > 0.75 * total:
        note(f"{sizes}: it may not be enough")


def check_loras(args: argparse.Namespace, checkpoint: "Checkpoint") -> None:
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
            note(str(lora.note))


def _weight_bytes(part: "Component", size: int) -> int:
    """Memory of a component whose floating-point tensors are loaded with `size` bytes an element."""
    return sum(math.prod(info.shape) * size if "float" in info.dtype else info.nbytes for info in part.tensors.values())


def say_what_is_pointless(args: argparse.Namespace) -> None:
    given = [f"--{flag}" for flag in ("t5_cpu", "convert_model_dtype") if getattr(args, flag)]
    if args.offload_model is not None:
        given.insert(0, "--offload_model")
    if given:
        note(f"{', '.join(given)}: no effect here, because CPU and GPU share their memory")
