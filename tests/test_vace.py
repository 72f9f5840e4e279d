"""What VACE is told: sizes, frames, masks and references; the numbers of the official code are in test_parity_runs."""

import checkpoint
import mlx.core as mx
import numpy as np
import pytest
import small
from PIL import Image

import mlx_wan
from mlx_wan import vace
from mlx_wan.errors import UserError
from mlx_wan.memory.plan import Dimensions, Setting, plans
from mlx_wan.models.packed import PackedLinear
from mlx_wan.vace import Source
from mlx_wan.weights.inspect import describe
from mlx_wan.weights.load import load_transformer, locate
from mlx_wan.weights.quantize import Quantization, quantize_module

CLIP = {"num_frames": 5, "num_inference_steps": 2, "seed": 3, "output_type": "latent"}
VIDEO = np.zeros((5, 32, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.write_official(tmp_path_factory.mktemp("vace") / "model", "small-vace-14B")


@pytest.fixture(scope="module")
def pipe(folder):
    return mlx_wan.WanPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("length", "count", "places"),
    [(81, 81, list(range(81))), (5, 5, [0, 1, 2, 3, 4]), (1, 1, [0]), (9, 5, [0, 2, 4, 6, 8]), (3, 5, [0, 0, 1, 1, 2])],
)
def test_frames_are_taken_evenly(length, count, places):
    assert vace.frame_places(length, count) == places


def test_as_many_frames_as_there_are():
    assert [vace.best_count(n, 4, 81) for n in (1, 4, 5, 80, 81, 500)] == [1, 1, 5, 77, 81, 81]


@pytest.mark.parametrize(
    ("size", "area", "made"),
    [
        ((1280, 720), 1280 * 720, (1280, 720)),
        ((1920, 1080), 832 * 480, (832, 480)),
        ((64, 48), 832 * 480, (64, 48)),
        ((720, 1280), 832 * 480, (464, 848)),
    ],
)
def test_the_size_follows_the_source_and_is_not_larger(size, area, made):
    assert vace.source_size(*size, 16, 16, area) == made


def test_a_mask_has_a_channel_for_each_pixel_of_a_latent():
    mask = np.zeros((5, 16, 32), np.float32)
    mask[:, 8 + 3, 16 + 5] = 1  # second row of latents, third column, at (3, 5) in it
    channels = vace.mask_channels(mask, (4, 8, 8))
    assert channels.shape == (1, 2, 2, 4, 64)
    assert np.argwhere(channels).tolist() == [[0, t, 1, 2, 3 * 8 + 5] for t in (0, 1)]


def test_a_reference_is_whole_on_white():
    frame = vace.on_canvas(Image.new("RGB", (100, 50), (255, 0, 0)), 64, 48)
    assert frame.shape == (1, 1, 48, 64, 3)
    np.testing.assert_array_equal(frame[0, 0, [0, 7, 8, 39, 40], 30, 1], [1, 1, -1, -1, 1])


def test_what_stays_and_what_changes_are_two_videos():
    seen = []

    def encode(video):
        seen.append(np.array(video))
        return mx.zeros((1, 2, 4, 6, 16))

    video, mask = np.full((5, 32, 48, 3), 255, np.uint8), np.zeros((1, 32, 48), np.uint8)
    mask[0, :, :24] = 128
    channels = vace.control_channels(encode, Source(video, mask), 48, 32, 5, (4, 8, 8))
    assert channels.shape == (1, 2, 4, 6, 96)
    stays, changing = seen
    assert (stays[..., :24, :] == 0).all()
    assert (stays[..., 24:, :] == 1).all()
    np.testing.assert_array_equal(stays + changing, np.ones_like(stays))
    np.testing.assert_allclose(channels[..., :3, 32:], 128 / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"mask": VIDEO[..., 0]}, "a mask says what may change in a source video: give that too"),
        ({"video": VIDEO[0]}, r"the source video is uint8 \(32, 48, 3\); it must be uint8 with 4 dimensions"),
        ({"video": VIDEO.astype(float)}, "the source video is float64"),
        ({"scale": float("nan")}, "the scale of the control is nan"),
    ],
)
def test_sources_that_cannot_be(source, message):
    with pytest.raises(UserError, match=message):
        Source(**source)


