"""Adapters as modules: what is added to the output of a matrix, computed beside it.

The matrix stays as it is, quantized or not, so an adapter keeps its own precision, can be changed in strength or
taken away at once, and several of them can share a matrix. A trainer and the pipeline use the same layers:

    model.freeze()
    add_lora(model, pattern.fullmatch, rank=32)  # trainable now: every lora_a and lora_b, nothing else
    step = nn.value_and_grad(model, loss)
    save_lora(path, model)  # lora/save.py
"""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_wan.models.packed import PackedLinear, multiply

Linear = nn.Linear | nn.QuantizedLinear
DEFAULT = "default"  # name of the adapter that is trained
PREFIX = "diffusion_model."  # what ComfyUI, Diffusers and most trainers put before official names


class Adapter(nn.Module):
    """A change Δ of a matrix W (out, in): the layer computes x Wᵀ + strength · scale · x Δᵀ.

    Attributes:
        scale: the adapter's own factor, alpha / rank for most; numbers of a file, not of a user.
        strength: the user's factor; 0 turns the adapter off, and it then costs nothing.
    """

    scale: float
    strength: float

    def __init__(self, scale: float = 1.0, strength: float = 1.0):
        super().__init__()
        self.scale, self.strength = scale, strength

    def __call__(self, x: mx.array, y: mx.array, linear: "Linear | None" = None) -> mx.array:
        """y + strength · scale · x Δᵀ for x (..., in), y (..., out), in y's dtype. linear: the layer, for DoRA."""
        raise NotImplementedError

    def delta(self, weight: mx.array | None = None) -> mx.array:
        """scale · Δ (out, in), float32; without the strength. weight: W, float32, for DoRA."""
        raise NotImplementedError

    def onto(self, changed: mx.array, weight: mx.array) -> mx.array:
        """changed + strength · scale · Δ (out, in), in changed's dtype; weight: W, which others may have changed."""
        delta = self.delta(weight.astype(mx.float32))
        return (changed.astype(mx.float32) + self.strength * delta).astype(changed.dtype)


class LowRank(Adapter):
    """LoRA: Δ = B A. `lora_a` is (rank, in) and `lora_b` (out, rank), as in PEFT's files."""

    def __init__(self, lora_a: mx.array, lora_b: mx.array, scale: float = 1.0, strength: float = 1.0):
        super().__init__(scale, strength)
        self.lora_a, self.lora_b = lora_a, lora_b

    @classmethod
    def initial(cls, in_dims: int, out_dims: int, rank: int, alpha: float, dtype: mx.Dtype) -> "LowRank":
        """A random A and a zero B: nothing is changed before the first step. A is as in PEFT (Kaiming, a = √5)."""
        bound = 1 / math.sqrt(in_dims)
        a = mx.random.uniform(-bound, bound, (rank, in_dims)).astype(dtype)
        return cls(a, mx.zeros((out_dims, rank), dtype), alpha / rank)

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    def __call__(self, x: mx.array, y: mx.array, linear: "Linear | None" = None) -> mx.array:
        hidden = x @ self.lora_a.astype(x.dtype).T
        return mx.addmm(y, hidden, self.lora_b.astype(x.dtype).T, alpha=self.strength * self.scale)

    def delta(self, weight: mx.array | None = None) -> mx.array:
        return self.scale * (self.lora_b.astype(mx.float32) @ self.lora_a.astype(mx.float32))

    def onto(self, changed: mx.array, weight: mx.array) -> mx.array:
        a, b = self.lora_a.astype(changed.dtype), self.lora_b.astype(changed.dtype)
        return mx.addmm(changed, b, a, alpha=self.strength * self.scale)


