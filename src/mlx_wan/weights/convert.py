"""From any layout to the native one, or one of others, without torch, one tensor in memory at a time."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_wan.errors import UserError
from mlx_wan.weights.checkpoint import Checkpoint
from mlx_wan.weights.export import WRITERS
from mlx_wan.weights.fit import component_tensors
from mlx_wan.weights.locate import locate
from mlx_wan.weights.quantize import Quantization, quantize_tensors
from mlx_wan.weights.save import MAX_SHARD_BYTES, native_config, remove_tensors, write_native
from mlx_wan.weights.tensors import TensorInfo

Parts = Mapping[str, list[TensorInfo]]
Change = Callable[[Checkpoint, str, list[TensorInfo]], list[TensorInfo]]


def convert(
    src: str | Path,
    dst: str | Path,
    dtype: mx.Dtype | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    *,
    to: str = "native",
    change: Change | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    files: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the checkpoint `src` (anything `locate` takes) to the folder `dst`.

    Args:
        dtype: of the matrices; None leaves each as it is stored. The VAE and the parts of the transformer that
            compute in float32 are always stored in float32.
        bits: 4 or 8 packs the matrices that `quantize.QUANTIZED` names; None packs nothing.
        group_size: how many values of a row share a scale; None for the mode's default.
        mode: one of `quantize.MODES`, which also says its bits and group sizes.
        to: the layout to write: "native", or "official" and "diffusers" for the programs of others.
        change: what to do with the tensors of each component before they are packed: called with the checkpoint,
            the component's name and its tensors as the module takes them.
        overwrite: whether a native model in `dst` may be replaced by another; other files there stay.
        max_shard_bytes: a component larger than this is split into several files with an index.
        progress: called with the bytes done and the bytes in all, before each tensor.
        files: single files in place of `src`'s own, by the names `locate` has for them.

    Returns:
        `dst`.

    Raises:
        UserError: bad options, or a `dst` that is not empty, not writable, or has too little space.
        CheckpointError: a bad `src`, as `locate`.
    """
    dst = Path(dst).expanduser()
    how = None if bits is None else Quantization(bits, group_size, mode)
    if to != "native" and to not in WRITERS:
        raise UserError(f"cannot write the layout {to!r}; choose one of native, {', '.join(WRITERS)}")
    if to != "native" and how is not None:
        raise UserError(f"packed matrices have no place in the {to} layout; leave the bits out")
    checkpoint = locate(src, **(files or {}))
    if checkpoint.quantization is not None:
        raise UserError(f"{checkpoint.folder}: is quantized already; convert the original")
    _check_destination(checkpoint.folder, dst, overwrite and to == "native")
    parts = _parts(checkpoint, dtype, how, change or (lambda _, __, tensors: tensors))
    partial = _make_partial(dst, _size(parts))
    try:
        watched = _watched(parts, progress)
        if to == "native":
            write_native(partial, watched, checkpoint.tokenizer, config_of(checkpoint, how), max_shard_bytes)
        else:
            WRITERS[to](partial, checkpoint, watched, max_shard_bytes)
        _move(partial, dst)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return dst


def _parts(checkpoint: Checkpoint, dtype: mx.Dtype | None, how: Quantization | None, change: Change) -> Parts:
    """The tensors of each part as they will be stored."""
    parts = {name: change(checkpoint, name, component_tensors(checkpoint, name, dtype)) for name in checkpoint.parts}
    if how is None:
        return parts
    kinds = {name: part.identity.component for name, part in checkpoint.parts.items()}
    return {name: quantize_tensors(tensors, kinds[name], how) for name, tensors in parts.items()}


def config_of(checkpoint: Checkpoint, how: Quantization | None) -> dict[str, Any]:
    """The config.json of the native layout for a model that was read, its matrices packed as `how` says."""
    return native_config(
        checkpoint.spec.name,
        transformer=checkpoint.transformer_config,
        text_encoder=checkpoint.text_encoder_config,
        vae=checkpoint.vae_config,
        sampling=checkpoint.spec.sampling(),
        boundary=checkpoint.spec.boundary,
        image_encoder=checkpoint.image_encoder_config,
        quantization=how,
    )


def _size(parts: Parts) -> int:
    return sum(info.nbytes for tensors in parts.values() for info in tensors)


def _watched(parts: Parts, progress: Callable[[int, int], None] | None) -> Parts:
    """The tensors, each reporting progress and emptying MLX's cache when it is loaded: few sizes come twice."""
    total, done = _size(parts), 0

    def load(info: TensorInfo) -> mx.array:
        nonlocal done
        if progress is not None:
            progress(done, total)
        done += info.nbytes
        mx.clear_cache()
        return info.load()

    def watched(info: TensorInfo) -> TensorInfo:
        return replace(info, load=lambda: load(info))

    return {name: [watched(info) for info in tensors] for name, tensors in parts.items()}


def _check_destination(src: Path, dst: Path, overwrite: bool) -> None:
    if dst.resolve() == src.resolve() or src.resolve() in dst.resolve().parents:
        raise UserError(f"{dst}: lies in the checkpoint that is read; choose another folder")
    if dst.exists() and not dst.is_dir():
        raise UserError(f"{dst}: is a file, not a folder")
    if not dst.is_dir() or not any(dst.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{dst}: is not empty; choose another folder or pass --overwrite")
    if '"mlx_wan"' not in _text(dst / "config.json"):
        raise UserError(f"{dst}: is not a converted model, so --overwrite leaves it alone; choose another folder")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _make_partial(dst: Path, needed: int) -> Path:
    """A fresh folder beside `dst`, so that `dst` itself appears whole or not at all."""
    partial = dst.with_name(f".{dst.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        raise UserError(f"{dst}: cannot be written: {error.strerror or error}") from error
    if free < needed:
        partial.rmdir()
        raise UserError(f"{dst}: needs {needed / 1e9:.1f} GB of disk space, {free / 1e9:.1f} GB are free")
    return partial


def _move(partial: Path, dst: Path) -> None:
    """Puts a finished folder in the place of `dst`: a model that was there is replaced, other files stay."""
    dst.mkdir(parents=True, exist_ok=True)
    config = dst / "config.json"
    config.unlink(missing_ok=True)
    remove_tensors(dst)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, dst / file.name)
