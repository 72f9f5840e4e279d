"""Fine-tuning: it learns what it is shown, trains what was asked for and nothing else, and survives kill -9."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import clips
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import safetensors.numpy
import toy
import toy_model
from mlx.utils import tree_flatten

from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.training import finetune
from mlx_wan.training.adapt import load_adapters, make_trainable
from mlx_wan.training.checkpoint import newest_state
from mlx_wan.training.finetune import Examples, fill_cache, load_trainable, make_trainer, run
from mlx_wan.training.objective import flow_loss
from mlx_wan.training.options import FinetuneRecipe
from mlx_wan.training.plan import make_plan
from mlx_wan.training.validate import band_losses
from mlx_wan.weights.convert import convert
from mlx_wan.weights.load import load_transformer, locate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_model.write_model(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    return convert(model, tmp_path_factory.mktemp("quantized") / "toy", bits=4, group_size=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = clips.write_folder(tmp_path_factory.mktemp("data") / "clips", 5)
    clips.write_image(folder / "p.png")
    (folder / "p.txt").write_text("a picture")
    return folder


SMALL = {
    "rank": 4,
    "batch_size": 2,
    "iters": 6,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "steps_per_report": 1,
    "steps_per_eval": 3,
    "save_every": 2,
    "hold_out": 0.2,
}


def plan(model, data, folder, **changes):
    values = {"model": str(model), "data": str(data), "adapter_path": str(folder), **SMALL, **changes}
    return make_plan(FinetuneRecipe(**values))


def fit(model, data, folder, resume=False, **changes):
    rows = []
    made = plan(model, data, folder, **changes)
    result, broken = run(made, resume, rows.append)
    assert not broken
    return made, result, rows


def arrays(module):
    return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(module.parameters())}


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["model", "quantized"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_learn_and_leave_the_weights_alone(model, quantized, data, tmp_path, base, kind):
    source = {"model": model, "quantized": quantized}[base]
    length = {"iters": 60, "steps_per_report": 20, "steps_per_eval": 60, "save_every": 60}
    made, result, rows = fit(source, data, tmp_path, fine_tune_type=kind, **length)
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    start = finetune.evaluation(made, fill_cache(made, lambda *_: None)[1])
    assert losses[-1] < 0.8 * start(load_transformer(made.checkpoint, mx.float32))["val_loss"]
    stored = safetensors.numpy.load_file(result)
    assert any(name.endswith(".dora_scale") for name in stored) == (kind == "dora")
    layers = {re.split(r"\.(?:lora_|dora_)", name)[0] for name in stored}
    assert layers == {
        f"diffusion_model.blocks.{i}.{part}"
        for i in range(2)
        for part in [f"{a}_attn.{m}" for a in ("self", "cross") for m in "qkvo"] + ["ffn.0", "ffn.2"]
    }
    assert stored["diffusion_model.blocks.1.ffn.2.lora_A.weight"].shape == (4, 64)
    assert np.abs(stored["diffusion_model.blocks.1.ffn.2.lora_B.weight"]).max() > 0
    trainer = make_trainer(made, Examples(made, fill_cache(made, lambda *_: None)[0]))
    assert trainer.resume()
    plain, tuned = arrays(load_transformer(made.checkpoint, mx.float32)), arrays(trainer.model)
    for name, array in plain.items():
        layer, _, kind = name.rpartition(".")
        np.testing.assert_array_equal(array, tuned.get(name, tuned.get(f"{layer}.linear.{kind}")), err_msg=name)


def test_targets_and_layers_are_those_that_were_named(model, data, tmp_path):
    made = plan(model, data, tmp_path, targets=("self_attn.q", "head.head"), num_layers=1, alpha=8.0)
    transformer = load_trainable(made)
    trained = {name for name, _ in tree_flatten(transformer.trainable_parameters())}
    adapter = "adapters.default.lora_"
    assert trained == {f"{layer}.{adapter}{ab}" for layer in ("blocks.1.self_attn.q", "head.head") for ab in "ab"}
    assert transformer.blocks[1].self_attn.q.adapters["default"].scale == 2


def test_full_fine_tuning_makes_a_whole_model(model, data, tmp_path):
    made, result, _ = fit(model, data, tmp_path / "run", fine_tune_type="full")
    assert result == tmp_path / "run" / "model"
    tuned = locate(result)
    assert tuned.spec.sampling() == made.checkpoint.spec.sampling()
    before, after = (arrays(load_transformer(each, mx.float32)) for each in (made.checkpoint, tuned))
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    for part in ("vae", "text_encoder"):
        one, other = (getattr(each, part).tensors for each in (made.checkpoint, tuned))
        for name, info in one.items():
            assert mx.array_equal(info.load(), other[name].load())
    assert not list((tmp_path / "run").glob("*adapters*"))


def test_full_fine_tuning_of_the_last_blocks(model, data, tmp_path):
    made = plan(model, data, tmp_path, fine_tune_type="full", num_layers=1, dtype="bfloat16")
    transformer = load_trainable(made)
    types = {name: array.dtype for name, array in tree_flatten(transformer.parameters())}
    trained = {name for name, _ in tree_flatten(transformer.trainable_parameters())}
    assert trained == {name for name in types if name.startswith("blocks.1.")}
    assert {types[name] for name in trained} == {mx.float32}
    assert types["blocks.0.ffn.0.weight"] == mx.bfloat16
    assert types["blocks.0.modulation"] == mx.float32


def test_bfloat16_trains_float32_weights(model, data, tmp_path):
    for kind in ("lora", "full"):
        _, _, rows = fit(model, data, tmp_path / kind, fine_tune_type=kind, dtype="bfloat16", iters=2)
        state = safetensors.numpy.load_file(newest_state(tmp_path / kind))
        weights = [array for name, array in state.items() if name.startswith("model.")]
        assert weights
        assert {array.dtype for array in weights} == {np.dtype(np.float32)}
        assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_checkpointed_gradients_are_the_same(model, data, tmp_path, kind):
    results = []
    for checkpointing in (False, True):
        transformer = load_trainable(plan(model, data, tmp_path, fine_tune_type=kind, grad_checkpoint=checkpointing))
        assert transformer.checkpointing == checkpointing
        x = mx.random.normal((1, 3, 4, 4, 4), key=mx.random.key(0))
        noise = mx.random.normal(x.shape, key=mx.random.key(1))
        context = mx.random.normal((1, 16, 32), key=mx.random.key(2))

        def loss(module, x=x, noise=noise, context=context):
            return flow_loss(module, x, context, noise, mx.array([0.6]), mx.array([True])).mean()

        value, gradients = nn.value_and_grad(transformer, loss)(transformer)
        results.append((value.item(), dict(tree_flatten(gradients))))
    (one, first), (other, second) = results
    assert one == other
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(np.array(first[name]), np.array(second[name]), rtol=1e-5, atol=1e-7, err_msg=name)


def test_magnitudes_too_are_taken_up(model, data, tmp_path):
    _, result, _ = fit(model, data, tmp_path / "one", fine_tune_type="dora")
    transformer = load_trainable(plan(model, data, tmp_path, fine_tune_type="dora", resume_adapter_file=str(result)))
    stored = safetensors.numpy.load_file(result)["diffusion_model.blocks.0.ffn.0.dora_scale"]
    np.testing.assert_array_equal(transformer.blocks[0].ffn[0].adapters["default"].magnitude, stored)


def test_adapters_can_be_the_start_of_another_run(model, data, tmp_path):
    _, result, _ = fit(model, data, tmp_path / "one")
    made = plan(model, data, tmp_path / "two", resume_adapter_file=str(result))
    got = dict(tree_flatten(load_trainable(made).trainable_parameters()))
    stored = safetensors.numpy.load_file(result)
    for name, array in got.items():
        layer, ab = name.split(".adapters.default.lora_")
        np.testing.assert_array_equal(array, stored[f"diffusion_model.{layer}.lora_{ab.upper()}.weight"])
    with pytest.raises(CheckpointError, match="does not fit: 40 tensors differ"):
        load_trainable(plan(model, data, tmp_path, resume_adapter_file=str(result), rank=2))
    transformer = load_transformer(made.checkpoint, mx.float32)
    make_trainable(transformer, made.recipe)
    (tmp_path / "cut").write_bytes(result.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cut: cannot be read as safetensors"):
        load_adapters(tmp_path / "cut", transformer)
    with pytest.raises(UserError, match="none: no such adapter file"):
        load_adapters(tmp_path / "none", transformer)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_captions_are_dropped_and_first_frames_given_as_often_as_asked(model, data, tmp_path):
    made = plan(model, data, tmp_path, batch_size=4, caption_dropout=0.3, image_to_video=0.6, hold_out=0.0)
    examples = Examples(made, fill_cache(made, lambda *_: None)[0])
    empty = np.array(examples.context(""))
    dropped, given, pictures = [], [], 0
    for index in range(150):
        batch = examples.batch(index)
        names = examples.names(index)
        assert batch["latents"].shape[0] == len(names) == 4
        contexts = np.array(batch["context"])
        dropped += [np.array_equal(context, empty) for context in contexts]
        if batch["latents"].shape[1] == 1:
            assert all(name.endswith("p.png") for name in names)
            assert not batch["keep_first"].any()  # a picture's only frame would leave no loss
            pictures += 1
        else:
            given += batch["keep_first"].tolist()
        for name, context in zip(names, contexts, strict=True):
            caption = Path(name.split(" frames")[0]).with_suffix(".txt").read_text().strip()
            assert np.array_equal(context, empty) or np.array_equal(context, np.array(examples.context(caption)))
    assert pictures == 50  # one of three batches an epoch: five videos in batches of four, and the picture
    assert abs(np.mean(dropped) - 0.3) < 0.06
    assert abs(np.mean(given) - 0.6) < 0.08
    again = examples.batch(7)
    for name, array in examples.batch(7).items():
        np.testing.assert_array_equal(array, again[name])


def test_encoders_are_gone_before_the_transformer_comes(model, data, tmp_path, monkeypatch):
    """Nothing that a loader of an encoder returned is alive when the transformer is loaded."""
    import gc
    import weakref

    from mlx_wan.training import cache

    alive, checked = [], []
    for name in ("load_vae", "load_text_encoder"):
        real = getattr(cache, name)

        def spy(*arguments, real=real):
            module = real(*arguments)
            alive.append(weakref.ref(module))
            return module

        monkeypatch.setattr(cache, name, spy)

    def loading(*arguments, **options):
        gc.collect()
        checked.append([ref() is None for ref in alive])
        return load_transformer(*arguments, **options)

    monkeypatch.setattr(finetune, "load_transformer", loading)
    fit(model, data, tmp_path, cache=str(tmp_path / "cache"))
    assert checked == [[True, True]]


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_validation_is_the_same_each_time_and_has_its_bands(model, data, tmp_path):
    made, _, rows = fit(model, data, tmp_path)
    bands = [f"val_loss_{low}_{low + 250}" for low in (0, 250, 500, 750)]
    validations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in validations] == [3, 6]
    for row in validations:
        assert row.keys() == {"step", "val_loss", *bands}
        assert row["val_loss"] == pytest.approx(np.mean([row[band] for band in bands]))
    evaluate = finetune.evaluation(made, fill_cache(made, lambda *_: None)[1])
    transformer = load_transformer(made.checkpoint, mx.float32)
    assert evaluate(transformer) == evaluate(transformer)


def test_a_band_asks_within_its_timesteps():
    seen = []

    def transformer(latents, timesteps, context, image=None):
        seen.append(timesteps[0, 0].item())
        return mx.zeros(latents.shape)

    band_losses(transformer, 3, lambda i: ({"latents": mx.zeros((2, 2, 2, 4))}, mx.zeros((5, 8))))
    np.testing.assert_allclose(seen, [250 * b + 250 * (i + 0.5) / 3 for i in range(3) for b in range(4)], rtol=1e-5)


def test_a_bad_clip_stops_the_run_and_is_named(model, data, tmp_path, monkeypatch):
    made = plan(model, data, tmp_path, iters=40, image_to_video=0.0)
    bad = data / "clip1.mp4"
    real = finetune.load_clip
    file = next(file for clip, file in fill_cache(made, lambda *_: None)[0].latents if clip.source.path == bad)
    broken = lambda f: {name: a * (float("nan") if f == file else 1) for name, a in real(f).items()}  # noqa: E731
    monkeypatch.setattr(finetune, "load_clip", broken)
    with pytest.raises(WanError, match=rf"loss is nan at step \d+ \(at {bad} frames 0-4\): training stopped") as caught:
        run(made, False, lambda row: None)
    last = newest_state(tmp_path)
    assert str(last or "none") in str(caught.value)


def test_weighting_and_sampling_reach_the_loss(model, data, tmp_path):
    losses = {}
    for changes in ({}, {"weighting": "bell"}, {"sigma_sampling": "logit-normal"}, {"shift": 1.0}):
        _, _, rows = fit(model, data, tmp_path / str(len(losses)), iters=1, **changes)
        losses[str(changes)] = rows[0]["loss"]
    assert len(set(losses.values())) == 4


def test_an_average_is_what_is_saved(model, data, tmp_path):
    _, plain, _ = fit(model, data, tmp_path / "plain")
    _, averaged, _ = fit(model, data, tmp_path / "averaged", ema_decay=0.9)
    one, other = (safetensors.numpy.load_file(path) for path in (plain, averaged))
    state = safetensors.numpy.load_file(newest_state(tmp_path / "averaged"))
    name = "blocks.0.self_attn.q"
    stored = other[f"diffusion_model.{name}.lora_B.weight"]
    assert not np.array_equal(one[f"diffusion_model.{name}.lora_B.weight"], stored)
    np.testing.assert_array_equal(state[f"ema.{name}.adapters.default.lora_b"], stored)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_numbered_adapters_and_states_are_pruned_together(model, data, tmp_path):
    _, result, _ = fit(model, data, tmp_path, iters=7, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0000006_adapters.safetensors",
        "0000007_adapters.safetensors",
        "adapter_config.json",
        "adapters.safetensors",
        "log.jsonl",
        "run.json",
        "state-00000006.safetensors",
        "state-00000007.safetensors",
    ]
    assert result.read_bytes() == (tmp_path / "0000007_adapters.safetensors").read_bytes()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["rank"], config["alpha"], config["fine_tune_type"]) == (4, 4, "lora")
    assert config["width"] == 16


def test_a_run_goes_on_only_as_itself(model, data, tmp_path):
    fit(model, data, tmp_path)
    assert fit(model, data, tmp_path, resume=True)[2] == []  # finished: nothing to do
    for changes, name in (
        ({"learning_rate": 2e-2}, "finetune.learning_rate"),
        ({"iters": 9}, "finetune.iters"),
        ({"flip": True}, "finetune.flip"),
    ):
        with pytest.raises(UserError, match=f"was started with another recipe: {name} was .*another --adapter-path"):
            fit(model, data, tmp_path, resume=True, **changes)
    other = clips.write_folder(tmp_path / "other", 3)
    with pytest.raises(UserError, match="another recipe: clips was"):
        fit(model, other, tmp_path, resume=True)
    with pytest.raises(UserError, match="another recipe: transformer was"):
        fit(toy_model.write_model(tmp_path / "model2", seed=1), data, tmp_path, resume=True)
    fit(model, data, tmp_path, resume=True, save_every=3, keep=5, steps_per_report=2)


CHILD = """
import os, signal, sys
from pathlib import Path
import mlx_wan
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_wan.training import checkpoint, finetune, loop
from mlx_wan.training.plan import make_plan
from mlx_wan.training.recipe import read_recipe
from mlx_wan.weights import save as files

