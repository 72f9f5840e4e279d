"""Each kernel's text, run on the CPU, against the plain functions; and strips against whole frames with both."""

from functools import partial

import cases
import cuda_on_cpu
import mlx.core as mx
import numpy as np
import pytest
import small

from mlx_wan.models import features, vae_passes
from mlx_wan.models.autoencoder import duplicate_up
from mlx_wan.models.features import FeatureCache
from mlx_wan.models.vae22 import average_down

pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(vae_passes, "cuda_kernel", partial(cuda_on_cpu.cuda_kernel, alone=True))


def drawn(name, *shape):
    return mx.array(small.random(name, shape))


def near(got, want):
    return got.shape == want.shape and cases.relative_error(np.array(got), np.array(want)) < 1e-6


@pytest.mark.parametrize("edges", [(True, True), (True, False), (False, False), (False, True)])
@pytest.mark.parametrize("memory", [0, 2])
def test_norm_silu(edges, memory):
    top, bottom = edges
    x, bias, gamma = drawn("x", 1, 3, 5, 4, 8), drawn("bias", 8), drawn("gamma", 8)
    before = drawn("before", 1, 2, 5, 4, 8) if memory else None
    above = None if top else drawn("above", 1, memory + 3, 2, 4, 8)
    padded, kept = vae_passes.norm_silu(x, bias, gamma, before, memory, above, top, bottom)
    y = (x + bias) * mx.rsqrt(mx.mean(mx.square(x + bias), axis=-1, keepdims=True)) * gamma
    want = y * mx.sigmoid(y)
    if before is not None:
        want = mx.concatenate([before, want], axis=1)
        assert near(kept, want[:, -2:])
    if not (top and bottom):
        zeros = mx.zeros_like(want[:, :, :1])
        want = mx.concatenate([zeros if above is None else above, want, *[zeros] * bottom], axis=2)
    assert near(padded, want)


@pytest.mark.parametrize(("rows", "behind"), [(6, 0), (4, 0), (6, 2), (8, 2)])
def test_add(rows, behind):
    x, y, bias = drawn("x", 1, 2, 6, 3, 8), drawn("y", 1, 2, rows, 3, 8), drawn("bias", 8)
    above = drawn("above", 1, 2, behind, 3, 8) if behind else None
    rest = x if above is None else mx.concatenate([above, x], axis=2)
    assert near(vae_passes.add(x, y, bias, above), rest[:, :, :rows] + y + bias)


@pytest.mark.parametrize(("t", "factor_t"), [(3, 1), (4, 2), (3, 2)])
@pytest.mark.parametrize(("c", "channels"), [(8, 8), (8, 16), (16, 16)])
def test_add_averages(t, factor_t, c, channels):
    x, y = drawn("x", 1, t, 6, 4, c), drawn("y", 1, -(-t // factor_t), 3, 2, channels)
    assert near(vae_passes.add_averages(y, x, factor_t, 2), y + average_down(x, channels, factor_t, 2))


@pytest.mark.parametrize("behind", [0, 3])
@pytest.mark.parametrize(("frames", "factor_t"), [(2, 1), (4, 2), (3, 2)])
def test_interleave(behind, frames, factor_t):
    phases, bias, shortcut = drawn("y", 1, frames, 6, 4, 32), drawn("bias", 8), drawn("x", 1, 2, 5, 3, 16)
    above = drawn("above", 1, 2, behind, 3, 16) if behind else None
    y = phases.reshape(1, frames, 6, 4, 2, 2, 8)
    rows = [mx.stack([y[:, :, i : i + 5, j : j + 3, i, j] for j in (0, 1)], axis=4) for i in (0, 1)]
    want = mx.stack(rows, axis=3).reshape(1, frames, 10, 6, 8) + bias
    assert near(vae_passes.interleave(phases, bias, None, factor_t), want)
    source = (shortcut if above is None else mx.concatenate([above, shortcut], axis=2))[:, :, :5]
    want = want + duplicate_up(source, 8, factor_t, 2, frames < 2 * factor_t)
    assert near(vae_passes.interleave(phases, bias, shortcut, factor_t, above), want)


@pytest.mark.parametrize("kind", ["small", "small-t2v-A14B"])
def test_a_clip_in_strips_by_kernels(kind, monkeypatch):
    """Three strips a piece and two pieces, on the CPU by the CUDA path."""
    model = cases.load_small("vae", kind)
    latents = drawn("latents", 1, 2, 16, 2, model.config.z_dim)
    want = mx.clip(model.pixels(model.denormalise(latents), FeatureCache()), -1, 1)
    monkeypatch.setattr(features, "STRIP", 1)
    monkeypatch.setattr(vae_passes, "has_kernels", lambda x: x.shape[-1] % 4 == 0)
    assert cases.relative_error(np.array(model.decode(latents)), np.array(want)) < 1e-5
