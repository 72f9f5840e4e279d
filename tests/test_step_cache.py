"""The step cache: when it reuses, what it remembers, and that everybody decides alike."""

import checkpoint
import mlx.core as mx
import numpy as np
import pytest

import mlx_wan
from mlx_wan.errors import UserError
from mlx_wan.sampling import Condition, Expert, denoise, initial_noise
from mlx_wan.schedulers import make_scheduler
from mlx_wan.step_cache import MOST_SKIPPED, StepCache, computed, reused

SHAPE = (2, 3, 2, 2, 4)
CONTEXT = mx.ones((2, 5, 6))
SMALL = {"width": 64, "height": 32, "num_frames": 5, "num_inference_steps": 12, "seed": 3, "output_type": "latent"}


class Model:
    """velocity = direction + curve(sigma), for each sample of the batch; counts its calls."""

    def __init__(self, curve):
        self.curve, self.levels = curve, []

    def read(self, context):
        return context

    def __call__(self, latents, timesteps, context):
        sigma = timesteps.max().item() / 1000
        self.levels.append(sigma)
        return mx.ones(latents.shape) * mx.array(self.curve(sigma))[:, None, None, None, None]


def run(curve, threshold, steps=20, expert_at=None, **condition):
    model, scheduler = Model(curve), make_scheduler("euler", steps, 3.0)
    cache = None if threshold is None else StepCache(threshold)
    expert_at = expert_at or (lambda t: Expert(model, 1.0))
    noise = initial_noise(SHAPE, 1)
    points = list(denoise(expert_at, scheduler, noise, CONTEXT, CONTEXT, Condition(**condition), cache=cache))
    return model, scheduler, points


def test_it_is_off_unless_asked():
    model, _, points = run(lambda s: [1.0, 1.0], None)
    assert len(model.levels) == 20
    assert all(point.kept is None for point in points)


def test_a_velocity_that_does_not_change_is_computed_every_third_step():
    model, scheduler, points = run(lambda s: [1.0, 2.0], 0.1)
    computed_at = [int(np.abs(scheduler.sigmas - level).argmin()) for level in model.levels]
    assert computed_at == [0, 1, 4, 7, 10, 13, 16, 19], "two to begin with, two skipped each time, and the last"
    assert [point.kept.skipped for point in points[1:5]] == [0, 1, 2, 0]
    assert MOST_SKIPPED == 2
    exact = run(lambda s: [1.0, 2.0], None)[-1][-1].latents
    np.testing.assert_allclose(points[-1].latents, exact, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.1, 0.2])
def test_a_step_is_skipped_while_the_change_stays_below_the_threshold(threshold):
    """A velocity that changes at one pace: the estimate is right, and so is the line that skipped steps follow."""
    curve = lambda s: [2 + s, 3.0]  # noqa: E731
    model, scheduler, points = run(curve, threshold)
    assert len(model.levels) < 20
    skipped = [i for i, point in enumerate(points) if point.kept.skipped]
    for i in skipped:
        last, now = points[i].kept.numbers[0], float(scheduler.sigmas[i])
        assert (curve(last)[0] - curve(now)[0]) / curve(last)[0] < threshold
    for i in range(2, 19):
        level, rate, count = points[i - 1].kept.numbers[:3]
        assert (i in skipped) == (rate * (level - float(scheduler.sigmas[i])) < threshold and count < MOST_SKIPPED)
    exact = run(curve, None)[-1][-1].latents
    np.testing.assert_allclose(points[-1].latents, exact, atol=1e-5)


def test_a_bent_velocity_is_missed_by_less_than_a_repeated_one_would_be():
    curve = lambda s: [2 + s**2, 2 + s**3]  # noqa: E731
    exact = run(curve, None)[-1][-1].latents
    _, _, points = run(curve, 0.2)
    assert any(point.kept.skipped for point in points)
    _, scheduler, _ = run(curve, None)
    x, state = initial_noise(SHAPE, 1), scheduler.init()
    for sigma, point in zip(scheduler.sigmas[:-1].tolist(), points, strict=True):
        level = point.kept.numbers[0] if point.kept.skipped else sigma
        x, state = scheduler.step(Model(curve)(x, mx.array([1000 * level]), None), x, state)
    assert 0 < np.abs(points[-1].latents - exact).max() < 0.5 * np.abs(x - exact).max()


def test_the_sample_that_changes_most_decides():
    slow, _, _ = run(lambda s: [1.0, 1.0], 0.1)
    fast, _, _ = run(lambda s: [1.0, 1 + 20 * s], 0.1)
    assert len(fast.levels) > len(slow.levels)


def test_a_given_first_frame_does_not_count():
    """Its velocity goes nowhere, so it must not keep the rest from being reused."""

    class Restless(Model):
        def __call__(self, latents, timesteps, context):
            velocity = super().__call__(latents, timesteps, context)
            velocity[:, 0] = 100 * (-1) ** len(self.levels)
            return velocity

    model, frame = Restless(lambda s: [1.0, 1.0]), mx.full((2, 1, 2, 2, 4), 0.5)
    run(None, 0.1, expert_at=lambda t: Expert(model, 1.0), first_frame=frame)
    assert len(model.levels) == 8
    run(None, 0.1, expert_at=lambda t: Expert(model, 1.0))
    assert len(model.levels) == 8 + 20


