# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "accelerate", "numpy>=2", "safetensors>=0.5",
# ]
# ///
"""Whether training here is training as in PyTorch: one small model, trained twice from the same numbers.

    uv run python parity/train_parity.py prepare runs/parity       # data, initial weights and settings
    uv run python parity/train_parity.py mlx runs/parity           # this package's Trainer
    uv run parity/train_parity.py torch runs/parity                # diffusers' WanTransformer3DModel, torch's AdamW
    uv run python parity/train_parity.py compare runs/parity --plot docs/images/train_parity.png
    uv run python parity/train_parity.py judge runs/parity         # what clips of both show, of what they were told
    uv run python parity/train_parity.py again runs/parity         # ours once more, from weights changed by 1e-7
    uv run python parity/train_parity.py compare runs/parity --sides mlx again         # how far such runs part

Both sides read the same initial weights and clips, and draw order, noise, timesteps, dropped captions and given first
frames of a step from the same NumPy generator. The model has the dimensions of the embedded one and starts from its
initialisation; the clips are drawn, encoded by the embedded VAE and text encoder. On a GPU `prepare --steps 2000
--batch 64 --clips 4096 --val-clips 256`, and MLX_ENABLE_TF32=0 for the float32 products that torch makes by default;
`mlx --dtype bfloat16` and `torch --dtype bfloat16` (autocast there) for mixed precision. `judge` makes clips of the
same prompts from the same noise with both results, here, and counts those that show what they should.
"""

import argparse
import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

VALIDATION_EVERY = 50


def sampled(settings, data, step):
    """(latents, contexts, noise, sigmas, keep_first) of a step, NumPy: what both sides are given."""
    rng = np.random.default_rng([settings["seed"], step])
    batch = settings["batch"]
    index = rng.integers(len(data["latents"]), size=batch)
    contexts = data["contexts"][index]
    contexts[rng.random(batch) < 0.1] = data["empty"]
    u = (rng.permutation(batch) + rng.random(batch)) / batch
    shift = settings["shift"]
    sigmas = (shift * u / (1 + (shift - 1) * u)).astype(np.float32)
    noise = rng.standard_normal(data["latents"][index].shape, dtype=np.float32)
    return data["latents"][index], contexts, noise, sigmas, rng.random(batch) < 0.2


def rates(settings):
    """Step, from 0 -> torch's learning rate, by a formula of its own: a linear rise, then as `schedule` says."""
    peak, warmup, steps = settings["learning_rate"], settings["warmup"], settings["steps"]

    def after(share):
        return peak if settings["schedule"] == "constant" else peak * (1 + math.cos(math.pi * share)) / 2

    def rate(step):
        if step < warmup:
            return peak / warmup + (peak - peak / warmup) * step / warmup
        return after((step - warmup) / max(1, steps - warmup))

    return rate


class Ahead:
    """`sampled` of steps that are asked for in order: the next one is made meanwhile, so that neither side waits."""

    def __init__(self, settings, data):
        self.make, self.pool, self.coming = lambda step: sampled(settings, data, step), ThreadPoolExecutor(1), {}

    def __call__(self, step):
        now = self.coming.pop(step, None) or self.pool.submit(self.make, step)
        self.coming = {step + 1: self.pool.submit(self.make, step + 1)}
        return now.result()


def validation(settings, data):
    """The same for the validation: every held-out clip once, at levels spread evenly."""
    count = len(data["val_latents"])
    rng = np.random.default_rng([settings["seed"], 10**9])
    noise = rng.standard_normal(data["val_latents"].shape, dtype=np.float32)
    sigmas = ((np.arange(count) + 0.5) / count).astype(np.float32)
    whole = (data["val_latents"], data["val_contexts"], noise, sigmas, np.arange(count) % 4 == 0)
    size = settings["batch"]
    return [tuple(part[i : i + size] for part in whole) for i in range(0, count, size)]


def read(folder):
    with np.load(folder / "data.npz") as stored:
        return json.loads((folder / "settings.json").read_text()), dict(stored)


