"""The plan of a fine-tuning run: what it says is what will be."""

from dataclasses import replace

import clips
import mlx.core as mx
import pytest
import toy_model

from mlx_wan import backend
from mlx_wan.errors import UserError
from mlx_wan.training.buckets import Bucket
from mlx_wan.training.dataset import Source
from mlx_wan.training.options import FinetuneRecipe
from mlx_wan.training.plan import activations, hold_out, make_plan
from mlx_wan.weights.convert import convert


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_model.write_model(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "toy"
    convert(model, folder, bits=4, group_size=32)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = clips.write_folder(tmp_path_factory.mktemp("data") / "clips", 4)
    clips.write_video(folder / "no_caption.mp4")
    clips.write_image(folder / "p.png")
    (folder / "p.txt").write_text("a picture")
    return folder


def plan(model, data, **changes):
    return make_plan(FinetuneRecipe(**{"model": str(model), "data": str(data), "rank": 2, **changes}))


def test_everything_is_counted(model, data):
    made = plan(model, data, batch_size=2, grad_accumulation_steps=3, iters=10, hold_out=0.25)
    assert [clip.bucket for clip in made.clips] == [Bucket(5, 16, 16)] * 3 + [Bucket(1, 16, 16)]
    assert len(made.held_out) == 1
    # 8 matrices of 32x32 and 64x32, 32x64 in each of 2 blocks: rank times both sides
    assert made.trained == 2 * 2 * (8 * 64 + 2 * 96)
    text = "\n".join(made.lines())
    for words in (
        "clips: 4 of 4 files, 1 for validation, 1 files skipped",
        "no_caption.mp4: has no caption",
        "bucket 16x16x5: 3 clips",
        "bucket 16x16x1: 1 clips",
        "LoRA of rank 2 beside q, k, v, o, ffn.0, ffn.2, in 2 of 2 blocks: 2,816 of 40,048 numbers",
        "steps: 10 of 6 clips, 15.0 times all clips",
        "fits",
    ):
        assert words in text


def test_the_models_own_values_fill_the_gaps(model, data):
    recipe = plan(model, data).recipe
    assert (recipe.width, recipe.height, recipe.num_frames, recipe.fps, recipe.shift) == (16, 16, (5,), 12.0, 3.0)
    assert (recipe.dtype, recipe.compile, recipe.preview_steps) == ("float32", False, 2)
    assert recipe.cache == str(data / ".mlx-wan-cache")
    other = plan(model, data, width=24, height=16, num_frames=(3, 7), fps=6.0, shift=1.0, cache="c").recipe
    assert (other.width, other.num_frames, other.fps, other.shift, other.cache) == (24, (3, 7), 6.0, 1.0, "c")


def test_an_expert_is_for_models_that_have_two(model, data):
    with pytest.raises(UserError, match="expert"):
        plan(model, data, expert="high")


def test_planning_writes_nothing(model, data):
    before = sorted(data.rglob("*"))
    plan(model, data)
    assert sorted(data.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("q", "kv")}, "targets: no matrix is called 'kv'; there are cross_attn.k, cross_attn.o"),
        ({"num_layers": 3}, "num_layers is 3; the model has 2"),
        ({"width": 20, "height": 16}, "size 20x16: sides must be multiples of 8 and 8"),
        ({"num_frames": (4,)}, r"num_frames is 4; it must be 2n\+1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"resume_adapter_file": "not/there.safetensors"}, "not/there.safetensors: no such adapter file"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(model, data, changes, message):
    with pytest.raises(UserError, match=message):
        plan(model, data, **changes)


def test_data_of_which_nothing_is_usable_is_refused_with_a_reason(model, data, tmp_path):
    clips.write_folder(tmp_path / "short", 2, frames=3)
    with pytest.raises(UserError, match=r"short: no clip to train on: .*clip0.mp4: is too short: 3 frames at 12 fps"):
        plan(model, tmp_path / "short")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no clip to train on$"):
        plan(model, tmp_path / "empty")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be above 0"),
        ({"fine_tune_type": "lokr"}, "fine_tune_type is 'lokr'; choose one of lora, dora, full"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5; it must be from 0 to 1"),
        ({"hold_out": 1.0}, "hold_out is 1.0"),
        ({"width": 16}, "give both width and height"),
        ({"val_batches": 0}, "val_batches is 0"),
        ({"targets": ()}, "targets is empty"),
        ({"fine_tune_type": "full", "resume_adapter_file": "a"}, "resume_adapter_file is for lora"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        FinetuneRecipe(**{"model": "m", "data": "d", **changes})


def test_quantized_models_take_adapters_only(quantized, data):
    made = plan(quantized, data)
    assert "QLoRA of rank 2" in "\n".join(made.lines())
    assert made.trained == 2816
    with pytest.raises(UserError, match="a quantized model cannot be trained itself"):
        plan(quantized, data, fine_tune_type="full")


def test_memory_grows_with_what_is_asked(model, quantized, data):
    whole = plan(model, data)
    need = whole.memory
    assert plan(quantized, data).memory["weights"] < need["weights"]
    bucket, deep = Bucket(9, 64, 64), replace(whole.checkpoint.transformer_config, num_layers=30)
    checkpoint = replace(whole.checkpoint, transformer_config=deep)
    assert activations(checkpoint, bucket, True, 4) < activations(checkpoint, bucket, False, 4) / 10
    assert plan(model, data, batch_size=2).memory["activations"] == 2 * need["activations"]
    assert plan(model, data, fine_tune_type="full").memory["gradients and optimizer"] == 12 * 37232
    assert plan(model, data, optimizer="lion").memory["gradients and optimizer"] == 8 * 2816
    assert plan(model, data, dtype="bfloat16").memory["weights"] < need["weights"]
    assert whole.fits


def test_what_does_not_fit_is_said(model, data, monkeypatch):
    made = plan(model, data)
    monkeypatch.setattr(backend, "total_memory", lambda: sum(made.memory.values()) - 1)
    assert not made.fits
    assert "does not fit; try grad_checkpoint" in made.lines()[-1]


def test_holding_out_is_spread_and_keeps_some_of_both():
    sources = [Source(data, "video", "x") for data in map(str, range(20))]
    rest, held = hold_out(sources, 0.2)
    assert [int(source.path) for source in held] == [2, 7, 12, 17]
    assert len(rest) == 16
    assert set(rest) | set(held) == set(sources)
    assert len(hold_out(sources, 0.001)[1]) == 1


def test_the_trainer_is_told_what_the_recipe_says(model, data):
    made = plan(model, data, optimizer="lion", lr_schedule="linear", grad_accumulation_steps=2, iters=7, keep=3, seed=4)
    config = made.train
    assert (config.optimizer, config.schedule, config.grad_accumulation_steps) == ("lion", "linear", 2)
    assert (config.steps, config.keep, config.seed, config.dtype) == (7, 3, 4, mx.float32)
    assert replace(made, recipe=replace(made.recipe, dtype="bfloat16")).train.dtype == mx.bfloat16
