"""Stage three: a model that exists, taught with clips of one's own; LoRA, DoRA, QLoRA or all of its weights.

Clips and captions are encoded once (cache.py), the encoders leave, and the transformer trains in the same Trainer as
the embedded model did.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_wan.errors import UserError
from mlx_wan.models.transformer import FLOAT32_PARAMETERS, WanTransformer
from mlx_wan.sampling import Condition
from mlx_wan.training.adapt import adapters_name, frozen, load_adapters, make_trainable, save_adapters
from mlx_wan.training.buckets import batch_at
from mlx_wan.training.cache import Cache, Cached, component_print, load_clip, load_context
from mlx_wan.training.checkpoint import newest_state, step_of
from mlx_wan.training.joint import Joint, let_go
from mlx_wan.training.objective import TRAIN_TIMESTEPS, WEIGHTINGS, flow_loss, sample_sigmas
from mlx_wan.training.plan import Plan, known
from mlx_wan.training.recipe import check_same_run, processes_of, remember_run
from mlx_wan.training.trainer import Batch, Numbers, Trainer
from mlx_wan.training.validate import band_losses
from mlx_wan.weights.convert import config_of
from mlx_wan.weights.fit import component_tensors
from mlx_wan.weights.load import Checkpoint, load_transformer
from mlx_wan.weights.save import module_tensors, write_native

MODEL = "model"  # the folder that full fine-tuning leaves
# Called with the transformer for a timestep, the step, the embeddings (1, text_len, text_dim) of the recipe's
# preview_prompts and of the model's negative prompt, and for each prompt what the model is shown.
Preview = Callable[[Callable[[float], WanTransformer], int, dict[str, mx.array], list[Condition]], None]


class Examples:
    """Batches of cached clips: batch number -> arrays, by the recipe's seed alone.

    Args:
        cached: what the cache holds for training.
    """

    def __init__(self, plan: Plan, cached: Cached):
        self.plan, self.recipe, self.cached = plan, plan.recipe, cached
        self.buckets = tuple(clip.bucket for clip, _ in cached.latents)
        self.length = plan.checkpoint.transformer_config.text_len

    def _clips(self, index: int) -> list[int]:
        return batch_at(self.buckets, self.recipe.batch_size, self.recipe.seed, index)

    def names(self, index: int) -> list[str]:
        """What the clips of a batch are called."""
        return [self.cached.latents[i][0].name for i in self._clips(index)]

    def batch(self, index: int) -> Batch:
        """latents (B, t, h, w, C), context (B, text_len, text_dim), keep_first (B,), and what else the cache holds."""
        recipe, clips = self.recipe, [self.cached.latents[i] for i in self._clips(index)]
        rng = np.random.default_rng([recipe.seed, 1, index])
        dropped = rng.random(len(clips)) < recipe.caption_dropout
        given = rng.random(len(clips)) < recipe.image_to_video
        texts = ["" if drop else clip.source.caption for (clip, _), drop in zip(clips, dropped, strict=True)]
        loaded = [load_clip(file) for _, file in clips]
        batch = {name: mx.stack([arrays[name] for arrays in loaded]) for name in loaded[0]}
        return {
            **batch,
            "context": mx.stack([self.context(text) for text in texts]),
            "keep_first": mx.array((given & (batch["latents"].shape[1] > 1)).tolist()),
        }

    def known(self, i: int) -> Condition:
        """What a model of pictures is shown of the i-th clip in the first one's bucket; nothing for other models."""
        alike = [file for clip, file in self.cached.latents if clip.bucket == self.buckets[0]]
        clip = load_clip(alike[i % len(alike)])
        channels, image = (
            clip[name][None].astype(mx.float32) if name in clip else None for name in ("channels", "image")
        )
        return Condition(channels=channels, image=image)

    def context(self, text: str) -> mx.array:
        """(text_len, text_dim) of a cached text."""
        return load_context(self.cached.texts[text], self.length)


def fill_cache(plan: Plan, report: Callable[[int, int, str], None]) -> tuple[Cached, Cached]:
    """(for training, for validation), computed where missing; UserError if no clip is left to train on."""
    recipe = plan.recipe
    cache = Cache(Path(str(recipe.cache)), plan.checkpoint, plan.dtype, report)
    texts = {clip.source.caption for clip in [*plan.clips, *plan.held_out]}
    texts |= {"", *recipe.preview_prompts, plan.checkpoint.spec.negative_prompt}
    both = cache.fill([*plan.clips, *plan.held_out], texts)
    training = set(plan.clips)
    parts = []
    for wanted in (True, False):
        latents = [(clip, file) for clip, file in both.latents if (clip in training) == wanted]
        parts.append(Cached(latents, both.texts, both.skipped, both.computed))
    if not parts[0].latents:
        raise UserError(f"{recipe.data}: no clip could be encoded: {both.skipped[0]}")
    return parts[0], parts[1]


