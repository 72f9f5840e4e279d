"""The CPU's own activations against MLX's, values and gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_wan.models import layers

POINTS = np.concatenate([np.linspace(-30, 30, 60_001), [0.0, 1e-30, -1e-6, 1e4, -1e4]]).astype(np.float32)


def test_quick_tanh_against_float64():
    found = np.array(layers.quick_tanh(mx.array(POINTS)))
    wanted = np.tanh(POINTS.astype(np.float64))
    assert np.abs(found - wanted).max() < 2e-7


def test_quick_tanh_passes_nan_on():
    assert np.isnan(np.array(layers.quick_tanh(mx.array([np.nan]))))


@pytest.mark.parametrize(("quick", "plain"), [(layers._cpu_gelu, nn.gelu_approx), (layers._cpu_silu, nn.silu)])
def test_activations_and_gradients(quick, plain):
    x = mx.array(POINTS)
    scale = np.maximum(np.abs(POINTS), 1)
    assert (np.abs(np.array(quick(x)) - np.array(plain(x))) / scale).max() < 3e-7
    slopes = [np.array(mx.grad(lambda x, f=f: f(x).sum())(x)) for f in (quick, plain)]
    assert np.abs(slopes[0] - slopes[1]).max() < 2e-6


def test_other_dtypes_keep_mlx_activations():
    x = mx.array([-1.0, 0.5, 3.0], mx.bfloat16)
    assert layers.GELU()(x).dtype == mx.bfloat16
    assert mx.array_equal(layers.SiLU()(x), nn.silu(x))


@pytest.mark.parametrize("keys", [50, 7])
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_in_pieces_has_the_same_gradients(monkeypatch, keys, compiled):
    """50 queries in pieces of 8 rows, the last one shorter."""
    monkeypatch.setattr(layers, "PIECE_BYTES", 8 * 4 * 2 * 3 * keys)
    q, k, v, probe = (mx.random.normal((2, n, 12), key=mx.random.key(i)) for i, n in enumerate((50, keys, keys, 50)))

    def gradients(in_pieces):
        def loss(q, k, v):
            out = layers.attend(q, k, v, num_heads=3, scale=0.5, in_pieces=in_pieces)
            return (out * probe).sum()

        function = mx.value_and_grad(loss, argnums=(0, 1, 2))
        value, grads = (mx.compile(function) if compiled and in_pieces else function)(q, k, v)
        return [value, *grads]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(32, 32), (32, 5), (32, 50), (30, 30), (30, 7)])
def test_attention_in_tiles_is_attention(monkeypatch, queries, keys, in_pieces):
    """What CUDA is given: never whole tiles of queries with keys that are none."""
    lengths = queries, keys, keys, queries
    q, k, v, probe = (mx.random.normal((2, n, 12), key=mx.random.key(i)) for i, n in enumerate(lengths))
    seen = []

    def gradients(in_pieces=False):
        def loss(q, k, v):
            return (layers.attend(q, k, v, num_heads=3, scale=0.5, in_pieces=in_pieces) * probe).sum()

        value, grads = mx.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
        return [value, *grads]

    plain, fast = gradients(), mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(layers, "TILE", 16)
    monkeypatch.setattr(layers, "_fused_backward", lambda q: True)
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda q, k, v, **options: seen.append((q.shape[2] % 16, k.shape[2] % 16)) or fast(q, k, v, **options),
    )
    for got, want in zip(gradients(in_pieces), plain, strict=True):
        np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4, atol=1e-5)
    assert seen == [(0, 0) if in_pieces or queries == 32 else (queries % 16, keys % 16)]
