"""Prints the table of docs/parity.md: this project's numbers beside the goldens', largest error of each group.

Usage: uv run python parity/report.py [--at-scale runs/at_scale.npz]
"""

import argparse
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

import mlx_wan  # noqa: F401  before mlx.core: it chooses the BLAS

import mlx.core as mx  # isort: skip

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import cases
import checkpoint
import small
from mlx.utils import tree_flatten

from mlx_wan.pipeline import WanPipeline


def groups():
    """(name, pairs) for each row of the table."""
    yield f"text embeddings, {len(small.PROMPTS)} prompts", list(cases.text_encoder())
    for label, got, want in (*cases.transformer(), *cases.experts()):
        yield f"transformer, {label}", [(label, got, want)]
    for kind, name in {"vae": "VAE", "vae21": "Wan2.1 VAE"}.items():
        for label, got, want in cases.vae(kind):
            yield f"{name}, {label}", [(label, got, want)]
    yield "Wan2.1 image encoder", list(cases.image_encoder())
    for name in ("unipc", "dpm++", "euler"):
        runs = [run for run in cases.scheduler_runs() if run.startswith(f"{name}/")]
        yield f"{name}, every step of {len(runs)} runs", [p for run in runs for p in list(cases.scheduler(run))[2:]]
    for task in ("t2v", "i2v"):
        for solver in ("unipc", "dpm++"):
            pairs = list(cases.run(task, solver))
            yield f"{task}, {solver}, six guided steps: final latents", pairs[-2:-1]
            yield f"{task}, {solver}, six guided steps: frames", pairs[-1:]
    yield "given timesteps: dmd, euler and dpm++, every step of 4 runs", list(cases.few_step_samplers())
    for task in ("t2v", "i2v"):
        yield f"{task}, dmd, three steps without guidance: final latents", list(cases.few_step_run(task))[-1:]
    yield "t2v-A14B, euler, four steps without guidance: final latents", cases.few_step_experts()[0][-1:]
    for kind in small.EXPERT_RUNS:
        with tempfile.TemporaryDirectory() as folder:
            pipe = WanPipeline.from_pretrained(checkpoint.write_official(Path(folder), f"small-{kind}"), mx.float32)
            for solver in ("unipc", "dpm++"):
                *_, latents, _ = cases.expert_run(pipe, kind, solver)
                yield f"{kind}, {solver}, six guided steps over two experts: final latents", [latents]
    for kind, settings in small.RUNS21.items():
        with tempfile.TemporaryDirectory() as folder:
            pipe = WanPipeline.from_pretrained(checkpoint.write_official(Path(folder), f"small-{kind}"), mx.float32)
            *_, latents, _ = cases.run21(pipe, kind)
            yield f"Wan2.1 {kind}, unipc, {settings['num_inference_steps']} guided steps: final latents", [latents]
    for case in cases.LOSSES:
        pairs = list(cases.gradients(case))
        got, want = (np.concatenate([pair[i] for pair in pairs]) for i in (1, 2))
        yield f"gradients, {case}, all parameters and inputs", [(case, got, want)]


def large(part):
    """A module at the released widths with weights drawn as the reference's are."""
    module = cases.build(part, small.at_scale()[part])
    for name, p in tree_flatten(module.parameters()):
        shape = p.shape if p.ndim < 4 else (p.shape[0], p.shape[-1], *p.shape[1:-1])
        weight = mx.array(cases.native(name, small.weight(part, name, shape)))
        module.load_weights([(name, weight)], strict=False)
        mx.eval(weight)
    return module


def at_scale(path):
    """(name, pairs) for the networks at their released widths."""
    with np.load(path) as stored:
        want = dict(stored)
    context = np.zeros((1, 512, 4096), np.float32)
    context[0, :20] = small.random("scale/context", (20, 4096))
    latents = mx.array(np.moveaxis(small.random("scale/latents", (48, 2, 4, 6)), 0, -1))[None]
    got = large("transformer")(latents, mx.array([[0, 500.5]]), mx.array(context))
    yield "transformer, 3072 wide, 2 layers", [("", np.moveaxis(np.array(got)[0], -1, 0), want["transformer"])]
    got = large("text_encoder")(mx.array(cases.golden("tokens")["ids/64"][2:3]))
    yield "text encoder, 4096 wide, 2 layers", [("", np.array(got)[0], want["text_encoder"])]
    vae, codes = large("vae"), small.random("scale/codes", (1, 48, 2, 4, 4))
    got = vae.encode(mx.array(small.video("scale", 5, 64, 64)))
    yield "VAE at full size, encode", [("", np.moveaxis(np.array(got)[0], -1, 0), want["encode"])]
    got = vae.decode(mx.array(np.moveaxis(codes, 1, -1)))
    yield "VAE at full size, decode", [("", np.moveaxis(np.array(got)[0], -1, 0), np.clip(want["decode"], -1, 1))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-scale", type=Path, metavar="FILE", help="compare with make_goldens.py --at-scale FILE")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    print(f"mlx {version('mlx')}, Python {platform.python_version()}, {platform.system()} {platform.machine()}, CPU\n")
    print("| what | ‖a−b‖/‖b‖ |\n| --- | --- |")
    for name, pairs in at_scale(args.at_scale) if args.at_scale else groups():
        print(f"| {name} | {max(cases.relative_error(got, want) for _, got, want in pairs):.1e} |")


if __name__ == "__main__":
    main()
