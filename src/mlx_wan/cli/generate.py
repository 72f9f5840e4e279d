"""`mlx-wan generate`: from a prompt, or a prompt and a picture, to a video file.

Everything that can be wrong with a request is found out before weights are loaded.
"""

import argparse
import contextlib
import copy
import math
import re
import secrets
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_wan import backend
from mlx_wan.cli import longer, report, resume, settings, sources
from mlx_wan.cli.flags import DTYPE_BYTES, FILES, TASKS, add_flags
from mlx_wan.cli.fuse import parse_loras
from mlx_wan.cli.progress import JsonProgress, Progress
from mlx_wan.cli.ranks import together
from mlx_wan.cli.report import note as _note
from mlx_wan.errors import UserError, WanError
from mlx_wan.formats import output_path, settings_path, sibling
from mlx_wan.zoo import MODELS

if TYPE_CHECKING:
    from mlx_wan.outputs import Behind
    from mlx_wan.parallel.plan import Parallel
    from mlx_wan.pipeline import Event, WanPipeline
    from mlx_wan.weights.checkpoint import Checkpoint, Component

SUMMARY = "make a video from a prompt, or from a prompt and a picture"
OTHER_TASKS = ("animate-14B", "s2v-14B")
LARGEST_SEED = 2**63 - 1


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("generate", help=SUMMARY, description=SUMMARY)
    # What settings.fill finds in a video, and longer.read in the one that goes on.
    parser.set_defaults(recorded=None, exact_size=False, extended={}, places={}, before=None, source=None)
    add_flags(parser)
    return parser


# --- the run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One video to be made, every request of it checked. name: what tells it from others in messages."""

    name: str
    args: argparse.Namespace
    checkpoint: "Checkpoint"
    options: dict[str, Any]
    path: Path


def run(args: argparse.Namespace) -> int:
    """Check what is asked for, make each video and print where it is and what it took; 1 if one of several failed."""
    with together(args) as args.crew:
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    jobs, failed = _batch(args) if args.batch is not None else (_jobs(args, "", set()), 0)
    single, pipelines = len(jobs) == 1 and args.batch is None, Pipelines()
    for number, job in enumerate(jobs, start=1):
        if report.is_json():
            seed = job.options["seed"]
            report.event("video", number=number, total=len(jobs), path=str(job.path), seed=seed, name=job.name)
        try:
            seconds = _make(job.args, job.checkpoint, job.options, job.path, pipelines)
        except WanError as error:
            if single:
                raise
            failed += 1
            report.say("error", f"{job.name}: {error}")
            continue
        print(job.path)
        print(f"seed {job.options['seed']}")
        stages = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in seconds.items())
        print(f"{stages}, together {sum(seconds.values()):.1f} s")
        print(f"peak memory {backend.peak_memory() / 2**30:.2f} GiB", flush=True)
        if report.is_json():
            report.event("saved", path=str(job.path), seconds=seconds, peak_memory_bytes=backend.peak_memory())
    return 1 if failed else 0


def _batch(args: argparse.Namespace) -> tuple[list[Job], int]:
    """The jobs of a file of lines, all looked at before the first is made, and how many lines cannot be done."""
    from mlx_wan.cli.batch import lines
    from mlx_wan.cli.main import build

    jobs: list[Job] = []
    failed, taken = 0, set()
    for name, line_args, problem in lines(args, build()[1]["generate"]):
        try:
            if line_args is None:
                raise UserError(problem)
            jobs += _jobs(line_args, name, taken)
        except WanError as error:
            failed += 1
            report.say("error", f"{name}: {error}")
    return jobs, failed


