"""This project's answer beside the reference's, one pair an array in tests/golden/.

Used by the tests, which hold the differences to a bound, and by parity/report.py, which prints them.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import small
from mlx.utils import tree_flatten
from PIL import Image

from mlx_wan.conditioning import area_size, best_output_size, image_to_frame, stretched_frame
from mlx_wan.models.clip import ImageEncoder, ImageEncoderConfig
from mlx_wan.models.transformer import TransformerConfig, WanTransformer
from mlx_wan.models.umt5 import TextEncoderConfig, UMT5Encoder
from mlx_wan.models.vae21 import VAE21Config, WanVAE21
from mlx_wan.models.vae22 import FeatureCache, VAEConfig, WanVAE22
from mlx_wan.pipeline import WanPipeline
from mlx_wan.sampling import Condition, Expert, denoise
from mlx_wan.schedulers import DMD, make_scheduler
from mlx_wan.text import Tokenizer, clean_prompt
from mlx_wan.zoo import NEGATIVE_PROMPT

GOLDEN = Path(__file__).parent / "golden"
Pair = tuple[str, np.ndarray, np.ndarray]  # label, ours, the reference's


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def official_names(model: str, part: str) -> dict[str, list[int]]:
    """Parameter name -> shape in the official checkpoint of one of `small.MODELS`."""
    return json.loads((GOLDEN / "names.json").read_text())[model][part]


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """||got - want|| / ||want||."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def native(name: str, array: np.ndarray) -> np.ndarray:
    """From the official layout to the modules': channels last, norm weights flat."""
    if name.endswith("gamma"):
        return array.reshape(-1)
    return np.moveaxis(array, 1, -1) if array.ndim > 3 else array


def load_small(part: str, model: str = "small") -> nn.Module:
    """A module with the weights of `small`; fails unless it has exactly the official names and shapes."""
    module = build(part, small.MODELS[model][part])
    shapes = official_names(model, part)
    weights = [(name, native(name, small.weight(part, name, tuple(shape)))) for name, shape in shapes.items()]
    module.load_weights([(name, mx.array(w)) for name, w in weights], strict=True)
    return module


def build(part: str, dimensions: dict) -> nn.Module:
    """A module without its weights; the VAE's latents are normalised as the released one's."""
    if part.startswith("transformer"):
        return WanTransformer(TransformerConfig(**dimensions))
    if part == "text_encoder":
        return UMT5Encoder(TextEncoderConfig(**dimensions))
    if part == "image_encoder":
        return ImageEncoder(ImageEncoderConfig(**dimensions))
    stored = golden("vae" if "dec_dim" in dimensions else "vae21")
    mean, std = (tuple(stored[f"latents_{k}"].tolist()) for k in ("mean", "std"))
    if "dec_dim" in dimensions:
        return WanVAE22(VAEConfig(**dimensions, latents_mean=mean, latents_std=std))
    return WanVAE21(VAE21Config(**dimensions, latents_mean=mean, latents_std=std))


def text_encoder() -> Iterator[Pair]:
    stored, model = golden("text_encoder"), load_small("text_encoder")
    for i, (ids, mask) in enumerate(zip(stored["ids"], stored["mask"], strict=True)):
        got = np.array(model(mx.array(ids[None]), mx.array(mask[None])))[0, : mask.sum()]
        start = stored["mask"][:i].sum()
        yield f"prompt {i}, {mask.sum()} tokens", got, stored["embeddings"][start : start + mask.sum()]


def transformer_inputs(case: str, batch: int, grid: tuple[int, int, int]) -> tuple[mx.array, mx.array]:
    """Latents (B, t, h, w, 48) and context (B, 512, 64), padded with zeros as the official code pads it."""
    latents = [small.random(f"transformer/{case}/{i}", (*grid, 48)) for i in range(batch)]
    context = np.zeros((batch, small.TRANSFORMER["text_len"], 64), np.float32)
    for i in range(batch):
        context[i, : 9 + 20 * i] = small.random(f"context/{case}/{i}", (9 + 20 * i, 64))
    return mx.array(np.stack(latents)), mx.array(context)


def transformer() -> Iterator[Pair]:
    stored, model = golden("transformer"), load_small("transformer")
    for case in ("scalar", "mixed"):
        want = stored[f"{case}/velocity"]
        latents, context = transformer_inputs(case, want.shape[0], want.shape[1:4])
        yield f"{case} timesteps", np.array(model(latents, mx.array(stored[f"{case}/timesteps"]), context)), want


