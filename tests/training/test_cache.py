"""The cache: what is in it is what the encoders give, computed once, and again when anything changed."""

import os

import clips
import mlx.core as mx
import numpy as np
import pytest
import toy_model

from mlx_wan.errors import WanError
from mlx_wan.pipeline import WanPipeline
from mlx_wan.training import cache as module
from mlx_wan.training.cache import Cache, load_clip, load_context
from mlx_wan.training.dataset import Sampling, find_sources, plan_clips, read_clip
from mlx_wan.weights.load import locate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_model.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    return clips.write_folder(tmp_path / "data", 3)


def plan(data, **changes):
    sampling = Sampling(**{"num_frames": (5,), "width": 16, "height": 16, "steps": (8, 8), "fps": 12, **changes})
    return plan_clips(find_sources(data)[0], sampling)[0]


def fill(tmp_path, model, planned, texts=("a bar", ""), dtype=mx.float32):
    return Cache(tmp_path / "cache", locate(model), dtype).fill(planned, texts)


def test_it_holds_what_the_encoders_give(tmp_path, model, data):
    planned = plan(data)
    cached = fill(tmp_path, model, planned)
    assert [clip for clip, _ in cached.latents] == planned
    assert (cached.computed, cached.skipped) == (5, [])
    pipe = WanPipeline.from_pretrained(model)
    for clip, file in cached.latents:
        want = np.array(pipe.vae.encode(mx.array(read_clip(clip))))[0]
        np.testing.assert_allclose(np.array(load_clip(file)["latents"]), want, rtol=1e-3, atol=1e-3)
    want = np.array(pipe._padded(pipe.encode_prompt("a bar")))[0]
    np.testing.assert_array_equal(np.array(load_context(cached.texts["a bar"], 16)), want)
    assert cached.texts.keys() == {"a bar", ""}


def test_a_second_run_loads_no_encoder(tmp_path, model, data, monkeypatch):
    first = fill(tmp_path, model, plan(data))
    for name in ("load_vae", "load_text_encoder"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("an encoder was loaded"))
    again = fill(tmp_path, model, plan(data))
    assert again.computed == 0
    assert (again.latents, again.texts) == (first.latents, first.texts)


def test_whatever_decides_a_value_makes_it_anew(tmp_path, model, data):
    fill(tmp_path, model, plan(data))
    touched = plan(data)[0].source.path
    os.utime(touched, (1, 1))
    assert fill(tmp_path, model, plan(data)).computed == 0, "contents decide, not dates"
    stat = touched.stat()
    clips.write_video(touched, seed=3)
    os.utime(touched, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fill(tmp_path, model, plan(data)).computed == 1
    assert fill(tmp_path, model, plan(data, width=24)).computed == 3
    assert fill(tmp_path, model, plan(data, num_frames=(3,))).computed == 3
    assert fill(tmp_path, model, plan(data, flip=True)).computed == 3
    assert fill(tmp_path, model, plan(data), texts=["a bar", "another"]).computed == 1
    assert fill(tmp_path, model, plan(data), dtype=mx.float16).computed == 2
    other = toy_model.write_model(tmp_path / "other", seed=1)
    assert fill(tmp_path, other, plan(data)).computed == 5
    assert fill(tmp_path, model, plan(data)).computed == 0


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_made_again(tmp_path, model, data, damage):
    cached = fill(tmp_path, model, plan(data))
    file = cached.latents[1][1]
    good = file.read_bytes()
    file.write_bytes({"cut": good[:-7], "changed": good[:-7] + b"damaged", "empty": b""}[damage])
    again = fill(tmp_path, model, plan(data))
    assert again.computed == 1
    assert file.read_bytes() == good


def test_a_write_that_fails_leaves_no_file(tmp_path, model, data):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(WanError, match=r"cannot be written .*choose another --cache"):
        fill(tmp_path, model, plan(data))


def test_a_clip_that_breaks_while_decoding_is_skipped(tmp_path, model, data):
    planned = plan(data)
    path = planned[1].source.path
    raw = bytearray(path.read_bytes())
    start = raw.index(b"mdat") + 8
    raw[start:] = bytes(len(raw) - start)
    path.write_bytes(raw)
    planned[2].source.path.unlink()
    cached = fill(tmp_path, model, planned)
    assert [clip for clip, _ in cached.latents] == planned[:1]
    assert {one.path for one in cached.skipped} == {path, planned[2].source.path}
    assert all(str(one.path) in str(one) for one in cached.skipped)


def test_progress_is_reported(tmp_path, model, data):
    seen = []
    Cache(tmp_path / "c", locate(model), mx.float32, lambda *row: seen.append(row)).fill(plan(data), ["a"])
    assert seen == [(1, 3, "clip"), (2, 3, "clip"), (3, 3, "clip"), (1, 1, "text")]
