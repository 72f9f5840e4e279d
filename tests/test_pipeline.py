"""WanPipeline as a user meets it: what may be given, what comes back, and who is in memory when."""

import dataclasses
import gc
import weakref

import checkpoint
import mlx.core as mx
import numpy as np
import pytest
import small
from PIL import Image

import mlx_wan
from mlx_wan import pipeline
from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.parallel import plan
from mlx_wan.weights.locate import locate

SMALL = {"width": 64, "height": 32, "num_frames": 5, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.write_official(tmp_path_factory.mktemp("small") / "Wan2.2-small")


@pytest.fixture(scope="module")
def pipe(folder):
    return mlx_wan.WanPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def noise():
    return small.random("noise", (1, 2, 2, 4, 48))


# --- what comes back -----------------------------------------------------------------------------------------


def test_frames_latents_seed_and_rate(pipe):
    out = pipe("a cat", **SMALL, seed=3)
    assert (out.frames.shape, out.frames.dtype) == ((5, 32, 64, 3), np.uint8)
    assert (out.latents.shape, out.latents.dtype) == ((1, 2, 2, 4, 48), mx.float32)
    assert (out.seed, out.fps) == (3, 24)
    again = pipe("a cat", **SMALL, seed=3)
    assert np.array_equal(again.frames, out.frames)
    assert not np.array_equal(pipe("a cat", **SMALL, seed=4).frames, out.frames)


def test_a_tokenizer_of_more_tokens_than_the_encoder_has_is_refused(folder):
    smaller = locate(folder)
    config = dataclasses.replace(smaller.text_encoder_config, vocab_size=600)
    with pytest.raises(CheckpointError, match=r"the tokenizer has 6\d\d tokens, the text encoder 600"):
        mlx_wan.WanPipeline.from_pretrained(dataclasses.replace(smaller, text_encoder_config=config))


def test_the_seed_that_was_drawn_makes_the_same_video(pipe):
    drawn = pipe("a cat", **SMALL, output_type="latent")
    assert mx.array_equal(pipe("a cat", **SMALL, output_type="latent", seed=drawn.seed).latents, drawn.latents)
    assert pipe("a cat", **SMALL, output_type="latent").seed != drawn.seed


def test_listed_timesteps_take_the_place_of_steps_and_shift(pipe, noise):
    size = {key: value for key, value in SMALL.items() if key != "num_inference_steps"}
    seen = []
    listed = {"timesteps": (1000, 757, 522), "scheduler": "dmd", "guidance_scale": 1.0}
    out = pipe("a cat", **size, **listed, seed=3, callback=lambda *step: seen.append(step[:2]), output_type="latent")
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert pipe.scheduler.timesteps.tolist() == [1000, 757, 522]
    assert mx.array_equal(pipe("a cat", **size, **listed, seed=3, output_type="latent").latents, out.latents)
    given = pipe("a cat", **size, **listed, latents=noise, output_type="latent")
    again = pipe("a cat", **size, **listed, latents=noise, seed=given.seed, output_type="latent")
    assert mx.array_equal(again.latents, given.latents), "the noise between steps follows from the seed that is told"
    with pytest.raises(UserError, match="3 timesteps and 2 steps: give one or the other"):
        pipe("a cat", **SMALL, **listed)
    with pytest.raises(UserError, match="a list of timesteps has no shift"):
        pipe("a cat", **size, **listed, shift=5.0)


def test_without_guidance_the_negative_prompt_is_not_even_encoded(pipe, monkeypatch):
    asked, encode = [], pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda text: asked.append(text) or encode(text))
    plain = pipe("a cat", **SMALL, seed=3, guidance_scale=1, negative_prompt="blurry", output_type="latent")
    assert asked == ["a cat"]
    assert mx.array_equal(pipe("a cat", **SMALL, seed=3, guidance_scale=1, output_type="latent").latents, plain.latents)


def test_given_noise_is_what_the_run_starts_from(pipe, noise):
    out = pipe("a cat", **SMALL, latents=noise, output_type="latent")
    assert (out.frames, out.seed) == (None, None)
    assert mx.array_equal(pipe("a cat", **SMALL, latents=mx.array(noise), output_type="latent").latents, out.latents)
    drawn = pipe("a cat", **SMALL, seed=3, output_type="latent").latents
    key = mx.random.normal((1, 2, 2, 4, 48), key=mx.random.key(3))
    assert mx.array_equal(pipe("a cat", **SMALL, latents=key, output_type="latent").latents, drawn)


