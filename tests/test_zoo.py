"""The zoo against what the official repository says."""

import dataclasses

import pytest

from mlx_wan.zoo import LATENTS_MEAN, LATENTS_STD, MODELS, RELEASES, SAMPLING_TYPES


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
    assert MODELS["ti2v-5B"].with_sampling({"fps": 7}) == dataclasses.replace(MODELS["ti2v-5B"], fps=7)


def test_latent_statistics():
    # Sums of the official lists, which a lost, doubled or mistyped number would change.
    assert (len(LATENTS_MEAN), len(LATENTS_STD)) == (48, 48)
    assert sum(LATENTS_MEAN) == pytest.approx(-0.5589, abs=1e-9)
    assert sum(LATENTS_STD) == pytest.approx(32.5360, abs=1e-9)


def test_releases_differ():
    dims = [(release.component, tuple(release.dims.items())) for release in RELEASES]
    assert len(set(dims)) == len(dims)
