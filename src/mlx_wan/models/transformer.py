"""The Wan diffusion transformer: noisy latents, a timestep and a text embedding in, a velocity out.

Follows `wan/modules/model.py` of the official repositories of Wan2.2 and, for the image tokens of its I2V models,
Wan2.1. Parameter names are the official ones; tensors are
channels last. Precision as there: the residual stream, norms, time embedding, modulation and output head are
float32, attention and feed-forward matmuls run in `dtype`.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.utils import checkpoint

from . import fused
from .layers import GELU, Pace, SiLU, attend, by_rows, run_layers
from .share import ALL, Share, everything

# Parameters that stay float32 whatever the compute dtype: fragments of their names.
FLOAT32_PARAMETERS = ("time_embedding.", "time_projection.", "modulation", "head.head.", "norm", "img_emb.")

ROPE_THETA = 10000.0


@dataclass(frozen=True)
class TransformerConfig:
    """Dimensions, under the names of the official config.json.

    And two that the official code derives: image_dim, the width of image embeddings that cross-attention takes beside
    the text (Wan2.1 I2V), and image_positions, for how many of them there is a position embedding (FLF2V); 0 for none.
    Of VACE, vace_layers are the blocks that take a hint of its control branch, and vace_in_dim its channels.
    """

    in_dim: int = 48
    out_dim: int = 48
    dim: int = 3072
    ffn_dim: int = 14336
    num_heads: int = 24
    num_layers: int = 30
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    model_type: str = "ti2v"
    image_dim: int = 0
    image_positions: int = 0
    vace_layers: tuple[int, ...] = ()
    vace_in_dim: int = 0


def timestep_embedding(timesteps: mx.array, dim: int) -> mx.array:
    """Sinusoidal features of `timesteps` (in 0..1000), shape (..., dim), float32: cosines, then sines.

    The reference computes the angles in float64, which GPUs lack. Here the frequency, in turns, is split into a
    12-bit head, whose product with the timestep's whole part is exact in float32, and a small tail; dropping the
    whole turns of that product first keeps the angle good to a few 1e-7.
    """
    half = dim // 2
    turns_per_step = ROPE_THETA ** -(np.arange(half, dtype=np.float64) / half) / (2 * np.pi)
    head = (turns_per_step.astype(np.float32).view(np.uint32) & 0xFFFFF000).view(np.float32)
    tail = (turns_per_step - head).astype(np.float32)
    t = timesteps.astype(mx.float32)[..., None]
    whole = mx.floor(t)
    turns = whole * mx.array(head)
    turns = turns - mx.round(turns) + (t - whole) * mx.array(head)
    angle = 2 * math.pi * (turns + t * mx.array(tail))
    return mx.concatenate([mx.cos(angle), mx.sin(angle)], axis=-1)


@lru_cache(maxsize=2)
def rope_table(grid: tuple[int, int, int], head_dim: int) -> tuple[mx.array, mx.array]:
    """Cosines and sines, each (t*h*w, 1, head_dim / 2), of the rotary embedding of a (t, h, w) grid of tokens.

    Computed in float64, kept in float32, and here: a run asks for the same table at every call.
    """
    # Each half-dimension of a head turns with one coordinate: time takes what height and width, a third each, leave.
    third = 2 * (head_dim // 6)
    angles = []
    for axis, (size, width) in enumerate(zip(grid, (head_dim - 2 * third, third, third), strict=True)):
        frequency = ROPE_THETA ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        shape = [1, 1, 1, width // 2]
        shape[axis] = size
        angles.append(np.broadcast_to(np.outer(np.arange(size), frequency).reshape(shape), (*grid, width // 2)))
    angle = np.concatenate(angles, axis=-1).reshape(-1, 1, head_dim // 2)
    return mx.array(np.cos(angle).astype(np.float32)), mx.array(np.sin(angle).astype(np.float32))


class Attention(nn.Module):
    """Self- or cross-attention with RMS-normalised queries and keys.

    Attributes:
        in_pieces: for training: see `attend`.
    """

    def __init__(self, config: TransformerConfig, dtype: mx.Dtype):
        super().__init__()
        dim = config.dim
        self.dtype, self.num_heads, self.in_pieces = dtype, config.num_heads, False
        self.scale = (dim // config.num_heads) ** -0.5
        self.flop = 2 * dim**2  # of a token in one of the matrices
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, config.eps) if config.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(dim, config.eps) if config.qk_norm else nn.Identity()

    def __call__(
        self,
        x: mx.array,
        context: "mx.array | Text",
        rope: tuple[mx.array, mx.array] | None = None,
        share: Share = ALL,
        pace: Pace | None = None,
    ) -> mx.array:
        # x: (B, L, C), context: (B, Lk, C), both in self.dtype; share: of whose tokens `context` is one
        q = self.normed(self.norm_q, by_rows(self.q, x, self.flop), rope)
        k, v = share.gather(*self.keys_and_values(context, rope))
        if pace is not None:
            q = pace.within(q, k, v)
        y = attend(q, k, v, self.num_heads, self.scale, in_pieces=self.in_pieces)
        return by_rows(self.o, y, self.flop)

    def keys_and_values(
        self, context: "mx.array | Text", rope: tuple[mx.array, mx.array] | None = None
    ) -> tuple[mx.array, mx.array]:
        """Of tokens (B, Lk, C); of a text that is kept, made once."""
        if isinstance(context, Text):
            return context.keys_and_values(self)
        return self.normed(self.norm_k, by_rows(self.k, context, self.flop), rope), by_rows(self.v, context, self.flop)

    def normed(
        self, norm: nn.RMSNorm | nn.Identity, x: mx.array, rope: tuple[mx.array, mx.array] | None = None
    ) -> mx.array:
        """Queries or keys (B, L, C), normalised if the model does that, and turned, in self.dtype."""
        if isinstance(norm, nn.RMSNorm):
            return fused.rms_norm(x, norm.weight, norm.eps, self.dtype, self.num_heads, rope)
        x = x.astype(mx.float32)
        return (x if rope is None else fused.rotate(x, *rope, self.num_heads)).astype(self.dtype)


class Text:
    """A text as a transformer reads it, for several calls: each block's keys and values are made in the first.

    They hold for the weights they were made with: `WanTransformer.read` again when those change.
    """

    def __init__(self, tokens: mx.array):
        self.tokens = tokens  # (B, n, C), in the transformer's dtype
        self._made: dict[int, tuple[mx.array, mx.array]] = {}

    def keys_and_values(self, attention: Attention) -> tuple[mx.array, mx.array]:
        """Those of one block, (B, n, C) each."""
        if id(attention) not in self._made:
            self._made[id(attention)] = attention.keys_and_values(self.tokens)
        return self._made[id(attention)]


class ImageCrossAttention(Attention):
    """Cross-attention to text and, with keys and values of their own, to image tokens."""

    def __init__(self, config: TransformerConfig, dtype: mx.Dtype):
        super().__init__(config, dtype)
        self.k_img = nn.Linear(config.dim, config.dim)
        self.v_img = nn.Linear(config.dim, config.dim)
        self.norm_k_img = nn.RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()

    def attend_image(self, x: mx.array, context: mx.array | Text, image: mx.array) -> mx.array:
        """x: (B, L, C), context: (B, n, C), image: (B, m, C), all in self.dtype."""
        q, (k, v) = self.normed(self.norm_q, by_rows(self.q, x, self.flop)), self.keys_and_values(context)
        k_img = self.normed(self.norm_k_img, self.k_img(image))
        text = attend(q, k, v, self.num_heads, self.scale, in_pieces=self.in_pieces)
        image = attend(q, k_img, self.v_img(image), self.num_heads, self.scale, in_pieces=self.in_pieces)
        return by_rows(self.o, text + image, self.flop)


class ImageEmbedding(nn.Module):
    """Image embeddings (B, m, image_dim) to tokens (B, m, dim), in float32."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width = config.image_dim
        self.proj = [
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, config.dim),
            nn.LayerNorm(config.dim),
        ]
        if config.image_positions:
            self.emb_pos = mx.zeros((1, config.image_positions, width))

    def __call__(self, image: mx.array) -> mx.array:
        image = image.astype(mx.float32)
        return run_layers(self.proj, image + self.emb_pos if "emb_pos" in self else image)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the timestep modulates the first and the last."""

    def __init__(self, config: TransformerConfig, dtype: mx.Dtype):
        super().__init__()
        self.dtype, self.eps = dtype, config.eps
        self.flop = 2 * config.dim * config.ffn_dim  # of a token in one of ffn's matrices
        self.between = config.ffn_dim * dtype.size  # bytes of it between the two
        self.modulation = mx.random.normal((1, 6, config.dim)) / config.dim**0.5
        self.self_attn = Attention(config, dtype)
        self.norm3 = nn.LayerNorm(config.dim, config.eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = ImageCrossAttention(config, dtype) if config.image_dim else Attention(config, dtype)
        self.ffn = [
            nn.Linear(config.dim, config.ffn_dim),
            fused.GELU(),
            nn.Linear(config.ffn_dim, config.dim),
        ]

    def __call__(
        self,
        x: mx.array,
        context: mx.array | Text,
        time: mx.array,
        rope: tuple[mx.array, mx.array],
        image: mx.array | None = None,
        share: Share = ALL,
        pace: Pace | None = None,
    ) -> mx.array:
        # x: (B, L, C) float32, of L tokens in the share; context: (B, n, C), image: (B, m, C) dtype;
        # time: (B, G, 6, C) float32
        shift1, scale1, gate1, shift2, scale2, gate2 = ((self.modulation[:, None] + time)[:, :, i] for i in range(6))
        y = fused.norm(x, 1 + scale1, shift1, self.eps, self.dtype)
        y = self.self_attn(y, y, rope, share, pace if share is ALL else None)  # exchanges have an order of their own
        if isinstance(self.norm3, nn.LayerNorm):
            weights = self.norm3.weight[None, None], self.norm3.bias[None, None]
            x, y = fused.add_norm(x, y, gate1, *weights, self.eps, self.dtype)
        else:
            x = fused.add(x, y, gate1)
            y = x.astype(self.dtype)
        if pace is not None:
            y = pace(y)
        if image is not None and isinstance(self.cross_attn, ImageCrossAttention):
            y = self.cross_attn.attend_image(y, context, image)
        else:
            y = self.cross_attn(y, context)
        x, y = fused.add_norm(x, y, None, 1 + scale2, shift2, self.eps, self.dtype)
        if pace is not None:
            y = pace.within(y, x)
        between = 0 if pace is None else self.between  # training keeps all rows anyway
        x = fused.add(x, by_rows(partial(self.feed_forward, pace), y, self.flop, between), gate2)
        if pace is not None:
            x = pace(x)
        return x

    def feed_forward(self, pace: Pace | None, y: mx.array) -> mx.array:
        """(B, n, C) of both matrices and what is between them."""
        *inner, outer = self.ffn
        y = run_layers(inner, y)
        return outer(y if pace is None else pace.within(y))


class VaceBlock(Block):
    """A block of VACE's control branch, whose tokens go from one to the next; each hints at what it saw.

    first: whether it is the one in which the branch takes in the video's tokens.
    """

    def __init__(self, config: TransformerConfig, dtype: mx.Dtype, first: bool):
        super().__init__(config, dtype)
        if first:
            self.before_proj = nn.Linear(config.dim, config.dim)
        self.after_proj = nn.Linear(config.dim, config.dim)

    def begin(self, control: mx.array, x: mx.array) -> mx.array:
        """The branch's first tokens (B, L, C), float32, from those of the control and of the video."""
        return x + by_rows(self.before_proj, control.astype(self.dtype), self.flop).astype(mx.float32)

    def hint(self, control: mx.array) -> mx.array:
        """(B, L, C), float32, for the main branch."""
        return by_rows(self.after_proj, control.astype(self.dtype), self.flop).astype(mx.float32)


