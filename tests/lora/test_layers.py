"""Adapters beside linear layers: computed, trained, switched, taken away, and written."""

import re

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import safetensors.numpy
import small
from cases import GOLDEN, load_small, relative_error, transformer_inputs
from mlx.utils import tree_flatten

from mlx_wan.lora.fuse import merge
from mlx_wan.lora.layers import (
    DoRA,
    LoRALinear,
    LowRank,
    add_lora,
    attach,
    detach,
    linear_layers,
    lora_tensors,
    matrix_of,
    matrix_shape,
)
from mlx_wan.lora.load import read_lora, transformer_shapes
from mlx_wan.lora.save import save_lora
from mlx_wan.models.packed import PackedLinear
from mlx_wan.weights.quantize import Quantization, quantize_module

BLOCKS = re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])")


def velocity(model) -> np.ndarray:
    latents, context = transformer_inputs("lora", 1, (2, 4, 4))
    return np.array(model(latents, mx.array([500.0]), context))


def factors(layer: str, shape: tuple[int, int], rank: int = 4) -> tuple[mx.array, mx.array]:
    out_dims, in_dims = shape
    a = small.random(f"lora/{layer}/a", (rank, in_dims)) / in_dims**0.5
    return mx.array(a), mx.array(small.random(f"lora/{layer}/b", (out_dims, rank)))


def low_ranks(model, scale: float = 0.25) -> dict[str, LowRank]:
    shapes = {name: tuple(linear.weight.shape) for name, linear in linear_layers(model).items()}
    return {name: LowRank(*factors(name, shape), scale) for name, shape in shapes.items() if BLOCKS.fullmatch(name)}


def test_beside_the_matrix_is_as_in_the_matrix():
    model, merged = load_small("transformer"), load_small("transformer")
    adapters = low_ranks(model)
    assert len(adapters) == 20
    plain = velocity(model)
    attach(model, adapters)
    for name, linear in linear_layers(merged).items():
        if name in adapters:
            linear.weight = linear.weight + 0.7 * adapters[name].delta()
    for adapter in adapters.values():
        adapter.strength = 0.7
    assert relative_error(velocity(model), velocity(merged)) < 2e-6
    assert relative_error(velocity(model), plain) > 0.01


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("way", ["low rank", "DoRA", "several"])
def test_many_rows_change_the_matrix_and_few_what_comes_of_it(way, bits):
    linear = nn.Linear(64, 96)
    layer = LoRALinear(PackedLinear.from_linear(linear, 32, bits) if bits else linear)
    a, b = factors("wide", (96, 64))
    one = LowRank(a, b, 0.25, 0.7)
    layer.adapters["one"] = one if way != "DoRA" else DoRA(a, b, 1 + mx.abs(b[:, :1]), 0.25, 0.7)
    if way == "several":
        layer.adapters["two"] = LowRank(*factors("other", (96, 64)), 0.5)
    x = mx.array(small.random("rows", (2, 40, 64)))
    beside, few = layer(x), layer(x[:, :10])
    layer.eval()
    assert relative_error(np.array(layer(x)), np.array(beside)) < 2e-6
    assert mx.array_equal(layer(x[:, :10]), few)
    assert not mx.array_equal(layer(x), beside), "the sums are made in another order"
    for adapter in layer.adapters.values():
        adapter.strength = 0.0
    assert mx.array_equal(layer(x), layer.linear(x))


def test_several_at_once_and_away_again():
    model = load_small("transformer")
    names, plain = {n for n, _ in tree_flatten(model.parameters())}, velocity(model)
    attach(model, low_ranks(model), "one")
    attach(model, low_ranks(model), "two")
    doubled = load_small("transformer")
    attach(doubled, low_ranks(doubled, scale=0.5))
    assert relative_error(velocity(model), velocity(doubled)) < 2e-6
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.adapters["one"].strength = module.adapters["two"].strength = 0.0
    assert np.array_equal(velocity(model), plain)
    detach(model, "one")
    detach(model, "two")
    assert {n for n, _ in tree_flatten(model.parameters())} == names
    assert np.array_equal(velocity(model), plain)


