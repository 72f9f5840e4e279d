"""How the embedded model is made: an autoencoder of drawn clips, then a transformer and text encoder on its latents.

Clips and captions are drawn on the fly (scenes.py, captions.py). Each stage is described by a YAML recipe
(recipes/tiny-vae.yaml, recipes/tiny.yaml) and runs through the same Trainer.
"""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tokenizers import Tokenizer

from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.models.transformer import FLOAT32_PARAMETERS, WanTransformer
from mlx_wan.models.umt5 import MAX_DISTANCE, UMT5Encoder, relative_buckets
from mlx_wan.models.vae22 import FeatureCache, VAEConfig, WanVAE22
from mlx_wan.training.captions import build_tokenizer, caption
from mlx_wan.training.checkpoint import newest_state, step_of
from mlx_wan.training.fields import build
from mlx_wan.training.objective import autoencoder_loss, flow_loss, psnr, sample_sigmas
from mlx_wan.training.recipe import AutoencoderRecipe, Clips, TransformerRecipe
from mlx_wan.training.scenes import crop, render, sample_batch
from mlx_wan.training.trainer import Batch, Trainer
from mlx_wan.weights.load import Checkpoint, load_text_encoder, load_transformer, load_vae, locate
from mlx_wan.weights.save import module_tensors, replacing, save_native, write_safetensors

PAD, EOS = 0, 1
_NEAREST, _WIDER, _OTHER_SIDE = 0.5, 0.3, -3.0  # of `look_near`: slope of the first heads, of each next pair, and bias


class TextToVideo(nn.Module):
    """The two parts that stage two trains together."""

    def __init__(self, recipe: TransformerRecipe):
        super().__init__()
        self.transformer = WanTransformer(recipe.transformer, recipe.train.dtype)
        self.text_encoder = UMT5Encoder(recipe.text_encoder)
        self.transformer.init_weights()
        self.text_encoder.init_weights()
        look_near(self.text_encoder)

    def encode_text(self, ids: mx.array) -> mx.array:
        """(B, L) ids -> (B, L, text_dim), zeros after the text, as the pipeline pads it."""
        mask = ids != PAD
        return self.text_encoder(ids, mask) * mask[..., None]


