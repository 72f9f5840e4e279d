"""What a fine-tuning run will do, found out before any of it: clips, buckets, what is trained, the memory it takes.

Reads headers and probes files; loads no model and writes nothing.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from mlx_wan import backend
from mlx_wan.conditioning import KNOWN_FRAMES
from mlx_wan.errors import UserError
from mlx_wan.lora.fuse import EXPERTS, expert_part
from mlx_wan.models.transformer import TransformerConfig, WanTransformer
from mlx_wan.training.adapt import (
    adapters_name,
    adapters_of_expert,
    frozen,
    load_adapters,
    make_trainable,
    trainable_size,
)
from mlx_wan.training.buckets import Bucket
from mlx_wan.training.dataset import Clip, Sampling, Skipped, Source, find_sources, plan_clips
from mlx_wan.training.hub import default_cache, open_data
from mlx_wan.training.joint import Turns
from mlx_wan.training.options import FinetuneRecipe
from mlx_wan.training.trainer import DTYPES, TrainConfig
from mlx_wan.weights.load import Checkpoint, locate
from mlx_wan.weights.quantize import quantize_module
from mlx_wan.weights.whole import flat

# Bytes that an optimizer keeps for each trained number, which is float32 as its weight and its gradient are.
_OPTIMIZER_BYTES = {"adamw": 8, "adam": 8, "muon": 4, "lion": 4, "adafactor": 0, "sgd": 0}
_GIB = 2**30
DOES_NOT_FIT = "does not fit; try grad_checkpoint, smaller clips, or a quantized model"
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Plan:
    """A run before it begins.

    Attributes:
        recipe: with the model's and the device's values where it had None.
        checkpoint: the model, its headers checked.
        clips, held_out: for training and for validation.
        skipped: files that cannot be used, and why.
        trained: how many numbers are trained, and `total` how many the transformer has with them.
        memory: bytes by what they are for, of the step with the largest bucket; an estimate.
        encoding: bytes of the encoders' weights, of text or of clips, the larger; they are gone while training.
    """

    recipe: FinetuneRecipe
    checkpoint: Checkpoint
    clips: list[Clip]
    held_out: list[Clip]
    skipped: list[Skipped]
    trained: int
    total: int
    memory: dict[str, int]
    encoding: int

    @property
    def train(self) -> TrainConfig:
        """The recipe in the trainer's words."""
        recipe = self.recipe
        return TrainConfig(
            steps=recipe.iters,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            warmup_steps=recipe.warmup_steps,
            schedule=recipe.lr_schedule,
            grad_accumulation_steps=recipe.grad_accumulation_steps,
            optimizer=recipe.optimizer,
            muon_learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            beta2=recipe.beta2,
            grad_clip=recipe.grad_clip,
            ema_decay=recipe.ema_decay,
            seed=recipe.seed,
            compute_dtype=str(recipe.dtype),
            report_every=recipe.steps_per_report,
            eval_every=recipe.steps_per_eval,
            save_every=recipe.save_every,
            keep=recipe.keep,
            compile=bool(recipe.compile),
            shard_optimizer=recipe.shard_optimizer,
            spike_factor=recipe.spike_factor,
        )

    def of(self, expert: str | None) -> "Plan":
        """The part of it that trains one of the experts: itself, or its turns where it trains both."""
        if expert == self.recipe.expert:
            return self
        recipe = self.recipe
        start = recipe.resume_adapter_file and str(adapters_of_expert(recipe.resume_adapter_file, expert))
        own = replace(
            recipe, expert=expert, iters=self.turns.made(str(expert), recipe.iters), resume_adapter_file=start
        )
        return replace(self, recipe=own)

    @property
    def turns(self) -> Turns:
        """Whose turn a step is, where both experts are trained."""
        return Turns(tuple(map(str, self.recipe.experts)), self.recipe.switch_every)

    @property
    def part(self) -> str:
        """Which of the checkpoint's transformers is trained."""
        return EXPERTS[self.recipe.expert or "high"]

    @property
    def sigmas(self) -> tuple[float, float]:
        """The noise levels it is trained at."""
        return expert_sigmas(self.checkpoint, self.recipe.expert)

    @property
    def dtype(self) -> mx.Dtype:
        """What is computed in."""
        return DTYPES[str(self.recipe.dtype)]

    @property
    def fits(self) -> bool:
        """Whether the estimate is below the memory of this machine."""
        return max(sum(self.memory.values()), self.encoding) < backend.total_memory()

    def lines(self) -> list[str]:
        """The plan for people, a line a fact."""
        recipe, config = self.recipe, self.checkpoint.transformer_config
        kind = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}[recipe.fine_tune_type]
        if recipe.fine_tune_type != "full":
            kind = ("Q" if self.checkpoint.quantization else "") + f"{kind} of rank {recipe.rank}"
            kind += f" beside {', '.join(recipe.targets)}"
        layers = config.num_layers if recipe.num_layers == -1 else recipe.num_layers
        parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in self.memory.items())
        need, have = sum(self.memory.values()) / _GIB, backend.total_memory() / _GIB
        buckets = Counter(clip.bucket for clip in self.clips)
        size = recipe.batch_size * recipe.grad_accumulation_steps
        return [
            f"model: {self.checkpoint.folder} ({self.checkpoint.spec.name})",
            *self._expert_lines(),
            f"clips: {len(self.clips)} of {_files(self.clips)} files, {len(self.held_out)} for validation, "
            f"{len(self.skipped)} files skipped",
            *[f"  skipped {one}" for one in self.skipped],
            *[f"  bucket {bucket}: {count} clips" for bucket, count in sorted(buckets.items())],
            f"trains: {kind}, in {layers} of {config.num_layers} blocks: {self.trained:,} of {self.total:,} numbers",
            f"steps: {recipe.iters} of {size} clips, {recipe.iters * size / len(self.clips):.1f} times all clips; "
            f"{recipe.optimizer}, learning rate {recipe.learning_rate:g}, {recipe.lr_schedule}",
            f"memory: about {need:.2f} GiB while training ({parts}), {self.encoding / _GIB:.2f} for encoders before; "
            f"this machine has {have:.2f}: {'fits' if self.fits else DOES_NOT_FIT}",
        ]

    def _expert_lines(self) -> list[str]:
        recipe, lines = self.recipe, []
        for expert in filter(None, recipe.experts):
            low, high = (1000 * sigma for sigma in expert_sigmas(self.checkpoint, expert))
            file = "model" if recipe.fine_tune_type == "full" else adapters_name(expert)
            turns = f", {self.of(expert).recipe.iters} steps" if recipe.expert == "both" else ""
            lines.append(f"expert: {expert} noise, timesteps {low:g} to {high:g}{turns}, written to {file}")
        if recipe.expert == "both":
            where = "both in memory" if recipe.keep_both_experts else "one in memory at a time"
            lines.append(f"turns: {recipe.switch_every} steps each, {where}")
        return lines