def test_over_quantized_weights_the_adapter_is_whole():
    model = quantize_module(load_small("transformer"), "transformer", Quantization(4, 32))
    name = "blocks.1.ffn.2"
    linear = linear_layers(model)[name]
    assert matrix_shape(linear) == (96, 160)
    x = mx.array(small.random("lora/x", (5, 160)))
    before = linear(x)
    adapter = low_ranks(load_small("transformer"))[name]
    attach(model, {name: adapter})
    after = dict(model.named_modules())[name](x)
    assert relative_error(np.array(after - before), np.array(x @ adapter.delta().T)) < 1e-5


@pytest.mark.parametrize("quantized", [False, True])
def test_training_touches_the_adapters_alone(quantized):
    model = load_small("transformer")
    if quantized:
        quantize_module(model, "transformer", Quantization(8, 32))
    model.freeze()
    layers = add_lora(model, BLOCKS.fullmatch, rank=2, alpha=4)
    assert len(layers) == 20
    trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert trainable == {f"{layer}.adapters.default.lora_{ab}" for layer in layers for ab in "ab"}
    before = {name: mx.array(array) for name, array in tree_flatten(model.parameters())}
    start = velocity(model)
    latents, context = transformer_inputs("lora", 1, (2, 4, 4))

    def loss(model):
        return (model(latents, mx.array([500.0]), context) ** 2).mean()

    step, optimizer = nn.value_and_grad(model, loss), optim.Adam(1e-2)
    losses = []
    for _ in range(4):
        value, gradients = step(model)
        assert {name for name, _ in tree_flatten(gradients)} == trainable
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    assert losses[0] == pytest.approx(float((start**2).mean()), rel=1e-5)  # a zero B changes nothing
    assert losses[-1] < losses[0]
    changed = {name for name, array in tree_flatten(model.parameters()) if not mx.array_equal(array, before[name])}
    assert changed == trainable


def test_gradients_are_those_of_the_product():
    adapter = LowRank(*factors("gradient", (6, 8), rank=3), 0.5)
    x, y = mx.array(small.random("lora/g", (2, 5, 8))), mx.zeros((2, 5, 6))
    probe = mx.array(small.random("lora/p", (2, 5, 6)))

    def beside(a, b, x):
        return (LowRank(a, b, 0.5)(x, y) * probe).sum()

    def plain(a, b, x):
        return (0.5 * ((x @ a.T) @ b.T) * probe).sum()

    arguments = (adapter.lora_a, adapter.lora_b, x)
    for got, want in zip(*(mx.grad(f, argnums=(0, 1, 2))(*arguments) for f in (beside, plain)), strict=True):
        assert relative_error(np.array(got), np.array(want)) < 1e-6


def test_what_is_written(tmp_path):
    model = load_small("transformer")
    attach(model, low_ranks(model, scale=0.25))
    path = save_lora(tmp_path / "a.safetensors", model, metadata={"prompt": "x"})
    stored = safetensors.numpy.load_file(path)
    layer = "diffusion_model.blocks.1.ffn.0"
    assert len(stored) == 60
    assert stored[f"{layer}.lora_A.weight"].shape == (4, 96)
    assert stored[f"{layer}.lora_B.weight"].shape == (160, 4)
    assert stored[f"{layer}.alpha"] == 1.0  # 0.25 · rank
    for name, array in lora_tensors(model).items():
        assert np.array_equal(stored[name], np.array(array))
    half = safetensors.numpy.load_file(save_lora(tmp_path / "b.safetensors", model, dtype=mx.float16))
    assert {str(array.dtype) for array in half.values()} == {"float16", "float32"}
    with pytest.raises(ValueError, match="no LoRA called 'other'"):
        save_lora(tmp_path / "c.safetensors", model, name="other")
    assert not (tmp_path / "c.safetensors").exists()


