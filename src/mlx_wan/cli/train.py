"""`mlx-wan train`: runs a YAML recipe."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

SUMMARY = "train a model from a YAML recipe"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("train", help=SUMMARY, description=SUMMARY)
    parser.add_argument("-c", "--config", required=True, type=Path, metavar="YAML", help="the recipe")
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="states, log and result go here")
    parser.add_argument("--vae", type=Path, metavar="DIR", help="finished autoencoder, for stage transformer")
    parser.add_argument("--resume", action="store_true", help="go on from the newest state in --run")
    parser.add_argument("--steps", type=int, help="instead of the recipe's train.steps")
    parser.add_argument("--batch-size", type=int, help="instead of the recipe's train.batch_size")
    parser.add_argument("--learning-rate", type=float, help="instead of the recipe's train.learning_rate")
    parser.add_argument("--seed", type=int, help="instead of the recipe's train.seed")
    return parser


def run(args: argparse.Namespace) -> int:
    import mlx.core as mx

    from mlx_wan.errors import UserError
    from mlx_wan.training.checkpoint import newest_state
    from mlx_wan.training.recipe import (
        TransformerRecipe,
        check_same_run,
        check_writable,
        describe,
        read_recipe,
        remember_run,
    )

    overrides = {name: getattr(args, name) for name in ("steps", "batch_size", "learning_rate", "seed")}
    recipe = read_recipe(args.config, {name: value for name, value in overrides.items() if value is not None})
    if isinstance(recipe, TransformerRecipe) != (args.vae is not None):
        need = "needs" if args.vae is None else "takes no"
        raise UserError(f"{args.config} {need} --vae, the folder of a finished autoencoder")
    world = mx.distributed.init()
    facts = describe(recipe, world.size(), args.vae)
    check_writable(args.run)
    if args.resume:
        check_same_run(args.run, facts)
    elif newest_state(args.run):
        raise UserError(f"{args.run} holds a run already; add --resume to go on with it, or choose another --run")
    if world.rank() == 0:
        remember_run(args.run, facts)
        note_states(args.run, args.resume)
    try:
        result = train(recipe, args)
    except KeyboardInterrupt:
        if world.rank() == 0 and (state := newest_state(args.run)):
            print(f"{state} is saved; the same command with --resume goes on from it", file=sys.stderr)
        raise
    if world.rank() == 0:
        print(f"saved {result}")
    return 0


def train(recipe: Any, args: argparse.Namespace) -> Path:
    """Runs the stage of the recipe; returns the folder of its result."""
    from mlx_wan.training.tiny import AutoencoderRecipe, train_autoencoder, train_transformer

    report = Reporter(recipe.train.steps)
    if isinstance(recipe, AutoencoderRecipe):
        return train_autoencoder(recipe, args.run, args.resume, report)
    return train_transformer(recipe, args.vae, args.run, args.resume, report)


def note_states(folder: Path, resume: bool) -> None:
    """Says which states are passed over, and where the run goes on."""
    from mlx_wan.training.checkpoint import damaged_states, newest_state

    for path in damaged_states(folder):
        print(f"note: {path} is damaged and passed over", file=sys.stderr)
    if resume:
        state = newest_state(folder)
        print(f"going on from {state}" if state else f"no state in {folder}: starting at step 0", file=sys.stderr)


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