def expert_sigmas(checkpoint: Checkpoint, expert: str | None) -> tuple[float, float]:
    """The noise levels at which an expert works, "high" or "low"; all of them for None."""
    boundary = checkpoint.spec.boundary
    if expert is None or boundary is None:
        return 0.0, 1.0
    return (boundary, 1.0) if expert == "high" else (0.0, boundary)


def _files(clips: list[Clip]) -> int:
    return len({clip.source.path for clip in clips})


def make_plan(recipe: FinetuneRecipe) -> Plan:
    """Finds out what `recipe` means for its model and data. UserError or CheckpointError if it cannot work."""
    checkpoint = locate(str(recipe.model))
    recipe = resolve(recipe, checkpoint)
    data = open_data(str(recipe.data), Path(str(recipe.cache)))
    sources, skipped = find_sources(data)
    valid, more = find_sources(data, "valid")
    if not valid and recipe.hold_out:
        sources, valid = hold_out(sources, recipe.hold_out)
    sources, pictures = without_pictures(sources, checkpoint)
    valid, more_pictures = without_pictures(valid, checkpoint)
    clips, unusable = plan_clips(sources, sampling(recipe, checkpoint))
    held_out, unusable_too = plan_clips(valid, sampling(recipe, checkpoint))
    skipped = [*skipped, *more, *pictures, *more_pictures, *unusable, *unusable_too]
    if not clips:
        why = f": {skipped[0]}" if skipped else ""
        raise UserError(f"{recipe.data}: no clip to train on{why}")
    transformer = WanTransformer(checkpoint.transformer_config)  # MLX makes values when they are asked for: never
    if checkpoint.quantization is not None:
        quantize_module(transformer, "transformer", checkpoint.quantization)
    make_trainable(transformer, recipe)
    trained = trainable_size(transformer) * len(recipe.experts)
    plan = Plan(recipe, checkpoint, clips, held_out, skipped, trained, 0, {}, 0)
    for expert in recipe.experts:
        own = plan.of(expert)
        _ = own.train  # its checks
        if own.recipe.resume_adapter_file:
            load_adapters(Path(own.recipe.resume_adapter_file), transformer)  # its shapes; no value is read
    largest = max((clip.bucket for clip in clips), key=lambda b: b.frames * b.width * b.height)
    return replace(
        plan,
        total=_total(checkpoint) * len(recipe.experts) + (0 if recipe.fine_tune_type == "full" else plan.trained),
        memory=training_memory(plan, transformer, largest),
        encoding=max(
            _stored(checkpoint, "text_encoder"), _stored(checkpoint, "vae") + _stored(checkpoint, "image_encoder")
        ),
    )


