"""The objectives against their formulas, written out in NumPy."""

import math
from statistics import NormalDist

import mlx.core as mx
import numpy as np
import pytest

from mlx_wan.training.objective import (
    SIGMA_SAMPLINGS,
    TRAIN_TIMESTEPS,
    WEIGHTINGS,
    add_noise,
    autoencoder_loss,
    flow_loss,
    psnr,
    sample_sigmas,
    shift_sigma,
)

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def test_shift_moves_noise_levels_up_and_keeps_the_ends():
    u = np.linspace(0, 1, 11, dtype=np.float32)
    np.testing.assert_allclose(shift_sigma(mx.array(u), 3.0), 3 * u / (1 + 2 * u), rtol=1e-6)
    assert shift_sigma(mx.array(0.5), 5.0).item() == pytest.approx(5 / 6)
    np.testing.assert_array_equal(shift_sigma(mx.array(u), 1.0), u)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_of_a_batch_fall_one_into_each_interval_in_any_order(shift):
    batch, seen = 8, []
    for seed in range(50):
        sigmas = np.array(sample_sigmas(mx.random.key(seed), batch, shift), np.float64)
        u = sigmas / (shift - (shift - 1) * sigmas)  # the way back
        np.testing.assert_array_equal(np.sort(np.floor(u * batch)), np.arange(batch))
        seen.append(u)
    firsts = [int(u[0] * batch) for u in seen]
    assert len(set(firsts)) > 4, "the place in the batch says nothing about the level"
    offsets = np.concatenate(seen) * batch % 1
    assert abs(offsets.mean() - 0.5) < 0.05
    assert abs(offsets.std() - 12**-0.5) < 0.03  # uniform within the interval


@pytest.mark.parametrize(("sampling", "mean", "std"), [("logit-normal", 0.4, 1.3), ("sigmoid", 0.0, 1.0)])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_logits_of_the_unshifted_levels_are_normal(sampling, mean, std, shift):
    sigmas = [np.array(sample_sigmas(mx.random.key(i), 16, shift, sampling, mean, std), np.float64) for i in range(40)]
    u = np.concatenate(sigmas)
    assert ((u > 0) & (u < 1)).all()
    u = u / (shift - (shift - 1) * u)
    shares = [NormalDist(mean, std).cdf(logit) for logit in np.log(u / (1 - u))]
    for row in np.split(np.array(shares), 40):
        np.testing.assert_array_equal(np.sort(np.floor(row * 16)), np.arange(16))  # still stratified


