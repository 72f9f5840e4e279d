"""An adapter file, of any dialect, as adapters and shifts for one transformer; checked from headers alone first."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.lora import dialects
from mlx_wan.lora.layers import Adapter, Difference, DoRA, Hadamard, Kronecker, LowRank
from mlx_wan.models.transformer import TransformerConfig, WanTransformer
from mlx_wan.weights.files import TENSOR_SUFFIXES, read_metadata, read_tensors
from mlx_wan.weights.hub import LORA_CONFIG, local_file
from mlx_wan.weights.identify import identify
from mlx_wan.weights.tensors import DTYPES, TensorInfo

Shape = tuple[int, ...]
Roles = Mapping[str, TensorInfo]
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of PEFT, of diffusers
METADATA_KEY = "lora_adapter_metadata"  # where diffusers puts that config in a file's header
PATCHES = "patch_embedding"  # the one layer whose weight is neither a matrix nor a vector
SHOWN = 3


@dataclass(frozen=True)
class Lora:
    """An adapter file whose every used tensor fits the transformer.

    Attributes:
        path: the file.
        writer: whose dialect it is in.
        layers: official name of a linear layer -> its factors by role, and the factor's scale.
        shifts: official name of another parameter (norms, biases, modulation, patch embedding) -> the same.
        shapes: of the transformer's parameters.
        unmatched: keys that belong to no part of this transformer.
    """

    path: Path
    writer: str
    layers: Mapping[str, tuple[Roles, float]]
    shifts: Mapping[str, tuple[Roles, float]]
    shapes: Mapping[str, Shape]
    unmatched: tuple[str, ...]

    @property
    def note(self) -> str | None:
        """One line about keys that were left out; None if there are none."""
        if not self.unmatched:
            return None
        more = ", …" if len(self.unmatched) > SHOWN else ""
        names = ", ".join(self.unmatched[:SHOWN])
        return f"{self.path}: {len(self.unmatched)} tensors belong to no part of this model, left out: {names}{more}"

    def adapter(self, layer: str, dtype: mx.Dtype | None = None) -> Adapter:
        """The adapter of a linear layer, its factors read from the file, in `dtype` if one is given."""
        roles, scale = self.layers[layer]
        # Magnitudes are a factor of the whole weight: rounded as the other numbers, they would change all of it.
        found = {role: _loaded(info, mx.float32 if role == "dora" else dtype) for role, info in roles.items()}
        adapter = _adapter(found, scale)
        mx.eval(adapter.parameters())
        return adapter

    def shift(self, parameter: str) -> mx.array:
        """What is added to a parameter at strength 1, in its shape, float32."""
        roles, scale = self.shifts[parameter]
        shape = self.shapes[parameter]
        found = {role: _loaded(info, mx.float32) for role, info in roles.items()}
        change = LowRank(_flat(found["lora_a"]), _flat(found["lora_b"])).delta() if "lora_a" in found else None
        change = next(iter(found.values())) if change is None else change
        if len(shape) == 5:  # from torch's order
            change = mx.moveaxis(change.reshape(shape[0], shape[4], *shape[1:4]), 1, -1)
        return scale * change.reshape(shape)

    @cached_property
    def summary(self) -> str:
        """What is in it, for people: "LoRA of rank 32 beside 300 matrices, 61 shifted parameters"."""
        roles = [r for _, (found, _) in self.layers.items() for r in found]
        kinds = [kind for mark, kind in dialects.KINDS if any(role.startswith(mark) for role in roles)]
        ranks = sorted({rank for found, _ in self.layers.values() if (rank := _rank(found)) is not None})
        rank = f" of rank {ranks[0]}" if len(ranks) == 1 else f" of ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
        parts = [f"{' and '.join(kinds)}{rank} beside {len(self.layers)} matrices"] if self.layers else []
        parts += [f"{len(self.shifts)} shifted parameters"] if self.shifts else []
        return ", ".join(parts)


@lru_cache(maxsize=4)  # each module that is made leaves MLX's random state some 100 kB longer
def transformer_shapes(config: TransformerConfig) -> Mapping[str, Shape]:
    """Official name -> shape of every parameter; nothing is computed."""
    parameters: dict[str, mx.array] = dict(tree_flatten(WanTransformer(config).parameters()))
    return {name: tuple(array.shape) for name, array in parameters.items()}


def read_lora(path: str | Path, shapes: Mapping[str, Shape]) -> Lora:
    """Reads the headers of an adapter for a transformer.

    Args:
        path: as of `lora_file`.
        shapes: of the transformer's parameters by official name, channels last (`transformer_shapes`).

    Raises:
        UserError: no such file, or one that is not an adapter; the message says what it is.
        CheckpointError: damaged; of a kind that cannot be computed (Tucker); no key of it belongs to this
            transformer; or a tensor of another shape, which means that it was made for another model.
    """
    path = lora_file(path)
    tensors = read_tensors(path)
    if not dialects.is_adapter(tensors):
        identity = identify({name: info.shape for name, info in tensors.items()})
        what = "not a LoRA" if identity.component == "unknown" else f"{identity.model}, not a LoRA"
        raise UserError(f"{path}: is {what}; a whole model goes to --ckpt_dir")
    grouped, writer, unmatched = _group(path, tensors, dialects.targets(shapes))
    if not grouped:
        raise CheckpointError(
            f"{path}: none of its {len(tensors)} tensors belongs to this model ({unmatched[0]} is one); "
            "it was made for another kind of model"
        )
    config = _peft_config(path)
    layers: dict[str, tuple[Roles, float]] = {}
    shifts: dict[str, tuple[Roles, float]] = {}
    for layer, (roles, raw) in grouped.items():
        _check_whole(path, raw, roles)
        scale = _scale(path, raw, roles, config)
        if config.get("dora") and "lora_a" in roles and "dora" not in roles:
            raise CheckpointError(f"{path}: is a DoRA without the magnitudes of {raw}; get the file again")
        _sort(path, layer, raw, roles, scale, shapes, layers, shifts)
    return Lora(path, writer, layers, shifts, shapes, tuple(unmatched))


def lora_file(where: str | Path) -> Path:
    """The file of an adapter: itself, of a folder that of PEFT or diffusers or its only one, and of one on the Hub (a
    repository, "OWNER/NAME", a folder or file in it) the copy in the local cache. Raises as `hub.local_file`."""
    path = local_file(where, FOLDER_FILES)
    if path.is_dir():
        usual = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        found = usual[:1] or [file for file in path.iterdir() if file.suffix in TENSOR_SUFFIXES and file.is_file()]
        if len(found) != 1:
            raise UserError(f"{path}: has no {' or '.join(FOLDER_FILES)}; give the LoRA file itself")
        return found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such LoRA file")
    return path


def _group(
    path: Path, tensors: Mapping[str, TensorInfo], spellings: Mapping[str, str]
) -> tuple[dict[str, tuple[dict[str, TensorInfo], str]], str, list[str]]:
    """Official layer -> (its tensors by role, the file's name for it); the writer; the keys of no layer."""
    grouped: dict[str, tuple[dict[str, TensorInfo], str]] = {}
    writers: dict[str, int] = {}
    unmatched: list[str] = []
    for name, info in tensors.items():
        key = dialects.parse(name)
        raw = None if key is None else f"{key.layer}.modulation" if key.role == "diff_m" else key.layer
        layer = None if raw is None else dialects.resolve(raw, spellings)
        if key is None or raw is None or layer is None:
            unmatched.append(name)
            continue
        if key.role in dialects.REFUSED:
            raise CheckpointError(f"{path}: {name}: {dialects.REFUSED[key.role]} is not supported; use plain LoRA")
        roles, _ = grouped.setdefault(layer, ({}, raw))
        if key.role in roles:
            raise CheckpointError(f"{path}: holds {layer} twice, as {roles[key.role].name} and {name}")
        if not mx.issubdtype(DTYPES[info.dtype][2], mx.floating):
            raise CheckpointError(f"{path}: {name} is {info.dtype}; a LoRA must be of floats")
        roles[key.role] = info
        writers[key.writer] = writers.get(key.writer, 0) + 1
    return grouped, max(writers, key=lambda w: writers[w], default=dialects.PLAIN), unmatched


PARTNERS = (
    ({"lora_a", "lora_b"}, {"lora_bias", "alpha", "diff_b", "dora"}),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"alpha", "diff_b"}),
    ({"lokr_w1", "lokr_w2"}, {"alpha", "diff_b"}),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, {"alpha", "diff_b"}),
    ({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}, {"alpha", "diff_b"}),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}, {"alpha", "diff_b"}),
    ({"diff"}, {"diff_b", "alpha"}),
    ({"diff_b"}, {"alpha"}),
    ({"diff_m"}, {"alpha"}),
)


