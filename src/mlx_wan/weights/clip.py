"""Files of CLIP: the half that sees, from the official file, or from one that transformers or ComfyUI wrote."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_wan.errors import CheckpointError
from mlx_wan.weights.layouts import official_names
from mlx_wan.weights.tensors import TensorInfo

QKV = ("q", "k", "v")
TEXT_HALF = ("textual.", "log_scale")  # what the official file has besides "visual."
# 0, 1, 2, ...: older files of transformers have them.
POSITION_IDS = ("vision_model.embeddings.position_ids", "embeddings.position_ids")


def image_half(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The image encoder's tensors in a file, by official name and of official shape; no text encoder's.

    Raises:
        CheckpointError: the file has something besides CLIP's two halves, or lacks a part of a matrix.
    """
    own = {name: info for name, info in tensors.items() if name.startswith("visual.")}
    rest = [name for name in tensors if not name.startswith(("visual.", *TEXT_HALF))]
    if own and rest:
        raise CheckpointError(f"{path}: does not fit the image encoder: unexpected {rest[0]}")
    if own and "visual.head" not in own:
        raise CheckpointError(f"{path}: does not fit the image encoder: 1 missing (visual.head)")
    found = {name: info for name, info in (own or tensors).items() if name not in POSITION_IDS}
    try:
        named = {official: found[name] for name, official in official_names(found).items()}
        return _joined(named) if "transformer.0.attn.to_qkv.q.weight" in named else named
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _joined(named: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """From transformers' shapes to the official ones."""
    tensors: dict[str, TensorInfo] = {}
    for name, info in named.items():
        start, found, rest = name.partition(".to_qkv.")
        part, _, kind = rest.partition(".")
        if found:
            thirds = [named.get(f"{start}{found}{which}.{kind}") for which in QKV]
            if None in thirds:
                lacking = QKV[thirds.index(None)]
                raise CheckpointError(f"does not fit the image encoder: {start} lacks the {kind} of {lacking}")
            if part == "q":
                tensors[f"{start}.to_qkv.{kind}"] = _stacked(f"{start}.to_qkv.{kind}", [t for t in thirds if t])
        elif name == "cls_embedding" and len(info.shape) == 1:
            tensors[name] = _reshaped(info, (1, 1, *info.shape))
        elif name == "pos_embedding" and len(info.shape) == 2:
            tensors[name] = _reshaped(info, (1, *info.shape))
        elif name == "head" and len(info.shape) == 2:
            tensors[name] = replace(info, shape=info.shape[::-1], load=lambda info=info: mx.contiguous(info.load().T))
        else:
            tensors[name] = info
    return tensors


def _stacked(name: str, parts: list[TensorInfo]) -> TensorInfo:
    """Rows below one another."""
    first = parts[0]
    if any((part.shape[1:], part.dtype) != (first.shape[1:], first.dtype) or not part.shape for part in parts):
        raise CheckpointError(f"does not fit the image encoder: the parts of {name} are not alike")
    return replace(
        first,
        name=name,
        shape=(sum(part.shape[0] for part in parts), *first.shape[1:]),
        nbytes=sum(part.nbytes for part in parts),
        load=lambda: mx.concatenate([part.load() for part in parts]),
    )


def _reshaped(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    return replace(info, shape=shape, load=lambda: info.load().reshape(shape))


def separated(tensors: list[TensorInfo]) -> list[TensorInfo]:
    """Official tensors as transformers' CLIPVisionModel has them but for their names: what `image_half` joins."""
    found: list[TensorInfo] = []
    for info in tensors:
        start, qkv, kind = info.name.partition(".to_qkv.")
        if qkv:
            found += [_third(info, f"{start}{qkv}{which}.{kind}", place) for place, which in enumerate(QKV)]
        elif info.name in ("cls_embedding", "pos_embedding"):
            found.append(_reshaped(info, info.shape[2:] if info.name == "cls_embedding" else info.shape[1:]))
        elif info.name == "head":
            found.append(replace(info, shape=info.shape[::-1], load=lambda info=info: mx.contiguous(info.load().T)))
        else:
            found.append(info)
    return found


def _third(info: TensorInfo, name: str, place: int) -> TensorInfo:
    rows = info.shape[0] // 3
    return replace(
        info,
        name=name,
        shape=(rows, *info.shape[1:]),
        nbytes=info.nbytes // 3,
        load=lambda: info.rows(place * rows, (place + 1) * rows),
    )
