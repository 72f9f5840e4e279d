"""Videos that go on: what each part is given, what it adds, and that the seam cannot be told."""

import checkpoint
import mlx.core as mx
import numpy as np
import pytest
import small
from PIL import Image

import mlx_wan
from mlx_wan import extend
from mlx_wan.errors import UserError

CLIP = {"width": 64, "height": 32, "num_frames": 9, "num_inference_steps": 2, "seed": 3, "scheduler": "euler"}


@pytest.fixture(scope="module", params=["small", "small-i2v-A14B", "small-i2v-14B"])
def pipe(request, tmp_path_factory):
    folder = checkpoint.write_official(tmp_path_factory.mktemp("model") / "model", request.param)
    return mlx_wan.WanPipeline.from_pretrained(folder)


def picture():
    return Image.fromarray(small.picture())


def frames_of(events):
    return np.concatenate([event.value for event in events if event.stage == "frames"])


@pytest.mark.parametrize("overlap", [1, 5])
def test_each_part_begins_with_the_last_frames_of_the_one_before(pipe, overlap):
    made = frames_of(extend.stream(pipe, "two cats", 3, overlap, **CLIP, image=picture()))
    assert made.shape == (9 + 2 * (9 - overlap), 32, 64, 3)
    first = pipe("two cats", **CLIP, image=picture())
    np.testing.assert_array_equal(made[:9], first.frames)
    given = [Image.fromarray(frame) for frame in made[9 - overlap : 9]]
    second = pipe("two cats", **CLIP | {"seed": 4}, image=given)
    np.testing.assert_array_equal(made[9 : 18 - overlap], second.frames[overlap:])
    known = pipe.vae.encode(mx.array(made[None, 9 - overlap : 9].astype(np.float32) / 127.5 - 1))
    if pipe.spec.task == "ti2v":
        np.testing.assert_allclose(second.latents[:, : known.shape[1]], known, atol=1e-5)


def test_a_video_goes_on_and_is_not_repeated(pipe):
    whole = frames_of(extend.stream(pipe, "two cats", 2, 5, **CLIP, image=picture()))
    added = frames_of(extend.stream(pipe, "two cats", 1, 5, before=whole[:9], **CLIP | {"seed": 4}))
    np.testing.assert_array_equal(added, whole[9:])


def test_parts_that_are_done_come_again_without_being_made(pipe):
    events = list(extend.stream(pipe, "two cats", 3, 1, **CLIP, image=picture()))
    latents = [event.value for event in events if event.stage == "latents"]
    point = [event.point for event in events if event.stage == "denoise"][2]  # the first step of the second part
    again = list(extend.stream(pipe, "two cats", 3, 1, **CLIP, image=picture(), done=latents[:1], start=point))
    np.testing.assert_array_equal(frames_of(again), frames_of(events))
    assert [event.index for event in again if event.stage == "denoise"] == [2, 1, 2]
    assert again[0].stage == "latents"


@pytest.mark.parametrize(
    ("count", "message"),
    [(2, "image is 2 pictures; one or 4n\\+1, fewer than the frames"), (9, "image is 9 pictures")],
)
def test_so_many_pictures_cannot_begin_a_video(pipe, count, message):
    with pytest.raises(UserError, match=message):
        pipe("two cats", **CLIP, image=[picture()] * count)


def test_what_cannot_go_on():
    spec = mlx_wan.WanPipeline.from_pretrained("tiny").spec
    from mlx_wan.zoo import MODELS

    for name in ("t2v-A14B", "t2v-1.3B", "flf2v-14B"):
        with pytest.raises(UserError, match=f"{name} cannot go on with a video"):
            extend.check(MODELS[name], 81, 1, last=False)
    with pytest.raises(UserError, match="an overlap of 4 frames: must be 4n\\+1, for instance 5"):
        extend.check(spec, 25, 4, last=False)
    with pytest.raises(UserError, match="an overlap of 25 frames: must be less than the 25 frames"):
        extend.check(spec, 25, 25, last=False)
    with pytest.raises(UserError, match="takes no last frame"):
        extend.check(spec, 25, 1, last=True)


def test_a_seam_is_measured_against_its_neighbours():
    steady = np.repeat(np.arange(0, 60, 3, dtype=np.uint8), 4 * 4 * 3).reshape(20, 4, 4, 3)
    assert extend.seam(steady, 10) == pytest.approx(1)
    jump = steady.copy()
    jump[10:] += 27
    assert extend.seam(jump, 10) == pytest.approx(10)
    assert extend.seam(jump, 11) < 1


def test_the_seam_of_the_embedded_model():
    """Two parts are joined far better than two that do not know each other (6.6 times the usual difference)."""
    pipe = mlx_wan.WanPipeline.from_pretrained("tiny")
    options = {"width": 96, "height": 96, "num_frames": 17, "num_inference_steps": 8}
    seams = []
    for number, prompt in enumerate(("a red circle moves right on a black background", "a blue square bounces")):
        made = frames_of(extend.stream(pipe, prompt, 2, 1, **options, seed=number))
        seams.append(extend.seam(made, 17))
        alone = [pipe(prompt, **options, seed=number + i).frames for i in (0, 50)]
        assert extend.seam(np.concatenate(alone), 17) > 2 * seams[-1]
    assert max(seams) < 3