def resolve(recipe: FinetuneRecipe, checkpoint: Checkpoint) -> FinetuneRecipe:
    """The recipe with the model's values, and the device's, where it had none; checked against the model."""
    spec, device = checkpoint.spec, backend.default_dtype()
    check_model(recipe, checkpoint)
    recipe = replace(
        recipe,
        width=recipe.width or spec.width,
        height=recipe.height or spec.height,
        num_frames=recipe.num_frames or (spec.num_frames,),
        fps=recipe.fps or float(spec.fps),
        shift=recipe.shift or spec.shift_for(recipe.width or spec.width, recipe.height or spec.height),
        image_to_video=recipe.image_to_video if spec.task == "ti2v" else 0.0,
        preview_steps=recipe.preview_steps or spec.num_inference_steps,
        dtype=recipe.dtype or str(device).removeprefix("mlx.core."),
        compile=_compiles_fast() if recipe.compile is None else recipe.compile,
        cache=recipe.cache or str(default_cache(str(recipe.data))),
    )
    step_w, step_h = checkpoint.size_steps
    stride = checkpoint.vae_config.stride[0]
    if recipe.width % step_w or recipe.height % step_h:  # type: ignore[operator]
        raise UserError(f"size {recipe.width}x{recipe.height}: sides must be multiples of {step_w} and {step_h}")
    if wrong := [length for length in recipe.num_frames if length % stride != 1 % stride]:
        raise UserError(f"num_frames is {wrong[0]}; it must be {stride}n+1, such as {spec.num_frames}")
    if spec.task in KNOWN_FRAMES and 1 in recipe.num_frames:
        raise UserError(f"num_frames is 1; {spec.name} learns what follows a picture: give more frames")
    return recipe


def _compiles_fast() -> bool:
    """Not on the CPU, where it gains nothing, nor on CUDA, where a whole step takes minutes (docs/benchmarks.md)."""
    return mx.default_device() == mx.gpu and not mx.cuda.is_available()


def check_model(recipe: FinetuneRecipe, checkpoint: Checkpoint) -> None:
    """UserError if this model, or that part of it, is not trained."""
    spec = checkpoint.spec
    if spec.task == "vace":
        raise UserError(f"{recipe.model}: is {spec.name}, whose control branch is not trained here; use another model")
    for expert in recipe.experts:
        expert_part(checkpoint, expert)  # refuses a word for models that have no experts
    if spec.boundary is not None and recipe.expert is None:
        raise UserError(f"{recipe.model}: is {spec.name}, which has two experts; give expert high, low or both")
    if recipe.preview_prompts and spec.boundary is not None and recipe.expert != "both":
        raise UserError("preview_prompts: one expert alone makes no video; train both, or leave them out")


def without_pictures(sources: list[Source], checkpoint: Checkpoint) -> tuple[list[Source], list[Skipped]]:
    """(usable, skipped): models that are shown a frame learn what follows it, of which a picture says nothing."""
    if checkpoint.spec.task not in KNOWN_FRAMES:
        return sources, []
    pictures = [
        Skipped(one.path, f"is a picture; {checkpoint.spec.name} needs videos")
        for one in sources
        if one.kind == "image"
    ]
    return [one for one in sources if one.kind != "image"], pictures


