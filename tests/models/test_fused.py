"""The passes between a block's matrices: their plain form against float64, their kernels against the plain form."""

import re

import cuda_on_cpu
import mlx.core as mx
import numpy as np
import pytest

from mlx_wan import backend
from mlx_wan.models import fused, fused_gradients, layers, row_kernels

EPS, WIDTH, HEADS, LENGTH = 1e-6, 32, 4, 12
ON_CUDA = backend.device_name() == "CUDA"


def drawn(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed + 7 * sum(shape)))


def tables(groups, batch=2):
    return [drawn(batch, groups, WIDTH, seed=i) for i in range(3)]


def layer_norm(x, gain, shift):
    """In float64; gain and shift as (B, L, C)."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * gain + shift


def spread(table):
    """(B, G, C) -> (B, L, C), float64."""
    return np.repeat(np.array(table, np.float64), LENGTH // table.shape[1], axis=1)


@pytest.mark.parametrize("groups", [1, 3, LENGTH])
def test_rows_against_float64(groups):
    x, y, (gate, gain, shift) = drawn(2, LENGTH, WIDTH), drawn(2, LENGTH, WIDTH, seed=5), tables(groups)
    wide = np.array(x, np.float64), np.array(y, np.float64)
    added = wide[0] + wide[1] * spread(gate)
    np.testing.assert_allclose(fused.add(x, y, gate), added, atol=1e-5)
    np.testing.assert_allclose(fused.add(x, y), wide[0] + wide[1], atol=1e-5)
    np.testing.assert_allclose(
        fused.norm(x, gain, shift, EPS, mx.float32), layer_norm(wide[0], spread(gain), spread(shift)), atol=1e-4
    )
    got = fused.add_norm(x, y, gate, gain[:1, :1], shift[:1, :1], EPS, mx.float32)
    np.testing.assert_allclose(got[0], added, atol=1e-5)
    want = layer_norm(added, np.array(gain[:1, :1], np.float64), np.array(shift[:1, :1], np.float64))
    np.testing.assert_allclose(got[1], want, atol=1e-4)


def test_heads_against_complex_numbers():
    x, weight, angle = drawn(2, LENGTH, WIDTH), 1 + drawn(WIDTH), drawn(LENGTH, 1, WIDTH // HEADS // 2, seed=3)
    wide = np.array(x, np.float64)
    wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * np.array(weight, np.float64)
    np.testing.assert_allclose(fused.rms_norm(x, weight, EPS, mx.float32, HEADS), wide, atol=1e-5)
    pairs = wide.reshape(2, LENGTH, HEADS, -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * np.array(angle, np.float64))
    want = np.stack([turned.real, turned.imag], axis=-1).reshape(wide.shape)
    got = fused.rms_norm(x, weight, EPS, mx.float32, HEADS, (mx.cos(angle), mx.sin(angle)))
    np.testing.assert_allclose(got, want, atol=1e-5)


def calls(dtype=mx.bfloat16, groups=3):
    """Every pass with every choice it has: (plain form, its fixed arguments, arrays)."""
    x, y, (gate, gain, shift) = drawn(2, LENGTH, WIDTH), drawn(2, LENGTH, WIDTH, seed=5).astype(dtype), tables(groups)
    angle = drawn(LENGTH, 1, WIDTH // HEADS // 2, seed=3)
    weight = 1 + drawn(WIDTH)
    return [
        (fused._plain_norm, (EPS, dtype), (x, gain, shift)),
        (fused._plain_norm, (EPS, dtype), (x, gain[:1, :1], shift[:1, :1])),
        (fused._plain_add, (), (x, y)),
        (fused._plain_add, (), (x, y, gate)),
        (fused._plain_add_norm, (EPS, dtype), (x, y, gain, shift)),
        (fused._plain_add_norm, (EPS, dtype), (x, y, gate, gain[:1, :1], shift[:1, :1])),
        (fused._plain_rms, (EPS, dtype, HEADS), (y, weight)),
        (fused._plain_rms, (EPS, dtype, HEADS), (y, weight, mx.cos(angle), mx.sin(angle))),
        (fused._plain_gelu, (), (y,)),
    ]


@pytest.fixture
def somewhere(monkeypatch):
    """Kernels run: on CUDA if there is a GPU, else their text as C++."""
    if not ON_CUDA:
        if cuda_on_cpu.COMPILER is None:
            pytest.skip("no C++ compiler")
        monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_on_cpu.cuda_kernel, raising=False)
    layers.cuda_kernel.cache_clear()
    yield
    layers.cuda_kernel.cache_clear()


def error(got, want):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    return mx.sqrt(mx.square(got - want).mean() / mx.square(want.astype(mx.float32)).mean()).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16] if ON_CUDA else [mx.bfloat16])
@pytest.mark.parametrize("index", range(len(calls())))
def test_kernels_give_what_plain_mlx_gives(somewhere, index, dtype):
    plain, fixed, arrays = calls(dtype)[index]
    for got, want in zip(fused.KERNELS[plain](*fixed, *arrays), plain(*fixed, *arrays), strict=True):
        assert error(got, want) < (2e-6 if dtype == mx.float32 else 5e-3), plain.__name__


@pytest.mark.parametrize(("dtype", "groups"), [(mx.float32, 3), (mx.bfloat16, 1), (mx.bfloat16, LENGTH)])
@pytest.mark.parametrize("index", range(len(calls())))
def test_kernels_of_gradients_give_what_plain_mlx_gives(somewhere, index, dtype, groups):
    plain, fixed, arrays = calls(dtype, groups)[index]
    if groups == LENGTH and not any(a.ndim == 3 and a.shape[1] == groups for a in arrays[1:]):
        pytest.skip("has no groups")
    results = plain(*fixed, *arrays)
    cotangents = [drawn(2, LENGTH, WIDTH, seed=8 + i).astype(r.dtype) for i, r in enumerate(results)]
    run = fused.differentiable(fused.KERNELS[plain], fused.GRADIENTS[plain], *fixed)
    got = mx.vjp(lambda *a: list(run(*a)), list(arrays), cotangents)[1]
    # bfloat16 is rounded in the middle by the plain form; the truth is the plain form of the same numbers in float32.
    exact = tuple(mx.float32 if f == dtype else f for f in fixed)
    wide = [[a.astype(mx.float32) for a in some] for some in (arrays, cotangents)]
    want = mx.vjp(lambda *a: list(plain(*exact, *a)), *wide)[1]
    trained = 2 if plain is fused._plain_rms else len(arrays)
    for a, b, primal in list(zip(got, want, arrays, strict=True))[:trained]:
        assert a.dtype == primal.dtype
        assert error(a.astype(mx.float32), b) < (3e-6 if dtype == mx.float32 else 5e-3), plain.__name__


@pytest.mark.parametrize(
    ("length", "groups", "rows"),
    [(112, (7,), 16), (112, (7, 1), 16), (27280, (1,), 31), (12, (12, 1), 1), (64, (), 32)],
)
def test_rows_of_a_block_share_the_rows_of_every_table(length, groups, rows):
    assert fused_gradients.rows_of_a_block(length, *groups) == rows


def test_kernels_are_written_whole(monkeypatch):
    """Without a GPU: what is handed to MLX has the right names, shapes and types, and no place left to fill."""
    launched = []

    def cuda_kernel(name, inputs, outputs, source, header=""):
        assert not re.findall(r"//[A-Z]+", source), name
        for array in (*inputs, *outputs):
            assert re.search(rf"\b{array}\b", source), (name, array)

        def launch(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            launched.append((name, grid, threadgroup))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel, raising=False)
    layers.cuda_kernel.cache_clear()
    for plain, fixed, arrays in calls():
        for got, want in zip(fused.KERNELS[plain](*fixed, *arrays), plain(*fixed, *arrays), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype), plain.__name__
    layers.cuda_kernel.cache_clear()
    assert len(launched) == len(calls()), "one launch each"
    assert all(grid[0] % threads[0] == 0 and threads[0] % 32 == 0 for _, grid, threads in launched)


@pytest.mark.parametrize("vector", [4, 8])
@pytest.mark.parametrize("width", [8, 64, 256, 1536, 3072, 5120, 14336])
def test_threads_cover_a_row(width, vector):
    threads, turns = row_kernels.threads_of(width, vector)
    assert threads % 32 == 0
    assert 32 <= threads <= 512
    assert threads * (turns - 1) * vector < width <= threads * turns * vector


@pytest.mark.parametrize(("width", "where", "kernels"), [(32, "CUDA", 1), (36, "CUDA", 0), (32, "Metal", 0)])
def test_kernels_where_there_are_some_and_rows_are_whole_vectors(monkeypatch, width, where, kernels):
    ran = []

    def kernel(*arguments):
        ran.append(1)
        return fused._plain_add(*arguments)

    monkeypatch.setattr(fused, "target", lambda: where)
    monkeypatch.setitem(fused.KERNELS, fused._plain_add, kernel)
    x, y = drawn(1, 4, width), drawn(1, 4, width, seed=1)
    np.testing.assert_allclose(fused.add(x, y), x + y)
    assert len(ran) == kernels
    monkeypatch.setattr(fused, "target", layers.target)
    with layers.traceable("CPU"):
        fused.add(x, y)
    assert len(ran) == kernels, "a graph that is traced is MLX's own"