def experts() -> Iterator[Pair]:
    """A call of each small model's low-noise expert, that for pictures with the channels they add."""
    for kind in small.EXPERT_RUNS:
        latents, picture = (
            mx.array(small.random(f"{kind}/{k}", (1, 3, 4, 6, n))) for k, n in (("latents", 16), ("y", 20))
        )
        inputs = mx.concatenate([latents, picture], axis=-1) if kind.startswith("i2v") else latents
        context = np.zeros((1, small.T2V["text_len"], 64), np.float32)
        context[0, :11] = small.random(f"{kind}/context", (11, 64))
        got = load_small("transformer_2", f"small-{kind}")(inputs, mx.array([875.0]), mx.array(context))
        yield f"{kind} expert", np.array(got), golden("expert_runs")[f"{kind}/velocity"]


def image_encoder() -> Iterator[Pair]:
    """A picture's tokens, some of their numbers."""
    model = load_small("image_encoder", "small-i2v-14B")
    square = stretched_frame(Image.fromarray(small.picture()), 224, 224)[0]
    got = np.array(model(mx.array(square)))
    yield f"{got.shape[1]} tokens of a picture", got[:, ::8, ::16], golden("runs21")["image_tokens"]


def vae(kind: str = "vae") -> Iterator[Pair]:
    """Of the Wan2.2 autoencoder, or "vae21", Wan2.1's."""
    stored, model = golden(kind), load_small("vae", "small" if kind == "vae" else "small-t2v-A14B")
    for case, (frames, height, width) in {"clip": (13, 32, 48), "frame": (1, 64, 32)}.items():
        clip = small.video(f"vae/{case}", frames, height, width)
        yield f"encode {case}", np.array(model.encode(mx.array(clip))), stored[f"{case}/encoded"]
        shape = stored[f"{case}/encoded"].shape[1:]
        latents = small.random(f"vae/{case}/latents", shape)[None]
        yield f"decode {case}", np.array(model.decode(mx.array(latents))), stored[f"{case}/decoded"]


def scheduler_runs() -> list[str]:
    """Keys "name/steps/shift" of the stored runs."""
    return sorted({key.rsplit("/", 1)[0] for key in golden("schedulers")})


def scheduler(run: str) -> Iterator[Pair]:
    """Latents after each step of one run, each step taking our own latents of the one before."""
    stored = golden("schedulers")
    name, steps, shift = run.split("/")
    sampler = make_scheduler(name, int(steps), float(shift))
    yield f"{run} timesteps", sampler.timesteps, stored[f"{run}/timesteps"]
    yield f"{run} sigmas", sampler.sigmas, stored[f"{run}/sigmas"]
    x, state = mx.array(small.random("schedulers", (1, 2, 3, 4, 5))), sampler.init()
    for i, t in enumerate(sampler.timesteps):
        velocity = mx.sin(1.7 * x + float(t) / 500) - 0.3 * x
        x, state = sampler.step(velocity, x, state)
        yield f"{run} step {i}", np.array(x), stored[f"{run}/latents"][i]


def few_step_samplers() -> Iterator[Pair]:
    """Samplers through timesteps that are given, with a fixed function in the model's place."""
    for run, want in golden("few_steps").items():
        name, _, listed = run.partition("/")
        if name not in small.FEW_STEPS:
            continue
        sampler = make_scheduler(name, 1, 1.0, [float(t) for t in listed.split(",")])
        if isinstance(sampler, DMD):
            sampler.noise = lambda step, shape: mx.array(small.random(f"few_steps/noise/{step}", shape))
        x, state = mx.array(small.random("schedulers", (1, 2, 3, 4, 5))), sampler.init()
        for i, t in enumerate(sampler.timesteps):
            x, state = sampler.step(mx.sin(1.7 * x + float(t) / 500) - 0.3 * x, x, state)
            yield f"{run} step {i}", np.array(x), want[i]


def few_step_context() -> mx.array:
    tokens = small.few_step_input("context")
    return mx.array(np.pad(tokens, [(0, small.T2V["text_len"] - len(tokens)), (0, 0)]))[None]


