"""The Wan2.1 video autoencoder: 8×8 pixels by 4 frames to one latent of 16 channels, and back.

Wan2.2's A14B models use it too. Follows `wan/modules/vae2_1.py` of the official repository: encoder and decoder are one
flat list of residual blocks and resamplings, without shortcuts around stages, and every doubling of space halves the
channels. What it shares with Wan2.2's, and how clips pass in pieces, is in `autoencoder.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import mlx.nn as nn

from .autoencoder import Downsample, ResidualBlock, Upsample, WanVAE, decoder_widths, encoder_widths, stride


@dataclass(frozen=True)
class VAE21Config:
    """Dimensions; the defaults are the released Wan2.1 VAE's. Fields as in `vae22.VAEConfig`."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @property
    def dec_dim(self) -> int:
        """Encoder and decoder are equally wide."""
        return self.dim

    @property
    def patch_size(self) -> int:
        """Pixels enter as they are."""
        return 1

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of video for one latent; (4, 8, 8) for the released model."""
        return stride(self)


def down_layers(config: VAE21Config) -> Iterator[nn.Module]:
    """The encoder's: residual blocks, and between two widths a Downsample."""
    strides = (*config.temporal_downsample, None)
    for (in_dim, out_dim), temporal in zip(pairwise(encoder_widths(config)), strides, strict=True):
        for dim in (in_dim, *[out_dim] * (config.num_res_blocks - 1)):
            yield ResidualBlock(dim, out_dim)
        if temporal is not None:
            yield Downsample(out_dim, temporal)


def up_layers(config: VAE21Config) -> Iterator[nn.Module]:
    """The decoder's: residual blocks, and between two widths an Upsample to half the channels."""
    strides = (*reversed(config.temporal_downsample), None)
    in_dim, *widths = decoder_widths(config)
    for out_dim, temporal in zip(widths, strides, strict=True):
        for dim in (in_dim, *[out_dim] * config.num_res_blocks):
            yield ResidualBlock(dim, out_dim)
        in_dim = out_dim // 2
        if temporal is not None:
            yield Upsample(out_dim, in_dim, temporal)


class WanVAE21(WanVAE):
    """The autoencoder of Wan2.1 and of Wan2.2's A14B models."""

    config: VAE21Config

    def __init__(self, config: VAE21Config):
        super().__init__(config, down_layers(config), up_layers(config))
