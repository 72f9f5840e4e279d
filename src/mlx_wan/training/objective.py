"""What training minimises: the flow-matching loss of the transformer and the loss of the autoencoder.

Functions of arrays only. Latents are normalised, shapes are channels last.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import mlx.core as mx

from mlx_wan.models.transformer import WanTransformer
from mlx_wan.models.vae22 import FeatureCache, WanVAE22

TRAIN_TIMESTEPS = 1000  # the model is given 1000 σ


def shift_sigma(u: mx.array, shift: float) -> mx.array:
    """Noise levels σ = s·u / (1 + (s − 1)·u) for u in [0, 1]; a larger shift s means more noise."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: float, shift: float) -> float:
    """The u in [0, 1] that `shift_sigma` takes to sigma."""
    return sigma / (shift - (shift - 1) * sigma)


def _normal(u: mx.array) -> mx.array:
    """The standard normal values below which a share u of them lies."""
    return math.sqrt(2) * mx.erfinv(2 * mx.clip(u, 1e-6, 1 - 1e-6) - 1)


# How noise levels are spread before the shift, from u uniform in [0, 1): name -> (u, mean, std) -> values in (0, 1).
SIGMA_SAMPLINGS: dict[str, Callable[[mx.array, float, float], mx.array]] = {
    "uniform": lambda u, mean, std: u,
    "logit-normal": lambda u, mean, std: mx.sigmoid(mean + std * _normal(u)),  # Esser et al., arXiv:2403.03206
    "sigmoid": lambda u, mean, std: mx.sigmoid(_normal(u)),
}


# Their inverses: (value in (0, 1), mean, std) -> u.
_SHARES: dict[str, Callable[[float, float, float], float]] = {
    "uniform": lambda x, mean, std: x,
    "logit-normal": lambda x, mean, std: NormalDist(mean, std).cdf(math.log(x / (1 - x))),
    "sigmoid": lambda x, mean, std: NormalDist().cdf(math.log(x / (1 - x))),
}


def sample_sigmas(
    key: mx.array,
    batch: int,
    shift: float,
    sampling: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    within: tuple[float, float] = (0.0, 1.0),
) -> mx.array:
    """Noise levels (batch,) from stratified draws: one in each of `batch` equal intervals of u, spread, then shifted.

    sampling: a key of SIGMA_SAMPLINGS; mean, std: of "logit-normal". A shift of 1 leaves them as they are.
    within: the noise levels of an expert. Its share of u is drawn from directly: the levels are spread as those of
    the whole range are that fall between the two.
    """
    jitter, order = mx.random.split(key)
    u = (mx.arange(batch) + mx.random.uniform(shape=(batch,), key=jitter)) / batch
    if within != (0.0, 1.0):
        low, high = (
            edge if edge in (0, 1) else _SHARES[sampling](unshift_sigma(edge, shift), mean, std) for edge in within
        )
        u = low + (high - low) * u
    spread = SIGMA_SAMPLINGS[sampling](u[mx.random.permutation(batch, key=order)], mean, std)
    return mx.clip(shift_sigma(spread, shift), *within)  # rounding may pass an edge


def _bell(sigmas: mx.array) -> mx.array:
    low = math.exp(-0.5)  # at σ = 0 and 1; the mean of the bell over [0, 1] is √(π/2)·erf(1/√2)
    mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - low
    return (mx.exp(-2 * mx.square(sigmas - 0.5)) - low) / mean


# Weight of a sample's loss by its noise level; each has mean 1 over uniform noise levels.
WEIGHTINGS: dict[str, Callable[[mx.array], mx.array]] = {
    "none": mx.ones_like,
    "bell": _bell,  # exp(−2 (σ − ½)²) less its ends, which then count nothing (as in DiffSynth-Studio)
    "cosmap": lambda sigmas: 2 / (math.pi * (1 - 2 * sigmas + 2 * mx.square(sigmas))),  # arXiv:2403.03206
}


def add_noise(latents: mx.array, noise: mx.array, sigmas: mx.array) -> mx.array:
    """x_σ = (1 − σ)·x0 + σ·ε for latents (B, t, h, w, C) and sigmas (B,) or (B, t)."""
    sigmas = sigmas.reshape(*sigmas.shape, *([1] * (latents.ndim - sigmas.ndim)))
    return (1 - sigmas) * latents + sigmas * noise


def flow_loss(
    transformer: WanTransformer,
    latents: mx.array,
    context: mx.array,
    noise: mx.array,
    sigmas: mx.array,
    keep_first: mx.array,
    channels: mx.array | None = None,
    image: mx.array | None = None,
) -> mx.array:
    """Mean squared error of the predicted velocity ε − x0, one value a sample (B,), float32.

    Args:
        latents: clean (B, t, h, w, C).
        context: text embeddings (B, n, text_dim), zeros after the text.
        noise: like latents.
        sigmas: noise level of each sample (B,), in [0, 1].
        keep_first: (B,) bool: image-to-video, whose first latent frame is clean, has timestep 0 and no part in
            the loss, as in the official TI2V. Not for clips of a single latent frame, which would have no loss.
        channels: (B, t, h, w, ·) put beside the noisy latents, as `sampling.Condition.channels` (I2V).
        image: image tokens (B, m, image_dim), for models that take them.
    """
    frames = latents.shape[1]
    known = keep_first[:, None] & (mx.arange(frames) == 0)[None]  # (B, t)
    per_frame = mx.where(known, 0.0, sigmas[:, None])
    inputs = add_noise(latents, noise, per_frame)
    if channels is not None:
        inputs = mx.concatenate([inputs, channels.astype(inputs.dtype)], axis=-1)
    tokens = () if image is None else (image,)
    velocity = transformer(inputs, TRAIN_TIMESTEPS * per_frame, context, *tokens)
    error = mx.square(velocity - (noise - latents).astype(mx.float32)).mean(axis=(2, 3, 4))  # (B, t)
    weight = (~known).astype(mx.float32)
    return (error * weight).sum(axis=1) / weight.sum(axis=1)


def autoencoder_loss(
    vae: WanVAE22, video: mx.array, key: mx.array, kl_weight: float, dtype: mx.Dtype
) -> tuple[mx.array, dict[str, mx.array]]:
    """Reconstruction of whole clips, and a pull of the latents towards unit Gaussians.

    Args:
        video: (B, T, H, W, 3) in [-1, 1], float32.
        key: random key of the noise; the latent drawn is mean + std·noise.
        kl_weight: weight of the mean Kullback-Leibler divergence of a latent value.
        dtype: what the convolutions compute in; their weights should have it too.

    Returns:
        loss (absolute + squared error + weighted divergence), and {"mse", "kl"}.
    """
    mean, log_variance = (a.astype(mx.float32) for a in vae.moments(video.astype(dtype), FeatureCache()))
    log_variance = mx.clip(log_variance, -20, 10)
    latents = mean + mx.exp(0.5 * log_variance) * mx.random.normal(mean.shape, key=key)
    error = vae.pixels(latents.astype(dtype), FeatureCache()).astype(mx.float32) - video
    kl = 0.5 * (mx.square(mean) + mx.exp(log_variance) - 1 - log_variance).mean()
    mse = mx.square(error).mean()
    return mx.abs(error).mean() + mse + kl_weight * kl, {"mse": mse, "kl": kl}


def psnr(mse: float, peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB; pixels in [-1, 1] have a peak-to-peak of 2."""
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)