def _check_whole(path: Path, raw: str, roles: Roles) -> None:
    """The tensors of a layer must make up exactly one adapter."""
    if not any(needed <= roles.keys() <= needed | allowed for needed, allowed in PARTNERS):
        raise CheckpointError(f"{path}: {raw} has {', '.join(sorted(roles))}, which is no whole adapter")


def _sort(
    path: Path,
    layer: str,
    raw: str,
    roles: Roles,
    scale: float,
    shapes: Mapping[str, Shape],
    layers: dict[str, tuple[Roles, float]],
    shifts: dict[str, tuple[Roles, float]],
) -> None:
    """Puts each tensor of a layer where it acts, once its shape is found to fit."""
    weight = f"{layer}.weight" if f"{layer}.weight" in shapes else layer
    matrix = {r: i for r, i in roles.items() if r not in ("alpha", "lora_bias", "diff_b")}
    for role, factor in (("diff_b", 1.0), ("lora_bias", scale)):
        if role in roles:
            bias = f"{layer}.bias"
            if bias not in shapes:
                raise CheckpointError(f"{path}: {roles[role].name}: {layer} has no bias in this model")
            _check_shape(path, roles[role], shapes[bias], _squeezed(roles[role].shape))
            if bias in shifts:
                raise CheckpointError(f"{path}: holds the bias of {layer} twice")
            shifts[bias] = ({role: roles[role]}, factor)
    if not matrix:
        return
    wanted = shapes[weight]
    factor = 1.0 if "diff" in matrix or "diff_m" in matrix else scale
    if len(wanted) == 2 and weight != layer:
        _check_product(path, matrix, (wanted[0], wanted[1]))
        layers[layer] = (matrix, factor)
        return
    if set(matrix) == {"lora_a", "lora_b"} and layer == PATCHES:
        _check_product(path, matrix, (wanted[0], math.prod(wanted[1:])))
    elif len(matrix) == 1:
        (info,) = matrix.values()
        torch_order = (wanted[0], wanted[4], *wanted[1:4]) if len(wanted) == 5 else wanted
        _check_shape(path, info, torch_order, info.shape if len(wanted) > 1 else _squeezed(info.shape))
    else:
        raise CheckpointError(f"{path}: {raw} has {', '.join(sorted(matrix))}, which {layer} cannot take")
    shifts[weight] = (matrix, factor)


