"""Whole runs against the official WanTI2V: prompt and noise in, latents and frames out."""

import cases
import pytest

RUNS = [(task, solver) for task in ("t2v", "i2v") for solver in ("unipc", "dpm++")]


@pytest.mark.parametrize(("task", "solver"), RUNS)
def test_every_stage_of_a_six_step_run(task, solver):
    errors = {label: cases.relative_error(got, want) for label, got, want in cases.run(task, solver)}
    assert len(errors) == 2 + 6 + 1
    for label, error in errors.items():
        assert error < (1e-5 if "context" in label else 1e-4), errors


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_bound_tells_samplers_apart(task):
    last = [cases.golden("runs")[f"{task}/{solver}/latents"][-1] for solver in ("unipc", "dpm++")]
    assert cases.relative_error(*last) > 1e-2