class Control(NamedTuple):
    """What VACE is told: channels (B, t, h, w, vace_in_dim), and how much its hints count; 1 is as trained."""

    channels: mx.array
    scale: float = 1.0


class Head(nn.Module):
    """The last norm and projection, modulated by the time embedding, in float32."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = mx.random.normal((1, 2, config.dim)) / config.dim**0.5
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)

    def __call__(self, x: mx.array, time: mx.array) -> mx.array:
        # x: (B, L, C); time: (B, G, C)
        shift, scale = self.modulation[:, :1] + time, self.modulation[:, 1:] + time
        return self.head(fused.norm(x, 1 + scale, shift, self.eps, mx.float32))


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, done as one matmul over patches."""

    def __init__(self, config: TransformerConfig, dtype: mx.Dtype, in_dim: int):
        super().__init__()
        self.dtype = dtype
        self.weight = mx.random.normal((config.dim, *config.patch_size, in_dim)) * 0.02
        self.bias = mx.zeros((config.dim,))

    def __call__(self, patches: mx.array) -> mx.array:
        # patches: (B, L, pt * ph * pw * C)
        weight = self.weight.reshape(self.weight.shape[0], -1)
        return patches.astype(self.dtype) @ weight.T + self.bias


def patchify(latents: mx.array, patch: tuple[int, int, int]) -> mx.array:
    """(B, t, h, w, C) -> (B, tokens, pt * ph * pw * C), tokens in (t, h, w) order."""
    b, t, h, w, c = latents.shape
    pt, ph, pw = patch
    x = latents.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, pt * ph * pw * c)


