"""The UMT5 text encoder: token ids in, one vector a token out.

Follows `wan/modules/t5.py` of the official repository (T5 v1.1 with gated GELU and, as in UMT5, a table of relative
positions in every layer). Parameter names are the official ones.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .layers import GELU, Pace, attend, run_layers

MAX_DISTANCE = 128  # tokens; further apart than this, all pairs share the last bucket


@dataclass(frozen=True)
class TextEncoderConfig:
    """Dimensions; the defaults are UMT5-XXL's."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32


@lru_cache(maxsize=8)
def relative_buckets(length: int, num_buckets: int) -> np.ndarray:
    """Bucket of key j as seen from query i, (length, length): exact near by, logarithmic further off.

    Half of the buckets serve keys to the right. float32 as in the reference, since the boundaries depend on it.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    log_bucket = exact + (ratio / np.float32(math.log(MAX_DISTANCE / exact)) * np.float32(half - exact)).astype(int)
    bucket = np.where(distance < exact, distance, np.minimum(log_bucket, half - 1))
    return bucket + half * (offset > 0)


class RelativePositions(nn.Module):
    """A learned attention bias for each head and bucket of distance."""

    def __init__(self, num_buckets: int, num_heads: int):
        super().__init__()
        self.num_buckets = num_buckets
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def __call__(self, buckets: mx.array) -> mx.array:
        # (L, L) of `relative_buckets` -> (1, heads, L, L)
        return self.embedding(buckets).transpose(2, 0, 1)[None]


class SelfAttention(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.k = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.v = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.o = nn.Linear(config.dim_attn, config.dim, bias=False)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        # T5 does not scale its scores: the initialisation of q does.
        return self.o(attend(self.q(x), self.k(x), self.v(x), self.num_heads, 1.0, bias))


class GatedFeedForward(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.gate = [nn.Linear(config.dim, config.dim_ffn, bias=False), GELU()]
        self.fc1 = nn.Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = nn.Linear(config.dim_ffn, config.dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.fc1(x) * run_layers(self.gate, x))


class EncoderBlock(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.dim, eps=1e-6)
        self.attn = SelfAttention(config)
        self.norm2 = nn.RMSNorm(config.dim, eps=1e-6)
        self.ffn = GatedFeedForward(config)
        self.pos_embedding = RelativePositions(config.num_buckets, config.num_heads)

    def __call__(self, x: mx.array, buckets: mx.array, mask: mx.array | None = None) -> mx.array:
        # x: (B, L, C); buckets: (L, L), the same for every block; mask: (B, 1, 1, L), true where a key is text
        bias = self.pos_embedding(buckets).astype(x.dtype)
        if mask is not None:
            # The lowest finite value, not -inf: a row with no key at all must not become NaN.
            bias = mx.where(mask, bias, mx.finfo(x.dtype).min)
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nn.Module):
    """Text encoder; computes in the dtype of its weights.

    In evaluation (`eval()`, which the pipeline calls) MLX works ahead by one block: that keeps memory small and
    forbids `mx.grad` and `mx.compile` around a call.
    """

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = [EncoderBlock(config) for _ in range(config.num_layers)]
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)

    def __call__(self, ids: mx.array, mask: mx.array | None = None) -> mx.array:
        """
        Args:
            ids: (B, L) token ids.
            mask: (B, L), non-zero where a token is text and not padding; None if all are.

        Returns:
            (B, L, dim). Rows of padding are computed but mean nothing.
        """
        keys = None if mask is None else (mask != 0)[:, None, None, :]
        buckets = mx.array(relative_buckets(ids.shape[1], self.config.num_buckets))
        x, pace = self.token_embedding(ids), None if self.training else Pace()
        for block in self.blocks:
            x = block(x, buckets, keys)
            if pace is not None:
                x = pace(x)
        return self.norm(x)

    def init_weights(self) -> None:
        """The official initialisation, which keeps unscaled attention scores near unit variance."""
        c = self.config

        def normal(array: mx.array, std: float) -> mx.array:
            return std * mx.random.normal(array.shape)

        self.token_embedding.weight = normal(self.token_embedding.weight, 1.0)
        for block in self.blocks:
            attn, ffn = block.attn, block.ffn
            attn.q.weight = normal(attn.q.weight, (c.dim * c.dim_attn) ** -0.5)
            attn.k.weight = normal(attn.k.weight, c.dim**-0.5)
            attn.v.weight = normal(attn.v.weight, c.dim**-0.5)
            attn.o.weight = normal(attn.o.weight, c.dim_attn**-0.5)
            ffn.gate[0].weight = normal(ffn.gate[0].weight, c.dim**-0.5)
            ffn.fc1.weight = normal(ffn.fc1.weight, c.dim**-0.5)
            ffn.fc2.weight = normal(ffn.fc2.weight, c.dim_ffn**-0.5)
            table = block.pos_embedding.embedding
            table.weight = normal(table.weight, (2 * c.num_buckets * c.num_heads) ** -0.5)
