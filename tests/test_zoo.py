"""The zoo against what the official repository says."""

import dataclasses

import cases
import numpy as np
import pytest

from mlx_wan.zoo import LATENT_STATISTICS, LATENTS_MEAN, LATENTS_STD, MODELS, RELEASES, SAMPLING_TYPES


def test_the_5b_is_sampled_as_officially():
    spec = MODELS["ti2v-5B"]
    assert (spec.num_frames, spec.fps, spec.num_inference_steps) == (121, 24, 50)
    assert (spec.guidance_scale, spec.shift, spec.scheduler) == (5.0, 5.0, "unipc")
    assert (spec.width, spec.height) in spec.sizes
    assert spec.hub_id == "Wan-AI/Wan2.2-TI2V-5B"
    # 28 phrases between full-width commas, from over-saturated colours to walking backwards.
    phrases = spec.negative_prompt.split("，")
    assert (len(phrases), phrases[0], phrases[-1]) == (28, "色调艳丽", "倒着走")


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_specs_make_sense(spec):
    assert MODELS[spec.name] is spec
    stride_t, stride_h, stride_w = spec.vae_stride
    assert spec.num_frames % stride_t == 1
    for width, height in (*spec.sizes, (spec.width, spec.height)):
        assert width % (2 * stride_w) == 0
        assert height % (2 * stride_h) == 0


def test_sampling_round_trip():
    spec = MODELS["tiny"]
    assert spec.sampling().keys() == SAMPLING_TYPES.keys()
    assert all(isinstance(value, SAMPLING_TYPES[name]) for name, value in spec.sampling().items())
    assert MODELS["t2v-A14B"].sampling()["guidance_scale"] == (3.0, 4.0)
    assert MODELS["ti2v-5B"].with_sampling({"fps": 7}) == dataclasses.replace(MODELS["ti2v-5B"], fps=7)


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "shift", "boundary", "size"),
    [  # wan/configs of Wan2.2; wan/configs and generate.py of Wan2.1
        ("t2v-A14B", 40, (3.0, 4.0), 12.0, 0.875, (1280, 720)),
        ("i2v-A14B", 40, (3.5, 3.5), 5.0, 0.9, (1280, 720)),
        ("t2v-14B", 50, 5.0, 5.0, None, (1280, 720)),
        ("t2v-1.3B", 50, 5.0, 5.0, None, (832, 480)),
        ("i2v-14B", 40, 5.0, 5.0, None, (1280, 720)),
        ("flf2v-14B", 50, 5.0, 16.0, None, (1280, 720)),
    ],
)
def test_models_with_the_wan21_vae_are_sampled_as_officially(name, steps, guidance, shift, boundary, size):
    spec = MODELS[name]
    assert (spec.num_inference_steps, spec.guidance_scale, spec.shift, spec.boundary) == (
        steps,
        guidance,
        shift,
        boundary,
    )
    assert (spec.num_frames, spec.fps, spec.vae_stride, spec.vae) == (81, 16, (4, 8, 8), "Wan2.1")
    assert (spec.width, spec.height) == size
    more = {"i2v-14B": "镜头晃动，", "flf2v-14B": "镜头切换，镜头晃动，"}.get(name, "")
    assert spec.negative_prompt == more + MODELS["ti2v-5B"].negative_prompt
    assert spec.shift_for(1280, 720) == shift
    assert spec.shift_for(832, 480) == (3.0 if name == "i2v-14B" else shift)


def test_latent_statistics():
    # Sums of the official lists, which a lost, doubled or mistyped number would change.
    assert (len(LATENTS_MEAN), len(LATENTS_STD)) == (48, 48)
    assert sum(LATENTS_MEAN) == pytest.approx(-0.5589, abs=1e-9)
    assert sum(LATENTS_STD) == pytest.approx(32.5360, abs=1e-9)
    for numbers, key in zip(LATENT_STATISTICS["Wan2.1"], ("latents_mean", "latents_std"), strict=True):
        np.testing.assert_allclose(numbers, cases.golden("vae21")[key], rtol=1e-6)


def test_releases_differ():
    dims = [(release.component, tuple(release.dims.items())) for release in RELEASES]
    assert len(set(dims)) == len(dims)
