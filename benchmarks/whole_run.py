"""A whole generation of a true-size model with random packed weights, on the memory that somebody owns.

    uv run python benchmarks/whole_run.py --task ti2v-5B --memory 8
    uv run python benchmarks/whole_run.py --task t2v-A14B --size 832*480 --frame_num 81 --memory 14 --shift 5
    uv run python benchmarks/whole_run.py                      # the embedded model's sizes, for a CPU

The checkpoint is written first, in the layout of `mlx-wan convert -q`, and read as any other: planned, with MLX's
limits set as `mlx-wan generate` sets them for a machine of so much memory, by `WanPipeline`, from the prompt to the
last frame. The prompt fills the text encoder. Printed is the most that MLX held in each stage, loading its weights
included, beside what was planned, and what it kept for later beside that (its cache counts towards its limit).
Weights are random, so the frames are noise; the steps are few, and memory does not depend on them.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_wan  # first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_wan import backend
from mlx_wan.cli.request import parse_size
from mlx_wan.memory.limits import limit_memory
from mlx_wan.memory.plan import Dimensions, Plan, Setting, choose, gib, make_vae
from mlx_wan.models.transformer import WanTransformer
from mlx_wan.models.umt5 import UMT5Encoder
from mlx_wan.weights.checkpoint import EMBEDDED
from mlx_wan.weights.fit import parameter_dtype
from mlx_wan.weights.locate import locate
from mlx_wan.weights.quantize import Quantization, quantize_module
from mlx_wan.weights.save import array_tensor, native_config, write_native
from mlx_wan.weights.tensors import TensorInfo

TOKENIZER = Path(__file__).resolve().parent.parent / "tests" / "golden" / "tokenizer.json"  # small
STAGES = {"decode": "frames"}  # what the plan calls otherwise than the events do
PROMPT = "a red circle moves right on a black background " * 80  # more tokens than a model takes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the memory of a whole generation against its plan.")
    parser.add_argument("--task", default="tiny", help="a released model; tiny: the embedded model's sizes")
    parser.add_argument("--size", help="W*H in pixels (default: the model's own)")
    parser.add_argument("--frame_num", type=int, help="frames of the clip, 4n+1 (default: the model's own)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group_size", type=int, help="(default: that of `mlx-wan convert`)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--shift", type=float, help="of the schedule: two experts take turns at 2 steps with 5")
    parser.add_argument("--memory", type=float, help="GiB that the machine is taken to have (default: its own)")
    parser.add_argument("--folder", help="where to write the checkpoint (default: a temporary folder)")
    parser.add_argument("--json", help="a file for the numbers")
    args = parser.parse_args(argv)
    if args.task == "tiny":
        model, group_size = Dimensions.of_checkpoint(locate("tiny")), 32  # which divides its rows
        tokenizer = EMBEDDED / "tokenizer.json"
    else:
        model, group_size, tokenizer = Dimensions.of_release(args.task), args.group_size, TOKENIZER
    model = replace(model, quantization=Quantization(args.bits, group_size))
    width, height = parse_size(args.size) if args.size else (model.spec.width, model.spec.height)
    setting = Setting(width, height, args.frame_num or model.spec.num_frames, backend.default_dtype())
    memory = backend.usable_memory(None if args.memory is None else int(args.memory * 2**30))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        found = measure(model, setting, memory, Path(name), args.steps, args.shift or model.spec.shift, tokenizer)
    print(table(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0


def measure(
    model: Dimensions, setting: Setting, memory: int, folder: Path, steps: int, shift: float, tokenizer: Path
) -> dict[str, Any]:
    """Writes the model, plans, runs; everything in bytes and seconds."""
    start = time.perf_counter()
    write_packed(folder, model, tokenizer)
    mx.clear_cache()
    written = time.perf_counter() - start
    checkpoint = locate(folder)
    plan = choose(Dimensions.of_checkpoint(checkpoint), setting, backend.device_name(), memory)
    limit_memory(plan)
    stages = run(checkpoint, plan, setting, steps, shift)
    planned = {STAGES.get(stage.name, stage.name): stage.peak for stage in plan.stages}
    for name, stage in stages.items():
        stage["planned"] = planned.get(name)
    return {
        "model": model.spec.name,
        "setting": [setting.width, setting.height, setting.num_frames, str(setting.dtype)],
        "quantization": vars(model.quantization) if model.quantization else None,
        "device": backend.device_name(),
        "memory": memory,
        "limit": plan.limit,
        "low_memory": plan.low_memory,
        "planned_peak": plan.peak,
        "peak": max(stage["peak"] for stage in stages.values()),
        "written_in": round(written, 1),
        "stages": stages,
    }


def run(checkpoint: Any, plan: Plan, setting: Setting, steps: int, shift: float) -> dict[str, dict[str, Any]]:
    """Stage -> the most bytes held within it, the most kept in MLX's cache at an event, its seconds, its events."""
    pipe = mlx_wan.WanPipeline.from_pretrained(checkpoint, low_memory=plan.low_memory)
    size: dict[str, Any] = {"width": setting.width, "height": setting.height, "num_frames": setting.num_frames}
    stages: dict[str, dict[str, Any]] = {}
    began, frames = time.perf_counter(), 0
    mx.reset_peak_memory()
    for event in pipe.stream(PROMPT, seed=0, num_inference_steps=steps, shift=shift, **size):
        if event.stage == "latents":
            mx.reset_peak_memory()
            continue
        stage = stages.setdefault(event.stage, {"peak": 0, "cache": 0, "seconds": 0.0, "events": 0})
        now = time.perf_counter()
        stage["peak"] = max(stage["peak"], mx.get_peak_memory())
        stage["cache"] = max(stage["cache"], mx.get_cache_memory())
        stage["seconds"] += now - began
        stage["events"] += 1
        began = now
        if event.index == event.total:
            mx.reset_peak_memory()
        if event.stage == "frames":
            frames += len(event.value)
    if frames != setting.num_frames:
        raise RuntimeError(f"{frames} frames came of {setting.num_frames}")
    return stages