class DoRA(LowRank):
    """LoRA with magnitudes (Liu et al., arXiv:2402.09353): W + Δ = m · (W + s B A) / ‖W + s B A‖, by rows.

    `magnitude` is (out, 1), as files have it. Gradients take the norm as a constant, as the paper advises.
    """

    def __init__(
        self, lora_a: mx.array, lora_b: mx.array, magnitude: mx.array, scale: float = 1.0, strength: float = 1.0
    ):
        super().__init__(lora_a, lora_b, scale, strength)
        self.magnitude = magnitude

    @classmethod
    def beside(cls, linear: "Linear", rank: int, alpha: float, dtype: mx.Dtype) -> "DoRA":
        """Starts as LoRA does, with the magnitudes of the weight's rows: nothing is changed before the first step."""
        out_dims, in_dims = matrix_shape(linear)
        plain = LowRank.initial(in_dims, out_dims, rank, alpha, dtype)
        new = cls(plain.lora_a, plain.lora_b, mx.zeros((out_dims, 1)), plain.scale)
        new.magnitude = new._norm(matrix_of(linear))
        return new

    def _norm(self, weight: mx.array) -> mx.array:
        """‖W + s B A‖ of each row (out, 1), float32, without making the sum."""
        w, a, b = (array.astype(mx.float32) for array in (weight, self.lora_a, self.lora_b))
        cross = ((w @ a.T) * b).sum(axis=1, keepdims=True)
        square = ((b @ (a @ a.T)) * b).sum(axis=1, keepdims=True)
        return mx.sqrt(mx.square(w).sum(axis=1, keepdims=True) + 2 * self.scale * cross + self.scale**2 * square)

    def __call__(self, x: mx.array, y: mx.array, linear: "Linear | None" = None) -> mx.array:
        assert linear is not None
        ratio = (self.magnitude / mx.stop_gradient(self._norm(matrix_of(linear)))).T  # (1, out)
        plain = linear(x) - linear.bias if "bias" in linear else linear(x)
        low = (x @ self.lora_a.astype(x.dtype).T) @ self.lora_b.astype(x.dtype).T
        change = (ratio - 1) * plain + self.scale * ratio * low
        return y + (self.strength * change).astype(y.dtype)

    def delta(self, weight: mx.array | None = None) -> mx.array:
        assert weight is not None
        turned = weight + super().delta()
        return self.magnitude.astype(mx.float32) * turned / self._norm(weight) - weight

    def onto(self, changed: mx.array, weight: mx.array) -> mx.array:
        return Adapter.onto(self, changed, weight)


class Kronecker(Adapter):
    """LoKr: Δ = w1 ⊗ w2, w1 (out1, in1) and w2 (out2, in2), where out = out1 · out2 and in = in1 · in2."""

    def __init__(self, w1: mx.array, w2: mx.array, scale: float = 1.0, strength: float = 1.0):
        super().__init__(scale, strength)
        self.w1, self.w2 = w1, w2

    def __call__(self, x: mx.array, y: mx.array, linear: "Linear | None" = None) -> mx.array:
        # (…, in1, in2) -> (…, in1, out2) -> (…, out2, in1) -> (…, out2, out1) -> (…, out1 · out2)
        w1, w2 = self.w1.astype(x.dtype), self.w2.astype(x.dtype)
        pairs = x.reshape(*x.shape[:-1], w1.shape[1], w2.shape[1]) @ w2.T
        change = (pairs.swapaxes(-1, -2) @ w1.T).swapaxes(-1, -2).reshape(y.shape)
        return y + (self.strength * self.scale) * change

    def delta(self, weight: mx.array | None = None) -> mx.array:
        return self.scale * mx.kron(self.w1.astype(mx.float32), self.w2.astype(mx.float32))


class Hadamard(Adapter):
    """LoHa: Δ = (a1 b1) ∘ (a2 b2), each a (out, rank) and b (rank, in). The product is made anew at each call."""

    def __init__(
        self, a1: mx.array, b1: mx.array, a2: mx.array, b2: mx.array, scale: float = 1.0, strength: float = 1.0
    ):
        super().__init__(scale, strength)
        self.a1, self.b1, self.a2, self.b2 = a1, b1, a2, b2

    def __call__(self, x: mx.array, y: mx.array, linear: "Linear | None" = None) -> mx.array:
        return mx.addmm(y, x, self.delta().astype(x.dtype).T, alpha=self.strength)

    def delta(self, weight: mx.array | None = None) -> mx.array:
        a1, b1, a2, b2 = (factor.astype(mx.float32) for factor in (self.a1, self.b1, self.a2, self.b2))
        return self.scale * (a1 @ b1) * (a2 @ b2)


class Difference(Adapter):
    """Δ itself, (out, in): costs as much as the layer."""

    def __init__(self, difference: mx.array, scale: float = 1.0, strength: float = 1.0):
        super().__init__(scale, strength)
        self.difference = difference

    def __call__(self, x: mx.array, y: mx.array, linear: "Linear | None" = None) -> mx.array:
        return mx.addmm(y, x, self.difference.astype(x.dtype).T, alpha=self.strength * self.scale)

    def delta(self, weight: mx.array | None = None) -> mx.array:
        return self.scale * self.difference.astype(mx.float32)


class LoRALinear(nn.Module):
    """A linear layer, plain or quantized, with adapters beside it.

    In evaluation (`eval()`) with many rows, adapters are added to the matrix anew in each call, which moves less memory
    than adding to every row: for TI2V-5B's 27,280 rows a tenth of it. What is kept is the same.
    """

    def __init__(self, linear: nn.Linear | nn.QuantizedLinear):
        super().__init__()
        self.linear = linear
        self.adapters: dict[str, Adapter] = {}

    def __call__(self, x: mx.array) -> mx.array:
        adapters = [adapter for adapter in self.adapters.values() if adapter.strength]
        if adapters and not self.training and self._has_many_rows(x):
            return self._changed(x, adapters)
        y = self.linear(x)
        for adapter in adapters:
            y = adapter(x, y, self.linear)
        return y

    def _has_many_rows(self, x: mx.array) -> bool:
        """Whether the rows, as an adapter reads and writes them, are more than the matrix."""
        out_dims, in_dims = matrix_shape(self.linear)
        return x.size // in_dims * (in_dims + out_dims) > in_dims * out_dims

    def _changed(self, x: mx.array, adapters: list[Adapter]) -> mx.array:
        linear = self.linear
        weight = linear.unpacked(x.dtype) if isinstance(linear, PackedLinear) else matrix_of(linear)
        changed = weight
        for adapter in adapters:
            changed = adapter.onto(changed, weight)
        return multiply(x, changed.T, linear.get("bias"))


