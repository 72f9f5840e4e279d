"""The Wan2.2 video autoencoder: 16×16 pixels by 4 frames to one latent of 48 channels, and back.

Follows `wan/modules/vae2_2.py` of the official repository: 2×2 pixels become channels first, and parameterless
shortcuts lead around the stages. What it shares with Wan2.1's, and how clips pass in pieces, is in `autoencoder.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from . import vae_passes
from .autoencoder import (
    Cached,
    Downsample,
    FeatureCache,
    ResidualBlock,
    Upsample,
    WanVAE,
    decoder_widths,
    encoder_widths,
    run_cached,
    stride,
)


@dataclass(frozen=True)
class VAEConfig:
    """Dimensions; the defaults are the released Wan2.2 VAE's.

    dim, dec_dim: base width of encoder and decoder. dim_mult: width of each stage over the base.
    temporal_downsample: which of the strided stages halve time too (the others only space).
    patch_size: side of the squares of pixels that become channels before the encoder.
    latents_mean, latents_std: per channel (z_dim); latents leave the encoder as (mean − latents_mean) / latents_std.
    """

    dim: int = 160
    dec_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 2
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of video for one latent; (4, 16, 16) for the released model."""
        return stride(self)


def average_down(x: mx.array, out_dim: int, factor_t: int, factor_s: int) -> mx.array:
    """Shortcut of a strided stage: folds factor_t×factor_s×factor_s pixels into channels and averages groups of them.

    An odd number of frames is completed by zeros in front.
    """
    x = mx.pad(x, [(0, 0), (-x.shape[1] % factor_t, 0), (0, 0), (0, 0), (0, 0)])
    b, t, h, w, c = x.shape
    t, h, w = t // factor_t, h // factor_s, w // factor_s
    x = x.reshape(b, t, factor_t, h, factor_s, w, factor_s, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, t, h, w, out_dim, -1).mean(axis=-1)


class DownStage(Cached):
    """Residual blocks, then a Downsample unless it is the last stage; a parameterless shortcut around them."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, strided: bool, temporal: bool):
        super().__init__()
        self.out_dim = out_dim
        self.factor_t, self.factor_s = (2 if temporal else 1), (2 if strided else 1)
        widths = [in_dim] + [out_dim] * num_blocks
        self.downsamples: list[nn.Module] = [ResidualBlock(a, b) for a, b in pairwise(widths)]
        if strided:
            self.downsamples.append(Downsample(out_dim, temporal))

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        y = run_cached(self.downsamples, x, cache)
        if cache.streaming and vae_passes.has_kernels(y):
            return vae_passes.add_averages(y, x, self.factor_t, self.factor_s)
        return y + average_down(x, self.out_dim, self.factor_t, self.factor_s)


class UpStage(Cached):
    """Residual blocks, then an Upsample and a parameterless shortcut around them unless it is the last stage."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, strided: bool, temporal: bool):
        super().__init__()
        self.strided = strided
        widths = [in_dim] + [out_dim] * num_blocks
        self.temporal = temporal
        self.upsamples: list[nn.Module] = [ResidualBlock(a, b) for a, b in pairwise(widths)]
        if strided:
            self.upsamples.append(Upsample(out_dim, out_dim, temporal))

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        if not self.strided:
            return run_cached(self.upsamples, x, cache)
        behind = ResidualBlock.behind * (len(self.upsamples) - 1)
        return self.widen(*self.lengthen(x, cache), cache, behind)

    def lengthen(self, x: mx.array, cache: FeatureCache) -> tuple[mx.array, mx.array]:
        """The half of a call before space is doubled: its result, and what the shortcut takes."""
        *blocks, last = self.upsamples
        return cast(Upsample, last).double_time(run_cached(blocks, x, cache), cache), x

    def widen(self, x: mx.array, shortcut: mx.array, cache: FeatureCache, behind: int = 0) -> mx.array:
        """The half that doubles space; of a strip, x is `behind` rows behind the shortcut."""
        upsample = cast(Upsample, self.upsamples[-1])
        return cache.settle(upsample.double(x, cache, shortcut, 2 if self.temporal else 1, behind))


def down_stages(config: VAEConfig) -> Iterator[nn.Module]:
    """The encoder's; each but the last is strided."""
    strides = (*config.temporal_downsample, None)
    for (a, b), temporal in zip(pairwise(encoder_widths(config)), strides, strict=True):
        yield DownStage(a, b, config.num_res_blocks, temporal is not None, bool(temporal))


def up_stages(config: VAEConfig) -> Iterator[nn.Module]:
    """The decoder's; each but the last doubles."""
    strides = (*reversed(config.temporal_downsample), None)
    for (a, b), temporal in zip(pairwise(decoder_widths(config)), strides, strict=True):
        yield UpStage(a, b, config.num_res_blocks + 1, temporal is not None, bool(temporal))


class WanVAE22(WanVAE):
    """The autoencoder of TI2V-5B."""

    config: VAEConfig

    def __init__(self, config: VAEConfig):
        super().__init__(config, down_stages(config), up_stages(config))