def _check_shape(path: Path, info: TensorInfo, wanted: Shape, found: Shape) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{path}: {info.name} {info.shape} does not fit this model, where it is {wanted}; "
            "it was made for a model of another size"
        )


def _check_product(path: Path, roles: Roles, wanted: tuple[int, int]) -> None:
    """The factors must multiply, and to a matrix of the shape `wanted`."""
    shapes = {role: _matrix(info.shape) for role, info in roles.items()}
    rows: int | None = None
    columns: int | None = None
    inner = True
    if "lora_a" in shapes:
        (rows, right), (left, columns) = shapes["lora_b"], shapes["lora_a"]
        # A DoRA has a magnitude a row, (out,) or (out, 1); a few have one a column, (1, in), which is not computed.
        inner = left == right and ("dora" not in roles or roles["dora"].shape in ((rows,), (rows, 1)))
    elif "diff" in shapes:
        rows, columns = shapes["diff"]
    elif "hada_w1_a" in shapes:
        (rows, r1), (l1, columns) = shapes["hada_w1_a"], shapes["hada_w1_b"]
        inner = r1 == l1 and shapes["hada_w2_a"] == (rows, shapes["hada_w2_b"][0])
        inner = inner and shapes["hada_w2_b"][1] == columns
    else:
        (rows1, columns1), inner1 = _kronecker_side(shapes, "lokr_w1")
        (rows2, columns2), inner2 = _kronecker_side(shapes, "lokr_w2")
        rows, columns, inner = rows1 * rows2, columns1 * columns2, inner1 and inner2
    if (rows, columns) != wanted or not inner:
        found = ", ".join(f"{info.name} {info.shape}" for info in roles.values())
        raise CheckpointError(
            f"{path}: {found} do not make the {wanted[0]}×{wanted[1]} matrix of this model; "
            "it was made for a model of another size"
        )