def known(value: Number | None) -> Number:
    """A value that `resolve` has filled in."""
    assert value is not None
    return value


def sampling(recipe: FinetuneRecipe, checkpoint: Checkpoint) -> Sampling:
    """How the resolved recipe cuts clips for this model."""
    return Sampling(
        num_frames=recipe.num_frames,
        width=known(recipe.width),
        height=known(recipe.height),
        steps=checkpoint.size_steps,
        fps=known(recipe.fps),
        frames=recipe.frame_sampling,
        windows=recipe.windows,
        stride=recipe.window_stride,
        aspect_buckets=recipe.aspect_buckets,
        flip=recipe.flip,
    )


def hold_out(sources: list[Source], share: float) -> tuple[list[Source], list[Source]]:
    """(rest, held out): a share of the sources, evenly spread over them, at least one."""
    count = max(1, round(share * len(sources)))
    chosen = {int((i + 0.5) * len(sources) / count) for i in range(count)}
    rest = [source for i, source in enumerate(sources) if i not in chosen]
    return rest, [source for i, source in enumerate(sources) if i in chosen]


def _stored(checkpoint: Checkpoint, part: str) -> int:
    return sum(info.nbytes for info in checkpoint.parts[part].tensors.values()) if part in checkpoint.parts else 0


def _total(checkpoint: Checkpoint) -> int:
    return sum(array.size for array in flat(WanTransformer(checkpoint.transformer_config).parameters()).values())


# --- memory ----------------------------------------------------------------------------------------------------------


def training_memory(plan: Plan, transformer: WanTransformer, bucket: Bucket) -> dict[str, int]:
    """Bytes of a step, by what they are for: an estimate from shapes."""
    recipe, dtype = plan.recipe, plan.dtype.size
    # Packed integers keep their size, scales and what else is a float is in the dtype of computing.
    base = sum(
        a.size * (dtype if mx.issubdtype(a.dtype, mx.floating) else a.dtype.size) for a in frozen(transformer).values()
    )
    averages = 4 if recipe.ema_decay else 0
    sums = 4 if recipe.grad_accumulation_steps > 1 else 0
    processes = mx.distributed.init().size() if recipe.shard_optimizer else 1
    kept = averages + _OPTIMIZER_BYTES[recipe.optimizer] / processes
    experts = len(recipe.experts)  # each keeps its state; gradients are of the one whose turn it is
    return {
        "weights": base * (experts if recipe.keep_both_experts else 1) + 4 * plan.trained,
        "gradients and optimizer": round(plan.trained * (kept + (4 + sums) / experts)),
        "activations": recipe.batch_size * activations(plan.checkpoint, bucket, recipe.grad_checkpoint, dtype),
    }


def activations(checkpoint: Checkpoint, bucket: Bucket, checkpointing: bool, dtype: int) -> int:
    """Bytes that forward and backward keep for one clip, with values of `dtype` bytes where precision is not needed.

    A block keeps about twelve float32 arrays of its width, eight in the dtype of computing, three of the feed-forward's
    width, and, since MLX's attention has no fused backward on most devices, all scores. Measured in float32 on the CPU
    at 192 to 1280 tokens (docs/training.md); elsewhere it is a guess.
    """
    config, (step_w, step_h) = checkpoint.transformer_config, checkpoint.size_steps
    frames = (bucket.frames - 1) // checkpoint.vae_config.stride[0] + 1
    tokens = frames * (bucket.height // step_h) * (bucket.width // step_w)
    block = _block(config, tokens, dtype)
    stream = 4 * tokens * config.dim
    whole = config.num_layers * block
    return min(whole, config.num_layers * stream + 2 * block) if checkpointing else whole


def _block(config: TransformerConfig, tokens: int, dtype: int) -> int:
    widths = tokens * config.dim * (12 * 4 + 8 * dtype) + 3 * tokens * config.ffn_dim * dtype
    scores = config.num_heads * tokens * (tokens + config.text_len) * dtype
    return widths + scores
