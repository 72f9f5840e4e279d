"""The measures of an evaluation."""

import numpy as np
import pytest

from mlx_wan.training.evaluate import ssim


def clip(seed=0, shape=(2, 24, 20, 3)):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_ssim_is_its_formula_in_a_window():
    """A frame of 11 by 11 pixels has one window: the formula of the paper, written out."""
    x, y = clip(0, (1, 11, 11, 3)).astype(np.float64), clip(1, (1, 11, 11, 3)).astype(np.float64)
    y = 0.5 * x + 0.5 * y
    taps = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    window = np.outer(taps, taps) / taps.sum() ** 2
    want = []
    for channel in range(3):
        a, b = x[0, ..., channel], y[0, ..., channel]
        ma, mb = (window * a).sum(), (window * b).sum()
        va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
        cov = (window * (a - ma) * (b - mb)).sum()
        c1, c2 = 0.02**2, 0.06**2
        want.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert ssim(x, y) == pytest.approx(np.mean(want), rel=1e-9)


def test_ssim_of_equal_clips_is_one_and_falls_with_noise():
    x = clip()
    assert ssim(x, x) == pytest.approx(1)
    assert ssim(x, 0.8 * x + 0.2 * clip(1)) > ssim(x, 0.4 * x + 0.6 * clip(1)) > ssim(x, clip(2)) > -0.1
    assert ssim(clip(0, (1, 8, 8, 3)), clip(0, (1, 8, 8, 3))) == pytest.approx(1)