def test_uniform_is_what_was_always_drawn():
    key = mx.random.key(3)
    np.testing.assert_array_equal(sample_sigmas(key, 8, 3.0, "uniform"), sample_sigmas(key, 8, 3.0))
    assert set(SIGMA_SAMPLINGS) == {"uniform", "logit-normal", "sigmoid"}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_have_mean_one_over_uniform_levels(name):
    sigmas = (np.arange(10000) + 0.5) / 10000
    weights = np.array(WEIGHTINGS[name](mx.array(sigmas.astype(np.float32))), np.float64)
    assert weights.mean() == pytest.approx(1, abs=1e-4)
    assert (weights >= 0).all()
    x = sigmas[[0, 2500, 5000]]
    bell = np.exp(-2 * (x - 0.5) ** 2) - np.exp(-0.5)
    want = {"none": np.ones(3), "bell": bell / 0.249095, "cosmap": 2 / np.pi / (1 - 2 * x + 2 * x * x)}[name]
    np.testing.assert_allclose(weights[[0, 2500, 5000]], want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_noise_is_mixed_in_by_sample_or_by_frame(shape):
    x, noise, sigmas = normal(2, 3, 4, 4, 5), normal(2, 3, 4, 4, 5), RNG.random(shape).astype(np.float32)
    s = sigmas.reshape(*shape, *[1] * (5 - len(shape)))
    got = add_noise(mx.array(x), mx.array(noise), mx.array(sigmas))
    np.testing.assert_allclose(got, (1 - s) * x + s * noise, rtol=1e-5, atol=1e-6)


class FixedVelocity:
    """Answers with a given velocity and remembers what it was asked."""

    def __init__(self, velocity):
        self.velocity = velocity

    def __call__(self, latents, timesteps, context, image=None):
        self.latents, self.timesteps, self.context = np.array(latents), np.array(timesteps), np.array(context)
        return mx.array(self.velocity)


@pytest.fixture
def sample():
    names = ("latents", "noise", "velocity")
    arrays = {name: normal(2, 3, 2, 2, 4) for name in names}
    return {**arrays, "context": normal(2, 5, 6), "sigmas": np.float32([0.3, 0.9])}


def loss_of(model, sample, keep_first):
    names = ("latents", "context", "noise", "sigmas")
    return np.array(flow_loss(model, *(mx.array(sample[name]) for name in names), mx.array(keep_first)))


def test_flow_loss_is_the_squared_error_of_noise_minus_clean(sample):
    model = FixedVelocity(sample["velocity"])
    got = loss_of(model, sample, [False, False])
    x, noise, sigmas = sample["latents"], sample["noise"], sample["sigmas"]
    expected = ((sample["velocity"] - (noise - x)) ** 2).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    s = sigmas[:, None, None, None, None]
    np.testing.assert_allclose(model.latents, (1 - s) * x + s * noise, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.timesteps, np.repeat(1000 * sigmas[:, None], 3, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(model.context, sample["context"])
    assert TRAIN_TIMESTEPS == 1000


def test_first_frame_of_image_to_video_is_clean_at_timestep_0_and_outside_the_loss(sample):
    model = FixedVelocity(sample["velocity"])
    got = loss_of(model, sample, [True, False])  # one of each in a batch
    x, noise, sigmas = sample["latents"], sample["noise"], sample["sigmas"]
    np.testing.assert_array_equal(model.latents[0, 0], x[0, 0])
    assert (model.latents[1, 0] != x[1, 0]).all()
    np.testing.assert_allclose(model.timesteps, 1000 * np.float32([[0, 0.3, 0.3], [0.9, 0.9, 0.9]]), rtol=1e-6)
    error = (sample["velocity"] - (noise - x)) ** 2
    np.testing.assert_allclose(got, [error[0, 1:].mean(), error[1].mean()], rtol=1e-5)
    # Whatever is predicted for the given frame, the loss does not see it; without a given frame it does.
    sample["velocity"][:, 0] += 100
    again = loss_of(FixedVelocity(sample["velocity"]), sample, [True, False])
    assert again[0] == got[0]
    assert again[1] > 2 * got[1]
    assert sigmas[0] > 0


class FixedAutoencoder:
    """Moments that are given; pixels that are a simple function of the latents."""

    def __init__(self, mean, log_variance):
        self.mean, self.log_variance = mx.array(mean), mx.array(log_variance)

    def moments(self, video, cache):
        self.video_dtype = video.dtype
        return self.mean, self.log_variance

    def pixels(self, latents, cache):
        return mx.tanh(latents[..., :3])


def test_autoencoder_loss_is_error_plus_weighted_divergence():
    mean, log_variance, video = normal(2, 3, 2, 2, 4), normal(2, 3, 2, 2, 4), normal(2, 3, 2, 2, 3)
    log_variance[0, 0, 0, 0, 0] = 50.0  # is cut to 10
    key = mx.random.key(3)
    model = FixedAutoencoder(mean, log_variance)
    loss, parts = autoencoder_loss(model, mx.array(video), key, 0.25, mx.float32)  # type: ignore[arg-type]
    cut = np.clip(log_variance, -20, 10).astype(np.float64)
    noise = np.array(mx.random.normal(mean.shape, key=key))
    error = np.tanh((mean + np.exp(cut / 2) * noise)[..., :3]) - video
    kl = 0.5 * (mean.astype(np.float64) ** 2 + np.exp(cut) - 1 - cut).mean()
    assert parts["kl"].item() == pytest.approx(kl, rel=1e-5)
    assert parts["mse"].item() == pytest.approx((error**2).mean(), rel=1e-5)
    assert loss.item() == pytest.approx(np.abs(error).mean() + (error**2).mean() + 0.25 * kl, rel=1e-5)


def test_autoencoder_computes_in_the_asked_dtype_and_its_loss_in_float32():
    model = FixedAutoencoder(normal(1, 1, 2, 2, 4), normal(1, 1, 2, 2, 4))
    video = mx.array(normal(1, 1, 2, 2, 3))
    loss, _ = autoencoder_loss(model, video, mx.random.key(0), 0.1, mx.bfloat16)  # type: ignore[arg-type]
    assert (model.video_dtype, loss.dtype) == (mx.bfloat16, mx.float32)


def test_psnr():
    assert psnr(4.0) == 0
    assert psnr(0.04) == pytest.approx(20)
    assert psnr(1 / 255**2, peak=1.0) == pytest.approx(20 * math.log10(255))
    assert psnr(0) == math.inf
