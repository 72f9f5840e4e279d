"""Dimensions of a model, read off the shapes of its tensors under their official names.

The official VAE and T5 files carry no configuration, and the transformer's config.json leaves fields out; the shapes
tell all but the number of attention heads of the transformer.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from mlx_wan.errors import CheckpointError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
PATCH_SIZE = (1, 2, 2)  # of every Wan transformer; the official config.json does not say it


def transformer_fields(shapes: Shapes, patch_size: Shape = PATCH_SIZE) -> dict[str, Any]:
    """The fields of a TransformerConfig that shapes determine, from a transformer in either convolution order.

    Raises:
        CheckpointError: a tensor is missing or cannot be a transformer's.
    """
    dim, in_dim = _patch_embedding(shapes, "patch_embedding.weight", patch_size)
    vace_in_dim = 0
    if _any(shapes, "vace_blocks."):
        _, vace_in_dim = _patch_embedding(shapes, "vace_patch_embedding.weight", patch_size)
    text_dim = _shape(shapes, "text_embedding.0.weight", 2)[1]
    return {
        "patch_size": patch_size,
        "in_dim": in_dim,
        "dim": dim,
        "ffn_dim": _shape(shapes, "blocks.0.ffn.0.weight", 2)[0],
        "freq_dim": _shape(shapes, "time_embedding.0.weight", 2)[1],
        "text_dim": text_dim,
        "out_dim": _quotient(shapes, "head.head.weight", math.prod(patch_size)),
        "num_layers": count(shapes, "blocks."),
        "qk_norm": "blocks.0.self_attn.norm_q.weight" in shapes,
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
        "image_dim": _shape(shapes, "img_emb.proj.1.weight", 2)[1] if _any(shapes, "img_emb.") else 0,
        "image_positions": _shape(shapes, "img_emb.emb_pos", 3)[1] if "img_emb.emb_pos" in shapes else 0,
        "vace_in_dim": vace_in_dim,
    }


def _patch_embedding(shapes: Shapes, name: str, patch_size: Shape) -> tuple[int, int]:
    """(dim, channels) of a patch embedding in either convolution order, or flat."""
    flat = len(shapes.get(name, ())) == 2
    patch = _shape(shapes, name, 2 if flat else 5)
    if flat and patch[1] % math.prod(patch_size) == 0:
        return patch[0], patch[1] // math.prod(patch_size)
    if patch[2:] == patch_size:
        return patch[0], patch[1]
    if patch[1:4] == patch_size:
        return patch[0], patch[4]
    raise CheckpointError(f"{name} {patch} does not fit the patch size {patch_size}")


def image_encoder_fields(shapes: Shapes) -> dict[str, Any]:
    """The fields of an ImageEncoderConfig but for its heads. Raises CheckpointError as `transformer_fields`."""
    patch = _shape(shapes, "patch_embedding.weight", 4)
    patch_size = patch[2]  # (O, I, p, p) or (O, p, p, I)
    positions = shapes.get("pos_embedding", ())
    patches = _shape(shapes, "pos_embedding", 2 if len(positions) == 2 else 3)[-2] - 1  # 2: as transformers has it
    return {
        "image_size": math.isqrt(patches) * patch_size,
        "patch_size": patch_size,
        "dim": patch[0],
        "ffn_dim": _shape(shapes, "transformer.0.mlp.0.weight", 2)[0],
        "out_dim": _shape(shapes, "head", 2)[1] if "head" in shapes else 0,
        "num_layers": count(shapes, "transformer."),
    }


def text_encoder_fields(shapes: Shapes) -> dict[str, Any]:
    """The fields of a TextEncoderConfig. Raises CheckpointError as `transformer_fields`."""
    vocab_size, dim = _shape(shapes, "token_embedding.weight", 2)
    num_buckets, num_heads = _shape(shapes, "blocks.0.pos_embedding.embedding.weight", 2)
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "dim_attn": _shape(shapes, "blocks.0.attn.q.weight", 2)[0],
        "dim_ffn": _shape(shapes, "blocks.0.ffn.fc1.weight", 2)[0],
        "num_heads": num_heads,
        "num_layers": count(shapes, "blocks."),
        "num_buckets": num_buckets,
    }


def vae_fields(shapes: Shapes) -> dict[str, Any]:
    """The fields of a VAEConfig, or of a VAE21Config, but for its statistics. Raises as `transformer_fields`."""
    return _vae22_fields(shapes) if vae_family(shapes) == "Wan2.2" else _vae21_fields(shapes)


def vae_family(shapes: Shapes) -> str:
    """ "Wan2.2", whose stages are lists within a list, or "Wan2.1", where they are one flat list."""
    return "Wan2.2" if _any(shapes, "encoder.downsamples.0.downsamples.") else "Wan2.1"


def _vae22_fields(shapes: Shapes) -> dict[str, Any]:
    (dim,) = _shape(shapes, "encoder.conv1.bias", 1)
    stages = count(shapes, "encoder.downsamples.")
    last = f"encoder.downsamples.{stages - 1}.downsamples."
    num_res_blocks = count(shapes, last)  # the last stage has no resampling after its residual blocks
    mult = tuple(
        _quotient(shapes, f"encoder.downsamples.{i}.downsamples.0.residual.2.bias", dim) for i in range(stages)
    )
    return {
        "dim": dim,
        "patch_size": math.isqrt(_quotient(shapes, "decoder.head.2.bias", 3)),  # RGB times patch squared
        "dec_dim": _quotient(shapes, "decoder.conv1.bias", mult[-1]),
        "z_dim": _quotient(shapes, "conv1.bias", 2),
        "dim_mult": mult,
        "num_res_blocks": num_res_blocks,
        "temporal_downsample": tuple(
            f"encoder.downsamples.{i}.downsamples.{num_res_blocks}.time_conv.weight" in shapes
            for i in range(stages - 1)
        ),
    }


def _vae21_fields(shapes: Shapes) -> dict[str, Any]:
    (dim,) = _shape(shapes, "encoder.conv1.bias", 1)
    layers = count(shapes, "encoder.downsamples.")
    # A stage ends with the layer that resamples; the last has none.
    ends = [i for i in range(layers) if f"encoder.downsamples.{i}.resample.1.weight" in shapes]
    starts = [0, *(i + 1 for i in ends)]
    return {
        "dim": dim,
        "z_dim": _quotient(shapes, "conv1.bias", 2),
        "dim_mult": tuple(_quotient(shapes, f"encoder.downsamples.{i}.residual.2.bias", dim) for i in starts),
        "num_res_blocks": layers - starts[-1],
        "temporal_downsample": tuple(f"encoder.downsamples.{i}.time_conv.weight" in shapes for i in ends),
    }


FIELDS = {
    "transformer": transformer_fields,
    "text_encoder": text_encoder_fields,
    "image_encoder": image_encoder_fields,
    "vae": vae_fields,
}


def count(shapes: Shapes, prefix: str) -> int:
    """How many numbered parts follow `prefix` in the names; they must be 0, 1, 2, ...

    Raises:
        CheckpointError: there are none, or gaps.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    if not numbers or numbers != set(range(len(numbers))):
        gap = min(set(range(len(numbers) + 1)) - numbers)
        raise CheckpointError(f"missing tensors {prefix}{gap}.*")
    return len(numbers)


def _any(shapes: Shapes, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in shapes)


def _shape(shapes: Shapes, name: str, ndim: int) -> Shape:
    if name not in shapes:
        raise CheckpointError(f"missing tensor {name}")
    shape = shapes[name]
    if len(shape) != ndim or 0 in shape:
        raise CheckpointError(f"{name} has the shape {shape}, which has to have {ndim} dimensions")
    return shape


def _quotient(shapes: Shapes, name: str, divisor: int) -> int:
    """The length of the first dimension of `name`, which `divisor` divides."""
    if name not in shapes:
        raise CheckpointError(f"missing tensor {name}")
    length = shapes[name][0] if shapes[name] else 0
    if length == 0 or length % divisor:
        raise CheckpointError(f"{name} has the shape {shapes[name]}; its first dimension must be n × {divisor}")
    return length // divisor
