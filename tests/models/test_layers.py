"""The CPU's own activations against MLX's, values and gradients."""

import cases
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import small

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


def test_quick_exp_against_float64():
    x = np.linspace(-87, 0, 20001, dtype=np.float32)
    found, want = np.array(layers.quick_exp(mx.array(x))), np.exp(x.astype(np.float64))
    assert np.abs(found / want - 1).max() < 5e-6, "MLX's own: 3.9e-6"
    assert np.abs(found / want - 1)[x > -2].max() < 3e-7
    assert np.array(layers.quick_exp(mx.array([-1e30, 0.0]))).tolist() == pytest.approx([0, 1], abs=1e-37)
    assert np.isnan(np.array(layers.quick_exp(mx.array([np.nan]))))


def test_attention_of_few_scores_has_mlx_values_and_gradients(monkeypatch):
    """Below the number from which MLX's softmax is taken, and above it."""
    arrays = [mx.array(small.random(name, (2, n, 24))) * 4 for name, n in (("q", 7), ("k", 9), ("v", 9))]
    weights = mx.array(small.random("weights", (2, 7, 24)))

    def loss(q, k, v):
        return (layers.attend(q, k, v, 3, 0.35) * weights).sum()

    found = [layers.attend(*arrays, 3, 0.35), *mx.grad(loss, argnums=(0, 1, 2))(*arrays)]
    monkeypatch.setattr(layers, "FEW_SCORES", 2 * 3 * 7 * 9 - 1)
    monkeypatch.setattr(layers, "quick_exp", None)
    want = [layers.attend(*arrays, 3, 0.35), *mx.grad(loss, argnums=(0, 1, 2))(*arrays)]
    for a, b in zip(found, want, strict=True):
        assert cases.relative_error(np.array(a), np.array(b)) < 1e-6


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


@pytest.mark.parametrize(("queries", "keys", "pieces"), [(32, 5, True), (32, 64, False), (30, 5, False)])
def test_on_cuda_attention_never_takes_the_gradient_that_loses_the_process(monkeypatch, queries, keys, pieces):
    monkeypatch.setattr(layers, "TILE", 16)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    made, original = [], layers._attention_in_pieces
    monkeypatch.setattr(layers, "_attention_in_pieces", lambda scale: made.append(1) or original(scale))
    arrays = [mx.random.normal((1, n, 12), key=mx.random.key(i)) for i, n in enumerate((queries, keys, keys))]
    exact = layers.attend(*arrays, num_heads=3, scale=0.5)
    assert not made  # in float32 MLX has no fused gradient
    found = layers.attend(*(a.astype(mx.bfloat16) for a in arrays), num_heads=3, scale=0.5)
    assert bool(made) == pieces
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(exact), atol=0.03)


@pytest.mark.parametrize(("queries", "keys"), [(30, 5), (30, 37), (32, 64)])
def test_where_a_fused_gradient_is_training_takes_it_at_whole_tiles(monkeypatch, queries, keys):
    q, k, v, probe = (
        mx.random.normal((2, n, 24), key=mx.random.key(i)) for i, n in enumerate((queries, keys, keys, queries))
    )

    def gradients():
        return mx.grad(lambda *qkv: (layers.attend(*qkv, 3, 0.5, in_pieces=True) * probe).sum(), (0, 1, 2))(q, k, v)

    want, seen, fast = gradients(), [], mx.fast.scaled_dot_product_attention

    def watched(q, k, v, **options):
        seen.append((q.shape[2], k.shape[2], v.shape[2]))
        return fast(q, k, v, **options)

    monkeypatch.setattr(layers, "TILE", 16)
    monkeypatch.setattr(layers, "FEW_SCORES", 0)
    monkeypatch.setattr(layers, "_has_fused_gradient", lambda q, head_dim: head_dim == 8)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    for got, exact in zip(gradients(), want, strict=True):
        assert got.shape == exact.shape
        np.testing.assert_allclose(np.array(got), np.array(exact), rtol=1e-4, atol=1e-5)
    assert seen
    assert all(length % 16 == 0 for lengths in seen for length in lengths)


# --- kernels that are not too long -----------------------------------------------------------------------------


def test_attention_of_many_queries_is_several_kernels_of_the_same_values(monkeypatch):
    monkeypatch.setattr(layers, "FEW_SCORES", 0)
    q, k, v = (mx.random.normal((2, n, 12), key=mx.random.key(i)) for i, n in enumerate((50, 21, 21)))
    want, calls = layers.attend(q, k, v, 3, 0.5), []
    fast = mx.fast.scaled_dot_product_attention

    def counted(q, *args, **kwargs):
        calls.append(q.shape[2])
        return fast(q, *args, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    monkeypatch.setitem(layers.KERNEL_FLOP, "CPU", 4 * 2 * 8 * 21 * 12)  # of 8 queries of both samples
    got = layers.attend(q, k, v, 3, 0.5)
    assert calls == [8] * 6 + [2]
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=0, atol=1e-6)
    layers.attend(q, k, v, 3, 0.5, mask=mx.zeros((50, 21)))
    assert calls[7:] == [50], "the text encoder's is short"


@pytest.mark.parametrize("in_pieces", [False, True])
def test_their_gradients_are_the_same_too(monkeypatch, in_pieces):
    q, k, v, probe = (mx.random.normal((1, n, 12), key=mx.random.key(i)) for i, n in enumerate((20, 9, 9, 20)))

    def gradients():
        return mx.grad(lambda *qkv: (layers.attend(*qkv, 3, 0.5, in_pieces=in_pieces) * probe).sum(), (0, 1, 2))(
            q, k, v
        )

    want = gradients()
    monkeypatch.setitem(layers.KERNEL_FLOP, "CPU", 4 * 6 * 9 * 12)
    for a, b in zip(gradients(), want, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "most", "sizes"), [(7, 1, [1] * 7), (7, 30, [3, 3, 1]), (7, 69, [4, 3]), (7, 70, [7])]
)
def test_rows_are_taken_so_many_at_a_time(monkeypatch, length, most, sizes):
    monkeypatch.setitem(layers.KERNEL_FLOP, "CPU", most)
    seen = []
    x = mx.arange(length)[None, :, None]
    out = layers.by_rows(lambda rows: seen.append(rows.shape[1]) or 2 * rows, x, flop=10)
    assert seen == sizes
    assert mx.array_equal(out, 2 * x)


def test_rows_are_few_where_they_are_wide_between(monkeypatch):
    monkeypatch.setitem(layers.BETWEEN_BYTES, "CPU", 2 * 4 * 30)
    x, seen = mx.arange(2 * 9 * 3.0).reshape(2, 9, 3), []
    out = layers.by_rows(lambda rows: seen.append(rows.shape[1]) or 2 * rows, x, flop=1e9, between=30)
    assert seen == [3, 3, 3], "four rows of both samples would fit, and parts are alike"
    assert mx.array_equal(out, 2 * x)


def test_only_metal_is_watched():
    assert set(layers.KERNEL_FLOP) == {"Metal"}