def test_callback_and_stream_tell_of_every_step(pipe, noise):
    calls = []
    out = pipe("a cat", **SMALL, latents=noise, callback=lambda step, steps, latents: calls.append((step, latents)))
    assert [step for step, _ in calls] == [1, 2]
    assert mx.array_equal(calls[-1][1], out.latents)
    events = list(pipe.stream("a cat", **SMALL, latents=noise, image=Image.new("RGB", (64, 32))))
    stages = [(event.stage, event.index, event.total) for event in events]
    assert stages == [
        *(("text", 1, 2), ("text", 2, 2), ("image", 1, 1), ("denoise", 1, 2), ("denoise", 2, 2)),
        *(("latents", 1, 1), ("frames", 1, 2), ("frames", 2, 2)),
    ]
    assert [event.value.shape for event in events[-2:]] == [(1, 32, 64, 3), (4, 32, 64, 3)]


@pytest.mark.parametrize("prompt", ["", "一只猫在草地上跑", "🐱👩\u200d🚀", "\ud83d \x00 \ufeff", "red " * 5000])
def test_any_text_is_a_prompt(pipe, prompt):
    embedding = pipe.encode_prompt(prompt)
    assert embedding.shape[1] == 64
    assert 1 <= embedding.shape[0] <= 512
    assert mx.isfinite(embedding).all().item()
    assert pipe(prompt, **SMALL, seed=0, output_type="latent").latents.shape == (1, 2, 2, 4, 48)


def test_a_picture_may_be_a_file_or_an_open_one_and_is_shown_upright(pipe, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # show turned a quarter clockwise
    sideways = Image.fromarray(np.ascontiguousarray(np.rot90(small.picture(32, 64))))
    sideways.save(tmp_path / "photo.png", exif=exif)
    options = {"num_frames": 1, "num_inference_steps": 1, "seed": 0, "width": 64, "height": 32, "output_type": "latent"}
    upright = pipe("a cat", image=Image.fromarray(small.picture(32, 64)), **options).latents
    assert mx.array_equal(pipe("a cat", image=tmp_path / "photo.png", **options).latents, upright)
    assert mx.array_equal(pipe("a cat", image=str(tmp_path / "photo.png"), **options).latents, upright)
    assert mx.array_equal(pipe("a cat", image=Image.open(tmp_path / "photo.png"), **options).latents, upright)
    assert not mx.array_equal(pipe("a cat", image=sideways, **options).latents, upright)


# --- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100}, "size 100x32: width must be a multiple of 32"),
        ({"width": 64.0}, "width is 64.0; it must be a whole number"),
        ({"height": "32"}, "height is '32'; it must be a whole number"),
        ({"width": None}, "give both width and height"),
        ({"num_frames": 6}, "num_frames is 6; it must be 4n"),
        ({"num_frames": 5.0}, "num_frames is 5.0; it must be a whole number"),
        ({"num_inference_steps": 0}, "number of inference steps is 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a number"),
        ({"guidance_scale": "5"}, "guidance_scale is '5'; it must be a number"),
        ({"shift": 0}, "shift is 0"),
        ({"scheduler": "ddim"}, "unknown scheduler 'ddim'"),
        ({"seed": -1}, "seed is -1; it must be a whole number, not negative"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"prompt": ["a cat"]}, "prompt is a list; it must be a string"),
        ({"negative_prompt": 3}, "negative_prompt is a int"),
        ({"output_type": "pil"}, "output_type is 'pil'; choose one of np, latent"),
        ({"image": np.zeros((32, 32, 3))}, "image is a ndarray; give a file name or a PIL image"),
        ({"image": "absent.png"}, "absent.png: no such picture"),
        ({"latents": mx.zeros((1, 2, 4, 4, 48))}, r"latents are \(1, 2, 4, 4, 48\)"),
        ({"latents": mx.full((1, 2, 2, 4, 48), float("nan"))}, "latents hold NaN"),
    ],
)
def test_mistakes_are_named_before_the_work(pipe, monkeypatch, options, message):
    monkeypatch.setattr(pipe, "encode_prompt", lambda text: pytest.fail("the work began"))
    with pytest.raises(UserError, match=message):
        pipe(**{"prompt": "a cat", **SMALL, "seed": 0, **options})


@pytest.mark.parametrize("dtype", ["bfloat16", mx.int8])
def test_other_types_are_refused(folder, dtype):
    with pytest.raises(UserError, match=r"choose one of mlx\.core\.float32"):
        mlx_wan.WanPipeline.from_pretrained(folder, dtype=dtype)


