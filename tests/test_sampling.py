"""The denoising loop with models whose answers are known."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_wan.errors import WanError
from mlx_wan.sampling import Condition, Expert, denoise, guided_velocity, initial_noise
from mlx_wan.schedulers import make_scheduler

SHAPE = (1, 3, 2, 2, 4)
CONTEXT, NEGATIVE = mx.ones((1, 5, 6)), mx.zeros((1, 5, 6))


class Model:
    """Velocity = the context's mean plus `slope` times the latents; remembers its calls."""

    def __init__(self, slope=0.0):
        self.slope, self.calls = slope, []

    def read(self, context):
        return context

    def __call__(self, latents, timesteps, context):
        self.calls.append((np.array(latents), np.array(timesteps)))
        return context.mean() + self.slope * latents


def run(model, scheduler, guidance=1.0, **condition):
    expert, noise = Expert(model, guidance), initial_noise(SHAPE, 1)
    steps = denoise(lambda _: expert, scheduler, noise, CONTEXT, NEGATIVE, Condition(**condition))
    return [np.array(point.latents) for point in steps]


def test_noise_depends_on_the_seed_alone():
    a, b, c = (np.array(initial_noise((1, 2, 16, 16, 4), seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(a, b)
    assert (a != c).all()
    assert abs(a.mean()) < 0.1
    assert abs(a.std() - 1) < 0.1


def test_guidance_goes_from_the_negative_prompt_past_the_prompt():
    class Prompted(Model):
        def __call__(self, latents, timesteps, context):
            super().__call__(latents, timesteps, context)
            return mx.full(SHAPE, 3.0) if context is CONTEXT else mx.full(SHAPE, 1.0)

    model = Prompted()
    velocity = guided_velocity(Expert(model, 5.0), mx.zeros(SHAPE), mx.zeros((1,)), CONTEXT, NEGATIVE)
    np.testing.assert_array_equal(velocity, np.full(SHAPE, 1 + 5 * (3 - 1)))
    assert len(model.calls) == 2
    velocity = guided_velocity(Expert(model, 1.0), mx.zeros(SHAPE), mx.zeros((1,)), CONTEXT, NEGATIVE)
    np.testing.assert_array_equal(velocity, np.full(SHAPE, 3))
    assert len(model.calls) == 3, "no guidance costs one pass"


def test_euler_follows_a_constant_velocity_straight_to_the_end():
    scheduler = make_scheduler("euler", 4, 3.0)
    model = Model()
    steps = run(model, scheduler)
    assert len(steps) == 4
    # dx = v dσ, from the first σ to 0, with v = 1
    np.testing.assert_allclose(steps[-1], np.array(initial_noise(SHAPE, 1)) - scheduler.sigmas[0], rtol=1e-5, atol=1e-6)
    assert [t.shape for _, t in model.calls] == [(1, 1)] * 4
    np.testing.assert_array_equal([t.item() for _, t in model.calls], scheduler.timesteps)


@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
def test_a_given_first_frame_is_clean_at_every_step_and_has_timestep_0(name):
    first = mx.full((1, 1, 2, 2, 4), 0.25)
    model = Model(slope=0.5)
    steps = run(model, make_scheduler(name, 3, 5.0), guidance=2.0, first_frame=first)
    for latents in steps:
        np.testing.assert_array_equal(latents[:, :1], np.full((1, 1, 2, 2, 4), 0.25, np.float32))
        assert (latents[:, 1:] != 0.25).all()
    for latents, timesteps in model.calls:
        np.testing.assert_array_equal(latents[:, 0], np.full((1, 2, 2, 4), 0.25, np.float32))
        assert timesteps.shape == (1, 3)
        assert timesteps[0, 0] == 0
        assert timesteps[0, 1] == timesteps[0, 2] > 0


def test_each_step_asks_for_its_expert_once_and_takes_its_guidance():
    high, low, asked = Model(), Model(), []

    def expert_at(t):
        asked.append(t)
        return Expert(high, 1.0) if t >= 800 else Expert(low, 3.0)

    scheduler = make_scheduler("euler", 5, 3.0)
    list(denoise(expert_at, scheduler, initial_noise(SHAPE, 1), CONTEXT, NEGATIVE))
    assert asked == scheduler.timesteps.tolist()
    count = sum(t >= 800 for t in asked)
    assert 0 < count < 5
    assert (len(high.calls), len(low.calls)) == (count, 2 * (5 - count))
    assert min(t.item() for _, t in high.calls) >= 800 > max(t.item() for _, t in low.calls)


def test_channels_of_a_picture_stand_beside_the_latents():
    class Wide(Model):
        def __call__(self, latents, timesteps, context):
            return super().__call__(latents, timesteps, context)[..., :4]

    model, channels = Wide(), mx.full((*SHAPE[:-1], 5), 0.25)
    steps = run(model, make_scheduler("euler", 3, 5.0), channels=channels)
    assert steps[-1].shape == SHAPE
    for (latents, timesteps), before in zip(model.calls, [np.array(initial_noise(SHAPE, 1)), *steps], strict=False):
        np.testing.assert_array_equal(latents[..., :4], before)
        np.testing.assert_array_equal(latents[..., 4:], channels)
        assert timesteps.shape == (1, 1)


def test_a_run_stops_at_the_step_that_is_not_finite():
    class Breaking(Model):
        def __call__(self, latents, timesteps, context):
            super().__call__(latents, timesteps, context)
            return latents if len(self.calls) < 2 else latents * mx.inf

    model = Breaking()
    with pytest.raises(WanError, match="not finite after step 2 of 5"):
        run(model, make_scheduler("euler", 5, 3.0))
    assert len(model.calls) == 2


@pytest.mark.parametrize(("value", "message"), [(0.0, "are all the same"), (float("nan"), "are not finite")])
def test_a_run_that_has_gone_wrong_stops_at_the_step_where_it_does(value, message):
    class Broken(Model):
        def __call__(self, latents, timesteps, context):
            answer = super().__call__(latents, timesteps, context)
            if len(self.calls) < 2:
                return answer
            # what makes the next latents `value` everywhere
            sigma, after = scheduler.sigmas[1:3]
            return (latents - value) / (sigma - after)

    scheduler, model = make_scheduler("euler", 4, 3.0), Broken()
    with pytest.raises(WanError, match=f"latents {message} after step 2 of 4: the run was stopped"):
        run(model, scheduler)
    assert len(model.calls) == 2