def _jobs(args: argparse.Namespace, name: str, taken: set[Path]) -> list[Job]:
    """A job for each seed. `taken` holds the files of earlier jobs, and gets those of these."""
    if args.resume is not None:
        resume.fill(args)
    elif args.replay:
        settings.fill(args)
    _check_flags(args)
    from mlx_wan.outputs import check_output
    from mlx_wan.video import read_image
    from mlx_wan.weights.locate import locate

    image = read_image(args.image) if args.image else None
    last = read_image(args.last_frame) if args.last_frame else None
    wanted = output_path(args.save_file) if args.save_file else None
    if wanted is not None and args.crew.is_first:
        check_output(wanted, args.codec)
    if args.preview is not None and args.crew.is_first and not Path(args.preview).is_dir():
        raise UserError(f"--preview {args.preview}: no such folder; create it first")
    files = {part: getattr(args, part) for part in FILES}
    alone = not args.ckpt_dir and not any(files.values())
    checkpoint = locate("tiny" if alone else args.ckpt_dir, task=args.task, **files)
    _check_task(args.task, checkpoint)
    image = longer.read(args, checkpoint, image)
    args.source = sources.read(args, checkpoint)
    checkpoint.spec.check_pictures(image is not None, last is not None)
    if alone and not args.replay:
        _note("no --ckpt_dir: the small embedded model draws this (coloured shapes that move)")
    settings.compare(args, checkpoint)
    seeds, loras = args.base_seed or [-1], [lora.facts() for lora in parse_loras(args)]
    jobs = []
    for seed in seeds:
        one = copy.copy(args)
        one.base_seed = seed
        options: dict[str, Any] = _options(one, checkpoint, image) | ({} if last is None else {"last_image": last})
        options["seed"] = args.crew.same_seed(options["seed"], drawn=seed < 0)
        longer.check(one, checkpoint, options)
        args.crew.agree(
            checkpoint, {"prompt": args.prompt, "--dtype": args.dtype, "LoRAs": loras, **sources.seen(args), **options}
        )
        if args.resume:
            resume.check(args, _facts(one, checkpoint, options))
        if wanted is None:
            path = _free_name(args.prompt, checkpoint.spec.name, options, taken)
        else:
            path = wanted if len(seeds) == 1 else sibling(wanted, f"seed{options['seed']}")
        if args.crew.is_first:
            check_output(path, args.codec, options["num_frames"] * longer.parts(args))
        if path in taken:
            raise UserError(f"{path}: is already the file of an earlier video of this command")
        taken.add(path)
        one.low_memory = _low_memory(args, checkpoint, options)
        seed_name = f"seed {options['seed']}" if len(seeds) > 1 else ""
        jobs.append(Job(" ".join(filter(None, (name, seed_name))), one, checkpoint, options, path))
    _check_loras(args, checkpoint)
    _say_what_is_pointless(args)
    return jobs


class Pipelines:
    """The pipeline of the last video, kept for as long as the next wants the same model, and the prompts extended."""

    def __init__(self) -> None:
        self._key: Any = None
        self._pipe: WanPipeline | None = None
        self._prompts: dict[Any, str] = {}

    def get(self, args: argparse.Namespace, checkpoint: "Checkpoint") -> "WanPipeline":
        """The pipeline for these flags, with its weights unless memory is short."""
        files = [getattr(args, part) for part in FILES]
        key = (args.ckpt_dir, *files, args.task, args.dtype, args.keep_both_experts, args.low_memory, args.fuse)
        key += (args.text_cache, *parse_loras(args))
        if self._pipe is None or key != self._key:
            self._pipe = None  # the old one leaves before the new one comes
            self._key, self._pipe = key, _load(args, checkpoint)
        return self._pipe

    def extended(self, args: argparse.Namespace) -> str:
        """The prompt as a language model writes it, asked for once; the given one, with a note, if that fails."""
        from mlx_wan.prompting.extend import extend

        how = {
            "method": args.prompt_extend_method,
            "model": args.prompt_extend_model,
            "language": args.prompt_extend_target_lang,
            "image": args.image,
        }
        key = (args.prompt, *how.values())
        if key not in self._prompts:
            try:
                self._prompts[key] = extend(args.prompt, **how)
                _note(f"extended prompt: {self._prompts[key]}")
            except WanError as error:
                self._prompts[key] = args.prompt
                _note(f"the prompt stays as it is, because it could not be extended: {error}")
        return self._prompts[key]


