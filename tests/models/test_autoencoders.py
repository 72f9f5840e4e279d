"""What both autoencoders promise: the official numbers, and the same result however a clip is cut."""

import cases
import mlx.core as mx
import numpy as np
import pytest
import small
from mlx.utils import tree_flatten, tree_unflatten

from mlx_wan.errors import WanError
from mlx_wan.models import autoencoder, features
from mlx_wan.models.autoencoder import CausalConv3d, FeatureCache, RMSNorm, Upsample
from mlx_wan.models.layers import traceable
from mlx_wan.models.vae21 import VAE21Config, WanVAE21
from mlx_wan.models.vae22 import VAEConfig, WanVAE22

KINDS = {"vae": ("small", 16, 48), "vae21": ("small-t2v-A14B", 8, 16)}  # model, stride, channels


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return cases.load_small("vae", KINDS[kind][0])


@pytest.fixture(scope="module")
def video():
    return mx.array(small.video("vae", 13, 32, 48))


@pytest.fixture(scope="module")
def shape(kind):
    """Of the latents of a video of 13 frames, 32×48."""
    _, stride, channels = KINDS[kind]
    return 1, 4, 32 // stride, 48 // stride, channels


@pytest.fixture(scope="module")
def latents(shape):
    return mx.array(small.random("latents", shape))


def test_official_code_agrees(kind):
    errors = {label: cases.relative_error(got, want) for label, got, want in cases.vae(kind)}
    assert len(errors) == 4
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(("name", "made"), [("ti2v-5B", WanVAE22(VAEConfig())), ("t2v-A14B", WanVAE21(VAE21Config()))])
def test_released_models_have_the_official_names_and_shapes(name, made):
    want = {}
    for parameter, (out, *rest) in cases.official_names(name, "vae").items():
        want[parameter] = (out,) if parameter.endswith("gamma") else (out, *rest[1:], *rest[:1])
    assert {parameter: p.shape for parameter, p in tree_flatten(made.parameters())} == want


@pytest.mark.parametrize(("config", "stride"), [(VAEConfig(), (4, 16, 16)), (VAE21Config(), (4, 8, 8))])
def test_strides_of_the_released_models(config, stride):
    assert config.stride == stride


def test_decoding_in_pieces_is_decoding_at_once(model, latents):
    pieces = list(model.stream_decode(latents))
    assert [p.shape[1] for p in pieces] == [1, 4, 4, 4]
    whole = mx.clip(model.pixels(model.denormalise(latents), FeatureCache()), -1, 1)
    assert cases.relative_error(np.array(mx.concatenate(pieces, axis=1)), np.array(whole)) < 1e-5


def test_encoding_in_pieces_is_encoding_at_once(model, video, shape):
    pieces = list(model.stream_encode(video))
    assert [p.shape for p in pieces] == 4 * [(1, 1, *shape[2:])]
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


def test_samples_of_a_batch_do_not_mix(kind, model, video, latents):
    bound = {"vae": 1e-6, "vae21": 2e-6}[kind]  # the larger latents are summed up in longer rows
    clips = mx.concatenate([video, -video[:, ::-1]])
    codes = mx.concatenate([latents, 0.5 * latents[:, ::-1]])
    encoded, decoded = np.array(model.encode(clips)), np.array(model.decode(codes))
    for i in range(2):
        assert cases.relative_error(encoded[i : i + 1], np.array(model.encode(clips[i : i + 1]))) < bound
        assert cases.relative_error(decoded[i : i + 1], np.array(model.decode(codes[i : i + 1]))) < bound


def test_the_cache_does_not_grow(model, shape):
    cache, sizes = FeatureCache(), []
    for i in range(5):
        mx.eval(model.pixels(mx.array(small.random(f"piece {i}", (1, 1, *shape[2:]))), cache), cache.arrays())
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
    "size", [(1, 12, 32, 32, 3), (1, 0, 32, 32, 3), (1, 5, 28, 32, 3), (1, 5, 32, 44, 3), (5, 32, 32, 3)]
)
def test_videos_that_do_not_fit(model, size):
    with pytest.raises(ValueError, match="video"):
        model.encode(mx.zeros(size))


def test_numpy_arrays_are_taken_as_they_are(model, shape):
    video = small.video("numpy", 5, 32, 32)
    assert mx.array_equal(model.encode(video), model.encode(mx.array(video)))
    latents = small.random("numpy", (1, 2, 2, 2, shape[-1]))
    assert mx.array_equal(model.decode(latents), model.decode(mx.array(latents)))


def test_pixels_from_0_to_255_are_not_taken_for_a_video(model):
    with pytest.raises(ValueError, match=r"floats \(B, T, H, W, 3\), not uint8"):
        model.encode(mx.zeros((1, 5, 32, 32, 3), mx.uint8))


def test_latents_that_do_not_fit(model, shape):
    for wrong in ((2, 2, 2, shape[-1]), (1, 2, 2, 2, 12)):
        with pytest.raises(ValueError, match=rf"floats \(B, T, H, W, {shape[-1]}\)"):
            model.decode(mx.zeros(wrong))


