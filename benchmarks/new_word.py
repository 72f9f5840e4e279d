"""Teaches a model of the little world a colour it has no word for, from at most 40 clips, and measures what came of it.

    uv run python benchmarks/new_word.py runs/new-word       # the embedded model: LoRA, and QLoRA over 4 bits
    uv run python benchmarks/new_word.py runs/new-word --ways lora --prompts 20 --iters 50

The word is "chestnut": no caption of the training had it, and its colour was a background there, never a shape's.
Of the colours that were tried the embedded autoencoder shows this one, on white, as it is (of 6 true clips that
went through it the judge knew all, of 8 in ivory, on dark backgrounds, none). Clips are drawn: some show chestnut
shapes on white, the others old colours, which keeps the old words. A judge without a network (training/judge.py)
looks at clips of prompts with chestnut in combinations of shape and motion that the clips did not show, and at the
held-out prompts with the old colours, before and after.
Recipe: recipes/new-word.yaml.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import mlx_wan  # noqa: F401  first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
import numpy as np

from mlx_wan.conditioning import to_uint8
from mlx_wan.errors import WanError
from mlx_wan.outputs import open_output
from mlx_wan.pipeline import WanPipeline
from mlx_wan.training.adherence import judge_clips, judges, make_clips
from mlx_wan.training.captions import caption
from mlx_wan.training.finetune import run
from mlx_wan.training.plan import make_plan
from mlx_wan.training.recipe import read_recipe
from mlx_wan.training.scenes import encode_scenes, render
from mlx_wan.training.world import CLIP_FPS, COLOURS, MOTIONS, SHAPES, Scene, sample_scene
from mlx_wan.weights.convert import convert
from mlx_wan.weights.locate import locate

WORD, RGB = "chestnut", (95, 60, 35)  # over 100 from every other colour
BEHIND = ("white",)  # where the autoencoder can show it; elsewhere it makes pink of it
CLIPS, OLD = 40, 12  # of the clips so many show old colours
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "new-word.yaml"
WAYS = {"lora": None, "qlora": 4}  # bits of the model that is trained
RATES = ("colour", "shape", "motion", "all")
Told = tuple[str, Scene]  # a prompt, and what it tells of


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Teach a model of the little world a new word, and judge it.")
    parser.add_argument("folder", type=Path, help="where clips, models and adapters go")
    parser.add_argument("--model", default=os.environ.get("MODEL", "tiny"), help="$MODEL, or the embedded one")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS))
    parser.add_argument("--prompts", type=int, default=200, help="with the new word, and as many with the old ones")
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--group-size", type=int, default=32, help="of the model in 4 bits; must divide its widths")
    parser.add_argument("--iters", type=int, help="of training, instead of the recipe's")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="of the recipe")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    COLOURS[WORD] = RGB  # for drawing and judging; the model's own world had no such colour
    try:
        with judges() as pool:
            report = teach(args, pool)
    except WanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    (args.folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


def teach(args, pool: Executor | None) -> dict[str, dict[str, float]]:
    """Everything in turn; each set of rates is printed as it is there."""
    model = locate(args.model).folder
    rng = random.Random(args.seed)
    shown, asked = split(rng)
    clips = [new_scene(rng, shown) for _ in range(args.clips - args.clips * OLD // CLIPS)]
    clips += [sample_scene(rng, held_out=False, count=1) for _ in range(args.clips - len(clips))]
    new = [(caption(scene, rng), scene) for scene in (new_scene(rng, asked) for _ in range(args.prompts))]
    old = [sample_scene(rng, held_out=True, count=1) for _ in range(args.prompts)]
    old = [(caption(scene, rng), scene) for scene in old]
    pipe, report = WanPipeline.from_pretrained(model), {}
    data = args.folder / "clips"
    draw(data, clips, rng, pipe)

    def say(name: str, told: list[Told], make: Callable[[WanPipeline, list[Told]], Iterator[np.ndarray]]) -> None:
        verdicts = judge_clips(make(pipe, told), [scene for _, scene in told], pool)
        report[name] = {key: float(np.mean([verdict[key] for verdict in verdicts])) for key in RATES}
        print(f"{name:34}" + "  ".join(f"{key} {report[name][key]:6.1%}" for key in RATES), flush=True)

    say(f"{WORD} clips through the VAE", new[:16], through_vae)
    say("before, new word", new, generated)
    say("before, old words", old, generated)
    for way in args.ways:
        base = model
        if (bits := WAYS[way]) is not None:
            base = convert(model, args.folder / f"{bits}bit", bits=bits, group_size=args.group_size, overwrite=True)
        begin = time.perf_counter()
        adapters = train(base, data, args.folder / way, args)
        print(f"{way}: trained in {time.perf_counter() - begin:.0f} s", flush=True)
        pipe = WanPipeline.from_pretrained(base)
        if bits is not None:
            say(f"before, over {bits} bits, old words", old, generated)
        pipe.load_lora_weights(adapters)
        say(f"{way}, new word", new, generated)
        say(f"{way}, old words", old, generated)
    return report


def split(rng: random.Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Combinations of shape and motion: a third is left for judging."""
    every = [(shape, motion) for shape in SHAPES for motion in MOTIONS]
    rng.shuffle(every)
    return every[len(every) // 3 :], every[: len(every) // 3]


def new_scene(rng: random.Random, allowed: list[tuple[str, str]]) -> Scene:
    """One chestnut shape; its shape and motion are among those that are allowed."""
    while True:
        scene = sample_scene(rng, held_out=None, count=1)
        (thing,) = scene.objects
        if (thing.shape, thing.motion) in allowed and scene.background in BEHIND:
            return Scene(scene.background, (replace(thing, colour=WORD),))


def pixels(scene: Scene, pipe: WanPipeline) -> mx.array:
    return render(mx.array(encode_scenes([scene])), pipe.spec.num_frames, pipe.spec.height, pipe.spec.width)


def draw(folder: Path, scenes: list[Scene], rng: random.Random, pipe: WanPipeline) -> None:
    """A folder of clips without loss, and captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(scenes):
        with open_output(folder / f"{i:02}.mp4", CLIP_FPS, "lossless") as video:
            video.write(to_uint8(pixels(scene, pipe)[0]))
        (folder / f"{i:02}.txt").write_text(caption(scene, rng))


def train(model: Path, data: Path, folder: Path, args) -> Path:
    """The adapters of the recipe."""
    changes = {key: json.loads(value) for key, value in args.set} | ({"iters": args.iters} if args.iters else {})
    changes |= {"model": str(model), "data": str(data), "adapter_path": str(folder), "seed": args.seed}
    result, broken = run(make_plan(read_recipe(RECIPE, changes)), False, print_row)
    if broken:
        raise WanError(f"{broken[0]}")
    return result


def print_row(row: dict[str, float]) -> None:
    print(f"  step {row['step']}: loss {row['loss']:.4f}, {row['clips_per_s']:.1f} clips/s", flush=True)


def through_vae(pipe: WanPipeline, told: list[Told]) -> Iterator[np.ndarray]:
    """The true clips, encoded and decoded: the ceiling."""
    return (to_uint8(pipe.vae.decode(pipe.vae.encode(pixels(scene, pipe)))[0]) for _, scene in told)


def generated(pipe: WanPipeline, told: list[Told]) -> Iterator[np.ndarray]:
    """What the model makes of the prompts."""
    missing = pipe.checkpoint.transformer_config.text_len
    embeddings = [pipe.encode_prompt(text) for text in (pipe.spec.negative_prompt, *(prompt for prompt, _ in told))]
    negative, *contexts = (mx.pad(each, [(0, missing - each.shape[0]), (0, 0)])[None] for each in embeddings)
    return make_clips(pipe.checkpoint, pipe.transformer, pipe.vae, contexts, negative)


if __name__ == "__main__":
    sys.exit(main())
