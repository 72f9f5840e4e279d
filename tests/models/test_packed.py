"""Packed matrices against the matrix they stand for."""

from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_wan.memory.liveness import trace
from mlx_wan.models import packed
from mlx_wan.models.packed import PackedLinear
from mlx_wan.weights.quantize import MODES

WAYS = [(mode, b, sizes[0]) for mode, (bits, sizes) in MODES.items() for b in bits]


def layer(mode, bits, group_size, bias=True):
    linear = nn.Linear(128, 64, bias=bias)
    return PackedLinear.from_linear(linear, group_size, bits, mode=mode)


@pytest.mark.parametrize(("mode", "bits", "group_size"), WAYS)
@pytest.mark.parametrize("rows", [1, packed.FEW_ROWS["CPU"], packed.FEW_ROWS["CPU"] + 1, 70])
@pytest.mark.parametrize("bias", [True, False])
def test_both_ways_give_what_mlx_gives(mode, bits, group_size, rows, bias):
    ours = layer(mode, bits, group_size, bias)
    x = mx.random.normal((2, rows, 128))[:, :rows] if rows > 4 else mx.random.normal((rows, 128))
    expected = nn.QuantizedLinear.__call__(ours, x)
    assert isinstance(ours, nn.QuantizedLinear)
    assert ours(x).shape == expected.shape
    assert mx.allclose(ours(x), expected, rtol=1e-5, atol=1e-5).item()


def test_few_rows_stay_packed_and_many_are_unpacked_once(monkeypatch):
    calls = []
    for name in ("quantized_matmul", "dequantize"):
        plain = getattr(mx, name)
        monkeypatch.setattr(mx, name, lambda *a, plain=plain, name=name, **k: calls.append(name) or plain(*a, **k))
    ours = layer("affine", 4, 64)
    few = packed.FEW_ROWS["CPU"]
    ours(mx.zeros((few, 128)))
    ours(mx.zeros((few + 1, 128)))
    assert calls == ["quantized_matmul", "dequantize"]


@pytest.mark.parametrize("few", [0, 1000])
def test_more_rows_than_mlx_takes_go_in_chunks(monkeypatch, few):
    monkeypatch.setattr(packed, "MAX_ROWS", 16)
    monkeypatch.setitem(packed.FEW_ROWS, "CPU", few)
    ours, x = layer("affine", 8, 64), mx.random.normal((1, 50, 128))
    sizes = []
    plain = PackedLinear._packed
    monkeypatch.setattr(PackedLinear, "_packed", lambda self, rows: sizes.append(len(rows)) or plain(self, rows))
    assert mx.allclose(ours(x), nn.QuantizedLinear.__call__(ours, x), atol=1e-5).item()
    assert sizes == ([16, 16, 16, 2] if few else [])


def test_results_have_the_inputs_dtype():
    ours = layer("affine", 4, 64, bias=False)
    for rows in (1, 40):
        assert ours(mx.zeros((rows, 128), mx.float16)).dtype == mx.float16


def test_gradients_pass_to_the_input():
    ours, x = layer("nvfp4", 4, 16), mx.random.normal((20, 128))
    weight = mx.dequantize(ours.weight, ours.scales, None, 16, 4, "nvfp4", dtype=mx.float32)
    gradient = mx.grad(lambda x: ours(x).sum())(x)
    assert mx.allclose(gradient, mx.broadcast_to(weight.sum(0), x.shape), atol=1e-4).item()


@pytest.mark.parametrize(("bias_type", "added"), [(mx.float32, 0), (mx.float16, 1)])
def test_many_rows_get_their_bias_within_the_product(bias_type, added):
    """A pass of its own would read and write them all once more; a bias of another type keeps its type."""
    ours = layer("affine", 4, 64)
    ours.bias = ours.bias.astype(bias_type)
    mx.eval(ours.parameters())
    names = Counter(op.name for op in trace(ours, [mx.zeros((200, 128))], "CUDA").operations)
    assert (names["AddMM"], names["Add"]) == (1 - added, added)