def load_trainable(plan: Plan) -> WanTransformer:
    """The transformer with what is trained in float32 and all else in the dtype of computing."""
    recipe, full = plan.recipe, plan.recipe.fine_tune_type == "full"
    transformer = load_transformer(plan.checkpoint, plan.dtype, plan.part, weights=mx.float32 if full else None)
    mx.random.seed(recipe.seed)
    make_trainable(transformer, recipe)
    if full:  # blocks that are not trained need no more digits than they are used with
        rounded = [
            (name, array.astype(plan.dtype))
            for name, array in frozen(transformer).items()
            if not any(part in name for part in FLOAT32_PARAMETERS)
        ]
        transformer.load_weights(rounded, strict=False)
    if recipe.resume_adapter_file:
        load_adapters(Path(recipe.resume_adapter_file), transformer)
    transformer.save_memory(recipe.grad_checkpoint)
    return transformer


def make_loop(plan: Plan, examples: Examples, processes: int | None = None) -> Trainer | Joint:
    """The steps of a plan, none made yet. processes: with how many the run was begun."""
    recipe = plan.recipe
    if recipe.expert != "both":
        return make_trainer(plan, examples, processes)
    plans, trainers = {name: plan.of(name) for name in plan.turns.names}, {}
    for name in reversed(plan.turns.names):  # the one whose turn is first stays in memory
        for other in trainers.values() if not recipe.keep_both_experts else ():
            let_go(other.model)
        trainers[name] = make_trainer(plans[name], examples, processes)

    def fetch(name: str, model: nn.Module) -> None:
        model.load_weights(list(frozen(load_trainable(plans[name])).items()), strict=False)

    fetched = None if recipe.keep_both_experts else fetch
    return Joint(trainers, plan.train, Path(recipe.adapter_path), plan.turns, fetched)


def make_trainer(plan: Plan, examples: Examples, processes: int | None = None) -> Trainer:
    """The trainer of a plan for one transformer, at step 0."""
    recipe = plan.recipe
    weight = WEIGHTINGS[recipe.weighting]
    spread = (recipe.sigma_sampling, recipe.logit_mean, recipe.logit_std, plan.sigmas)

    def loss(model: Any, batch: Batch, key: mx.array) -> tuple[mx.array, Numbers]:
        latents = batch["latents"].astype(mx.float32)
        noise_key, sigma_key = mx.random.split(key)
        noise = mx.random.normal(latents.shape, key=noise_key)
        sigmas = sample_sigmas(sigma_key, latents.shape[0], known(recipe.shift), *spread)
        given = {name: batch[name] for name in ("channels", "image") if name in batch}
        each = flow_loss(model, latents, batch["context"], noise, sigmas, batch["keep_first"], **given)
        each = each * weight(sigmas)
        return each.mean(), {"each": each}

    folder = Path(recipe.adapter_path)
    return Trainer(load_trainable(plan), loss, plan.train, folder, FLOAT32_PARAMETERS, examples.names, processes)


def run(
    plan: Plan,
    resume: bool,
    report: Callable[[dict[str, float]], None],
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    preview: Preview | None = None,
) -> tuple[Path, list]:
    """The whole stage; returns what it made and the clips that turned out to be broken.

    Args:
        resume: go on from the newest state in the recipe's adapter_path. A finished run is left as it is.
        report: gets the rows of the log.
        progress: how far the encoding is.
        preview: see `Preview`.

    Raises:
        UserError: the folder holds another run, or nothing can be trained on.
    """
    recipe, folder = plan.recipe, Path(plan.recipe.adapter_path)
    files = [folder / (MODEL if recipe.fine_tune_type == "full" else adapters_name(one)) for one in recipe.experts]
    result = files[0] if len(set(files)) == 1 else folder
    training, validation = fill_cache(plan, progress)
    processes = processes_of(folder, resume)
    facts = describe(plan, training, processes)
    if resume:
        check_same_run(folder, facts)
        newest = newest_state(folder)
        if newest is not None and step_of(newest) >= recipe.iters and all(file.exists() for file in files):
            return result, training.skipped
    examples = Examples(plan, training)
    trainer = make_loop(plan, examples, processes)
    if trainer.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        remember_run(folder, facts)
    if resume:
        trainer.resume()
    trainer.fit(
        examples.batch,
        evaluation(plan, validation),
        report,
        saving=lambda step: keep_adapters(trainer, plan, step),
        visit=previewing(trainer, examples, Examples(plan, validation) if validation.latents else examples, preview),
    )
    if trainer.is_first and recipe.fine_tune_type == "full":
        for one in trainers_of(trainer, plan).values():
            one.model.update(one.ema["weights"])
        models = {plan.of(expert).part: one.model for expert, one in trainers_of(trainer, plan).items()}
        export(models, plan.checkpoint, plan.dtype, result)
    elif trainer.is_first:
        keep_adapters(trainer, plan, trainer.step)
    return result, training.skipped