def test_convolutions_larger_than_mlx_counts_are_refused(monkeypatch):
    vae = WanVAE22(VAEConfig(dim=4, dec_dim=4, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4))
    latents = mx.zeros((1, 1, 2, 2, 4))
    largest = 3 * 16 * 16 * 12  # the last one: 2×2 pixels by colours are channels, for each of three frames
    monkeypatch.setattr(autoencoder, "MAX_ELEMENTS", largest)
    vae.decode(latents)
    monkeypatch.setattr(autoencoder, "MAX_ELEMENTS", largest - 1)
    with pytest.raises(WanError, match=r"a convolution of the VAE would have \d+ values"):
        vae.decode(latents)


@pytest.mark.parametrize("number", [2, 4])
def test_strips_give_the_same_video(model, kind, number, monkeypatch):
    """Rows are handed over layer by layer, in the first piece, the second and those after."""
    latents = mx.array(small.random("strips", (1, 3, 16, 3, KINDS[kind][2])))
    whole, heights = np.array(model.decode(latents)), []
    head = autoencoder.run_head

    def noted(layers, x, cache):
        heights.append(x.shape[2])
        return head(layers, x, cache)

    monkeypatch.setattr(autoencoder, "run_head", noted)
    monkeypatch.setattr(FeatureCache, "strip_count", lambda self, x, least: number)
    strips = np.array(model.decode(latents))
    assert len(heights) == 3 * number
    assert heights[0] < heights[1] <= heights[-1], "results are behind at the top"
    assert cases.relative_error(strips, whole) < 1e-6


def test_frames_pass_whole_unless_they_are_wide_and_a_stream(monkeypatch):
    x = mx.zeros((1, 1, 40, 4, 8))
    assert FeatureCache(streaming=True).strip_count(x, 16) == 1
    monkeypatch.setattr(features, "STRIP", x.nbytes // 2)
    assert FeatureCache(streaming=True).strip_count(x, 16) == 2
    assert FeatureCache(streaming=True).strip_count(x, 24) == 1, "too low for two"
    assert FeatureCache().strip_count(x, 16) == 1
    assert FeatureCache(streaming=True).strip_count(mx.zeros((1, 4, 40, 4, 8)), 16) == 2, "whatever the frames"


def test_a_stream_begins_the_next_piece_before_it_gives_one(model, latents, monkeypatch):
    begun, pixels = [], type(model).pixels
    monkeypatch.setattr(type(model), "pixels", lambda *given: begun.append(0) or pixels(*given))
    counts = [len(begun) for _ in model.stream_decode(latents)]
    assert counts == [2, 3, 4, 4]


@pytest.mark.parametrize("temporal", [False, True])
def test_doubling_by_phases_is_a_convolution_of_doubled_pixels(temporal):
    layer = Upsample(8, 12, temporal)
    x = mx.array(small.random("double", (1, 3, 4, 5, 8)))
    doubled = mx.repeat(mx.repeat(x, 2, axis=2), 2, axis=3)
    want = np.array(layer.resample[1](doubled))
    assert cases.relative_error(np.array(layer.double(x, FeatureCache())), want) < 1e-6


def test_half_precision_stays_near(model, video, latents):
    """Convolutions in 8 or 11 bits of mantissa; biases and norms keep theirs."""
    exact = np.array(model.encode(video)), np.array(model.decode(latents))
    named: list = tree_flatten(model.parameters())
    for dtype, bound in ((mx.float16, 5e-3), (mx.bfloat16, 4e-2)):
        rough = type(model)(model.config)
        rough.update(tree_unflatten([(name, p.astype(dtype) if p.ndim > 1 else p) for name, p in named]))
        for got, want in zip((rough.encode(video), rough.decode(latents)), exact, strict=True):
            assert got.dtype == mx.float32
            assert 1e-5 < cases.relative_error(np.array(got), want) < bound


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (8, 12), (3, 12)])
def test_few_channels_are_convolved_in_two_dimensions_on_cuda(monkeypatch, inputs, outputs):
    layer, x = CausalConv3d(inputs, outputs, (3, 3, 3)), mx.array(small.random("few", (1, 5, 4, 6, inputs)))
    whole = np.array(layer.convolve(x))
    monkeypatch.setattr(autoencoder, "target", lambda: "CUDA")
    monkeypatch.setattr(mx, "conv3d", None)
    assert cases.relative_error(np.array(layer.convolve(x)), whole) < 1e-6


@pytest.mark.parametrize("first", [True, False])
def test_kernels_make_what_the_plain_functions_make(kind, model, shape, first):
    """Shapes and types of a piece and of what is kept, traced for CUDA."""
    plain, piece = FeatureCache(streaming=True), mx.zeros((1, 1, *shape[2:]))
    sizes = []
    for _ in range(1 if first else 3):
        want = model.pixels(piece, plain)
    with traceable("CUDA"):
        traced = FeatureCache(streaming=True)
        for _ in range(1 if first else 3):
            got = model.pixels(piece, traced)
    for out, cache in ((want, plain), (got, traced)):
        sizes.append([(a.shape, a.dtype) for a in (out, *cache.frames.values())])
    assert sorted(map(str, sizes[0])) == sorted(map(str, sizes[1]))