folder, when, where = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if where == "encode":  # the second clip is written but has no name yet
    real = os.fsync
    calls = []
    os.fsync = lambda fd: kill() if calls.append(fd) or len(calls) == 2 else real(fd)

def saving(*arguments):
    if when and arguments[1] >= when and where == "save":
        os.fsync = kill
    return checkpoint.save_state(*arguments)

def adapters(*arguments):
    if when and arguments[3] >= when and where == "adapters":
        files.os.replace = kill  # the adapters are written but have no name yet
    return real_adapters(*arguments)

def report(row):
    if when and row["step"] >= when and where == "step":
        kill()

loop.save_state = saving
real_adapters, finetune.save_adapters = finetune.save_adapters, adapters
recipe = read_recipe(folder / "recipe.yaml")
finetune.run(make_plan(recipe), True, report)
"""


def child(folder, when=0, where="none"):
    line = [sys.executable, "-c", CHILD, str(folder), str(when), where]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "changes",
    [{}, {"fine_tune_type": "full", "ema_decay": 0.9}, {"grad_accumulation_steps": 2, "optimizer": "adafactor"}],
    ids=["lora", "full", "accumulated"],
)
def test_killed_at_any_moment_the_result_is_the_same_byte_for_byte(model, data, tmp_path, changes):
    for name in ("straight", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        values = {"model": str(model), "data": str(data), "cache": str(folder / "cache")}
        recipe = {"stage": "finetune", **values, "adapter_path": str(folder / "run"), **SMALL, **changes}
        toy.write(folder / "recipe.yaml", recipe | {"iters": 9, "keep": 3})
    done = child(tmp_path / "straight")
    assert done.returncode == 0, done.stderr
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    steps = [int(rng.integers(low, low + 3)) for low in (1, 4, 7)]
    middle = "save" if "fine_tune_type" in changes else "adapters"
    for when, where in ((1, "encode"), (steps[0], "step"), (steps[1], middle), (steps[2], "save")):
        done = child(tmp_path / "killed", when, where)
        assert done.returncode == -signal.SIGKILL, (when, where, done.stderr)
    done = child(tmp_path / "killed")
    assert done.returncode == 0, (steps, done.stderr)
    straight, killed = tmp_path / "straight" / "run", tmp_path / "killed" / "run"
    results = [path for path in straight.rglob("*.safetensors") if not path.name.startswith("state")]
    results.append(newest_state(straight))
    assert len(results) >= 4
    for path in results:
        assert path.read_bytes() == (killed / path.relative_to(straight)).read_bytes(), (steps, path.name)
    assert not list(killed.rglob("*partial*"))
    rows = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10))