def test_a_source_of_another_model_and_pictures_of_another(pipe):
    with pytest.raises(UserError, match="takes a source video, a mask and reference pictures, no first or last frame"):
        pipe("two cats", image=Image.new("RGB", (64, 64)), **CLIP)
    with pytest.raises(UserError, match="tiny takes no source video or reference pictures: use a VACE model"):
        mlx_wan.WanPipeline.from_pretrained("tiny")("two cats", source=Source())
    with pytest.raises(UserError, match="the mask has 3 frames and the source video 5"):
        pipe("two cats", source=Source(VIDEO, np.zeros((3, 32, 48), np.uint8)), **CLIP)


def test_all_of_it_counts(pipe):
    """Each part of a source changes the latents, and references are no part of them."""
    clip, mask, references = small.vace_source()
    pictures = [Image.fromarray(one) for one in references]
    sources = [
        Source(),
        Source(clip[:5]),
        Source(clip[:5], mask[:5]),
        Source(clip[:5], mask[:5], pictures),
        Source(clip[:5], mask[:5], pictures, 0.5),
    ]
    made = [np.array(pipe("two cats", source=source, width=64, height=48, **CLIP).latents) for source in sources]
    assert {latents.shape for latents in made} == {(1, 2, 6, 8, 16)}
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(made) for b in made[:i])


def test_the_size_of_a_run_is_the_sources(pipe):
    assert pipe("two cats", source=Source(VIDEO), **CLIP).latents.shape == (1, 2, 4, 6, 16)


def test_a_run_with_references_goes_on_from_any_step(pipe, tmp_path):
    from mlx_wan.resume import load_point, save_point

    arguments = CLIP | {"source": Source(VIDEO, None, [Image.new("RGB", (30, 30))])}
    arguments.pop("output_type")
    events = list(pipe.stream("two cats", **arguments))
    (point, _) = (event.point for event in events if event.stage == "denoise")
    assert point.latents.shape[1] == 3
    save_point(tmp_path / "a.safetensors", point, {})
    again = list(pipe.stream("two cats", **arguments, start=load_point(tmp_path / "a.safetensors", pipe.scheduler)))
    (want, got) = (next(e.value for e in some if e.stage == "latents") for some in (events, again))
    assert mx.array_equal(got, want)


def test_it_is_named_and_packed(folder):
    found = describe(folder)
    assert found["problems"] == []
    assert "VACE transformer of an unreleased size" in str(found)
    checkpoint_ = locate(folder)
    assert (checkpoint_.spec.task, checkpoint_.kind, checkpoint_.spec.shift) == ("vace", "vace-1.3B", 16.0)
    module = quantize_module(load_transformer(checkpoint_, mx.float32), "transformer", Quantization(8, 32))
    names = [name for name, layer in module.named_modules() if isinstance(layer, PackedLinear)]
    assert len(names) == 10 * (4 + 2)
    assert "vace_blocks.1.self_attn.q" in names


def test_released_models_are_told_apart_by_names_and_planned():
    setting = Setting(832, 480, 81, mx.bfloat16, references=1)
    vace_plan = plans(Dimensions.of_release("vace-1.3B"), setting, "CPU")[1]
    t2v_plan = plans(Dimensions.of_release("t2v-1.3B"), Setting(832, 480, 81, mx.bfloat16), "CPU")[1]
    assert [stage.name for stage in vace_plan.stages] == ["text", "image", "denoise", "decode"]
    peaks = [next(s for s in plan.stages if s.name == "denoise") for plan in (vace_plan, t2v_plan)]
    assert peaks[0].weights > 1.4 * peaks[1].weights
    assert peaks[0].work > peaks[1].work