def test_a_video_that_is_not_a_number_is_a_failure(folder):
    broken = mlx_wan.WanPipeline.from_pretrained(folder)
    broken.vae.decoder.head[2].bias[0] = float("nan")
    with pytest.raises(WanError, match="piece 1 of the decoded video is not finite"):
        broken("a cat", **SMALL, seed=0)


# --- memory --------------------------------------------------------------------------------------------------


def in_memory(pipe):
    """The modules a pipeline holds."""
    parts = {"text_encoder": pipe._text_encoder, "vae": pipe._vae, **pipe._transformers}
    return {name: module for name, module in parts.items() if module is not None}


def test_with_low_memory_one_large_part_is_there_at_a_time(folder):
    pipe = mlx_wan.WanPipeline.from_pretrained(folder, low_memory=True)
    parts, alive = {}, []
    for event in pipe.stream("a cat", **SMALL, seed=0):
        for name, module in in_memory(pipe).items():
            parts.setdefault(name, weakref.ref(module))
            del module
        gc.collect()
        alive.append((event.stage, {name for name, part in parts.items() if part() is not None}))
    assert alive == [
        ("text", {"text_encoder"}),
        ("text", {"text_encoder"}),
        ("denoise", {"transformer"}),
        ("denoise", {"transformer"}),
        ("latents", set()),
        ("frames", {"vae"}),
        ("frames", {"vae"}),
    ]


def test_without_it_the_parts_stay(folder):
    pipe = mlx_wan.WanPipeline.from_pretrained(folder, low_memory=False)
    parts = (pipe.text_encoder, pipe.transformer, pipe.vae)
    pipe("a cat", **SMALL, seed=0)
    assert parts == (pipe.text_encoder, pipe.transformer, pipe.vae)


# --- two experts ---------------------------------------------------------------------------------------------

CROSSING = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 4, "seed": 0}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return checkpoint.write_official(tmp_path_factory.mktemp("experts") / "Wan2.2", "small-t2v-A14B")


def watched(pipe, **options):
    """(stage, which transformers are anywhere in memory) at each event of a run that crosses the boundary."""
    parts, seen = {}, []
    for event in pipe.stream("a cat", **CROSSING, **options):
        for name, module in pipe._transformers.items():
            parts.setdefault(name, weakref.ref(module))
            del module
        gc.collect()
        seen.append((event.stage, {name for name, part in parts.items() if part() is not None}))
    return [names for stage, names in seen if stage == "denoise"], seen[-1][1]


def test_one_expert_is_in_memory_at_a_time_and_they_change_places_once(experts, monkeypatch):
    loads = []
    load = plan.load_transformer
    monkeypatch.setattr(plan, "load_transformer", lambda *args: loads.append(args[2]) or load(*args))
    pipe = mlx_wan.WanPipeline.from_pretrained(experts, low_memory=False)
    during, after = watched(pipe)
    high, low = {"transformer"}, {"transformer_2"}
    assert during == [high, high, high, low]
    assert after == low
    assert loads == ["transformer", "transformer_2"]
    assert watched(mlx_wan.WanPipeline.from_pretrained(experts, low_memory=True))[1] == set()


def test_both_experts_stay_if_asked(experts):
    pipe = mlx_wan.WanPipeline.from_pretrained(experts, low_memory=False, keep_both_experts=True)
    during, after = watched(pipe)
    assert [len(names) for names in during] == [1, 1, 1, 2]
    assert after == {"transformer", "transformer_2"}
    assert pipe.transformer is pipe.transformer is not pipe.transformer_2
    one_at_a_time = mlx_wan.WanPipeline.from_pretrained(experts)
    options = {**CROSSING, "output_type": "latent"}
    assert mx.array_equal(pipe("a cat", **options).latents, one_at_a_time("a cat", **options).latents)


def test_a_model_with_one_transformer_has_no_second(pipe):
    assert pipe.transformer_2 is None
    with pytest.raises(UserError, match=r"a pair .* is for models of two experts"):
        pipe("a cat", **SMALL, guidance_scale=(3.0, 4.0))


def test_one_number_of_guidance_is_for_both_experts(experts):
    pipe = mlx_wan.WanPipeline.from_pretrained(experts, keep_both_experts=True)
    options = {**CROSSING, "output_type": "latent"}
    one, pair, other = (pipe("a cat", **options, guidance_scale=s).latents for s in (2.0, (2.0, 2.0), (3.0, 2.0)))
    assert mx.array_equal(one, pair)
    assert not mx.array_equal(one, other)
    with pytest.raises(UserError, match=r"guidance_scale is \(2\.0, nan\); it must be a number"):
        pipe("a cat", **options, guidance_scale=(2.0, float("nan")))


