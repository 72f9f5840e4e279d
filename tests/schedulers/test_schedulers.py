"""What must hold of every sampler, whatever the reference says."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_wan.errors import UserError
from mlx_wan.schedulers import DMD, SCHEDULERS, make_scheduler

STEPS = (1, 2, 3, 6, 20, 50)
SHIFTS = (1.0, 3.0, 5.0, 8.0, 12.0)


def run(scheduler, latents, velocity):
    """All steps with velocity(x, sigma), the latents after each."""
    state, after = scheduler.init(), []
    for sigma in scheduler.sigmas[:-1]:
        latents, state = scheduler.step(velocity(latents, float(sigma)), latents, state)
        after.append(np.array(latents))
    return after


def noise(seed=0, shape=(1, 2, 3, 4, 5)):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_levels_fall_from_one_to_zero(name, steps, shift):
    s = make_scheduler(name, steps, shift)
    assert s.sigmas.shape == (steps + 1,)
    assert s.sigmas.dtype == np.float32
    assert 0.999 <= s.sigmas[0] <= 1
    assert s.sigmas[-1] == 0
    assert np.all(np.diff(s.sigmas) < 0)
    assert s.timesteps.shape == (steps,)
    assert np.all((s.timesteps > 0) & (s.timesteps <= 1000))
    # Cut to whole numbers, never rounded up; 949.9999999 becomes 949, as in the official code.
    behind = 1000 * s.sigmas[:-1].astype(np.float64) - s.timesteps
    assert np.all((behind > -1e-4) & (behind < 1 + 1e-4))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "dmd"])  # which adds noise of its own
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_a_straight_flow_is_followed_exactly(name, steps, shift):
    """With a constant velocity every level has one right answer: x + (sigma - sigma_0) * velocity."""
    s = make_scheduler(name, steps, shift)
    start, v = noise(1), noise(2)
    for i, got in enumerate(run(s, mx.array(start), lambda x, sigma: mx.array(v))):
        want = start + (s.sigmas[i + 1] - s.sigmas[0]) * v
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_lands_on_the_last_clean_prediction(name):
    s = make_scheduler(name, 6, 5.0)
    target = noise(3)
    *_, last = run(s, mx.array(noise(1)), lambda x, sigma: (x - mx.array(target)) / sigma)
    np.testing.assert_allclose(last, target, rtol=0, atol=1e-5)


def exact_and_field(start):
    """For data ~ N(0, 1/4) the flow is linear, x = start * spread(sigma) / spread(sigma_0)."""

    def spread(sigma):
        return np.sqrt((1 - sigma) ** 2 / 4 + sigma**2)

    def velocity(x, sigma):
        return x * ((sigma - (1 - sigma) / 4) / spread(sigma) ** 2)

    return lambda sigma_0: start * (spread(0.0) / spread(sigma_0)), velocity


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_error_falls_with_the_promised_order(name, order):
    """Four times the steps must divide the error by about 4^order; half of that is asked for."""
    start = noise(4)
    exact, velocity = exact_and_field(start)
    errors = []
    for steps in (10, 40):
        s = make_scheduler(name, steps, 3.0)
        errors.append(np.abs(run(s, mx.array(start), velocity)[-1] - exact(float(s.sigmas[0]))).max())
    assert errors[0] / errors[1] > 4**order / 2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_step_changes_nothing_it_is_given(name):
    """The same state gives the same answer twice, also after later steps were taken from it."""
    s = make_scheduler(name, 4, 5.0)
    x, v = mx.array(noise(1)), mx.array(noise(2))
    x, state = s.step(v, x, s.init())
    before = np.array(x)
    first, _ = s.step(v, x, state)
    s.step(v * 2, x * 3, state)
    again, _ = s.step(v, x, state)
    assert np.array_equal(np.array(first), np.array(again))
    assert np.array_equal(np.array(x), before)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_half_precision_in_float32_out(name):
    s = make_scheduler(name, 2, 5.0)
    v, x = mx.array(noise(2)).astype(mx.bfloat16), mx.array(noise(1)).astype(mx.bfloat16)
    got, _ = s.step(v, x, s.init())
    assert got.dtype == mx.float32
    want, _ = s.step(v.astype(mx.float32), x.astype(mx.float32), s.init())
    assert np.array_equal(np.array(got), np.array(want))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_finished_run_says_so(name):
    s = make_scheduler(name, 1, 5.0)
    x, state = s.step(mx.array(noise(2)), mx.array(noise(1)), s.init())
    with pytest.raises(ValueError, match="all 1 steps"):
        s.step(x, x, state)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "6", None, True])
def test_bad_step_counts(name, steps):
    with pytest.raises(UserError, match="inference steps"):
        make_scheduler(name, steps, 5.0)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shift", [0, -1.0, float("nan"), float("inf"), "5", 1e12])
def test_bad_shifts(name, shift):
    with pytest.raises(UserError, match="shift"):
        make_scheduler(name, 20, shift)


def test_unknown_name():
    with pytest.raises(UserError, match="unipc, dpm\\+\\+, euler"):
        make_scheduler("ddim", 20, 5.0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_largest_run(name):
    s = make_scheduler(name, 1000, 12.0)
    target = mx.array(noise(5, (3,)))
    state, x = s.init(), mx.array(noise(6, (3,)))
    for sigma in s.sigmas[:-1]:
        x, state = s.step((x - target) / float(sigma), x, state)
        mx.eval(x)
    np.testing.assert_allclose(np.array(x), np.array(target), rtol=0, atol=1e-4)


# --- timesteps that are given ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpm++", "euler", "dmd"])
def test_given_timesteps_are_the_levels(name):
    s = make_scheduler(name, 50, 5.0, (1000, 757, 522.5))
    np.testing.assert_array_equal(s.timesteps, np.array([1000, 757, 522.5], np.float32))
    np.testing.assert_array_equal(s.sigmas, np.array([1, 0.757, 0.5225, 0], np.float32))


@pytest.mark.parametrize(
    "timesteps",
    [(), (1001, 500), (1000, 0), (500, 757), (757, 757), (1000, float("nan")), (1000, "757"), (True,), (-1,)],
)
def test_other_lists_are_refused(timesteps):
    with pytest.raises(UserError, match="give numbers that fall, from at most 1000 to above 0"):
        make_scheduler("euler", 1, 1.0, timesteps)


def test_unipc_takes_no_list():
    with pytest.raises(UserError, match=r"unipc takes no list of timesteps; choose one of dpm\+\+, euler, dmd"):
        make_scheduler("unipc", 3, 5.0, (1000, 757))


def test_dmd_noises_its_prediction_anew():
    s = DMD(3, timesteps=(1000, 757, 522), seed=5)
    shape, clean = (1, 2, 8, 8, 16), noise(3, (1, 2, 8, 8, 16))
    first, _ = s.step(mx.zeros(shape), mx.array(clean), s.init())
    added = (np.array(first) - (1 - 0.757) * clean) / 0.757
    assert abs(added.mean()) < 0.1
    assert abs(added.std() - 1) < 0.1
    # what another start gets there is the same noise, another step's and another seed's are not
    for other, same in ((s.noise(0, shape), True), (s.noise(1, shape), False)):
        assert np.allclose(other, added, atol=1e-5) == same
    assert not np.allclose(DMD(3, timesteps=(1000, 757, 522), seed=6).noise(0, shape), added, atol=1e-2)
    assert not np.allclose(mx.random.normal(shape, key=mx.random.key(5)), added, atol=1e-2), "the run began with it"
    *_, last = run(s, mx.array(noise(1)), lambda x, sigma: (x - mx.array(noise(2))) / sigma)
    np.testing.assert_allclose(last, noise(2), atol=1e-5)
