"""`generate --save_every N` keeps a run on disk as it goes, `--resume FILE` goes on with it."""

import argparse
import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mlx_wan.cli import settings
from mlx_wan.cli.fuse import parse_loras
from mlx_wan.cli.parts import PARTS
from mlx_wan.cli.report import note
from mlx_wan.cli.sources import references
from mlx_wan.errors import UserError, WanError
from mlx_wan.formats import FORMATS, resume_path, resumed_output

if TYPE_CHECKING:
    from collections.abc import Sequence

    import mlx.core as mx

    from mlx_wan.pipeline import Event
    from mlx_wan.sampling import Point

# What of a run's settings may be another when it goes on: how the video is written, where files are (their fingerprints
# are compared), and what is said in a note.
FREE = {"fps", "codec", "mlx", "mlx_wan", "device", "ckpt_dir", "parts", *settings.FILES, settings.REFERENCES}
KEPT = ("codec", "save_every", "save_settings")  # flags that settings do not tell
LONGEST = 60  # characters of a value in a message


def record(args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """What is kept beside a point: the settings that the video will carry, and what is needed to find it all again."""
    files = [(flag, getattr(args, flag)) for flag in (*settings.FILES.values(), *PARTS, "ckpt_dir")]
    files += [("lora" if lora.expert is None else f"lora_{lora.expert}", lora.path) for lora in parse_loras(args)]
    files += [(settings.REFERENCES, file) for file in references(args)]
    there = [(flag, Path(file)) for flag, file in files if file and Path(file).exists()]
    return {
        "settings": facts,
        "flags": {flag: getattr(args, flag) for flag in KEPT},
        "places": {
            f"{flag} {(path.resolve() if flag == 'ckpt_dir' else path).name}": str(path.absolute())
            for flag, path in there
        },
        "processes": args.crew.size,
    }


def fill(args: argparse.Namespace) -> None:
    """Gives every flag that was not typed the value it had in the run of --resume. Raises UserError if that is none."""
    from mlx_wan.resume import read_record

    if args.replay:
        raise UserError("--resume and --from: one run goes on, or another is made like it; leave one out")
    if args.use_prompt_extend:
        raise UserError("--use_prompt_extend: a run goes on with the prompt it has; leave that out with --resume")
    if not args.resume:
        raise UserError("--resume is empty; give a name, or leave the flag out")
    file = Path(args.resume)
    own = json.dumps(read_record(file)) if args.crew.is_first else ""
    found = json.loads(args.crew.from_first(own))
    try:
        args.places, flags, processes = found["places"], found["flags"], found["processes"]
        recorded = dict(found["settings"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: lacks the settings of its run") from None
    args.replay = args.resume
    settings.fill(args, recorded)
    for flag in KEPT:
        if getattr(args, flag) is None or getattr(args, flag) is False:
            setattr(args, flag, flags.get(flag))
    if args.save_file is None:
        args.save_file = resumed_output(file)
        if Path(args.save_file).suffix not in FORMATS and not args.save_file.endswith("/"):
            raise UserError(f"{file}: its name does not tell that of the video; give -o")
    if processes != args.crew.size:
        note(f"{file}: {processes} processes worked on it before, and now {args.crew.size}: digits may differ")


def check(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """UserError if the settings of this run are not those of the one that is to go on."""
    before, now = (_flat(some) for some in (args.recorded, json.loads(json.dumps(facts))))
    changed = [name for name in {**before, **now} if name not in FREE and before.get(name) != now.get(name)]
    if "the model" in changed:
        why = f"of another model ({before.get('the model')}, this is {now['the model']}); give that one (--ckpt_dir)"
        raise UserError(f"{args.resume}: is of a run {why}")
    if changed:
        name = changed[0]
        raise UserError(
            f"{args.resume}: is of a run with another {name} ({_short(before.get(name))}, this is "
            f"{_short(now.get(name))}); it goes on as it began, or begin a new one without --resume"
        )


def stand(args: argparse.Namespace, options: dict[str, Any]) -> "tuple[list[mx.array], Point | None]":
    """Where the run of --resume stood, in every process: latents of the parts before, and the point in the present one.

    ([], None) without --resume. Raises CheckpointError.
    """
    if not args.resume:
        return [], None
    import mlx.core as mx

    from mlx_wan.resume import arrays_of, expected, load_done, load_point, with_arrays
    from mlx_wan.schedulers import make_scheduler

    shift, timesteps = options.get("shift", 1.0), options.get("timesteps")  # the one or the other
    scheduler = make_scheduler(options["scheduler"], options["num_inference_steps"], shift, timesteps)
    cached = options.get("cache") is not None
    if args.crew.size == 1:
        return load_done(args.resume), load_point(args.resume, scheduler, cached)
    own, done = None, []
    if args.crew.is_first:
        own, done = load_point(args.resume, scheduler, cached), load_done(args.resume)
    place = json.dumps([own.step, own.latents.shape, len(done)]) if own else ""
    step, shape, parts = json.loads(args.crew.from_first(place))
    like = expected(scheduler, step, tuple(shape), cached)
    arrays = arrays_of(own or like)
    point = with_arrays(like, {name: args.crew.parallel.from_first(arrays[name]) for name in sorted(arrays)})
    done = [args.crew.parallel.from_first(part) for part in done or [mx.zeros(shape)] * parts]
    return done, point


class Keeper:
    """A context manager around a run that saves where it stands, every so many steps and after the last one.

    On Ctrl-C it saves once more. The file goes when the block ends well, because then the video is there.
    """

    def __init__(self, video: Path, every: int, steps: int, kept: dict[str, Any], done: "Sequence[mx.array]") -> None:
        self.path, self._every, self._steps, self._record = resume_path(video), every, steps, kept
        self._done, self._again = list(done), len(done)  # parts, and how many of them come once more
        self._newest: Point | None = None
        self._saved = 0

    def __enter__(self) -> "Keeper":
        return self

    def saw(self, event: "Event") -> None:
        """Something is finished. If that cannot be saved, it is said, and the run goes on."""
        if event.stage == "latents":
            self._part_done(event.value)
        if event.point is None:
            return
        self._newest = point = event.point
        if point.step % self._every == 0 or point.step == self._steps:
            self._save(point)

    def _part_done(self, latents: "mx.array") -> None:
        """The point of its last step stays in the file until the next part has come to one."""
        if self._again:
            self._again -= 1
        else:
            self._done.append(latents)

    def _save(self, point: "Point") -> None:
        from mlx_wan.resume import save_point

        try:
            save_point(self.path, point, self._record, self._done)
            self._saved = point.step
        except WanError as error:
            note(str(error))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.path.unlink(missing_ok=True)
            return
        newest = self._newest
        if kind is KeyboardInterrupt and newest is not None and newest.step != self._saved:
            self._save(newest)
        self.say()

    def say(self) -> None:
        """How to go on, if there is anything to go on from."""
        if self.path.exists():
            after = f" after step {self._saved} of {self._steps}" if self._saved else ""
            note(f"{self.path} has the run as it stood{after}: generate --resume {self.path} goes on")


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts, and each of the fingerprints under a name of its own."""
    prints = facts.get("fingerprints")
    prints = prints if isinstance(prints, dict) else {}
    words = {"model": "the model", "loras": "set of LoRAs"}
    named = {words.get(name, f"{name} file"): value for name, value in prints.items()}
    return named | {name: value for name, value in facts.items() if name != "fingerprints"}


def _short(value: Any) -> str:
    words = "none" if value is None else str(value)
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 1]}…"
