"""Small pieces that more than one model is made of."""

import mlx.core as mx
import mlx.nn as nn


def run_layers(layers: list[nn.Module], x: mx.array) -> mx.array:
    """Applies `layers` in turn.

    The official checkpoints number the members of a torch Sequential, parameterless ones included. A plain
    list of modules gives MLX parameters the same names ("ffn.2.weight"), which `nn.Sequential` does not.
    """
    for layer in layers:
        x = layer(x)
    return x


def attend(
    q: mx.array, k: mx.array, v: mx.array, num_heads: int, scale: float, mask: mx.array | None = None
) -> mx.array:
    """Multi-head attention over projections whose heads lie side by side.

    Args:
        q: (B, Lq, num_heads * head_dim)
        k, v: (B, Lk, num_heads * head_dim)
        mask: additive, broadcastable to (B, num_heads, Lq, Lk), in q's dtype.

    Returns:
        (B, Lq, num_heads * head_dim) in q's dtype.
    """
    batch, length, width = q.shape
    q, k, v = (a.reshape(batch, a.shape[1], num_heads, -1).transpose(0, 2, 1, 3) for a in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(batch, length, width)