# --- DoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_dora_is_its_formula_and_starts_without_a_change(quantized):
    mx.random.seed(3)
    linear = nn.Linear(32, 12)
    linear = linear.to_quantized(32, 8) if quantized else linear
    weight = np.array(matrix_of(linear), np.float64)
    x = mx.array(small.random("dora/x", (2, 5, 32)))
    adapter = DoRA.beside(linear, 3, 6.0, mx.float32)
    assert relative_error(np.array(adapter(x, linear(x), linear)), np.array(linear(x))) < 1e-6
    adapter.lora_b = mx.array(small.random("dora/b", (12, 3)))
    adapter.magnitude = mx.array(1 + np.abs(small.random("dora/m", (12, 1))))
    a, b, m = (np.array(v, np.float64) for v in (adapter.lora_a, adapter.lora_b, adapter.magnitude))
    turned = weight + 2 * b @ a
    turned = m * turned / np.linalg.norm(turned, axis=1, keepdims=True)
    want = np.array(x, np.float64) @ turned.T + np.array(linear.bias, np.float64)
    assert relative_error(np.array(adapter(x, linear(x), linear)), want) < 1e-6
    assert relative_error(np.array(adapter.delta(mx.array(weight, mx.float32))), turned - weight) < 1e-6
    adapter.strength = 0.5
    half = np.array(x, np.float64) @ (weight + 0.5 * (turned - weight)).T + np.array(linear.bias, np.float64)
    assert relative_error(np.array(adapter(x, linear(x), linear)), half) < 1e-6


def test_dora_is_written_read_and_merged(tmp_path):
    model = load_small("transformer")
    plain = velocity(model)
    layers = add_lora(model, re.compile(r"blocks\.1\..*").fullmatch, rank=2, alpha=1, dora=True)
    assert np.abs(velocity(model) - plain).max() < 1e-5
    for module in model.modules():
        if isinstance(module, DoRA):
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
            module.magnitude = module.magnitude * 1.1
    tuned = velocity(model)
    path = save_lora(tmp_path / "dora.safetensors", model)
    assert {name.rsplit(".", 1)[1] for name in safetensors.numpy.load_file(path)} == {"weight", "alpha", "dora_scale"}
    other = load_small("transformer")
    lora = read_lora(path, transformer_shapes(other.config))
    assert set(lora.layers) == set(layers)
    attach(other, {layer: lora.adapter(layer) for layer in lora.layers})
    assert relative_error(velocity(other), tuned) < 1e-6
    assert relative_error(tuned, plain) > 0.01
    merge(other)
    assert relative_error(velocity(other), tuned) < 1e-5


def test_dora_and_its_gradients_are_those_of_peft():
    with np.load(GOLDEN / "lora" / "dora.npz") as stored:
        want = {name: mx.array(stored[name]) for name in stored}
    linear = nn.Linear(32, 12)
    linear.weight, linear.bias = want["weight"], want["bias"]
    layer = LoRALinear(linear)
    layer.freeze()
    adapter = DoRA(want["a"], want["b"], want["magnitude"].reshape(-1, 1), 2.0)
    layer.adapters["default"] = adapter
    assert relative_error(np.array(layer(want["x"])), np.array(want["output"])) < 1e-6

    def loss(layer):
        return mx.square(layer(want["x"]) - want["target"]).mean()

    value, gradients = nn.value_and_grad(layer, loss)(layer)
    assert value.item() == pytest.approx(want["loss"].item(), rel=1e-6)
    for name, golden in (("lora_a", "a_grad"), ("lora_b", "b_grad"), ("magnitude", "magnitude_grad")):
        got = np.array(gradients["adapters"]["default"][name]).reshape(-1)
        assert relative_error(got, np.array(want[golden]).reshape(-1)) < 1e-6