@pytest.mark.parametrize("change", ["expert", "guidance"])
def test_another_expert_or_guidance_begins_anew(change):
    """A velocity of one is nothing to the other, and its pace is found anew: two computed steps on either side."""
    models, asked = (Model(lambda s: [1.0, 1.0]), Model(lambda s: [9.0, 9.0])), []

    def expert_at(t):
        later = int(t < 800)
        asked.append(later)
        if change == "expert":
            return Expert(models[later], 1.0, number=later)
        return Expert(models[0], [1.0, 2.0][later])

    _, scheduler, points = run(None, 0.1, expert_at=expert_at)
    switch = asked.index(1)
    assert [point.kept.skipped for point in points[switch : switch + 3]] == [0, 0, 1]
    if change == "expert":
        assert points[switch + 2].kept.velocity.max().item() == 9
    assert len(scheduler.timesteps) == len(asked) == 20


def test_all_processes_take_the_first_one_s_decision():
    cache = StepCache(0.1, agree=lambda decision: not decision)
    kept = computed(computed(None, mx.ones(SHAPE), 1.0, 3.0, 0), mx.ones(SHAPE), 0.9, 3.0, 0)
    assert StepCache(0.1).reuses(kept, 0.8, 3.0, 0)
    assert not cache.reuses(kept, 0.8, 3.0, 0)
    for _ in range(MOST_SKIPPED):
        _, kept = reused(kept, 0.8)
    assert not cache.reuses(kept, 0.8, 3.0, 0), "nobody is asked where all know the answer"


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 1.5, float("nan")])
def test_thresholds_that_cannot_be(threshold):
    with pytest.raises(UserError, match=r"give a relative change between 0 and 1, such as 0\.1"):
        StepCache(threshold)


# --- through the pipeline ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return mlx_wan.WanPipeline.from_pretrained(checkpoint.write_official(tmp_path_factory.mktemp("small") / "model"))


def calls(pipe, monkeypatch, **options):
    """(latents, timestep of each transformer call) of a run."""
    seen, transformer = [], pipe.transformer

    class Spy:
        read = transformer.read

        def __call__(self, latents, timesteps, *more):
            seen.append(timesteps.max().item())
            return transformer(latents, timesteps, *more)

    spy = Spy()
    monkeypatch.setattr(pipe, "_load_transformer", lambda part: spy)
    latents = pipe("a cat", **SMALL, **options).latents
    monkeypatch.undo()
    return np.array(latents), seen


def test_both_passes_of_guidance_are_saved(pipe, monkeypatch):
    exact, every = calls(pipe, monkeypatch)
    close, fewer = calls(pipe, monkeypatch, cache=0.7)
    assert len(every) == 24
    assert len(fewer) < 24
    assert fewer[::2] == fewer[1::2], "always both"
    error = np.linalg.norm(close - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.7
    same, all_of_them = calls(pipe, monkeypatch, cache=0.01)  # less than it ever changes by
    assert all_of_them == every
    np.testing.assert_array_equal(same, exact)


def test_guidance_on_a_part_of_the_steps(pipe, monkeypatch):
    _, seen = calls(pipe, monkeypatch, guidance_interval=(0.5, 0.95))
    for t in set(seen):
        assert seen.count(t) == (2 if 500 <= t <= 950 else 1)
    assert {seen.count(t) for t in seen} == {1, 2}
    whole, _ = calls(pipe, monkeypatch)
    same, _ = calls(pipe, monkeypatch, guidance_interval=(0, 1))
    np.testing.assert_array_equal(whole, same)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.9, 0.1), (-0.1, 1), (0, 1.1), (0.5,), (0, "1"), (0, float("nan"))])
def test_intervals_that_cannot_be(pipe, interval):
    with pytest.raises(UserError, match=r"guidance_interval is .*give two noise levels"):
        pipe("a cat", **SMALL, guidance_interval=interval)


def test_dmd_cannot_reuse(pipe):
    with pytest.raises(UserError, match="cache: dmd adds new noise after every step"):
        pipe("a cat", **SMALL, scheduler="dmd", cache=0.1)


@pytest.mark.parametrize("image", [False, True])
def test_a_run_goes_on_with_what_it_had_kept(pipe, tmp_path, image):
    from PIL import Image

    from mlx_wan.resume import load_point, save_point

    options = {name: value for name, value in SMALL.items() if name != "output_type"} | {"cache": 0.7}
    if image:
        options["image"] = Image.new("RGB", (64, 32), (200, 0, 0))
    points = [event.point for event in pipe.stream("a cat", **options) if event.stage == "denoise"]
    middle = next(point for point in points if point.kept.skipped == 1)
    save_point(tmp_path / "run.safetensors", middle, {})
    start = load_point(tmp_path / "run.safetensors", pipe.scheduler, cached=True)
    again = [event.point for event in pipe.stream("a cat", **options, start=start) if event.stage == "denoise"]
    assert [point.kept.skipped for point in again] == [point.kept.skipped for point in points[middle.step :]]
    assert mx.array_equal(again[-1].latents, points[-1].latents)
