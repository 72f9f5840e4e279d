import cases
import pytest


@pytest.mark.parametrize("run", cases.scheduler_runs())
def test_every_step_is_the_reference_s(run):
    """Timesteps and noise levels to the last bit, latents to 1e-5."""
    (_, timesteps, want_timesteps), (_, sigmas, want_sigmas), *steps = cases.scheduler(run)
    assert timesteps.dtype == want_timesteps.dtype
    assert timesteps.tolist() == want_timesteps.tolist()
    assert sigmas.tolist() == want_sigmas.tolist()
    errors = {label: cases.relative_error(got, want) for label, got, want in steps}
    assert len(errors) == int(run.split("/")[1])
    assert max(errors.values()) < 1e-5, errors


def test_the_three_samplers_are_three():
    """The bound above tells them apart: after six steps they lie further from each other than that."""
    last = {name: cases.golden("schedulers")[f"{name}/6/5/latents"][-1] for name in ("unipc", "dpm++", "euler")}
    assert cases.relative_error(last["unipc"], last["dpm++"]) > 1e-3
    assert cases.relative_error(last["euler"], last["dpm++"]) > 1e-3


def test_given_timesteps_are_followed_as_the_references_do():
    """DMD after FastVideo's formulas, Euler as diffusers', DPM++ as the official one."""
    errors = {label: cases.relative_error(got, want) for label, got, want in cases.few_step_samplers()}
    assert len(errors) == 3 + 5 + 4 + 4
    assert max(errors.values()) < 1e-5, errors
