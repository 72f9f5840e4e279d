"""From noise to latents: the denoising loop, as a generator of steps."""

import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_wan.errors import WanError
from mlx_wan.models.transformer import Text, WanTransformer
from mlx_wan.schedulers import Scheduler

LEAST_VARIANCE = 1e-8  # of latents; theirs is about 1


def initial_noise(shape: tuple[int, ...], seed: int) -> mx.array:
    """Gaussian noise of `shape`, float32; the same seed gives the same noise on every backend."""
    return mx.random.normal(shape, key=mx.random.key(seed))


class Expert(NamedTuple):
    """What works at a step: a transformer, the scale of its guidance, and the strengths of its adapters, if any."""

    transformer: WanTransformer
    guidance_scale: float
    adapters: tuple[tuple[str, float], ...] = ()


class _Reader:
    """The two texts as the expert at work reads them: again when that is another one, or has other adapters."""

    def __init__(self, *contexts: mx.array):
        self._contexts, self._texts = contexts, []
        self._transformer, self._adapters = None, ()  # the former by weak reference: it may leave memory

    def texts(self, expert: Expert) -> list[Text]:
        known = self._transformer is not None and self._transformer() is expert.transformer
        if not known or self._adapters != expert.adapters:
            self._transformer, self._adapters = weakref.ref(expert.transformer), expert.adapters
            self._texts = [expert.transformer.read(context) for context in self._contexts]
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

    step: steps taken. latents: (B, t, h, w, C) normalised. state: the scheduler's.
    """

    step: int
    latents: mx.array
    state: Any


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
) -> Generator[Point, None, None]:
    """Yields the point after each step, its latents evaluated and found finite; the last are the result.

    Args:
        expert_at: the expert for a timestep. It is asked once a step, and nothing else here keeps what it returns: a
            model may leave memory when another takes over.
        start: noise (B, t, h, w, C), float32; or the point of an earlier run to go on from.
        context, negative_context: (B, text_len, text_dim), zeros after the text.
        passes: how the two velocities of guidance come about.

    Raises WanError when a step gives values that are not finite, or all the same.
    """
    if not isinstance(start, Point):
        start = Point(0, _with_first(start, condition.first_frame), scheduler.init())
    done, latents, state = start
    batch, frames = latents.shape[:2]
    reader = _Reader(context, negative_context)
    for step, t in enumerate(scheduler.timesteps.tolist()[done:], start=done + 1):
        timesteps = mx.full((batch, frames), t, dtype=mx.float32)
        if condition.first_frame is None:
            timesteps = timesteps[:, :1]
        else:
            timesteps[:, : condition.first_frame.shape[1]] = 0
        inputs = latents if condition.channels is None else mx.concatenate([latents, condition.channels], axis=-1)
        velocity = _velocity(expert_at(t), reader, inputs, timesteps, condition.image, passes)
        latents, state = scheduler.step(velocity, latents, state)
        latents = _with_first(latents, condition.first_frame)
        mx.eval(latents)
        _check(latents, step, len(scheduler.timesteps))
        yield Point(step, latents, state)


def _velocity(
    expert: Expert, reader: _Reader, inputs: mx.array, timesteps: mx.array, image: mx.array | None, passes: Passes
) -> mx.array:
    """`guided_velocity`; of a function, so that `denoise` keeps no reference to the expert."""
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