def unpatchify(x: mx.array, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> mx.array:
    """The way back from `patchify`: (B, tokens, pt * ph * pw * C) -> (B, t, h, w, C)."""
    (t, h, w), (pt, ph, pw) = grid, patch
    x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], t * pt, h * ph, w * pw, -1)


class WanTransformer(nn.Module):
    """Predicts the velocity ε − x0 of flow matching from noisy latents.

    After `eval()`, which the pipeline calls, MLX works ahead by half a block and no more, a fifth if arrays are large:
    then few of them are in memory at a time. `mx.grad` and `mx.compile` want a model in training, as it is made.

    Args:
        config: dimensions.
        dtype: what attention and feed-forward matmuls compute in; their weights should have it too.

    Attributes:
        share_of: which tokens of a grid are computed here; several processes share a call by replacing it.
        checkpointing: for training: a block keeps only its input, and is computed again when its gradient is.
            `save_memory` sets it.
    """

    def __init__(self, config: TransformerConfig, dtype: mx.Dtype = mx.float32):
        super().__init__()
        self.config, self.dtype, self.checkpointing = config, dtype, False
        self.share_of = everything
        self.patch_embedding = PatchEmbedding(config, dtype, config.in_dim)
        self.text_embedding = [
            nn.Linear(config.text_dim, config.dim),
            GELU(),
            nn.Linear(config.dim, config.dim),
        ]
        self.time_embedding = [nn.Linear(config.freq_dim, config.dim), SiLU(), nn.Linear(config.dim, config.dim)]
        self.time_projection = [SiLU(), nn.Linear(config.dim, 6 * config.dim)]
        self.blocks = [Block(config, dtype) for _ in range(config.num_layers)]
        self.head = Head(config)
        if config.image_dim:
            self.img_emb = ImageEmbedding(config)
        if config.vace_layers:
            self.vace_patch_embedding = PatchEmbedding(config, dtype, config.vace_in_dim)
            self.vace_blocks = [VaceBlock(config, dtype, first=layer == 0) for layer in config.vace_layers]

    def __call__(
        self,
        latents: mx.array,
        timesteps: mx.array,
        context: mx.array | Text,
        image: mx.array | None = None,
        control: Control | None = None,
    ) -> mx.array:
        """
        Args:
            latents: (B, t, h, w, in_dim); h and w divisible by the patch.
            timesteps: 0 (clean) to 1000 (noise): (B,), (B, t) one a latent frame, or (B, tokens).
            context: (B, n, text_dim) text embeddings; the reference pads n with zeros to `text_len`. Or what `read`
                made of them.
            image: (B, m, image_dim) image embeddings, for models that take them and only those.
            control: for VACE, and only for it; (t, h, w) as the latents.

        Returns:
            velocity (B, t, h, w, out_dim), float32.

        Raises ValueError for shapes that do not fit.
        """
        config = self.config
        grid = self.token_grid(latents.shape)
        given = context.tokens if isinstance(context, Text) else context
        width = config.dim if isinstance(context, Text) else config.text_dim
        if given.ndim != 3 or (given.shape[0], given.shape[2]) != (latents.shape[0], width):
            raise ValueError(f"context {given.shape} must be ({latents.shape[0]}, tokens, {width})")
        if (image is None) != (config.image_dim == 0):
            raise ValueError(f"image embeddings {'are needed' if image is None else 'have no place in this model'}")
        if image is not None:
            image = self.img_emb(image).astype(self.dtype)
        if (control is None) == bool(config.vace_layers):
            raise ValueError(f"a control {'is needed' if control is None else 'has no place in this model'}")
        share = self.share_of(grid)
        x = self.patch_embedding(share.take(patchify(latents, config.patch_size))).astype(mx.float32)
        time, modulation = self.embed_time(timesteps, grid)
        if time.shape[1] == math.prod(grid):
            time, modulation = share.take(time), share.take(modulation)
        if not isinstance(context, Text):
            context = self.embed_text(context)
        cos, sin = (share.take(table[None])[0] for table in rope_table(grid, config.dim // config.num_heads))
        pace = None if self.training else Pace()
        branch = x
        if control is not None:
            tokens = self.vace_patch_embedding(share.take(patchify(control.channels, config.patch_size)))
            branch = self.vace_blocks[0].begin(tokens, x)
        for layer, block in enumerate(self.blocks):
            hint = None
            if control is not None and layer in config.vace_layers:  # only now: all hints together would be large
                other = self.vace_blocks[config.vace_layers.index(layer)]
                branch = other(branch, context, modulation, (cos, sin), None, share, pace)
                hint = control.scale * other.hint(branch)
            run = checkpoint(block) if self.checkpointing else block
            x = run(x, context, modulation, (cos, sin), image, share, pace)
            x = x if hint is None else x + hint
        return unpatchify(share.join(self.head(x, time)), grid, config.patch_size)

    def save_memory(self, on: bool) -> None:
        """For training: every block, and within it the scores of attention, is computed again instead of kept."""
        self.checkpointing = on
        for block in self.blocks:
            block.self_attn.in_pieces = block.cross_attn.in_pieces = on

    def token_grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens along time, height and width for latents of `shape` (B, t, h, w, C)."""
        sizes, patch = tuple(shape[1:4]), self.config.patch_size
        fits = len(shape) == 5 and shape[4] == self.config.in_dim
        if not fits or any(size % p for size, p in zip(sizes, patch, strict=True)):
            raise ValueError(f"latents {tuple(shape)} do not fit patches of {patch} and {self.config.in_dim} channels")
        return sizes[0] // patch[0], sizes[1] // patch[1], sizes[2] // patch[2]

    def read(self, context: mx.array) -> Text:
        """Text embeddings (B, n, text_dim), for calls that will be many: what depends on them alone is made once."""
        return Text(self.embed_text(context))

    def embed_text(self, context: mx.array) -> mx.array:
        """(B, n, text_dim) -> (B, n, dim), in self.dtype."""
        return run_layers(self.text_embedding, context.astype(self.dtype))

    def embed_time(self, timesteps: mx.array, grid: tuple[int, int, int]) -> tuple[mx.array, mx.array]:
        """Time embedding (B, G, C) and modulation (B, G, 6, C), float32; G as in `modulate`."""
        if timesteps.ndim == 1:
            timesteps = timesteps[:, None]
        if timesteps.ndim != 2 or timesteps.shape[1] not in (1, grid[0], math.prod(grid)):
            raise ValueError(
                f"timesteps {timesteps.shape} must hold one value a sample, a latent frame ({grid[0]}) "
                f"or a token ({math.prod(grid)})"
            )
        time = run_layers(self.time_embedding, timestep_embedding(timesteps, self.config.freq_dim))
        modulation = run_layers(self.time_projection, time)
        return time, modulation.reshape(*time.shape[:2], 6, self.config.dim)

    def init_weights(self) -> None:
        """The official initialisation: Xavier-uniform matrices, small embeddings, a zero output layer."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                out_dim, in_dim = module.weight.shape
                if name.startswith(("text_embedding", "time_embedding")):
                    module.weight = 0.02 * mx.random.normal((out_dim, in_dim))
                else:
                    bound = math.sqrt(6 / (in_dim + out_dim))
                    module.weight = mx.random.uniform(-bound, bound, (out_dim, in_dim))
                module.bias = mx.zeros((out_dim,))
        patch = self.patch_embedding.weight
        bound = math.sqrt(6 / (patch.shape[0] + patch.size // patch.shape[0]))
        self.patch_embedding.weight = mx.random.uniform(-bound, bound, patch.shape)
        self.head.head.weight = mx.zeros_like(self.head.head.weight)