def test_pictures_where_they_belong(experts, tmp_path):
    picture = Image.fromarray(small.picture())
    with pytest.raises(UserError, match="custom takes no picture"):
        mlx_wan.WanPipeline.from_pretrained(experts)("a cat", **CROSSING, image=picture)
    pipe = mlx_wan.WanPipeline.from_pretrained(checkpoint.write_official(tmp_path / "i2v", "small-i2v-A14B"))
    with pytest.raises(UserError, match="custom makes a video of a picture: give an image"):
        pipe("a cat", **CROSSING)
    assert pipe._request("a cat", picture, *[None] * 10).width == 1136  # of 100x70 at the area of 1280x720
    with pytest.raises(UserError, match="num_frames is 1; a first and a last frame need more"):
        pipe("a cat", picture, last_image=picture, num_frames=1)


# --- first and last frame, image tokens -----------------------------------------------------------------------


def test_two_experts_take_a_last_frame_too(tmp_path):
    pipe = mlx_wan.WanPipeline.from_pretrained(checkpoint.write_official(tmp_path / "i2v", "small-i2v-A14B"))
    first, last = (Image.fromarray(small.picture(32, 32, name)) for name in ("picture", "last"))
    request = pipe._request("a cat", first, None, 32, 32, 9, *[None] * 6, last)
    channels = np.array(pipe._known_frames(request).channels)
    assert channels.shape == (1, 3, 4, 4, 20)
    np.testing.assert_array_equal(channels[0, :, 0, 0, :4], [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    video = np.zeros((1, 9, 32, 32, 3), np.float32)
    video[:, 0], video[:, 8] = (np.asarray(picture) / np.float32(127.5) - 1 for picture in (first, last))
    assert np.abs(channels[..., 4:] - np.array(pipe.vae.encode(mx.array(video)))).max() < 1e-5
    options = {**CROSSING, "num_frames": 9, "output_type": "latent", "image": first}
    assert not mx.array_equal(pipe("a cat", **options, last_image=last).latents, pipe("a cat", **options).latents)


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory):
    return checkpoint.write_official(tmp_path_factory.mktemp("tokens") / "Wan2.1", "small-i2v-14B")


def test_the_image_encoder_leaves_memory_too(with_tokens, experts):
    options = {**CROSSING, "num_inference_steps": 1, "image": Image.fromarray(small.picture(32, 32))}
    pipe = mlx_wan.WanPipeline.from_pretrained(with_tokens, low_memory=True)
    list(pipe.stream("a cat", **options))
    assert pipe._image_encoder is None
    pipe = mlx_wan.WanPipeline.from_pretrained(with_tokens, low_memory=False)
    list(pipe.stream("a cat", **options))
    assert pipe._image_encoder is pipe.image_encoder is not None
    assert mlx_wan.WanPipeline.from_pretrained(experts).image_encoder is None


def test_the_default_shift_goes_with_the_size(with_tokens):
    pipe = mlx_wan.WanPipeline.from_pretrained(with_tokens)
    picture = Image.fromarray(small.picture())
    for size, shift in (((832, 480), 3.0), ((1280, 720), 5.0)):
        pipe._request("a cat", picture, None, *size, *[None] * 7)
        want = pipeline.make_scheduler("unipc", 40, shift)
        assert np.array_equal(pipe.scheduler.sigmas, want.sigmas)


def test_last_frames_where_they_belong(with_tokens, tmp_path):
    picture = Image.fromarray(small.picture())
    with pytest.raises(UserError, match="custom takes no last frame: leave it out, or use I2V-A14B or FLF2V-14B"):
        mlx_wan.WanPipeline.from_pretrained(with_tokens)("a cat", picture, last_image=picture)
    pipe = mlx_wan.WanPipeline.from_pretrained(checkpoint.write_official(tmp_path / "flf2v", "small-flf2v-14B"))
    with pytest.raises(UserError, match="custom makes a video between two pictures: give the last frame too"):
        pipe("a cat", picture)


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "is one flat colour"), (float("inf"), "is not finite"), (float("nan"), "is not finite"), (1.0, None)],
)
def test_a_decoder_that_fails_stops_the_run(pipe, monkeypatch, value, message):
    plain = type(pipe.vae).pixels
    monkeypatch.setattr(type(pipe.vae), "pixels", lambda self, z, cache: plain(self, z, cache) * 0 + value)
    if message is None:
        assert (pipe("a cat", **SMALL, seed=1).frames == 255).all()
        return
    with pytest.raises(WanError, match=f"piece 1 of the decoded video {message}"):
        pipe("a cat", **SMALL, seed=1)
