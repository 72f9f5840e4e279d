"""From noise to latents: the denoising loop, as a generator of steps."""

import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_wan.errors import WanError
from mlx_wan.models.transformer import Text, WanTransformer
from mlx_wan.schedulers import Scheduler
from mlx_wan.step_cache import Kept, StepCache, computed, reused

LEAST_VARIANCE = 1e-8  # of latents; theirs is about 1


def initial_noise(shape: tuple[int, ...], seed: int) -> mx.array:
    """Gaussian noise of `shape`, float32; the same seed gives the same noise on every backend."""
    return mx.random.normal(shape, key=mx.random.key(seed))


class Expert(NamedTuple):
    """What works at a step: a transformer, the scale of its guidance, the strengths of its adapters, if any, and which
    of the model's transformers it is."""

    transformer: WanTransformer
    guidance_scale: float
    adapters: tuple[tuple[str, float], ...] = ()
    number: int = 0


class _Reader:
    """The two texts as the expert at work reads them: again when that is another one, or has other adapters."""

    def __init__(self, *contexts: mx.array):
        self._contexts, self._texts = contexts, []
        self._transformer, self._adapters = None, ()  # the former by weak reference: it may leave memory

    def texts(self, expert: Expert) -> list[Text]:
        known = self._transformer is not None and self._transformer() is expert.transformer
        if not known or self._adapters != expert.adapters:
            self._transformer, self._adapters = weakref.ref(expert.transformer), expert.adapters
            read = {id(context): expert.transformer.read(context) for context in self._contexts}  # which may be one
            self._texts = [read[id(context)] for context in self._contexts]
        return self._texts


@dataclass(frozen=True)
class Condition:
    """What is known of the video besides the text.

    Attributes:
        first_frame: (B, 1, h, w, C) normalised latent of a picture, or more latent frames: they replace the first
            ones before and after every step, and their tokens have timestep 0 (official `WanTI2V.i2v`, which has one).
        image: (B, m, image_dim) embeddings of pictures, for transformers that take them.
        channels: (B, t, h, w, ·) put beside the latents' channels whenever the transformer is asked (official
            `WanI2V`).
    """

    first_frame: mx.array | None = None
    channels: mx.array | None = None
    image: mx.array | None = None


class Point(NamedTuple):
    """Where a run stands: with it, the rest of the run follows from what the run was given.

    step: steps taken. latents: (B, t, h, w, C) normalised. state: the scheduler's. kept: what a step cache remembers.
    """

    step: int
    latents: mx.array
    state: Any
    kept: Kept | None = None


# (velocity for a context, context, negative context) -> both velocities
Context = mx.array | Text
Passes = Callable[[Callable[[Context], mx.array], Context, Context], tuple[mx.array, mx.array]]


def one_after_the_other(
    velocity_for: Callable[[Context], mx.array], context: Context, negative_context: Context
) -> tuple[mx.array, mx.array]:
    """Both velocities of guidance, computed here."""
    velocity = velocity_for(context)
    mx.eval(velocity)  # one pass's activations in memory at a time
    return velocity, velocity_for(negative_context)


def guided_velocity(
    expert: Expert,
    latents: mx.array,
    timesteps: mx.array,
    context: Context,
    negative_context: Context,
    image: mx.array | None = None,
    passes: Passes = one_after_the_other,
) -> mx.array:
    """Classifier-free guidance: the velocity away from the negative prompt, towards the prompt.

    A scale of 1 is the prompt alone and costs one pass instead of two. Shapes as in `WanTransformer`.
    """
    transformer, guidance_scale = expert[:2]
    known = () if image is None else (image,)

    def velocity_for(context: Context) -> mx.array:
        return transformer(latents, timesteps, context, *known)

    if guidance_scale == 1:
        return velocity_for(context)
    velocity, negative = passes(velocity_for, context, negative_context)
    return negative + guidance_scale * (velocity - negative)


