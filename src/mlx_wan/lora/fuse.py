"""The adapters of a model: put beside its weights, changed in strength, or added to the weights for good."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_wan.errors import UserError
from mlx_wan.lora.layers import LoRALinear, attach, detach, linear_layers
from mlx_wan.lora.load import Lora, read_lora, transformer_shapes
from mlx_wan.weights.checkpoint import Checkpoint
from mlx_wan.weights.convert import convert
from mlx_wan.weights.tensors import TensorInfo

# What an adapter may be meant for -> the part of the checkpoint; without a word it is for every transformer.
EXPERTS = {"high": "transformer", "low": "transformer_2"}


class Adapters:
    """Adapters by name with the user's strengths, for transformers that may come and go.

    `install` is for a transformer fresh from its file, `update` after every change. Matrices get their adapters
    beside them; the few other parameters a file may change (norms, biases, modulation, patch embedding) are
    replaced by their sum, and their originals kept here.
    """

    def __init__(self) -> None:
        self.loras: dict[str, Lora] = {}
        self.strengths: dict[str, float] = {}
        self.fused = False
        self._parts: dict[str, str | None] = {}
        self._originals: dict[str, dict[str, mx.array]] = {}

    def add(self, lora: Lora, name: str | None, strength: float, part: str | None = None) -> str:
        """Takes a LoRA in, under its file's name unless another is given; returns the name.

        part: the only transformer of the checkpoint that it is for; None for all.

        Raises:
            UserError: the name is taken, or the strength no number.
        """
        self._check_open()
        if name is None:
            stem = lora.path.stem.replace(".", "_")
            name = next(n for i in count(1) if (n := stem if i == 1 else f"{stem}_{i}") not in self.loras)
        if name in self.loras:
            raise UserError(f"there is an adapter called {name!r} already; choose another adapter_name")
        self.loras[name], self.strengths[name], self._parts[name] = lora, _strength(strength), part
        return name

    def set(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Gives `names` their strengths and turns all other adapters off.

        Raises:
            UserError: an unknown name, or not one weight a name.
        """
        self._check_open()
        if len(names) != len(weights):
            raise UserError(f"{len(names)} adapters and {len(weights)} weights; give one weight an adapter")
        self._check_names(names)
        self.strengths = dict.fromkeys(self.loras, 0.0) | dict(zip(names, map(_strength, weights), strict=True))

    def remove(self, names: Sequence[str]) -> None:
        """Forgets adapters. Raises UserError for an unknown name."""
        self._check_open()
        self._check_names(names)
        for name in names:
            del self.loras[name], self.strengths[name], self._parts[name]

    def clear(self) -> None:
        """Forgets all adapters, fused ones too; the model they were fused into must be read again."""
        self.loras, self.strengths, self._parts, self.fused = {}, {}, {}, False

    def _check_names(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self.loras]:
            raise UserError(f"no adapter called {unknown[0]!r}; there is {', '.join(self.loras) or 'none'}")

    def _check_open(self) -> None:
        if self.fused:
            raise UserError("the adapters are fused into the weights; call unload_lora_weights() first")

    def _of(self, part: str) -> dict[str, Lora]:
        return {name: lora for name, lora in self.loras.items() if self._parts[name] in (None, part)}

    def install(self, model: nn.Module, part: str = "transformer") -> None:
        """Brings all adapters to a model that has none."""
        self._originals[part] = {}
        self.update(model, part)
        if self.fused:
            merge(model)

    def update(self, model: nn.Module, part: str = "transformer") -> None:
        """Makes the adapters beside the model's weights those that are wanted, without reading weights again."""
        loras = self._of(part)
        homes = {layer: m for layer, m in model.named_modules() if isinstance(m, LoRALinear)}
        present = {name for home in homes.values() for name in home.adapters}
        for name in present - loras.keys():
            detach(model, name)
        dtypes = {layer: _dtype(linear) for layer, linear in linear_layers(model).items()}
        for name in loras.keys() - present:
            lora = loras[name]
            attach(model, {layer: lora.adapter(layer, dtypes[layer]) for layer in lora.layers}, name)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                for name, adapter in module.adapters.items():
                    adapter.strength = self.strengths[name]
        self._shift(model, loras, self._originals.setdefault(part, {}))

    def _shift(self, model: nn.Module, loras: dict[str, Lora], originals: dict[str, mx.array]) -> None:
        parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        home = {name.replace(".linear.", "."): name for name in parameters}
        wanted = {name for lora in loras.values() for name in lora.shifts}
        changed = []
        for name in wanted | originals.keys():
            original = originals.setdefault(name, parameters[home[name]])
            value = original.astype(mx.float32)
            for key, lora in loras.items():
                if name in lora.shifts and self.strengths[key]:
                    value = value + self.strengths[key] * lora.shift(name)
            changed.append((home[name], value.astype(original.dtype)))
        if changed:
            mx.eval([array for _, array in changed])
            model.update(tree_unflatten(changed))  # pyright: ignore[reportArgumentType]
        for name in originals.keys() - wanted:
            del originals[name]