def _kronecker_side(shapes: Mapping[str, tuple[int, int]], name: str) -> tuple[tuple[int, int], bool]:
    if name in shapes:
        return shapes[name], True
    (rows, right), (left, columns) = shapes[f"{name}_a"], shapes[f"{name}_b"]
    return (rows, columns), right == left


def _matrix(shape: Shape) -> tuple[int, int]:
    """(rows, columns) of a factor; those of convolutions are laid flat."""
    return (shape[0], math.prod(shape[1:])) if len(shape) >= 2 else (0, 0)


def _squeezed(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1) or (1,)


def _flat(array: mx.array) -> mx.array:
    return array.reshape(_matrix(tuple(array.shape)))


def _loaded(info: TensorInfo, dtype: mx.Dtype | None) -> mx.array:
    array = info.load()
    return array if dtype is None else array.astype(dtype)


def _adapter(found: Mapping[str, mx.array], scale: float) -> Adapter:
    """One adapter from its factors."""
    found = {role: array.reshape(-1, 1) if role == "dora" else _flat(array) for role, array in found.items()}
    if "dora" in found:
        return DoRA(found["lora_a"], found["lora_b"], found["dora"], scale)
    if "lora_a" in found:
        return LowRank(found["lora_a"], found["lora_b"], scale)
    if "diff" in found:
        return Difference(found["diff"], scale)
    if "hada_w1_a" in found:
        return Hadamard(found["hada_w1_a"], found["hada_w1_b"], found["hada_w2_a"], found["hada_w2_b"], scale)
    w1, w2 = (
        found[name] if name in found else found[f"{name}_a"] @ found[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
    )
    return Kronecker(w1, w2, scale)


# --- scales --------------------------------------------------------------------------------------------------


def _rank(roles: Roles) -> int | None:
    """Of the low-rank factors; None where there are none."""
    for role in ("lora_a", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if role in roles:
            return roles[role].shape[0]
    return None


def _scale(path: Path, raw: str, roles: Roles, config: Mapping[str, Any]) -> float:
    """alpha / rank; 1 where the file says nothing of alpha, or where nothing has a rank."""
    rank = _rank(roles)
    if "alpha" in roles:
        if math.prod(roles["alpha"].shape) != 1:
            raise CheckpointError(f"{path}: {roles['alpha'].name} {roles['alpha'].shape} is not one number")
        alpha = cast(float, roles["alpha"].load().item())
        scale = alpha / rank if rank else 1.0
    elif config:
        rank = rank or config["r"]
        alpha = next((a for p, a in config["alpha_pattern"].items() if re.fullmatch(rf"(.*\.)?({p})", raw)), None)
        scale = (config["alpha"] if alpha is None else alpha) / (math.sqrt(rank) if config["rslora"] else rank)
    else:
        return 1.0
    if not math.isfinite(scale):
        raise CheckpointError(f"{path}: alpha of {raw} is {scale}; the file is damaged")
    return scale


def _peft_config(path: Path) -> dict[str, Any]:
    """What PEFT's adapter_config.json beside the file, or diffusers' copy of it in the header, says of alpha."""
    beside = path.with_name(LORA_CONFIG)
    said: Any = {}
    if path.name == FOLDER_FILES[0] and beside.is_file():
        path, said = beside, _json(beside, beside.read_bytes())
    elif path.suffix == ".safetensors" and METADATA_KEY in (metadata := read_metadata(path)):
        said = {k.removeprefix("transformer."): v for k, v in _json(path, metadata[METADATA_KEY]).items()}
    if not said:
        return {}
    rank = said.get("r")
    alpha = said.get("lora_alpha", said.get("alpha"))
    patterns = said.get("alpha_pattern") or {}
    numbers = [rank, alpha, *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(isinstance(n, int | float) and n == n and n > 0 for n in numbers):
        raise CheckpointError(f"{path}: r, lora_alpha and alpha_pattern must be positive numbers")
    try:
        for pattern in patterns:
            re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{path}: alpha_pattern {pattern!r} is not a pattern ({error})") from error
    kinds = {"rslora": bool(said.get("use_rslora")), "dora": bool(said.get("use_dora"))}
    return {"r": rank, "alpha": alpha, "alpha_pattern": patterns, **kinds}


def _json(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its LoRA configuration is not JSON; get the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: its LoRA configuration is not a JSON object; get the file again")
    return content