def table(found: dict[str, Any]) -> str:
    width, height, frames, dtype = found["setting"]
    packed = found["quantization"]
    lines = [
        f"{found['model']}, {width}×{height}, {frames} frames, {dtype.removeprefix('mlx.core.')}, "
        f"{packed['bits']} bits in groups of {packed['group_size']}, {found['device']}, "
        f"on {gib(found['memory'])}, limit {gib(found['limit'])}, "
        f"{'parts leave memory' if found['low_memory'] else 'everything stays loaded'}",
        "",
        "| stage | planned, GiB | held, GiB | cache, GiB | seconds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, stage in found["stages"].items():
        sizes = (f"{stage[key] / 2**30:.2f}" if stage[key] is not None else "" for key in ("planned", "peak", "cache"))
        lines.append(f"| {name} | {' | '.join(sizes)} | {stage['seconds']:.1f} |")
    lines.append(f"\npeak {gib(found['peak'])}; the checkpoint was written in {found['written_in']} s")
    return "\n".join(lines)


# --- the checkpoint ------------------------------------------------------------------------------------------


def write_packed(folder: Path, model: Dimensions, tokenizer: Path) -> None:
    """The model in the native layout, packed, with the random weights that modules are made with."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "transformer": lambda: WanTransformer(model.transformer),
        "transformer_2": lambda: WanTransformer(model.transformer),
        "text_encoder": lambda: UMT5Encoder(model.text_encoder),
        "vae": lambda: make_vae(model.vae),
    }
    if model.experts == 1:
        del makers["transformer_2"]
    config = native_config(
        model.spec.name,
        transformer=model.transformer,
        text_encoder=model.text_encoder,
        vae=model.vae,
        sampling=model.spec.sampling(),
        boundary=model.spec.boundary,
        quantization=model.quantization,
    )
    parts = {part: random_tensors(part, make(), model.quantization) for part, make in makers.items()}
    write_native(folder, parts, tokenizer, config)


def random_tensors(part: str, module: nn.Module, how: Quantization | None) -> list[TensorInfo]:
    """The parameters of a module in the types that `convert` stores, each made when it is written and gone after."""
    component = part.removesuffix("_2")
    if how is not None:
        quantize_module(module, component, how)
    arrays: dict[str, mx.array] = dict(tree_flatten(module.parameters()))  # pyright: ignore[reportArgumentType]
    stored = None if component == "vae" else mx.bfloat16

    def tensor(name: str) -> TensorInfo:
        dtype = parameter_dtype(component, name, arrays[name].dtype, stored)
        info = array_tensor(name, arrays[name], dtype)
        return replace(info, load=lambda: arrays.pop(name).astype(dtype))

    return [tensor(name) for name in arrays]


if __name__ == "__main__":
    sys.exit(main())