class Log:
    """Rows of a side, with the seconds of each step."""

    def __init__(self, path):
        self.file = path.open("w", buffering=1)

    def __call__(self, row):
        self.file.write(json.dumps(row) + "\n")
        if "val_loss" in row:
            print(json.dumps(row), flush=True)


# --- the data --------------------------------------------------------------------------------------------------------


def embedder(checkpoint):
    """texts -> (n, text_len, text_dim), NumPy, zeros after each text."""
    import mlx.core as mx

    from mlx_wan.text import Tokenizer
    from mlx_wan.weights.load import load_text_encoder

    config = checkpoint.transformer_config
    encoder, tokenizer = load_text_encoder(checkpoint, mx.float32), Tokenizer(checkpoint.tokenizer, config.text_len)

    def contexts(texts):
        made = np.zeros((len(texts), config.text_len, config.text_dim), np.float32)
        pairs = [tokenizer(text) for text in texts]
        lengths = np.array([int(mask.sum()) for _, mask in pairs])
        for length in set(lengths.tolist()):  # together, those that need no padding
            rows = np.flatnonzero(lengths == length)
            for part in np.array_split(rows, -(-len(rows) // 64)):
                ids = np.concatenate([pairs[row][0][:, :length] for row in part])
                made[part, :length] = np.array(encoder(mx.array(ids)))
        return made

    return contexts


def prepare(args):
    import mlx_wan  # noqa: F401  before mlx.core: it chooses the BLAS

    import mlx.core as mx  # isort: skip
    from dataclasses import asdict

    import safetensors.numpy
    from mlx.utils import tree_flatten

    from mlx_wan.models.transformer import WanTransformer
    from mlx_wan.models.vae22 import FeatureCache
    from mlx_wan.training.scenes import render, sample_batch
    from mlx_wan.weights.load import load_vae, locate

    checkpoint = locate("tiny")
    spec, vae, config, contexts = (
        checkpoint.spec,
        load_vae(checkpoint),
        checkpoint.transformer_config,
        embedder(checkpoint),
    )

    def clips(count, held_out):
        rng = np.random.default_rng([args.seed, int(held_out)])
        latents, texts = [], []
        while len(texts) < count:
            _, params, captions = sample_batch(rng, min(64, count), held_out=held_out, two_objects=0.0)
            video = render(mx.array(params), spec.num_frames, spec.height, spec.width)
            latents.append(np.array(vae.normalise(vae.moments(video, FeatureCache())[0])))
            texts += captions
        return np.concatenate(latents)[:count], contexts(texts[:count])

    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    latents, texts = clips(args.clips, False)
    val_latents, val_texts = clips(args.val_clips, True)
    empty = contexts([""])[0]
    arrays = {"latents": latents, "contexts": texts, "val_latents": val_latents, "val_contexts": val_texts}
    np.savez(folder / "data.npz", empty=empty, **arrays)
    mx.random.seed(args.seed)
    model = WanTransformer(config)
    model.init_weights()
    weights = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    weights["patch_embedding.weight"] = np.moveaxis(weights["patch_embedding.weight"], -1, 1)  # the official order
    safetensors.numpy.save_file(
        {n: np.ascontiguousarray(w) for n, w in weights.items()}, folder / "initial.safetensors"
    )
    settings = {"steps": args.steps, "batch": args.batch, "learning_rate": args.learning_rate, "seed": args.seed}
    settings |= {"shift": spec.shift, "warmup": 50, "beta2": 0.99, "weight_decay": 0.01, "grad_clip": 1.0}
    settings |= {"schedule": args.schedule}
    settings["transformer"] = asdict(config)
    (folder / "settings.json").write_text(json.dumps(settings, indent=2))
    print(f"{len(latents)} clips of {latents.shape[1:]}, {sum(w.size for w in weights.values()):,} weights")


# --- MLX -------------------------------------------------------------------------------------------------------------


def run_mlx(args):
    import mlx_wan  # noqa: F401

    import mlx.core as mx  # isort: skip
    import safetensors.numpy
    from mlx.utils import tree_flatten

    from mlx_wan.models.transformer import FLOAT32_PARAMETERS, TransformerConfig, WanTransformer
    from mlx_wan.training.fields import build
    from mlx_wan.training.objective import flow_loss
    from mlx_wan.training.trainer import DTYPES, TrainConfig, Trainer

    settings, data = read(args.folder)
    model = WanTransformer(build(TransformerConfig, settings["transformer"], "settings.json"), DTYPES[args.dtype])
    weights, side = safetensors.numpy.load_file(args.folder / "initial.safetensors"), args.command
    if side == "again":
        rng = np.random.default_rng(settings["seed"])
        weights = {n: w + 1e-7 * w * rng.standard_normal(w.shape, dtype=np.float32) for n, w in weights.items()}
    weights["patch_embedding.weight"] = np.moveaxis(weights["patch_embedding.weight"], 1, -1)
    model.load_weights([(name, mx.array(array)) for name, array in weights.items()], strict=True)

    def losses(model, batch):
        names = ("latents", "context", "noise", "sigmas", "keep_first")
        return flow_loss(model, *(batch[name] for name in names))

    def arrays(parts):
        names = ("latents", "context", "noise", "sigmas", "keep_first")
        return {name: mx.array(part) for name, part in zip(names, parts, strict=True)}

    config = TrainConfig(
        steps=settings["steps"],
        batch_size=settings["batch"],
        learning_rate=settings["learning_rate"],
        warmup_steps=settings["warmup"],
        schedule=settings["schedule"],
        weight_decay=settings["weight_decay"],
        beta2=settings["beta2"],
        grad_clip=settings["grad_clip"],
        ema_decay=0.0,
        compute_dtype=args.dtype,
        report_every=1,
        eval_every=VALIDATION_EVERY,
        save_every=settings["steps"],
        compile=args.compile,
        compile_update=args.compile_update,
    )
    folder = args.folder / f"{side}-{args.dtype}"
    if folder.exists():
        raise SystemExit(f"{folder} exists already; remove it first")
    trainer = Trainer(model, lambda m, b, key: (losses(m, b).mean(), {}), config, folder, FLOAT32_PARAMETERS)
    log, held_out = (
        Log(args.folder / f"{side}-{args.dtype}.jsonl"),
        [arrays(part) for part in validation(settings, data)],
    )

    def evaluate(model):
        return {"val_loss": float(np.mean(np.concatenate([np.array(losses(model, part)) for part in held_out])))}

    log({"step": 0, **evaluate(model)})
    batch_at = Ahead(settings, data)
    trainer.fit(lambda index: arrays(batch_at(index)), evaluate, log)
    final = {name: np.array(array) for name, array in tree_flatten(trainer.model.parameters())}
    final["patch_embedding.weight"] = np.moveaxis(final["patch_embedding.weight"], -1, 1)
    final = {name: np.ascontiguousarray(array) for name, array in final.items()}
    safetensors.numpy.save_file(final, args.folder / f"{side}-{args.dtype}.safetensors")


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def run_torch(args):
    import re
    import sys

    import safetensors.torch
    import torch
    from diffusers import WanTransformer3DModel

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from diffusers_names import TRANSFORMER_NAMES

    settings, data = read(args.folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # as for products; MLX_ENABLE_TF32=0 is the same there
    c = settings["transformer"]
    model = WanTransformer3DModel(
        patch_size=tuple(c["patch_size"]),
        num_attention_heads=c["num_heads"],
        attention_head_dim=c["dim"] // c["num_heads"],
        in_channels=c["in_dim"],
        out_channels=c["out_dim"],
        text_dim=c["text_dim"],
        freq_dim=c["freq_dim"],
        ffn_dim=c["ffn_dim"],
        num_layers=c["num_layers"],
        cross_attn_norm=c["cross_attn_norm"],
        eps=c["eps"],
    )

    def renamed(name):
        for pattern, replacement in TRANSFORMER_NAMES:
            name = re.sub(pattern, replacement, name)
        return name

    official = safetensors.torch.load_file(args.folder / "initial.safetensors")
    names = {name: renamed(name) for name in official}
    model.load_state_dict({names[name]: array for name, array in official.items()})
    model.to(device).train()
    # Decay for every parameter, as here: torch's default too.
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["learning_rate"],
        betas=(0.9, settings["beta2"]),
        eps=1e-8,
        weight_decay=settings["weight_decay"],
    )
    rate_at = rates(settings)
    half = args.dtype != "float32"
    ph, pw = c["patch_size"][1:]

    def losses(parts):
        latents, contexts, noise, sigmas, keep_first = (torch.from_numpy(np.asarray(a)).to(device) for a in parts)
        latents, noise = (a.permute(0, 4, 1, 2, 3) for a in (latents, noise))
        frames, height, width = latents.shape[2:]
        known = keep_first[:, None] & (torch.arange(frames, device=device) == 0)[None]
        levels = torch.where(known, 0.0, sigmas[:, None])  # (B, t)
        level = levels[:, None, :, None, None]
        noised = (1 - level) * latents + level * noise
        timesteps = (1000 * levels).repeat_interleave(height // ph * (width // pw), dim=1)  # a token each
        with torch.autocast(device, getattr(torch, args.dtype), enabled=half):
            velocity = model(noised, timesteps, contexts, return_dict=False)[0]
        error = (velocity.float() - (noise - latents)).square().mean(dim=(1, 3, 4))
        weight = (~known).float()
        return (error * weight).sum(1) / weight.sum(1)

    log, held_out = Log(args.folder / f"torch-{args.dtype}.jsonl"), validation(settings, data)

    def evaluate():
        with torch.no_grad():
            return {"val_loss": torch.cat([losses(part) for part in held_out]).mean().item()}

    log({"step": 0, **evaluate()})
    batch_at = Ahead(settings, data)
    for step in range(settings["steps"]):
        start = time.perf_counter()
        rate = rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = losses(batch_at(step)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
        optimizer.step()
        row = {"step": step + 1, "loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate}
        row["clips_per_s"] = settings["batch"] / (time.perf_counter() - start)
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else _resident()
        log(row)
        if (step + 1) % VALIDATION_EVERY == 0 or step + 1 == settings["steps"]:
            log({"step": step + 1, **evaluate()})
    state = model.state_dict()
    final = {name: state[names[name]].cpu().contiguous() for name in official}
    safetensors.torch.save_file(final, args.folder / f"torch-{args.dtype}.safetensors")


def _resident():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --- both ------------------------------------------------------------------------------------------------------------


def smooth(values, width=50):
    """A running mean over the last `width` values."""
    sums = np.cumsum(np.insert(np.asarray(values, np.float64), 0, 0))
    starts = np.maximum(np.arange(len(values)) - width + 1, 0)
    ends = np.arange(len(values)) + 1
    return (sums[ends] - sums[starts]) / (ends - starts)


def compare(args):
    sides = {}
    for side in args.sides:
        rows = [json.loads(line) for line in (args.folder / f"{side}-{args.dtype}.jsonl").read_text().splitlines()]
        train = [row for row in rows if "loss" in row]
        curves = {name: np.array([row[name] for row in train]) for name in ("loss", "grad_norm", "clips_per_s")}
        curves["val"] = np.array([[row["step"], row["val_loss"]] for row in rows if "val_loss" in row])
        sides[side] = curves | {"peak": max(row["peak_gib"] for row in train)}
    one, other = sides.values()
    raw = np.abs(one["loss"] / other["loss"] - 1)
    val = np.abs(one["val"][:, 1] / other["val"][:, 1] - 1)
    first = np.abs(one["loss"][:10] / other["loss"][:10] - 1).max()
    print(f"{len(raw)} steps, {args.dtype}; relative difference of {' and '.join(sides)}")
    print(f"loss of a step:            first ten {first:.1e}, median {np.median(raw):.1e}, largest {raw.max():.1e}")
    for width in (50, 200):
        mean = np.abs(smooth(one["loss"], width) / smooth(other["loss"], width) - 1)
        print(f"loss, mean of {width} steps:".ljust(27) + f"largest {mean.max():.1e}, last {mean[-1]:.1e}")
    print(f"validation loss:           largest {val.max():.1e}, last {val[-1]:.1e}")
    for side, curves in sides.items():
        speed = np.median(curves["clips_per_s"])
        end = f"loss {smooth(curves['loss'])[-1]:.5f}, validation {curves['val'][-1, 1]:.5f}"
        print(f"{side:6} {end}, {speed:.1f} clips/s (median step), peak {curves['peak']:.2f} GiB")
    if args.plot:
        plot(sides, args.plot)


def plot(sides, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), dpi=100)
    for (side, curves), style in zip(sides.items(), ("-", "--"), strict=True):
        axes[0].plot(np.arange(len(curves["loss"])) + 1, smooth(curves["loss"]), style, label=side)
        axes[1].plot(*curves["val"].T, style, label=side)
    for axis, title in zip(axes, ("loss, mean of 50 steps", "validation loss"), strict=True):
        axis.set(title=title, xlabel="step", yscale="log")
        axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def judge(args):
    """Rates of both results on the same held-out prompts and noise, and of the difference its standard error."""
    import mlx_wan  # noqa: F401

    import mlx.core as mx  # isort: skip
    import safetensors.numpy

    from mlx_wan.training.adherence import judge_clips, judges, make_clips
    from mlx_wan.training.captions import caption
    from mlx_wan.training.world import sample_scene
    from mlx_wan.weights.load import load_transformer, load_vae, locate

    checkpoint, rng = locate("tiny"), random.Random(args.seed)
    vae, contexts = load_vae(checkpoint), embedder(checkpoint)
    scenes = [sample_scene(rng, held_out=True, count=1) for _ in range(args.prompts)]
    texts = [mx.array(each)[None] for each in contexts([caption(scene, rng) for scene in scenes])]
    negative = mx.array(contexts([checkpoint.spec.negative_prompt]))
    names, right = ("background", "colour", "shape", "motion", "all"), {}
    for side in ("mlx", "torch"):
        weights = safetensors.numpy.load_file(args.folder / f"{side}-{args.dtype}.safetensors")
        weights["patch_embedding.weight"] = np.moveaxis(weights["patch_embedding.weight"], 1, -1)
        model = load_transformer(checkpoint, mx.float32)
        model.load_weights([(name, mx.array(array)) for name, array in weights.items()], strict=True)
        with judges() as pool:
            clips = make_clips(checkpoint, model, vae, texts, negative, args.seed, args.batch)
            verdicts = judge_clips(clips, scenes, pool)
        right[side] = np.array([[verdict[name] for name in names] for verdict in verdicts], np.float64)
    print(f"clips of {args.prompts} held-out prompts that show what they should")
    difference = right["mlx"] - right["torch"]
    errors = difference.std(axis=0) / len(difference) ** 0.5
    for i, name in enumerate(names):
        one, other = (right[side][:, i].mean() for side in ("mlx", "torch"))
        print(
            f"{name:11} mlx {one:6.1%}, torch {other:6.1%}: {100 * (one - other):+.1f} points ± {100 * errors[i]:.1f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    sides = {"prepare": prepare, "mlx": run_mlx, "again": run_mlx, "torch": run_torch}
    sides |= {"compare": compare, "judge": judge}
    for name, function in sides.items():
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        command.set_defaults(function=function)
        if name == "prepare":
            command.add_argument("--steps", type=int, default=300)
            command.add_argument("--batch", type=int, default=8)
            command.add_argument("--clips", type=int, default=256)
            command.add_argument("--val-clips", type=int, default=32)
            command.add_argument("--learning-rate", type=float, default=1e-3)
            command.add_argument("--schedule", default="cosine", choices=("cosine", "constant"))
            command.add_argument("--seed", type=int, default=0)
        else:
            command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
        if name in ("mlx", "again"):
            command.add_argument("--compile", action="store_true", help="the whole step; takes minutes on CUDA")
            command.add_argument("--compile-update", action="store_true", help="what follows the gradients")
        if name == "compare":
            command.add_argument("--plot", type=Path)
            command.add_argument("--sides", nargs=2, choices=("mlx", "again", "torch"), default=("mlx", "torch"))
        if name == "judge":
            command.add_argument("--prompts", type=int, default=200)
            command.add_argument("--batch", type=int, help="clips that are made together")
            command.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
