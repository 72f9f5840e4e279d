"""Whether a text encoder knows which word stands by which: "a red circle and a blue square" or the other way round?

    uv run python benchmarks/word_order.py swap                   # the embedded model: what wrong words cost it
    uv run python benchmarks/word_order.py learn --start near     # a fresh encoder, trained on that question alone
    uv run python benchmarks/word_order.py learn --start official --optimizer muon

`swap`: clips with two objects that have nothing in common, captions in which both have the other's colour, shape or
motion, and how much the loss of the velocity is above that of the true caption; in brackets the share of clips where it
is. A model that takes captions for bags of words shows zeros.

`learn`: of captions of two objects, what shape is that of a given colour and how does it move? Asked by one layer of
cross-attention, like the transformer's, and answered by two; held-out captions name combinations never trained.
"""

import argparse
import random
from dataclasses import replace

import mlx_wan  # first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_wan.models.umt5 import TextEncoderConfig, UMT5Encoder
from mlx_wan.training.captions import build_tokenizer, canonical_caption, caption
from mlx_wan.training.muon import BatchedMuon
from mlx_wan.training.objective import flow_loss
from mlx_wan.training.scenes import encode_scenes, render
from mlx_wan.training.tiny import PAD, look_near, tokenise
from mlx_wan.training.trainer import learning_rates
from mlx_wan.training.world import COLOURS, MOTIONS, SHAPES, Scene, sample_scene

SIGMAS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.5)
TEXT_LEN, BATCH, HEADS = 48, 128, 4


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a text encoder knows of the order of words.")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("swap")
    one.add_argument("--model", default="tiny")
    one.add_argument("--clips", type=int, default=24)
    one.set_defaults(run=swap)
    other = commands.add_parser("learn")
    other.add_argument("--start", choices=("near", "official"), default="near")
    other.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    other.add_argument("--steps", type=int, default=300)
    other.add_argument("--captions", type=int, default=20_000)
    other.set_defaults(run=learn)
    args = parser.parse_args()
    args.run(args)


# --- what wrong words cost a model ----------------------------------------------------------------------------------


def swapped(scene: Scene, what: str) -> Scene:
    """The scene with `what` of its two objects exchanged."""
    one, other = scene.objects
    given = replace(one, **{what: getattr(other, what)}), replace(other, **{what: getattr(one, what)})
    return replace(scene, objects=given)


def differing(rng: random.Random) -> Scene:
    """A held-out scene of two objects that have nothing in common."""
    while True:
        scene = sample_scene(rng, held_out=True, count=2)
        one, other = scene.objects
        if one.shape != other.shape and one.motion != other.motion:
            return scene


def swap(args: argparse.Namespace) -> None:
    pipe = mlx_wan.WanPipeline.from_pretrained(args.model, dtype=mx.float32)
    rng, tokenizer = random.Random(5), build_tokenizer()
    scenes = [differing(rng) for _ in range(args.clips)]
    latents = mx.concatenate([pipe.vae.encode(render(mx.array(encode_scenes([scene])))) for scene in scenes])

    def read(scenes: list[Scene]) -> mx.array:
        ids = mx.array(tokenise(tokenizer, [canonical_caption(scene) for scene in scenes], TEXT_LEN))
        return pipe.text_encoder(ids, ids != PAD) * (ids != PAD)[..., None]

    true, wrong = (
        read(scenes),
        {what: read([swapped(s, what) for s in scenes]) for what in ("colour", "shape", "motion")},
    )
    noise, given = mx.random.normal(latents.shape, key=mx.random.key(1)), mx.zeros((args.clips,), mx.bool_)
    print("sigma   loss    " + "".join(f"{what + ' swapped':<22}" for what in wrong))
    for sigma in SIGMAS:
        sigmas = mx.full((args.clips,), sigma)
        losses = [flow_loss(pipe.transformer, latents, c, noise, sigmas, given) for c in (true, *wrong.values())]
        mx.eval(losses)
        worse = [(loss - losses[0]).mean().item() for loss in losses[1:]]
        shares = [(loss > losses[0]).astype(mx.float32).mean().item() for loss in losses[1:]]
        cells = (f"{cost:+.6f} ({share:4.0%})" for cost, share in zip(worse, shares, strict=True))
        print(f"{sigma:<8}{losses[0].mean().item():<8.4f}" + "".join(f"{cell:<22}" for cell in cells), flush=True)