def matrix_shape(linear: nn.Linear | nn.QuantizedLinear) -> tuple[int, int]:
    """(out, in) of a linear layer, plain or quantized."""
    out_dims, in_dims = linear.weight.shape
    return out_dims, in_dims * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else in_dims


def matrix_of(linear: Linear) -> mx.array:
    """The weight (out, in) of a linear layer; of a quantized one, the values it stands for."""
    if isinstance(linear, nn.QuantizedLinear):
        packed = (linear.weight, linear.scales, linear.biases)
        return mx.dequantize(*packed, group_size=linear.group_size, bits=linear.bits, mode=linear.mode)
    return linear.weight


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | nn.QuantizedLinear]:
    """Official name -> linear layer, of all that an adapter can be put beside, whether or not it has one."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            found[name.removesuffix(".linear")] = module
    return found


def attach(model: nn.Module, adapters: dict[str, Adapter], name: str = DEFAULT) -> None:
    """Puts each adapter beside the layer with its official name, under the name `name`; replaces one of that name.

    Raises:
        KeyError: the model has no such linear layer.
    """
    modules, layers = dict(model.named_modules()), linear_layers(model)
    wrapped = []
    for layer, adapter in adapters.items():
        home = modules.get(layer)
        if not isinstance(home, LoRALinear):
            home = LoRALinear(layers[layer])
            home.train(model.training)
            wrapped.append((layer, home))
        home.adapters[name] = adapter
    if wrapped:
        model.update_modules(tree_unflatten(wrapped))  # pyright: ignore[reportArgumentType]


def detach(model: nn.Module, name: str = DEFAULT) -> None:
    """Takes every adapter called `name` away; a layer without adapters is the plain one again."""
    bare = []
    for layer, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.adapters.pop(name, None)
            if not module.adapters:
                bare.append((layer, module.linear))
    if bare:
        model.update_modules(tree_unflatten(bare))  # pyright: ignore[reportArgumentType]


def add_lora(
    model: nn.Module,
    wanted: Callable[[str], object],
    rank: int,
    alpha: float | None = None,
    *,
    name: str = DEFAULT,
    dtype: mx.Dtype = mx.float32,
    dora: bool = False,
) -> list[str]:
    """Fresh trainable LoRAs beside the linear layers whose official name is `wanted`; returns those names.

    Freeze the model before, not after: the new `lora_a` and `lora_b` are born trainable.

    Args:
        alpha: the LoRA's scale is alpha / rank; None means rank, a scale of 1.
        dtype: of the trained factors; products are computed in the dtype of the layer's input.
        dora: with trained magnitudes.
    """
    alpha = rank if alpha is None else alpha
    layers = {layer: linear for layer, linear in linear_layers(model).items() if wanted(layer)}

    def fresh(linear: Linear) -> LowRank:
        out_dims, in_dims = matrix_shape(linear)
        if dora:
            return DoRA.beside(linear, rank, alpha, dtype)
        return LowRank.initial(in_dims, out_dims, rank, alpha, dtype)

    attach(model, {layer: fresh(linear) for layer, linear in layers.items()}, name)
    return list(layers)


def lora_tensors(model: nn.Module, name: str = DEFAULT) -> dict[str, mx.array]:
    """The LoRAs called `name` as files of others have them, under official names with `PREFIX`.

    `….lora_A.weight` (rank, in), `….lora_B.weight` (out, rank), of a DoRA `….dora_scale` (out, 1) too, and, where the
    scale is not 1, `….alpha`. ComfyUI,
    Diffusers and LightX2V read that, and so does this package.
    """
    tensors = {}
    for layer, module in model.named_modules():
        adapter = module.adapters.get(name) if isinstance(module, LoRALinear) else None
        if isinstance(adapter, LowRank):
            tensors[f"{PREFIX}{layer}.lora_A.weight"] = adapter.lora_a
            tensors[f"{PREFIX}{layer}.lora_B.weight"] = adapter.lora_b
            if isinstance(adapter, DoRA):
                tensors[f"{PREFIX}{layer}.dora_scale"] = adapter.magnitude
            if adapter.scale != 1:
                tensors[f"{PREFIX}{layer}.alpha"] = mx.array(adapter.scale * adapter.rank, mx.float32)
    return tensors
