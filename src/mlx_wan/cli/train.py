"""`mlx-wan train`: runs a YAML recipe; `mlx-wan train report RUN` shows how a run went."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from mlx_wan.cli.ranks import alongside
from mlx_wan.errors import UserError
from mlx_wan.training.options import FREE_OPTIONS, FinetuneRecipe

if TYPE_CHECKING:
    from mlx_wan.training.plan import Plan
    from mlx_wan.weights.checkpoint import Checkpoint

SUMMARY = "train a model from a YAML recipe, or fine-tune one on clips of your own"
# Flags of the two stages that make the embedded model; those of stage finetune are the fields of its recipe.
_OWN = ("run", "vae", "init", "steps")
# Options that processes may have differently: where things are, and what the first alone does.
MAY_DIFFER = set(FREE_OPTIONS) - {"shard_optimizer", "keep_both_experts"} | {"resume_adapter_file"}
_SHARED = ("steps", "batch_size", "learning_rate", "seed")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("train", help=SUMMARY, description=SUMMARY)
    parser.add_argument("words", nargs="*", metavar="report RUN", help="write RUN/report.html instead of training")
    parser.add_argument("-c", "--config", type=Path, metavar="YAML", help="the recipe; flags win over its values")
    parser.add_argument("--resume", action="store_true", help="go on from the newest state of the run")
    parser.add_argument("--dry-run", action="store_true", help="fine-tuning: print what would be done, and stop")
    made = parser.add_argument_group("stages autoencoder and transformer")
    made.add_argument("--run", type=Path, metavar="DIR", help="states, log and result go here")
    made.add_argument("--vae", type=Path, metavar="DIR", help="finished autoencoder, for stage transformer")
    made.add_argument("--init", metavar="MODEL", help="instead: a finished model to go on from, 'tiny' or a folder")
    made.add_argument("--steps", metavar="N", help="instead of the recipe's train.steps")
    tuned = parser.add_argument_group("stage finetune (three of them for all stages: batch size, learning rate, seed)")
    for field in fields(FinetuneRecipe):
        tuned.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name, **_flag(field))
    return parser


def _flag(field: Any) -> dict[str, Any]:
    default = "" if field.default in (None, ()) else f" ({_show(field.default)})"
    words: dict[str, Any] = {"default": None, "help": (field.metadata["help"] + default).replace("%", "%%")}
    if get_origin(field.type) is tuple:
        return words | {"nargs": "+", "metavar": "X"}
    if bool in (field.type, *get_args(field.type)):
        return words | {"nargs": "?", "const": "true", "metavar": "false"}
    return words | {"metavar": "X"}


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def run(args: argparse.Namespace) -> int:
    if args.words:
        return report(args)
    from mlx_wan.training.recipe import read_recipe

    options = [field.name for field in fields(FinetuneRecipe)]
    given = {name: getattr(args, name) for name in (*options, *_OWN) if getattr(args, name) is not None}
    if args.config is None and not given.keys() & set(options):
        raise UserError("give a recipe with -c, or at least --model and --data (see mlx-wan train --help)")
    changes = {name: _plain(name, value) for name, value in given.items() if name not in ("run", "vae", "init")}
    recipe = read_recipe(args.config, changes if _is_finetuning(args, given) else _of_train(args, changes, given))
    prepare = finetune if isinstance(recipe, FinetuneRecipe) else make
    with alongside() as crew:
        facts, work = crew.attempt(partial(prepare, recipe, args, crew.is_first))
        crew.same(facts | {"--resume": args.resume})
        return work()


def _is_finetuning(args: argparse.Namespace, given: dict[str, Any]) -> bool:
    """Whether the recipe is of stage finetune; UserError for flags of the other stages then."""
    from mlx_wan.training.recipe import stage_of

    if args.config is not None and stage_of(args.config) != "finetune":
        return False
    for name, instead in {"run": "--adapter-path", "vae": "nothing", "init": "--model", "steps": "--iters"}.items():
        if name in given:
            raise UserError(f"stage finetune takes no --{name}; use {instead}")
    return True


def _of_train(args: argparse.Namespace, changes: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The changes to a recipe of another stage's train section; UserError for flags of fine-tuning."""
    for name in given:
        if name not in (*_OWN, *_SHARED):
            raise UserError(f"{args.config} takes no --{name.replace('_', '-')}; it is for stage finetune")
    if args.dry_run:
        raise UserError(f"{args.config} takes no --dry-run; it is for stage finetune")
    if args.run is None:
        raise UserError(f"{args.config} needs --run, the folder for states, log and result")
    return changes


def _plain(name: str, value: Any) -> Any:
    """A flag's text as YAML would have it; what it must be is checked with the recipe."""
    if isinstance(value, list):
        return [_plain(name, each) for each in value]
    kinds = {field.name: field.type for field in fields(FinetuneRecipe)}
    kind = kinds.get(name, int)
    if str in (kind, *get_args(kind)):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


# --- the stages of the embedded model --------------------------------------------------------------------------------


Prepared = tuple[dict[str, Any], Callable[[], int]]  # what all processes must have alike, and what is left to do