def denoise(
    expert_at: Callable[[float], Expert],
    scheduler: Scheduler,
    start: mx.array | Point,
    context: mx.array,
    negative_context: mx.array,
    condition: Condition = Condition(),
    passes: Passes = one_after_the_other,
    cache: StepCache | None = None,
) -> Generator[Point, None, None]:
    """Yields the point after each step, its latents evaluated and found finite; the last are the result.

    Args:
        expert_at: the expert for a timestep. It is asked once a step, and nothing else here keeps what it returns: a
            model may leave memory when another takes over.
        start: noise (B, t, h, w, C), float32; or the point of an earlier run to go on from.
        context, negative_context: (B, text_len, text_dim), zeros after the text.
        passes: how the two velocities of guidance come about.
        cache: which steps do without the transformer; None: no step does.

    Raises WanError when a step gives values that are not finite, or all the same.
    """
    if not isinstance(start, Point):
        start = Point(0, _with_first(start, condition.first_frame), scheduler.init())
    done, latents, state, kept = start
    given = 0 if condition.first_frame is None else condition.first_frame.shape[1]
    reader = _Reader(context, negative_context)
    for step, t in enumerate(scheduler.timesteps.tolist()[done:], start=done + 1):
        expert, is_last = expert_at(t), step == len(scheduler.timesteps)
        about = float(scheduler.sigmas[step - 1]), expert.guidance_scale, expert.number
        if cache is not None and kept is not None and not is_last and cache.reuses(kept, *about):
            velocity, kept = reused(kept, about[0])
        else:
            inputs, timesteps = _inputs(latents, t, condition)
            velocity = _velocity(expert, reader, inputs, timesteps, condition.image, passes)
            if cache is not None:
                kept = computed(kept, velocity, *about, given)
        del expert
        latents, state = scheduler.step(velocity, latents, state)
        latents = _with_first(latents, condition.first_frame)
        mx.eval(latents, *(kept or ()))
        _check(latents, step, len(scheduler.timesteps))
        yield Point(step, latents, state, kept)


def _inputs(latents: mx.array, t: float, condition: Condition) -> tuple[mx.array, mx.array]:
    """What the transformer is given at a timestep: latents with the channels beside them, and timesteps."""
    timesteps = mx.full(latents.shape[:2], t, dtype=mx.float32)
    if condition.first_frame is None:
        timesteps = timesteps[:, :1]
    else:
        timesteps[:, : condition.first_frame.shape[1]] = 0
    inputs = latents if condition.channels is None else mx.concatenate([latents, condition.channels], axis=-1)
    return inputs, timesteps


def _velocity(
    expert: Expert, reader: _Reader, inputs: mx.array, timesteps: mx.array, image: mx.array | None, passes: Passes
) -> mx.array:
    """`guided_velocity` of the texts as this expert reads them."""
    context, negative_context = reader.texts(expert)
    return guided_velocity(expert, inputs, timesteps, context, negative_context, image, passes)


def _check(latents: mx.array, step: int, steps: int) -> None:
    """A run that has gone wrong shows here, hours before its video: as NaN, or as the zeros of a GPU out of memory."""
    if not mx.isfinite(latents).all().item():
        raise WanError(
            f"latents are not finite after step {step} of {steps}: the run was stopped; "
            "check the checkpoint's weights, or try dtype float32"
        )
    if latents.size > 1 and (mx.var(latents) < LEAST_VARIANCE).item():
        raise WanError(
            f"latents are all the same after step {step} of {steps}: the run was stopped; MLX gives zeros where a GPU "
            "runs out of memory: try fewer frames or a smaller size"
        )


def _with_first(latents: mx.array, first_frame: mx.array | None) -> mx.array:
    if first_frame is None:
        return latents
    return mx.concatenate([first_frame.astype(latents.dtype), latents[:, first_frame.shape[1] :]], axis=1)
