"""A run that stopped at any step goes on to the latents it would have had, bit for bit; other files are refused."""

import itertools
import random

import checkpoint
import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
import small
from PIL import Image

import mlx_wan
from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.resume import arrays_of, expected, load_point, read_record, save_point
from mlx_wan.schedulers import SCHEDULERS, make_scheduler
from mlx_wan.zoo import MODELS

CLIP = {"width": 64, "height": 32, "num_frames": 5, "num_inference_steps": 5, "seed": 3}
PICTURE = {"image": Image.fromarray(small.picture())}
# Of the two experts the second works from the third or fourth of five steps on.
RUNS = {"small": {}, "small picture": PICTURE, "small-t2v-A14B": {}, "small-i2v-A14B": PICTURE}


@pytest.fixture(scope="module", params=RUNS)
def made(request, tmp_path_factory):
    """(pipeline, its arguments)."""
    folder = checkpoint.write_official(tmp_path_factory.mktemp("model") / "model", request.param.split()[0])
    return mlx_wan.WanPipeline.from_pretrained(folder), CLIP | RUNS[request.param]


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_a_run_goes_on_from_any_step_to_the_same_video(made, solver, tmp_path):
    pipe, arguments = made
    arguments = arguments | {"scheduler": solver, "prompt": "two cats"}
    whole = list(pipe.stream(**arguments))
    latents = next(event.value for event in whole if event.stage == "latents")
    points = [event.point for event in whole if event.stage == "denoise"]
    assert [point.step for point in points] == [1, 2, 3, 4, 5]
    for point in points:
        file = tmp_path / f"{point.step}.safetensors"
        save_point(file, point, {"any": "thing"})
        assert read_record(file) == {"any": "thing"}
        again = list(pipe.stream(**arguments, start=load_point(file, pipe.scheduler)))
        assert [event.index for event in again if event.stage == "denoise"] == list(range(point.step + 1, 6))
        assert mx.array_equal(next(event.value for event in again if event.stage == "latents"), latents)
    frames = [np.concatenate([e.value for e in events if e.stage == "frames"]) for events in (whole, again)]
    np.testing.assert_array_equal(*frames)


def test_the_switch_of_experts_lies_within_the_runs():
    for name in ("t2v-A14B", "i2v-A14B"):
        spec = MODELS[name]
        for solver in SCHEDULERS:
            times = make_scheduler(solver, 5, spec.shift).timesteps
            high = sum(t >= spec.boundary * 1000 for t in times)
            assert 0 < high < 5, (name, solver, times)


def point_of(solver="unipc", step=3):
    scheduler = make_scheduler(solver, 5, 5.0)
    latents, state = mx.random.normal((1, 2, 2, 4, 8)), scheduler.init()
    for _ in range(step):
        latents, state = scheduler.step(mx.random.normal(latents.shape), latents, state)
    return type(expected(scheduler, step))(step, latents, state)


def test_a_file_holds_what_other_programs_can_read(tmp_path):
    point = point_of()
    save_point(tmp_path / "a.safetensors", point, {})
    arrays = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(arrays["latents"], point.latents)
    assert {array.shape for array in arrays.values()} == {(1, 2, 2, 4, 8)}
    assert len(arrays) == 4  # UniPC: corrected latents and two predictions


def test_a_state_of_another_sampler_or_length_is_refused(tmp_path):
    save_point(tmp_path / "a.safetensors", point_of("unipc", 3), {})
    for solver in ("dpm++", "euler"):
        with pytest.raises(CheckpointError, match="does not hold the state of this sampler after step 3"):
            load_point(tmp_path / "a.safetensors", make_scheduler(solver, 5, 5.0))
    with pytest.raises(CheckpointError, match="is after step 3, and the run has 2"):
        load_point(tmp_path / "a.safetensors", make_scheduler("unipc", 2, 5.0))


def test_a_point_of_another_size_and_noise_beside_it_are_refused(made):
    pipe, arguments = made
    point = point_of("unipc")
    with pytest.raises(UserError, match=r"start has latents \(1, 2, 2, 4, 8\); this size and number of frames need"):
        pipe("two cats", **arguments, start=point)
    with pytest.raises(UserError, match="start and latents are both given"):
        pipe("two cats", **arguments, start=point, latents=point.latents)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_record(tmp_path / "a.safetensors")
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": mx.zeros(3)}, {})
    with pytest.raises(UserError, match="is not the state of a run of mlx-wan"):
        read_record(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match="is damaged, or not the state of a run"):
        read_record(tmp_path / "a.safetensors")


def test_any_changed_byte_is_noticed(tmp_path):
    path, point = tmp_path / "a.safetensors", point_of()
    save_point(path, point, {"settings": {"prompt": "a"}})
    whole, rng = path.read_bytes(), random.Random(0)
    record, messages, kept = read_record(path), [], list(arrays_of(point).values())
    for place in itertools.chain(range(0, 700, 3), rng.sample(range(len(whole)), 300)):
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            found, loaded = read_record(path), load_point(path, make_scheduler("unipc", 5, 5.0))
        except WanError as error:
            messages.append(str(error))
            continue
        assert found == record
        assert loaded.step == point.step
        assert all(mx.array_equal(a, b) for a, b in zip(arrays_of(loaded).values(), kept, strict=True))
    assert not any("\n" in message for message in messages)
    assert len(messages) > 450  # the rest hit blanks, or a letter of JSON that may be either
