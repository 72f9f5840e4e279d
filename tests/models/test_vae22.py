import cases
import mlx.core as mx
import numpy as np
import pytest
import small
from mlx.utils import tree_flatten

from mlx_wan.models.vae22 import FeatureCache, RMSNorm, VAEConfig, WanVAE22


@pytest.fixture(scope="module")
def model():
    return cases.load_small("vae")


@pytest.fixture(scope="module")
def video():
    return mx.array(small.video("vae", 13, 32, 48))


@pytest.fixture(scope="module")
def latents():
    return mx.array(small.random("latents", (1, 4, 2, 3, 48)))


def test_official_code_agrees():
    errors = {label: cases.relative_error(got, want) for label, got, want in cases.vae()}
    assert len(errors) == 4
    assert max(errors.values()) < 1e-5, errors


def test_released_model_has_the_official_names_and_shapes():
    want = {}
    for name, (out, *rest) in cases.official_names("ti2v-5B", "vae").items():
        want[name] = (out,) if name.endswith("gamma") else (out, *rest[1:], *rest[:1])
    parameters = tree_flatten(WanVAE22(VAEConfig()).parameters())
    assert {name: p.shape for name, p in parameters} == want


def test_decoding_in_pieces_is_decoding_at_once(model, latents):
    pieces = list(model.stream_decode(latents))
    assert [p.shape[1] for p in pieces] == [1, 4, 4, 4]
    whole = mx.clip(model.pixels(model.denormalise(latents), FeatureCache()), -1, 1)
    assert cases.relative_error(np.array(mx.concatenate(pieces, axis=1)), np.array(whole)) < 1e-5


def test_encoding_in_pieces_is_encoding_at_once(model, video):
    pieces = list(model.stream_encode(video))
    assert [p.shape for p in pieces] == 4 * [(1, 1, 2, 3, 48)]
    whole = model.normalise(model.moments(video, FeatureCache())[0])
    assert cases.relative_error(np.array(mx.concatenate(pieces, axis=1)), np.array(whole)) < 1e-5


@pytest.mark.parametrize("cut", [(1, 3), (2, 2), (3, 1)])
def test_pieces_may_have_any_length(model, latents, cut):
    cache, latents = FeatureCache(), model.denormalise(latents)
    parts = [model.pixels(part, cache) for part in mx.split(latents, [cut[0]], axis=1)]
    whole = model.pixels(latents, FeatureCache())
    assert cases.relative_error(np.array(mx.concatenate(parts, axis=1)), np.array(whole)) < 1e-5


def test_the_past_does_not_see_the_future(model, video, latents):
    ending = mx.concatenate([latents[:, :3], -latents[:, 3:]], axis=1)
    assert np.array_equal(np.array(model.decode(latents))[:, :9], np.array(model.decode(ending))[:, :9])
    ending = mx.concatenate([video[:, :9], -video[:, 9:]], axis=1)
    assert np.array_equal(np.array(model.encode(video))[:, :3], np.array(model.encode(ending))[:, :3])


def test_samples_of_a_batch_do_not_mix(model, video, latents):
    clips = mx.concatenate([video, -video[:, ::-1]])
    codes = mx.concatenate([latents, 0.5 * latents[:, ::-1]])
    encoded, decoded = np.array(model.encode(clips)), np.array(model.decode(codes))
    for i in range(2):
        assert cases.relative_error(encoded[i : i + 1], np.array(model.encode(clips[i : i + 1]))) < 1e-6
        assert cases.relative_error(decoded[i : i + 1], np.array(model.decode(codes[i : i + 1]))) < 1e-6


def test_the_cache_does_not_grow(model):
    cache, sizes = FeatureCache(), []
    for i in range(5):
        mx.eval(model.pixels(mx.array(small.random(f"piece {i}", (1, 1, 2, 3, 48))), cache), cache.arrays())
        sizes.append(sum(a.nbytes for a in cache.arrays()))
    assert sizes[2] == sizes[3] == sizes[4] > 0


def test_pixels_stay_in_range(model, latents):
    decoded = np.array(model.decode(8 * latents))
    assert np.abs(decoded).max() == 1
    assert np.abs(np.array(model.pixels(model.denormalise(8 * latents), FeatureCache()))).max() > 1


def test_normalising_and_back(model, latents):
    back = model.normalise(model.denormalise(latents))
    assert cases.relative_error(np.array(back), np.array(latents)) < 1e-6


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1.0, 1e6])
def test_norm_forgets_the_size_of_its_input(size):
    """The official norm divides by the length itself; only a length below 1e-12 is taken for 1e-12."""
    x = mx.array(small.random("norm", (2, 3, 16)))
    assert cases.relative_error(np.array(RMSNorm(16)(x * size)), np.array(RMSNorm(16)(x))) < 1e-5
    assert np.array_equal(np.array(RMSNorm(16)(mx.zeros((1, 16)))), np.zeros((1, 16)))


@pytest.mark.parametrize(
    "shape", [(1, 12, 32, 32, 3), (1, 0, 32, 32, 3), (1, 5, 24, 32, 3), (1, 5, 32, 40, 3), (5, 32, 32, 3)]
)
def test_videos_that_do_not_fit(model, shape):
    with pytest.raises(ValueError, match="video"):
        model.encode(mx.zeros(shape))


def test_numpy_arrays_are_taken_as_they_are(model):
    video = small.video("numpy", 5, 32, 32)
    assert mx.array_equal(model.encode(video), model.encode(mx.array(video)))
    latents = small.random("numpy", (1, 2, 2, 2, 48))
    assert mx.array_equal(model.decode(latents), model.decode(mx.array(latents)))


def test_pixels_from_0_to_255_are_not_taken_for_a_video(model):
    with pytest.raises(ValueError, match=r"floats \(B, T, H, W, 3\), not uint8"):
        model.encode(mx.zeros((1, 5, 32, 32, 3), mx.uint8))


@pytest.mark.parametrize("shape", [(2, 2, 2, 48), (1, 2, 2, 2, 16)])
def test_latents_that_do_not_fit(model, shape):
    with pytest.raises(ValueError, match=r"floats \(B, T, H, W, 48\)"):
        model.decode(mx.zeros(shape))
