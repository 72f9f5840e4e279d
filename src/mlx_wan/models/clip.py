"""The image encoder of Wan2.1's I2V models: the visual half of CLIP XLM-RoBERTa ViT-H/14.

Follows `wan/modules/clip.py` of the official Wan2.1 repository, whose parameter names it keeps without their "visual.".
The transformer wants the tokens before the last block, so that block, the norm after it and the projection are there
to be loaded and never computed.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .layers import attend, run_layers

# What the pixels of each colour, from 0 to 1, are normalised with.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Dimensions; the defaults are the released encoder's. image_size, patch_size: sides of squares of pixels.
    out_dim: of the projection, 0 where there is none."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    ffn_dim: int = 5120
    out_dim: int = 1024
    num_heads: int = 16
    num_layers: int = 32
    eps: float = 1e-5

    @property
    def num_tokens(self) -> int:
        """Of one picture: its patches and one for the whole."""
        return (self.image_size // self.patch_size) ** 2 + 1


class SelfAttention(nn.Module):
    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.num_heads, self.scale = config.num_heads, (config.dim // config.num_heads) ** -0.5
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = mx.split(self.to_qkv(x), 3, axis=-1)
        return self.proj(attend(q, k, v, self.num_heads, self.scale))


class Block(nn.Module):
    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps)
        self.attn = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.mlp = [nn.Linear(config.dim, config.ffn_dim), nn.GELU(), nn.Linear(config.ffn_dim, config.dim)]

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attn(self.norm1(x))
        return x + run_layers(self.mlp, self.norm2(x))


class ImageEncoder(nn.Module):
    """Pictures to tokens."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size, bias=False)
        self.cls_embedding = mx.random.normal((1, 1, config.dim)) / config.dim**0.5
        self.pos_embedding = mx.random.normal((1, config.num_tokens, config.dim)) / config.dim**0.5
        self.pre_norm = nn.LayerNorm(config.dim, config.eps)
        self.transformer: list[nn.Module] = [Block(config) for _ in range(config.num_layers)]
        self.post_norm = nn.LayerNorm(config.dim, config.eps)
        if config.out_dim:
            self.head = mx.random.normal((config.dim, config.out_dim)) / config.dim**0.5

    def __call__(self, pictures: mx.array) -> mx.array:
        """(B, image_size, image_size, 3) in [-1, 1] -> (B, num_tokens, dim), in the dtype of the weights.

        Raises ValueError for pictures of another size.
        """
        size = self.config.image_size
        if pictures.shape[1:] != (size, size, 3):
            raise ValueError(f"pictures {pictures.shape} must be (B, {size}, {size}, 3)")
        pixels = (pictures * 0.5 + 0.5 - mx.array(MEAN)) / mx.array(STD)
        x = self.patch_embedding(pixels.astype(self.patch_embedding.weight.dtype))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = mx.concatenate([mx.broadcast_to(self.cls_embedding, (x.shape[0], 1, x.shape[-1])), x], axis=1)
        return run_layers(self.transformer[:-1], self.pre_norm(x + self.pos_embedding))