def trainers_of(loop: Trainer | Joint, plan: Plan) -> dict[str | None, Trainer]:
    """The trainers by the experts that they train."""
    if isinstance(loop, Joint):
        return {**loop.trainers}
    return {plan.recipe.expert: loop}


def evaluation(plan: Plan, cached: Cached) -> Any:
    """The validation of a plan, as its loop wants it; None without clips for it."""
    if plan.recipe.expert == "both":
        each = {name: (evaluation(plan.of(name), cached), plan.of(name).sigmas) for name in plan.turns.names}
        if any(measure is None for measure, _ in each.values()):
            return None
        return {
            name: lambda model, measure=measure, share=high - low: (measure(model), share)
            for name, (measure, (low, high)) in each.items()
        }
    examples = Examples(plan, cached)
    count = len(cached.latents)
    if plan.recipe.val_batches != -1:
        count = min(count, plan.recipe.val_batches * plan.recipe.batch_size)
    if count == 0:
        return None

    def example(i: int) -> tuple[dict[str, mx.array], mx.array]:
        clip, file = cached.latents[i]
        return load_clip(file), examples.context(clip.source.caption)

    return lambda model: band_losses(model, count, example, plan.sigmas)  # type: ignore[arg-type]


def keep_adapters(trainer: Trainer | Joint, plan: Plan, step: int) -> None:
    """Writes the adapters of a step; what full fine-tuning makes is written once, at the end."""
    if plan.recipe.fine_tune_type != "full":
        folder = Path(plan.recipe.adapter_path)
        for expert, one in trainers_of(trainer, plan).items():
            one.with_averaged_weights(
                lambda model, expert=expert: save_adapters(folder, model, plan.recipe, step, expert)
            )


def previewing(
    trainer: Trainer | Joint, examples: Examples, shown: Examples, preview: Preview | None
) -> Callable[[int], bool]:
    """What to do after a step: nothing, or previews. shown: whose frames models of pictures go on from."""
    plan, recipe, spec = examples.plan, examples.recipe, examples.plan.checkpoint.spec
    if preview is None or not recipe.preview_prompts:
        return lambda step: False
    models = [one.model for one in trainers_of(trainer, plan).values()]

    def transformer_at(given: Any) -> Callable[[float], WanTransformer]:
        if not isinstance(trainer, Joint):
            return lambda timestep: given
        return lambda timestep: given("high" if timestep >= known(spec.boundary) * TRAIN_TIMESTEPS else "low")

    def visit(step: int) -> bool:
        if step % recipe.preview_every and step != recipe.iters:
            return False
        texts = {text: examples.context(text)[None] for text in (*recipe.preview_prompts, spec.negative_prompt)}
        frames = [shown.known(i) for i in range(len(recipe.preview_prompts))]
        for model in models:
            model.save_memory(False)  # type: ignore[operator]
        trainer.with_averaged_weights(lambda given: preview(transformer_at(given), step, texts, frames))
        for model in models:
            model.save_memory(recipe.grad_checkpoint)  # type: ignore[operator]
        return True

    return visit


def describe(plan: Plan, cached: Cached, processes: int) -> dict[str, Any]:
    """All that decides a run's weights, as JSON has it."""
    files = [file.name for _, file in cached.latents]
    captions = [cached.texts[clip.source.caption].name for clip, _ in cached.latents]
    config = asdict(plan.checkpoint.transformer_config)
    prints = [component_print(plan.checkpoint, plan.of(expert).part, config) for expert in plan.recipe.experts]
    facts = {
        "stage": "finetune",
        "finetune": asdict(plan.recipe),
        "transformer": prints[0] if len(prints) == 1 else prints,
        "clips": hashlib.sha256(json.dumps([files, captions]).encode()).hexdigest(),
        "processes": processes,
    }
    return json.loads(json.dumps(facts))


def export(models: Mapping[str, nn.Module], checkpoint: Checkpoint, dtype: mx.Dtype, folder: Path) -> None:
    """A whole model in the native layout: the trained parts `models`, and the others as they are in `checkpoint`."""
    parts = {name: component_tensors(checkpoint, name, None) for name in checkpoint.parts if name not in models}
    parts |= {part: module_tensors(transformer, dtype) for part, transformer in models.items()}
    write_native(folder, parts, checkpoint.tokenizer, config_of(checkpoint, None))
