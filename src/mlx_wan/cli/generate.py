"""`mlx-wan generate`: from a prompt, or a prompt and a picture, to a video file.

Everything that can be wrong with a request is found out before weights are loaded.
"""

import argparse
import contextlib
import copy
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_wan import backend
from mlx_wan.cli import longer, report, request, resume, settings, sources
from mlx_wan.cli.flags import add_flags
from mlx_wan.cli.fuse import parse_loras
from mlx_wan.cli.parts import given_parts
from mlx_wan.cli.progress import JsonProgress, Progress
from mlx_wan.cli.ranks import together
from mlx_wan.cli.report import note as _note
from mlx_wan.errors import UserError, WanError
from mlx_wan.formats import output_path, settings_path, sibling

if TYPE_CHECKING:
    from mlx_wan.outputs import Behind
    from mlx_wan.pipeline import Event, WanPipeline
    from mlx_wan.weights.checkpoint import Checkpoint

SUMMARY = "make a video from a prompt, or from a prompt and a picture"


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
            if single or args.crew.size > 1:  # the others may be in the middle of it
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
    found = list(lines(args, build()[1]["generate"]))
    args.crew.same({"number of lines (--batch)": len(found)})
    for name, line_args, problem in found:
        try:
            if line_args is None:
                raise UserError(problem)
            jobs += args.crew.attempt(partial(_jobs, line_args, name, taken))
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
    request.check_flags(args)
    from mlx_wan.outputs import check_output
    from mlx_wan.parallel.pulse import PULSE
    from mlx_wan.video import read_image
    from mlx_wan.weights.locate import locate

    image = read_image(args.image) if args.image else None
    last = read_image(args.last_frame) if args.last_frame else None
    wanted = output_path(args.save_file) if args.save_file else None
    if wanted is not None and args.crew.is_first:
        check_output(wanted, args.codec)
    if args.preview is not None and args.crew.is_first and not Path(args.preview).is_dir():
        raise UserError(f"--preview {args.preview}: no such folder; create it first")
    files = given_parts(args)
    alone = not args.ckpt_dir and not files
    with PULSE.taking():  # one machine may have to download what another has
        checkpoint = locate("tiny" if alone else args.ckpt_dir, task=args.task, **files)
    request.check_task(args.task, checkpoint)
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
        options: dict[str, Any] = request.options_of(one, checkpoint, image) | (
            {} if last is None else {"last_image": last}
        )
        options["seed"] = args.crew.same_seed(options["seed"], drawn=seed < 0)
        longer.check(one, checkpoint, options)
        args.crew.agree(
            checkpoint, {"prompt": args.prompt, "--dtype": args.dtype, "LoRAs": loras, **sources.seen(args), **options}
        )
        if args.resume:
            resume.check(args, _facts(one, checkpoint, options))
        if wanted is None:
            path = request.free_name(args.prompt, checkpoint.spec.name, options, taken)
        else:
            path = wanted if len(seeds) == 1 else sibling(wanted, f"seed{options['seed']}")
        if args.crew.is_first:
            check_output(path, args.codec, options["num_frames"] * longer.parts(args))
        if path in taken:
            raise UserError(f"{path}: is already the file of an earlier video of this command")
        taken.add(path)
        one.low_memory = request.low_memory(args, checkpoint, options)
        seed_name = f"seed {options['seed']}" if len(seeds) > 1 else ""
        jobs.append(Job(" ".join(filter(None, (name, seed_name))), one, checkpoint, options, path))
    request.check_loras(args, checkpoint)
    request.say_what_is_pointless(args)
    return jobs


class Pipelines:
    """The pipeline of the last video, kept for as long as the next wants the same model, and the prompts extended."""

    def __init__(self) -> None:
        self._key: Any = None
        self._pipe: WanPipeline | None = None
        self._prompts: dict[Any, str] = {}

    def get(self, args: argparse.Namespace, checkpoint: "Checkpoint") -> "WanPipeline":
        """The pipeline for these flags, with its weights unless memory is short."""
        key = (args.ckpt_dir, args.task, args.dtype, args.keep_both_experts, args.low_memory, args.fuse)
        key += (args.text_cache, *given_parts(args).items(), *parse_loras(args))
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
        previews = StepPictures(Path(args.preview), path, pipe, parts) if args.preview and is_first else None
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
                args.crew.on_stop(keeper.say)
            if is_first:
                writer = stack.enter_context(open_output(path, facts["fps"], args.codec, facts))
                args.crew.on_stop(writer.discard)
                if args.before is not None:
                    writer.write(args.before)
                behind = stack.enter_context(Behind(writer))
            progress.stage("text")
            reused = 0
            for event in events:
                args.crew.steady(event.stage == "denoise")  # the next is like this one, or the next comes soon
                reused += bool(event.point and event.point.kept and event.point.kept.skipped)
                if keeper is not None:
                    keeper.saw(event)
                if previews is not None:
                    previews.saw(event)
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
    more |= {"codec": args.codec} if args.codec else {}
    return settings.facts(args, checkpoint, options, **more, fps=fps, dtype=dtype)


def _extend_prompt(args: argparse.Namespace, pipelines: Pipelines) -> argparse.Namespace:
    """These flags with an extended prompt, and what of that is to be kept in the video."""
    from mlx_wan.parallel.pulse import PULSE

    with PULSE.taking():  # others wait
        prompt = pipelines.extended(args) if args.crew.is_first else args.prompt
    prompt = args.crew.from_first(prompt)
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