def few_step_run(task: str) -> Iterator[Pair]:
    """FastWan's three steps: from text, or from a first frame."""
    model, context = load_small("transformer"), few_step_context()
    sampler = DMD(3, timesteps=small.FEW_STEPS["dmd"][0])
    sampler.noise = lambda step, shape: mx.array(small.few_step_noise(step, shape[-1]))
    first = mx.array(small.few_step_input("frame")) if task == "i2v" else None
    noise = mx.array(small.few_step_input("latents"))
    steps = denoise(lambda _: Expert(model, 1.0), sampler, noise, context, context, Condition(first_frame=first))
    for i, (got, want) in enumerate(zip(steps, golden("few_steps")[f"{task}/latents"], strict=True)):
        yield f"latents after step {i + 1}", np.array(got.latents)[0], want


def few_step_experts() -> tuple[list[Pair], list[bool]]:
    """Lightning's four Euler steps over two experts without guidance, and which step the low-noise one took."""
    parts = ("transformer", "transformer_2")
    models, used = [load_small(part, "small-t2v-A14B") for part in parts], []

    def expert_at(t: float) -> Expert:
        used.append(t < 875)
        return Expert(models[used[-1]], 1.0)

    noise = mx.array(small.few_step_input("latents", 16))
    steps = denoise(expert_at, make_scheduler("euler", 4, 5.0), noise, few_step_context(), few_step_context())
    wanted = golden("few_steps")["experts/latents"]
    pairs = [
        (f"step {i + 1}", np.array(x.latents)[0], want) for i, (x, want) in enumerate(zip(steps, wanted, strict=True))
    ]
    return pairs, used


def negative_prompt(task: str) -> str:
    return small.I2V_NEGATIVE_PROMPT if task == "i2v" else NEGATIVE_PROMPT


def run(task: str, solver: str) -> Iterator[Pair]:
    """A whole run, stage by stage, each working on what ours made before: text, latents, frames."""
    stored, settings = golden("runs"), small.RUN
    contexts = []
    for name, prompt in {"context": small.RUN_PROMPT, "context_null": negative_prompt(task)}.items():
        ids, mask = Tokenizer(GOLDEN / "tokenizer.json")(clean_prompt(prompt))
        embedded = load_small("text_encoder")(mx.array(ids), mx.array(mask))
        yield f"{name} ({mask.sum()} tokens)", np.array(embedded)[0, : mask.sum()], stored[f"{task}/{solver}/{name}"]
        contexts.append(embedded * mx.array(mask)[..., None])
    vae, first = load_small("vae"), None
    if task == "i2v":
        picture = Image.fromarray(small.picture())
        area = settings["width"] * settings["height"]
        width, height = best_output_size(*picture.size, 32, 32, area)
        first = vae.encode(mx.array(image_to_frame(picture, width, height)))
    expert = Expert(load_small("transformer"), settings["guidance_scale"])
    steps = denoise(
        lambda _: expert,
        make_scheduler(solver, settings["num_inference_steps"], settings["shift"]),
        mx.array(stored[f"{task}/noise"]),
        *contexts,
        Condition(first_frame=first),
    )
    latents = None
    for i, ((_, latents, *_), want) in enumerate(zip(steps, stored[f"{task}/{solver}/latents"], strict=True)):
        yield f"latents after step {i + 1}", np.array(latents)[0], want
    yield "frames", np.array(vae.decode(latents))[0, :, ::4, ::4], stored[f"{task}/{solver}/frames"]


def expert_settings(kind: str) -> dict[str, Any]:
    """The pipeline's arguments for a stored run of two experts."""
    settings = dict(small.EXPERT_RUNS[kind])
    if kind.startswith("i2v"):
        picture = Image.fromarray(small.picture())
        width, height = area_size(*picture.size, 16, 16, settings["width"] * settings["height"])
        settings |= {"image": picture, "width": width, "height": height, "negative_prompt": small.I2V_NEGATIVE_PROMPT}
    return settings | {"prompt": small.RUN_PROMPT, "latents": golden("expert_runs")[f"{kind}/noise"]}


def expert_run(pipe: WanPipeline, kind: str, solver: str) -> Iterator[Pair]:
    """A whole run of a pipeline with two experts; the frames as whole numbers."""
    stored, latents = golden("expert_runs"), []
    out = pipe(scheduler=solver, callback=lambda *step: latents.append(np.array(step[2])[0]), **expert_settings(kind))
    for i, (got, want) in enumerate(zip(latents, stored[f"{kind}/{solver}/latents"], strict=True)):
        yield f"latents after step {i + 1}", got, want
    assert out.frames is not None
    yield "frames", out.frames[:, ::4, ::4], np.round((stored[f"{kind}/{solver}/frames"] + 1) * 127.5)