# --- how fast a fresh one learns -------------------------------------------------------------------------------------


class Questions(nn.Module):
    """A text encoder of the embedded model's size and what reads it: (ids, colour) -> logits of shapes and motions."""

    def __init__(self, dim: int = 256):
        super().__init__()
        config = TextEncoderConfig(480, dim=160, dim_attn=160, dim_ffn=320, num_heads=5, num_layers=3)
        self.text_encoder = UMT5Encoder(config)
        self.text_encoder.init_weights()
        self.text_embedding = nn.Sequential(nn.Linear(config.dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.colours = nn.Embedding(len(COLOURS), dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.answer = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, len(SHAPES) + len(MOTIONS)))

    def __call__(self, ids: mx.array, colours: mx.array) -> mx.array:
        text = self.text_embedding(self.text_encoder(ids, ids != PAD) * (ids != PAD)[..., None])
        asked = self.colours(colours)[:, None]
        arrays = self.norm_q(self.q(asked)), self.norm_k(self.k(text)), self.v(text)
        q, k, v = (a.reshape(*a.shape[:2], HEADS, -1).transpose(0, 2, 1, 3) for a in arrays)
        found = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return self.answer((asked + self.o(found.transpose(0, 2, 1, 3).flatten(2)))[:, 0])


def questions(count: int, held_out: bool, rng: random.Random) -> tuple[mx.array, mx.array, mx.array]:
    """Token ids (n, TEXT_LEN), a colour of each caption (n,), and shape and motion of what has it (n, 2)."""
    captions, colours, answers = [], [], []
    for _ in range(count):
        scene = sample_scene(rng, held_out, count=2)
        one = scene.objects[rng.randrange(2)]
        captions.append(caption(scene, rng))
        colours.append(list(COLOURS).index(one.colour))
        answers.append((SHAPES.index(one.shape), MOTIONS.index(one.motion)))
    return mx.array(tokenise(build_tokenizer(), captions, TEXT_LEN)), mx.array(colours), mx.array(answers)


def learn(args: argparse.Namespace) -> None:
    mx.random.seed(0)
    model, rng, order = Questions(), random.Random(1), np.random.default_rng(0)
    if args.start == "near":
        look_near(model.text_encoder)
    seen, unseen = questions(args.captions, False, rng), questions(512, True, rng)
    adamw = optim.AdamW(
        learning_rates(1e-3, 100, args.steps, "cosine"), betas=[0.9, 0.99], weight_decay=0.0, bias_correction=True
    )
    muon = BatchedMuon(learning_rates(0.012, 100, args.steps, "cosine"), weight_decay=0.0)
    hidden = optim.MultiOptimizer(
        [muon, adamw], [lambda name, w: "blocks." in name and w.ndim > 1 and "pos_" not in name]
    )
    optimizer = hidden if args.optimizer == "muon" else adamw

    def loss(model: Questions, ids: mx.array, colours: mx.array, answers: mx.array) -> mx.array:
        logits, both = model(ids, colours), nn.losses.cross_entropy
        return (both(logits[:, : len(SHAPES)], answers[:, 0]) + both(logits[:, len(SHAPES) :], answers[:, 1])).mean()

    step = nn.value_and_grad(model, loss)
    for number in range(1, args.steps + 1):
        rows = mx.array(order.integers(args.captions, size=BATCH))
        value, gradients = step(model, *(array[rows] for array in seen))
        optimizer.update(model, optim.clip_grad_norm(gradients, 1.0)[0])
        mx.eval(value, model.state, optimizer.state)
        if number % 50 == 0 or number == args.steps:
            logits = model(*unseen[:2])
            shape = logits[:, : len(SHAPES)].argmax(-1) == unseen[2][:, 0]
            motion = logits[:, len(SHAPES) :].argmax(-1) == unseen[2][:, 1]
            rates = [right.astype(mx.float32).mean().item() for right in (shape, motion, shape & motion)]
            print(f"step {number}: loss {value.item():.3f}; held out, shape {rates[0]:.1%}, motion {rates[1]:.1%}, "
                  f"both {rates[2]:.1%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
