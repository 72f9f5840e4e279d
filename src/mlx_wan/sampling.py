"""From noise to latents: the denoising loop, as a generator of steps."""

from collections.abc import Generator

import mlx.core as mx

from mlx_wan.errors import WanError
from mlx_wan.models.transformer import WanTransformer
from mlx_wan.schedulers import Scheduler


def initial_noise(shape: tuple[int, ...], seed: int) -> mx.array:
    """Gaussian noise of `shape`, float32; the same seed gives the same noise on every backend."""
    return mx.random.normal(shape, key=mx.random.key(seed))


def guided_velocity(
    transformer: WanTransformer,
    latents: mx.array,
    timesteps: mx.array,
    context: mx.array,
    negative_context: mx.array,
    guidance_scale: float,
) -> mx.array:
    """Classifier-free guidance: the velocity away from the negative prompt, towards the prompt.

    A scale of 1 is the prompt alone and costs one pass instead of two. Shapes as in `WanTransformer`.
    """
    velocity = transformer(latents, timesteps, context)
    if guidance_scale == 1:
        return velocity
    mx.eval(velocity)  # one pass's activations in memory at a time
    negative = transformer(latents, timesteps, negative_context)
    return negative + guidance_scale * (velocity - negative)


def denoise(
    transformer: WanTransformer,
    scheduler: Scheduler,
    noise: mx.array,
    context: mx.array,
    negative_context: mx.array,
    guidance_scale: float,
    first_frame: mx.array | None = None,
) -> Generator[mx.array, None, None]:
    """Yields the latents after each step, evaluated and found finite; the last are the result.

    Args:
        noise: (B, t, h, w, C), float32.
        context, negative_context: (B, text_len, text_dim), zeros after the text.
        first_frame: (B, 1, h, w, C) normalised latent of a picture: it replaces the first latent frame before and
            after every step, and its tokens have timestep 0 (official `WanTI2V.i2v`).

    Raises WanError when a step gives values that are not finite.
    """
    batch, frames = noise.shape[:2]
    latents, state = _with_first(noise, first_frame), scheduler.init()
    for step, t in enumerate(scheduler.timesteps.tolist()):
        timesteps = mx.full((batch, frames), t, dtype=mx.float32)
        if first_frame is None:
            timesteps = timesteps[:, :1]
        else:
            timesteps[:, 0] = 0
        velocity = guided_velocity(transformer, latents, timesteps, context, negative_context, guidance_scale)
        latents, state = scheduler.step(velocity, latents, state)
        latents = _with_first(latents, first_frame)
        mx.eval(latents)
        if not mx.isfinite(latents).all().item():
            raise WanError(
                f"latents are not finite after step {step + 1} of {len(scheduler.timesteps)}: the run was stopped; "
                "check the checkpoint's weights, or try dtype float32"
            )
        yield latents


def _with_first(latents: mx.array, first_frame: mx.array | None) -> mx.array:
    if first_frame is None:
        return latents
    return mx.concatenate([first_frame.astype(latents.dtype), latents[:, 1:]], axis=1)