def run21(pipe: WanPipeline, kind: str) -> Iterator[Pair]:
    """A whole run of a pipeline of the Wan2.1 kind; the frames as whole numbers."""
    stored, settings, latents = golden("runs21"), dict(small.RUNS21[kind]), []
    if kind.startswith("i2v"):
        settings |= {"image": Image.fromarray(small.picture())}
    elif kind.startswith("flf2v"):
        images = (Image.fromarray(small.picture(name=name)) for name in ("picture", "last"))
        settings |= dict(zip(("image", "last_image"), images, strict=True))
    if "image" in settings:
        width, height = area_size(*settings["image"].size, 16, 16, settings["width"] * settings["height"])
        settings |= {"width": width, "height": height, "negative_prompt": small.I2V_NEGATIVE_PROMPT}
    note = lambda *step: latents.append(np.array(step[2])[0])  # noqa: E731
    out = pipe(small.RUN_PROMPT, latents=stored[f"{kind}/noise"], callback=note, **settings)
    for i, (got, want) in enumerate(zip(latents, stored[f"{kind}/latents"], strict=True)):
        yield f"latents after step {i + 1}", got, want
    assert out.frames is not None
    yield "frames", out.frames[::4, ::4, ::4], np.round((stored[f"{kind}/frames"] + 1) * 127.5)


def official_layout(name: str, array: np.ndarray) -> np.ndarray:
    """The way back of `native`; also for a batch of one of the inputs (1, t, h, w, C)."""
    return np.moveaxis(array, -1, 1) if array.ndim > 3 else array


def gradients(case: str) -> Iterator[Pair]:
    """Gradients by every parameter and by the inputs: "transformer", "text_encoder", "encode" or "decode"."""
    module = load_small(case if case in ("transformer", "text_encoder") else "vae")
    loss, inputs = LOSSES[case](module)

    def loss_of(parameters: dict, inputs: dict) -> mx.array:
        module.update(parameters)
        return loss(inputs)

    by_parameter, by_input = mx.grad(loss_of, argnums=(0, 1))(module.parameters(), inputs)
    found = dict(tree_flatten(by_parameter)) | by_input
    stored = {k.removeprefix(f"{case}/"): v for k, v in golden("gradients").items() if k.startswith(f"{case}/")}
    for name, want in stored.items():
        yield f"d {case} / d {name}", small.spread(official_layout(name, np.array(found[name]))), want


def _last(array: np.ndarray) -> mx.array:
    """(C, t, h, w) or (1, C, t, h, w), as the reference has it -> (1, t, h, w, C)."""
    return mx.array(np.moveaxis(array.reshape(1, *array.shape[-4:]), 1, -1))


def _transformer_loss(model: nn.Module) -> tuple[Callable, dict]:
    inputs = {
        "latents": _last(small.random("gradient/latents", (48, 2, 4, 6))),
        "context": mx.array(small.random("gradient/context", (512, 64)))[None],
    }
    t = mx.array([[0.0] * 6 + [640.5] * 6])
    probe = _last(small.random("gradient/velocity", (48, 2, 4, 6)))
    return lambda x: (model(x["latents"], t, x["context"]) * probe).sum(), inputs


def _text_encoder_loss(model: nn.Module) -> tuple[Callable, dict]:
    ids, mask = (golden("tokens")[f"{k}/64"][2:4] for k in ("ids", "mask"))
    probe = mx.array(small.random("gradient/text", (2, 64, 64)) * mask[..., None])
    return lambda _: (model(mx.array(ids), mx.array(mask)) * probe).sum(), {}


def _encode_loss(model: nn.Module) -> tuple[Callable, dict]:
    probe = _last(small.random("gradient/mean", (1, 48, 3, 2, 3)))
    inputs = {"video": _last(small.random("gradient/video", (1, 3, 9, 32, 48)))}
    return lambda x: (model.normalise(model.moments(x["video"], FeatureCache())[0]) * probe).sum(), inputs


def _decode_loss(model: nn.Module) -> tuple[Callable, dict]:
    probe = _last(small.random("gradient/pixels", (1, 3, 9, 32, 48)))
    inputs = {"latents": _last(small.random("gradient/codes", (1, 48, 3, 2, 3)))}
    return lambda x: (model.pixels(model.denormalise(x["latents"]), FeatureCache()) * probe).sum(), inputs


LOSSES = {
    "transformer": _transformer_loss,
    "text_encoder": _text_encoder_loss,
    "encode": _encode_loss,
    "decode": _decode_loss,
}