def make(recipe: Any, args: argparse.Namespace, first: bool) -> Prepared:
    """A stage of training/tiny.py, everything checked."""
    from mlx.utils import tree_flatten

    from mlx_wan.fingerprint import model_fingerprint
    from mlx_wan.training.recipe import TransformerRecipe, check_same_run, describe, processes_of, remember_run
    from mlx_wan.training.tiny import build_tokenizer, load_start

    given = [f"--{name}" for name in ("vae", "init") if getattr(args, name) is not None]
    if not isinstance(recipe, TransformerRecipe):
        if given:
            raise UserError(f"{args.config} takes no {given[0]}; it is for stage transformer")
    elif len(given) != 1:
        need = "--vae or --init, not both" if given else "--vae, the folder of a finished autoencoder, or --init"
        raise UserError(f"{args.config} needs {need}")
    start = None
    if isinstance(recipe, TransformerRecipe) and args.init is not None:
        start = load_start(args.init, recipe, build_tokenizer())
    init = None if start is None else model_fingerprint(start)
    processes = processes_of(args.run, args.resume)
    facts = describe(recipe, processes, args.vae, init)
    check_free(args.run, args.resume, "--run")
    if args.resume:
        check_same_run(args.run, facts)

    def work() -> int:
        if first:
            remember_run(args.run, facts)
            note_states(args.run, args.resume)
        return finish(args.run, lambda: train(recipe, args, processes, start))

    return dict(tree_flatten(facts)), work


def train(recipe: Any, args: argparse.Namespace, processes: int, start: "Checkpoint | None") -> Path:
    """Runs the stage of the recipe; returns the folder of its result."""
    from mlx_wan.training.tiny import AutoencoderRecipe, train_autoencoder, train_transformer

    report = Reporter(recipe.train.steps)
    if isinstance(recipe, AutoencoderRecipe):
        return train_autoencoder(recipe, args.run, args.resume, report, processes)
    return train_transformer(recipe, args.vae, args.run, args.resume, report, start, processes)


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def finetune(recipe: FinetuneRecipe, args: argparse.Namespace, first: bool) -> Prepared:
    """Prints the plan; what is left is to do it."""
    from mlx_wan.fingerprint import model_fingerprint
    from mlx_wan.parallel.pulse import PULSE
    from mlx_wan.training.plan import make_plan

    with PULSE.taking():  # one machine may have to download what another has
        plan = make_plan(recipe)
    if first:
        print("\n".join(plan.lines()), file=sys.stdout if args.dry_run else sys.stderr, flush=True)
    if args.dry_run:
        return {}, lambda: 0
    folder = Path(recipe.adapter_path)
    check_free(folder, args.resume, "--adapter-path")

    def work() -> int:
        if first:
            note_states(folder, args.resume)
        return finish(folder, lambda: _finetune(plan, args.resume))

    options = {name: value for name, value in vars(plan.recipe).items() if name not in MAY_DIFFER}
    return {"model": model_fingerprint(plan.checkpoint), **options}, work


def _finetune(plan: "Plan", resume: bool) -> Path:
    from mlx_wan.cli.previews import Previews
    from mlx_wan.memory.limits import limit_memory
    from mlx_wan.training.finetune import run
    from mlx_wan.training.trackers import trackers

    limit_memory()
    folder = Path(plan.recipe.adapter_path)
    shown = [Reporter(plan.recipe.iters), *trackers(plan.recipe.report_to, folder)]

    def report(row: dict[str, float]) -> None:
        for each in shown:
            each(row)

    result, broken = run(plan, resume, report, Encoding(), Previews(plan))
    for one in broken:
        print(f"skipped {one}", file=sys.stderr)
    if broken:
        print(f"{len(broken)} clips could not be decoded and were skipped", file=sys.stderr)
    return result


class Encoding:
    """Says how far the encoding of clips and texts is, about every second."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        if done == total or time.monotonic() - self.last > 1:
            self.last = time.monotonic()
            print(f"encoding {what} {done}/{total}", file=sys.stderr, flush=True)


# --- both ------------------------------------------------------------------------------------------------------------


def check_free(folder: Path, resume: bool, flag: str) -> None:
    """UserError if `folder` cannot be written, or holds a run that is not to be resumed."""
    from mlx_wan.training.checkpoint import newest_state
    from mlx_wan.training.recipe import check_writable

    check_writable(folder)
    if not resume and newest_state(folder):
        raise UserError(f"{folder} holds a run already; add --resume to go on with it, or choose another {flag}")


def finish(folder: Path, work: Any) -> int:
    """Does the work and names its result; when it is stopped, says how to go on."""
    import mlx.core as mx

    from mlx_wan.training.checkpoint import newest_state

    first = mx.distributed.init().rank() == 0
    try:
        result = work()
    except KeyboardInterrupt:
        if first and (state := newest_state(folder)):
            print(f"{state} is saved; the same command with --resume goes on from it", file=sys.stderr)
        raise
    if first:
        print(f"saved {result}")
    return 0


def note_states(folder: Path, resume: bool) -> None:
    """Says which states are passed over, and where the run goes on."""
    from mlx_wan.training.checkpoint import damaged_states, newest_state

    for path in damaged_states(folder):
        print(f"note: {path} is damaged and passed over", file=sys.stderr)
    if resume:
        state = newest_state(folder)
        print(f"going on from {state}" if state else f"no state in {folder}: starting at step 0", file=sys.stderr)


def report(args: argparse.Namespace) -> int:
    """`mlx-wan train report RUN`."""
    if len(args.words) != 2 or args.words[0] != "report":
        raise UserError(f"{' '.join(args.words)}: only `mlx-wan train report RUN` takes words without a flag")
    from mlx_wan.training.report import write_report

    print(f"saved {write_report(Path(args.words[1]))}")
    return 0


class Reporter:
    """Prints each row of the log with the time left."""

    def __init__(self, steps: int):
        self.steps, self.rate = steps, 0.0
        self.started = time.perf_counter()

    def __call__(self, row: dict[str, float]) -> None:
        self.rate = row.get("steps_per_s", self.rate)
        left = (self.steps - row["step"]) / self.rate if self.rate else 0.0
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
        print(f"step {row['step']}/{self.steps}  {numbers}  left {left:.0f} s", file=sys.stderr, flush=True)