def merge(model: nn.Module) -> None:
    """Adds every adapter to its matrix, computed in float32, and leaves plain linear layers behind.

    Raises:
        UserError: the model is quantized: rounding would eat the adapter.
    """
    merged = []
    for layer, home in model.named_modules():
        if not isinstance(home, LoRALinear):
            continue
        linear = home.linear
        if isinstance(linear, nn.QuantizedLinear):
            raise UserError(QUANTIZED)
        weight = original = linear.weight.astype(mx.float32)
        for adapter in home.adapters.values():
            weight = weight + adapter.strength * adapter.delta(original)
        linear.weight = weight.astype(linear.weight.dtype)
        mx.eval(linear.weight)
        merged.append((layer, linear))
    if merged:
        model.update_modules(tree_unflatten(merged))  # pyright: ignore[reportArgumentType]


QUANTIZED = (
    "a LoRA cannot be fused into quantized weights, whose rounding is coarser than it; "
    "leave --fuse out, or fuse the original model and quantize it afterwards"
)


def fuse(
    src: str | Path,
    dst: str | Path,
    loras: Sequence[tuple[str | Path, float] | tuple[str | Path, float, str | None]],
    *,
    note: Callable[[str], None] = warnings.warn,
    **options: Any,
) -> Path:
    """Writes the checkpoint `src` with LoRAs in its weights to the folder `dst`, in the native layout.

    Args:
        loras: files, their strengths and, if for one of two experts alone, "high" or "low".
        note: told of keys that were left out, a line a file.
        options: of `weights.convert.convert`: dtype, bits, group_size, overwrite, progress, files.

    Raises:
        as `convert` and `read_lora`.
    """

    def change(checkpoint: Checkpoint, component: str, tensors: list[TensorInfo]) -> list[TensorInfo]:
        if not component.startswith("transformer"):
            return tensors
        shapes = transformer_shapes(checkpoint.transformer_config)
        found = [
            (read_lora(path, shapes), _strength(strength))
            for path, strength, *expert in loras
            if expert_part(checkpoint, *expert) in (None, component)
        ]
        for lora, _ in found:
            if lora.note:
                note(lora.note)
        return merge_tensors(tensors, found)

    return convert(src, dst, change=change, **options)


def expert_part(checkpoint: Checkpoint, expert: str | None = None) -> str | None:
    """The part of a checkpoint that "high" or "low" means; None for None.

    Raises:
        UserError: another word, or a model that has no experts.
    """
    if expert is None:
        return None
    if expert not in EXPERTS:
        raise UserError(f"expert is {expert!r}; it must be one of {', '.join(EXPERTS)}, or left out for both")
    if checkpoint.transformer_2 is None:
        raise UserError(f"the model has one transformer: a LoRA for the {expert}-noise expert has no place in it")
    return EXPERTS[expert]


def merge_tensors(tensors: Sequence[TensorInfo], loras: Sequence[tuple[Lora, float]]) -> list[TensorInfo]:
    """The tensors of a transformer, as `component_tensors` gives them, each plus what the LoRAs add to it.

    Sums are computed in float32, one tensor at a time when it is loaded, and rounded to the tensor's type.
    """
    return [_merged(info, loras) for info in tensors]


def _merged(info: TensorInfo, loras: Sequence[tuple[Lora, float]]) -> TensorInfo:
    layer = info.name.removesuffix(".weight")
    acting = [(lora, strength) for lora, strength in loras if layer in lora.layers or info.name in lora.shifts]
    if not acting:
        return info

    def load() -> mx.array:
        stored = info.load()
        value = original = stored.astype(mx.float32)
        for lora, strength in acting:
            change = lora.shift(info.name) if info.name in lora.shifts else lora.adapter(layer).delta(original)
            value = value + strength * change
        return value.astype(stored.dtype)

    return replace(info, load=load)


def _dtype(linear: nn.Linear | nn.QuantizedLinear) -> mx.Dtype:
    """What the layer computes in."""
    return linear.scales.dtype if isinstance(linear, nn.QuantizedLinear) else linear.weight.dtype


def _strength(value: float) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"the strength of a LoRA is {value!r}; it must be a number, such as 0.8")
    return float(value)