def look_near(encoder: UMT5Encoder) -> None:
    """Lets every other head begin by looking left, the others right, a last odd one both ways, the nearer the more.

    T5's own start is blind to order: all tokens get nearly the same mean of all others, and the few steps taken here
    never teach it that in "a red circle and a blue square" the circle is the red one. Slopes of distance as a start are
    those of ALiBi (Press et al., arXiv:2108.12409), and are trained like the rest.
    """
    config = encoder.config
    length = MAX_DISTANCE + 1
    buckets, far_first = relative_buckets(length, config.num_buckets), np.arange(length)[::-1]
    table = np.full((config.num_buckets, config.num_heads), _OTHER_SIDE, np.float32)
    for head in range(config.num_heads):
        slope = _NEAREST * _WIDER ** (head // 2)
        both = head == config.num_heads - 1 and head % 2 == 0
        for side, row in enumerate((buckets[:, 0], buckets[0])):  # keys to the left, to the right
            if both or head % 2 == side:
                table[row[far_first], head] = -slope * far_first  # the nearest of a bucket is written last
    table[0] = 0.0  # itself
    for block in encoder.blocks:
        block.pos_embedding.embedding.weight = mx.array(table)


# --- stage one -------------------------------------------------------------------------------------------------------


def draw(params: mx.array, clips: Clips) -> mx.array:
    """The clips (B, T, H, W, 3) of scene parameters."""
    return render(params, clips.num_frames, clips.height, clips.width)


def reconstruction_mse(vae: WanVAE22, video: mx.array) -> mx.array:
    """Mean squared error of each clip (B,) after encoding and decoding, pixels in [-1, 1]."""
    mean, _ = vae.moments(video, FeatureCache())
    back = mx.clip(vae.pixels(mean, FeatureCache()), -1, 1)
    return mx.square(back - video).mean(axis=(1, 2, 3, 4))


def autoencoder_trainer(
    recipe: AutoencoderRecipe, folder: Path, processes: int | None = None
) -> tuple[Trainer, Callable, Callable]:
    """(trainer, batch_at, evaluate) of stage one. processes: see `Trainer`."""
    config, clips = recipe.train, recipe.clips
    began = processes or mx.distributed.init().size()
    mx.random.seed(config.seed)
    vae = WanVAE22(recipe.model)
    vae.init_weights()
    crops = recipe.crops or clips

    def loss(model: nn.Module, batch: Batch, key: mx.array):
        video = draw(batch["whole"], clips) if "whole" in batch else draw(batch["cropped"], crops)
        return autoencoder_loss(model, video, key, recipe.kl_weight, config.dtype)  # type: ignore[arg-type]

    def batch_at(index: int) -> Batch:
        rng = np.random.default_rng([config.seed, index])
        if recipe.crops is None:
            return {"whole": mx.array(sample_batch(rng, config.batch_size)[1])}
        # Counted from 1, and so that processes that share a step share the kind of its batch.
        if (index // began + 1) % recipe.whole_every == 0:
            return {"whole": mx.array(sample_batch(rng, recipe.whole_batch)[1])}
        params = sample_batch(rng, config.batch_size)[1]
        return {"cropped": mx.array(crop(params, rng, recipe.crops.width / clips.width))}

    def evaluate(model: nn.Module) -> dict[str, float]:
        _, scenes, _ = sample_batch(np.random.default_rng(1_000_000), recipe.validation_clips, held_out=True)
        values: list[float] = []
        for params in np.split(scenes, range(8, len(scenes), 8)):
            mse = reconstruction_mse(model, draw(mx.array(params), clips))  # type: ignore[arg-type]
            values += mse.tolist()  # type: ignore[arg-type]
        scores = [psnr(v) for v in values]
        return {"val_psnr": sum(scores) / len(scores), "val_psnr_min": min(scores)}

    return Trainer(vae, loss, config, folder, processes=began), batch_at, evaluate


def latent_statistics(
    vae: WanVAE22, clips: Clips, count: int = 192, batch: int = 16
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over `count` drawn clips; WanError if one has none."""
    rng = np.random.default_rng(2_000_000)
    means, squares = [], []
    for _ in range(max(1, count // batch)):
        mean, _ = vae.moments(draw(mx.array(sample_batch(rng, batch, held_out=False)[1]), clips), FeatureCache())
        means.append(mean.mean(axis=(0, 1, 2, 3)))
        squares.append(mx.square(mean).mean(axis=(0, 1, 2, 3)))
        mx.eval(means[-1], squares[-1])
    mean = reduce(add, means) / len(means)
    std = mx.sqrt(reduce(add, squares) / len(squares) - mx.square(mean))
    if not (mx.isfinite(mean).all() & (std > 0).all()).item():
        raise WanError("the autoencoder's latents have a channel without variance; train longer or lower kl_weight")
    return mean.tolist(), std.tolist()  # type: ignore[return-value]


def save_autoencoder(vae: WanVAE22, folder: Path) -> None:
    """vae.safetensors and vae.json, its configuration; the second is written last. WanError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "vae.safetensors", module_tensors(vae), {})
        with replacing(folder / "vae.json") as config:
            config.write_text(json.dumps(asdict(vae.config), indent=2) + "\n")
    except (OSError, WanError) as error:
        raise WanError(f"{folder}: the autoencoder cannot be written: {error}; make room, then use --resume") from None


def load_autoencoder(folder: Path) -> WanVAE22:
    """What `save_autoencoder` wrote."""
    path = folder / "vae.json"
    if not path.exists():
        raise UserError(f"{folder} has no vae.json: train the autoencoder first (recipes/tiny-vae.yaml)")
    try:
        vae = WanVAE22(build(VAEConfig, json.loads(path.read_text()), str(path)))
        vae.load_weights(str(folder / "vae.safetensors"), strict=True)
        mx.eval(vae.parameters())
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the autoencoder is damaged: {error}") from None
    return vae


def train_autoencoder(
    recipe: AutoencoderRecipe, folder: Path, resume: bool, report: Callable, processes: int | None = None
) -> Path:
    """Stage one, whole; returns the folder of the finished autoencoder. A finished run is left as it is."""
    result = folder / "vae"
    if resume and _is_finished(folder, recipe.train.steps) and (result / "vae.json").exists():
        return result
    trainer, batch_at, evaluate = autoencoder_trainer(recipe, folder, processes)
    if resume:
        trainer.resume()
    trainer.fit(batch_at, evaluate, report)
    if trainer.is_first:
        vae: WanVAE22 = trainer.model  # type: ignore[assignment]
        vae.update(trainer.ema["weights"])
        mean, std = latent_statistics(vae, recipe.clips)
        vae.config = replace(recipe.model, latents_mean=tuple(mean), latents_std=tuple(std))
        save_autoencoder(vae, result)
    return result


def _is_finished(folder: Path, steps: int) -> bool:
    newest = newest_state(folder)
    return newest is not None and step_of(newest) >= steps


# --- stage two -------------------------------------------------------------------------------------------------------


def tokenise(tokenizer: Tokenizer, captions: list[str], length: int) -> np.ndarray:
    """Token ids (n, length), int32, zeros after the text; a caption that is too long is an error."""
    ids = np.full((len(captions), length), PAD, np.int32)
    for row, encoding in zip(ids, tokenizer.encode_batch(captions), strict=True):
        if len(encoding.ids) > length:
            raise UserError(f"a caption has {len(encoding.ids)} tokens; text_len is {length}")
        row[: len(encoding.ids)] = encoding.ids
    return ids


def encode_pool(
    vae: WanVAE22, tokenizer: Tokenizer, recipe: TransformerRecipe, seed: int, count: int, held_out: bool
) -> tuple[mx.array, np.ndarray]:
    """Latents (count, t, h, w, C), float16, and token ids (count, captions, text_len) of freshly drawn clips."""
    latents, texts, done, batch = [], [], 0, min(count, recipe.encode_batch)
    encode = partial(_encode, vae, recipe.clips)
    if recipe.train.compile:
        encode = mx.compile(encode)
    draw_words = random.Random(seed)
    rng = np.random.default_rng([seed, int(held_out)])
    while done < count:
        scenes, params, first = sample_batch(rng, batch, held_out=held_out, two_objects=recipe.two_objects)
        latents.append(encode(mx.array(params)))
        mx.eval(latents[-1])  # one batch of pixels in memory at a time
        texts += [
            [one] + [caption(s, draw_words) for _ in range(recipe.captions - 1)]
            for s, one in zip(scenes, first, strict=True)
        ]
        done += batch
    ids = tokenise(tokenizer, [text for group in texts for text in group], recipe.transformer.text_len)
    pool = mx.concatenate(latents)[:count]
    mx.eval(pool)
    return pool, ids.reshape(-1, recipe.captions, ids.shape[1])[:count]


def _encode(vae: WanVAE22, clips: Clips, params: mx.array) -> mx.array:
    mean, _ = vae.moments(draw(params, clips), FeatureCache())
    return vae.normalise(mean).astype(mx.float16)


def load_start(where: str | Path, recipe: TransformerRecipe, tokenizer: Tokenizer) -> Checkpoint:
    """The finished model at `where` (a folder or "tiny"), to train on; UserError if it is not one of the recipe's."""
    checkpoint = locate(where)
    ours = (recipe.transformer, recipe.text_encoder, json.loads(tokenizer.to_str()))
    its = (checkpoint.transformer_config, checkpoint.text_encoder_config, json.loads(checkpoint.tokenizer_json()))
    for name, one, other in zip(("transformer", "text_encoder", "tokenizer"), its, ours, strict=True):
        if one != other:
            raise UserError(f"{where} has another {name} than the recipe: it cannot go on from there")
    if checkpoint.quantization is not None:
        raise UserError(f"{where} is quantized; give the model it was made from")
    return checkpoint


def transformer_trainer(
    recipe: TransformerRecipe,
    vae: WanVAE22,
    tokenizer: Tokenizer,
    folder: Path,
    start: Checkpoint | None = None,
    processes: int | None = None,
) -> tuple[Trainer, Callable, Callable]:
    """(trainer, batch_at, evaluate) of stage two, from fresh weights or those of `start`. processes: see `Trainer`."""
    config, text_len = recipe.train, recipe.transformer.text_len
    mx.random.seed(config.seed)
    model = TextToVideo(recipe)
    if start is not None:
        model.transformer.update(load_transformer(start, config.dtype, weights=mx.float32).parameters())
        if not recipe.fresh_text_encoder:
            model.text_encoder.update(load_text_encoder(start, mx.float32).parameters())
    # Every process the run began with drew and encoded its own share; these are the shares of this one's batches.
    world = mx.distributed.init()
    began = processes or world.size()
    batches = range(world.rank(), began * config.grad_accumulation_steps, world.size())
    pools = {
        part: encode_pool(vae, tokenizer, recipe, config.seed * began + part, recipe.pool // began, held_out=False)
        for part in sorted({batch % began for batch in batches})
    }
    empty = tokenise(tokenizer, [""], text_len)[0]

    def losses(model: Any, batch: Batch, key: mx.array) -> mx.array:
        latents = batch["latents"].astype(mx.float32)
        noise_key, sigma_key = mx.random.split(key)
        noise = mx.random.normal(latents.shape, key=noise_key)
        sigmas = sample_sigmas(sigma_key, latents.shape[0], recipe.shift)
        context = model.encode_text(batch["ids"])
        return flow_loss(model.transformer, latents, context, noise, sigmas, batch["keep_first"])

    def loss(model: nn.Module, batch: Batch, key: mx.array):
        return losses(model, batch, key).mean(), {}

    def batch_at(number: int) -> Batch:
        pool, pool_ids = pools[number % began]
        rng = np.random.default_rng([config.seed, number])
        index = rng.integers(len(pool_ids), size=config.batch_size)
        ids = pool_ids[index, rng.integers(recipe.captions, size=config.batch_size)]
        ids = np.where(rng.random((config.batch_size, 1)) < recipe.caption_dropout, empty, ids)
        keep_first = rng.random(config.batch_size) < recipe.image_to_video
        return {"latents": pool[mx.array(index)], "ids": mx.array(ids), "keep_first": mx.array(keep_first.tolist())}

    val_pool, val_ids = encode_pool(vae, tokenizer, recipe, 3_000_000, recipe.validation_clips, held_out=True)
    size = min(config.batch_size, recipe.validation_clips)

    def evaluate(model: nn.Module) -> dict[str, float]:
        values = []
        for start in range(0, recipe.validation_clips - size + 1, size):
            part = slice(start, start + size)
            batch = {
                "latents": val_pool[part],
                "ids": mx.array(val_ids[part, 0]),
                "keep_first": mx.arange(size) % 4 == 0,
            }
            values.append(losses(model, batch, mx.random.key(start)).mean().item())
        return {"val_loss": sum(values) / len(values)}

    trainer = Trainer(model, loss, config, folder, ("text_encoder.", *FLOAT32_PARAMETERS), processes=began)
    return trainer, batch_at, evaluate


def train_transformer(
    recipe: TransformerRecipe,
    vae_folder: Path | None,
    folder: Path,
    resume: bool,
    report: Callable,
    init: Checkpoint | None = None,
    processes: int | None = None,
) -> Path:
    """Stage two, whole; returns the folder of the finished model in the native layout. A finished run is left alone.

    It works on the latents of the autoencoder in `vae_folder`, or of the model `init`, whose weights it goes on from.
    """
    result = folder / "model"
    if resume and _is_finished(folder, recipe.train.steps) and (result / "config.json").exists():
        return result
    tokenizer = build_tokenizer()
    if (vae_folder is None) == (init is None):
        raise UserError("give the folder of an autoencoder or a model to go on from")
    vae: WanVAE22 = load_autoencoder(vae_folder) if vae_folder else load_vae(init)  # type: ignore[assignment, arg-type]
    recipe.check_autoencoder(vae.config)
    trainer, batch_at, evaluate = transformer_trainer(recipe, vae, tokenizer, folder, init, processes)
    if resume:
        trainer.resume()
    trainer.fit(batch_at, evaluate, report)
    if trainer.is_first:
        trainer.model.update(trainer.ema["weights"])
        export(trainer.model, vae, tokenizer, recipe, result)  # type: ignore[arg-type]
    return result


def export(model: TextToVideo, vae: WanVAE22, tokenizer: Tokenizer, recipe: TransformerRecipe, folder: Path) -> Path:
    """Writes the parts as a bfloat16 checkpoint in the native layout."""
    save_native(
        folder,
        model="tiny",
        transformer=model.transformer,
        text_encoder=model.text_encoder,
        vae=vae,
        tokenizer_json=tokenizer.to_str(pretty=True),
        sampling=recipe.sampling,
        dtype=mx.bfloat16,
        max_shard_bytes=14_000_000,
    )
    return folder