def _load(args: argparse.Namespace, checkpoint: "Checkpoint") -> "WanPipeline":
    import mlx.core as mx

    import mlx_wan

    mx.clear_cache()
    dtype = getattr(mx, args.dtype) if args.dtype else None
    both, parallel = args.keep_both_experts, args.crew.parallel
    pipe = mlx_wan.WanPipeline.from_pretrained(checkpoint, dtype, args.low_memory, both, parallel=parallel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # _check_loras has said it
        for lora in parse_loras(args):
            pipe.load_lora_weights(lora.path, scale=lora.scale, expert=lora.expert)
    if args.fuse:
        pipe.fuse_lora()
    pipe.text_cache = Path(args.text_cache) if args.text_cache else None
    if not pipe.low_memory:  # else each part is loaded in the stage that needs it
        _ = pipe.text_cache or pipe.text_encoder, pipe.vae, both and pipe.transformer_2, pipe.transformer
    return pipe


def _make(
    args: argparse.Namespace, checkpoint: "Checkpoint", options: dict[str, Any], path: Path, pipelines: Pipelines
) -> dict[str, float]:
    """Load, generate and write, under one progress bar; returns the seconds each stage took."""
    from mlx_wan import extend
    from mlx_wan.cli.steps import StepPictures
    from mlx_wan.outputs import Behind, open_output, save_settings

    pieces, parts = (options["num_frames"] - 1) // checkpoint.spec.vae_stride[0] + 1, longer.parts(args)
    steps = options["num_inference_steps"]
    args = _extend_prompt(args, pipelines) if args.use_prompt_extend else args
    shown = JsonProgress if report.is_json() else Progress
    done, start = resume.stand(args, options)
    with shown(steps * parts, pieces * parts, steps * len(done) + (start.step if start else 0)) as progress:
        progress.stage("load")
        pipe = pipelines.get(args, checkpoint)
        is_first = args.crew.is_first
        previews = StepPictures(Path(args.preview), path, pipe) if args.preview and is_first else None
        if args.extend:
            events = extend.stream(pipe, args.prompt, parts, args.overlap, args.before, done, start, **options)
        else:
            events = pipe.stream(args.prompt, **options, start=start, source=args.source)
        facts = _facts(args, checkpoint, options)
        with contextlib.ExitStack() as stack:
            keeper = behind = None
            if args.save_every and is_first:
                kept = resume.record(args, facts)
                keeper = stack.enter_context(resume.Keeper(path, args.save_every, steps, kept, done))
            if is_first:
                writer = stack.enter_context(open_output(path, facts["fps"], args.codec, facts))
                args.crew.on_stop(writer.discard)
                if args.before is not None:
                    writer.write(args.before)
                behind = stack.enter_context(Behind(writer))
            progress.stage("text")
            reused = 0
            for event in events:
                reused += bool(event.point and event.point.kept and event.point.kept.skipped)
                if keeper is not None:
                    keeper.saw(event)
                if event.stage == "denoise" and previews:
                    previews.write(event.index, event.value)
                _follow(event, progress, behind, with_image=bool(args.image or args.extend or args.source))
        if args.save_settings and is_first:
            save_settings(settings_path(path), facts)
    if args.cache is not None:
        _note(f"--cache: {reused} of {options['num_inference_steps']} steps did without the transformer")
    return progress.seconds


def _facts(args: argparse.Namespace, checkpoint: "Checkpoint", options: dict[str, Any]) -> dict[str, Any]:
    """What the video will carry."""
    fps = args.fps or checkpoint.spec.fps
    dtype = args.dtype or str(backend.default_dtype()).removeprefix("mlx.core.")
    more = {**args.extended, **longer.facts(args), **sources.facts(args)}
    return settings.facts(args, checkpoint, options, **more, fps=fps, dtype=dtype)


def _extend_prompt(args: argparse.Namespace, pipelines: Pipelines) -> argparse.Namespace:
    """These flags with an extended prompt, and what of that is to be kept in the video."""
    prompt = args.crew.from_first(pipelines.extended(args) if args.crew.is_first else args.prompt)
    if prompt == args.prompt:
        return args
    how = {"method": args.prompt_extend_method, "model": args.prompt_extend_model}
    kept = {"given_prompt": args.prompt, "prompt_extend": how | {"target_lang": args.prompt_extend_target_lang}}
    return argparse.Namespace(**vars(args) | {"prompt": prompt, "extended": kept})


def _follow(event: "Event", progress: Progress, writer: "Behind | None", with_image: bool) -> None:
    """An event says what is finished: show what comes next, and write frames as they come."""
    if event.stage == "text" and event.index == event.total:
        progress.stage("image" if with_image else "denoise")
    elif event.stage == "image":
        progress.stage("denoise")
    elif event.stage == "denoise":
        progress.step_done()
    elif event.stage == "latents":
        progress.stage("decode")
    elif event.stage == "frames" and writer is not None:
        if len(event.value):
            writer.write(event.value)
        progress.piece_done()


# --- the request ---------------------------------------------------------------------------------------------


def _check_flags(args: argparse.Namespace) -> None:
    """What can be judged without knowing the model."""
    if args.prompt is None:
        raise UserError("the following arguments are required: --prompt (see mlx-wan generate --help)")
    if args.save_every is not None and args.save_every < 1:
        raise UserError(f"--save_every {args.save_every}: must be at least 1")
    for flag in ("image", "last_frame", "save_file", "ckpt_dir", "text_cache", *sources.FLAGS[:3], *FILES):
        if getattr(args, flag) == "":  # an unset variable of a script: no reason to do something else silently
            raise UserError(f"--{flag} is empty; give a name, or leave the flag out")
    if args.use_prompt_extend:
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


def _check_task(task: str | None, checkpoint: "Checkpoint") -> None:
    """A task that is named must be the one that the files are for."""
    if task is None:
        return
    alike = MODELS[task].traits == MODELS[checkpoint.kind].traits
    if not alike or (checkpoint.spec.name in TASKS and checkpoint.spec.name != task):
        raise UserError(f"--task {task}: {checkpoint.folder} holds a model of the kind {checkpoint.kind}")


def _options(args: argparse.Namespace, checkpoint: "Checkpoint", image: Any) -> dict[str, Any]:
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
        _note(f"the 480P and the 720P model look the same: {width}*{height} is assumed; --size 832*480 for the other")
    if spec.sizes and (width, height) not in spec.sizes:
        trained = " and ".join(f"{w}*{h}" for w, h in spec.sizes)
        _note(f"the model was trained for {trained}; {width}*{height} may look worse")
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


def _free_name(prompt: str, model: str, options: dict[str, Any], taken: "set[Path] | None" = None) -> Path:
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


def _low_memory(args: argparse.Namespace, checkpoint: "Checkpoint", options: dict[str, Any]) -> bool | None:
    """Whether parts have to leave memory on the way, None to let the pipeline decide; UserError if the run cannot fit.

    The planner knows of one process with whole parts. Where weights are spread over several, only they are counted.
    """
    parallel = args.crew.parallel
    if min(parallel.share_of_transformer, parallel.share_of_text_encoder) < 1:
        _check_memory(checkpoint, args.dtype, args.keep_both_experts, parallel)
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
    if 0 < plan.limit < mx.get_memory_limit():
        mx.set_memory_limit(plan.limit)
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
        _note(f"{sizes}: it may not be enough")


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


def _weight_bytes(part: "Component", size: int) -> int:
    """Memory of a component whose floating-point tensors are loaded with `size` bytes an element."""
    return sum(math.prod(info.shape) * size if "float" in info.dtype else info.nbytes for info in part.tensors.values())


def _say_what_is_pointless(args: argparse.Namespace) -> None:
    given = [f"--{flag}" for flag in ("t5_cpu", "convert_model_dtype") if getattr(args, flag)]
    if args.offload_model is not None:
        given.insert(0, "--offload_model")
    if given:
        _note(f"{', '.join(given)}: no effect here, because CPU and GPU share their memory")
