"""Whole runs against the official WanTI2V: prompt and noise in, latents and frames out."""

import cases
import checkpoint
import mlx.core as mx
import numpy as np
import pytest
import small
from PIL import Image

import mlx_wan

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


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = checkpoint.write_official(tmp_path_factory.mktemp("small") / "Wan2.2-small")
    return mlx_wan.WanPipeline.from_pretrained(folder, dtype=mx.float32)


@pytest.mark.parametrize(("task", "solver"), RUNS)
def test_the_pipeline_on_the_official_layout(pipe, task, solver):
    """The same through the front door: a folder as downloaded, WanPipeline, the words a user writes."""
    stored = cases.golden("runs")
    out = pipe(
        small.RUN_PROMPT,
        image=Image.fromarray(small.picture()) if task == "i2v" else None,
        negative_prompt=small.I2V_NEGATIVE_PROMPT if task == "i2v" else None,
        scheduler=solver,
        latents=mx.array(stored[f"{task}/noise"]),
        **small.RUN,
    )
    assert cases.relative_error(np.array(out.latents)[0], stored[f"{task}/{solver}/latents"][-1]) < 1e-4
    assert out.frames.shape == (9, 64, 96, 3)
    assert out.frames.dtype == np.uint8
    off = np.abs(out.frames[:, ::4, ::4] - np.round((stored[f"{task}/{solver}/frames"] + 1) * 127.5))
    assert off.max() <= 1  # only pixels so near to a half that the last digits decide
    assert np.mean(off > 0) < 1e-3


# --- two experts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=small.EXPERT_RUNS)
def experts(request, tmp_path_factory):
    folder = checkpoint.write_official(tmp_path_factory.mktemp(request.param) / "Wan2.2", f"small-{request.param}")
    return request.param, mlx_wan.WanPipeline.from_pretrained(folder, dtype=mx.float32)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_a_run_over_two_experts(experts, solver, monkeypatch):
    """WanT2V and WanI2V: every step's latents, which expert made them, and the frames."""
    kind, pipe = experts
    load, loads = pipe._load_transformer, []

    def spy(part):
        loads.append(["transformer", "transformer_2"].index(part))
        return load(part)

    monkeypatch.setattr(pipe, "_load_transformer", spy)
    *latents, (_, frames, wanted) = cases.expert_run(pipe, kind, solver)
    errors = [cases.relative_error(got, want) for _, got, want in latents]
    assert max(errors) < 1e-4, errors
    assert loads == cases.golden("expert_runs")[f"{kind}/{solver}/experts"].tolist()
    off = np.abs(frames - wanted)
    assert off.max() <= 1
    assert np.mean(off > 0) < 1e-3


def test_the_bound_tells_the_guidances_apart(experts):
    kind, pipe = experts
    settings = cases.expert_settings(kind)
    settings["guidance_scale"] = settings["guidance_scale"][::-1]
    out = pipe(output_type="latent", **settings)
    assert (
        cases.relative_error(np.array(out.latents)[0], cases.golden("expert_runs")[f"{kind}/unipc/latents"][-1]) > 1e-2
    )


# --- Wan2.1 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", small.RUNS21)
def test_a_run_of_the_wan21_kind(kind, tmp_path):
    pipe = mlx_wan.WanPipeline.from_pretrained(checkpoint.write_official(tmp_path / "Wan2.1", f"small-{kind}"))
    *latents, (_, frames, wanted) = cases.run21(pipe, kind)
    errors = [cases.relative_error(got, want) for _, got, want in latents]
    assert len(errors) == small.RUNS21[kind]["num_inference_steps"]
    assert max(errors) < 1e-4, errors
    off = np.abs(frames - wanted)
    assert off.max() <= 1
    assert np.mean(off > 0) < 1e-3


# --- a few steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_distilled_model_s_three_steps(task):
    errors = [cases.relative_error(got, want) for _, got, want in cases.few_step_run(task)]
    assert len(errors) == 3
    assert max(errors) < 1e-4, errors


def test_four_steps_over_two_experts_without_guidance():
    pairs, used = cases.few_step_experts()
    assert used == cases.golden("few_steps")["experts/used"].tolist() == [False, False, True, True]
    assert max(cases.relative_error(got, want) for _, got, want in pairs) < 1e-4
