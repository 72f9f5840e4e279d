"""Both stages at toy size, up to a model that the pipeline runs, and what they draw their batches from."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import toy
from mlx.utils import tree_flatten

import mlx_wan
from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.models.umt5 import TextEncoderConfig, UMT5Encoder, relative_buckets
from mlx_wan.training import tiny
from mlx_wan.training.captions import build_tokenizer
from mlx_wan.training.recipe import Clips, read_recipe
from mlx_wan.training.world import is_held_out
from mlx_wan.weights.load import load_text_encoder, load_transformer, load_vae, locate


@pytest.fixture(autouse=True)
def few_clips(monkeypatch):
    """Latent statistics over fewer clips than a real run takes."""
    monkeypatch.setattr(tiny.latent_statistics, "__defaults__", (32, 16))


def recipe(tmp_path, base, **changes):
    return read_recipe(toy.write(tmp_path / "recipe.yaml", toy.changed(base, **changes)))


def ignore(row):
    pass


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """(folder of the autoencoder, folder of the model, rows of both logs) of a whole toy run."""
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.latent_statistics, "__defaults__", (32, 16))
        one = recipe(folder, toy.AUTOENCODER, crops={"num_frames": 3, "width": 8, "height": 8}, whole_every=2)
        vae = tiny.train_autoencoder(one, folder / "one", False, ignore)
        two = recipe(folder, toy.TRANSFORMER)
        model = tiny.train_transformer(two, vae, folder / "two", False, ignore)
    logs = [[json.loads(line) for line in (folder / run / "log.jsonl").open()] for run in ("one", "two")]
    return vae, model, logs


def test_both_stages_make_a_model_that_the_pipeline_runs(stages, tmp_path):
    pipe = mlx_wan.WanPipeline.from_pretrained(stages[1], dtype=mx.float32)
    out = pipe("a red circle moves right", seed=1)
    assert (out.frames.shape, out.frames.dtype, out.fps) == ((5, 16, 16, 3), np.uint8, 12)
    assert out.latents.shape == (1, 3, 4, 4, 4)
    other = pipe("a red circle moves right", seed=1, num_frames=9, width=24, height=16)
    assert other.frames.shape == (9, 16, 24, 3)
    assert (pipe("a blue star", seed=1).latents != out.latents).any().item(), "the prompt has a say"


def test_a_run_goes_on_from_a_finished_model(stages, tmp_path):
    _, model, logs = stages
    two = recipe(tmp_path, toy.TRANSFORMER)
    first, start = {}, tiny.load_start(model, two, build_tokenizer())
    again = tiny.train_transformer(
        two, None, tmp_path / "run", False, lambda row: first.setdefault(row["step"], row), start
    )
    assert first[1]["loss"] < logs[1][0]["loss"], "it starts where the other ended, on the same batch"
    tensors = [mx.load(str(folder / "vae.safetensors")) for folder in (model, again)]
    assert all((tensors[0][name] == tensors[1][name]).all().item() for name in tensors[0]), "the autoencoder stays"


def test_a_model_of_other_dimensions_is_no_start(stages, tmp_path):
    other = recipe(
        tmp_path, toy.changed(toy.TRANSFORMER, transformer={**toy.TRANSFORMER["transformer"], "num_layers": 3})
    )
    with pytest.raises(UserError, match="has another transformer than the recipe"):
        tiny.train_transformer(
            other, None, tmp_path / "run", False, ignore, tiny.load_start(stages[1], other, build_tokenizer())
        )
    with pytest.raises(UserError, match="give the folder of an autoencoder or a model"):
        tiny.train_transformer(recipe(tmp_path, toy.TRANSFORMER), None, tmp_path / "run", False, ignore)


def test_image_to_video_on_it_keeps_the_pictures_latent(stages):
    from PIL import Image

    pipe = mlx_wan.WanPipeline.from_pretrained(stages[1], dtype=mx.float32)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = pipe("it moves left", image=Image.fromarray(picture), seed=1)
    first = pipe.vae.encode(mx.array(picture / np.float32(127.5) - 1)[None, None])
    np.testing.assert_allclose(out.latents[:, :1], first, atol=1e-5)
    assert out.frames.shape == (5, 16, 16, 3)


def test_logs_hold_what_is_to_be_plotted(stages):
    one, two = stages[2]
    assert [row["step"] for row in one if "loss" in row] == [1, 2, 3, 4]
    paces = {"learning_rate", "steps_per_s", "clips_per_s", "peak_gib"}
    assert {"step", "loss", "mse", "kl", "grad_norm", *paces} == one[0].keys()
    assert {"step", "val_psnr", "val_psnr_min"} == one[-1].keys()
    assert {"step", "loss", "grad_norm", *paces} == two[0].keys()
    assert {"step", "val_loss"} == two[-1].keys()


def test_the_autoencoder_comes_back_with_measured_statistics(stages, tmp_path):
    vae = tiny.load_autoencoder(stages[0])
    mean, std = tiny.latent_statistics(vae, Clips(5, 16, 16), 32, 16)
    np.testing.assert_allclose(vae.config.latents_mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(vae.config.latents_std, std, rtol=1e-4)
    # Normalised with them, latents of the same clips have mean 0 and deviation 1 in every channel.
    params = [tiny.sample_batch(rng := np.random.default_rng(2_000_000), 16)[1], tiny.sample_batch(rng, 16)[1]]
    latents = np.array(vae.encode(tiny.draw(mx.array(np.concatenate(params)), Clips(5, 16, 16))))
    np.testing.assert_allclose(latents.mean(axis=(0, 1, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(latents.std(axis=(0, 1, 2, 3)), 1, atol=1e-3)


@pytest.mark.parametrize("file", ["vae.json", "vae.safetensors"])
def test_a_damaged_autoencoder_is_one_error(stages, tmp_path, file):
    for name in ("vae.json", "vae.safetensors"):
        data = (stages[0] / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-5] if name == file else data)
    with pytest.raises(CheckpointError, match="the autoencoder is damaged"):
        tiny.load_autoencoder(tmp_path)
    with pytest.raises(UserError, match=r"has no vae.json: train the autoencoder first"):
        tiny.load_autoencoder(tmp_path / "none")


def test_a_channel_without_variance_is_an_error(stages):
    vae = tiny.load_autoencoder(stages[0])
    vae.conv1.weight = mx.zeros_like(vae.conv1.weight)
    vae.conv1.bias = mx.zeros_like(vae.conv1.bias)
    with pytest.raises(WanError, match="a channel without variance"):
        tiny.latent_statistics(vae, Clips(5, 16, 16), 4, 4)


def test_a_finished_run_is_left_alone(stages):
    vae, model, _ = stages
    files = {path: path.stat().st_mtime_ns for folder in (vae, model) for path in folder.iterdir()}
    one = recipe(vae.parent, toy.AUTOENCODER, crops={"num_frames": 3, "width": 8, "height": 8}, whole_every=2)
    assert tiny.train_autoencoder(one, vae.parent, True, ignore) == vae
    assert tiny.train_transformer(recipe(model.parent, toy.TRANSFORMER), vae, model.parent, True, ignore) == model
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_a_finished_run_without_its_result_writes_it_again(stages, tmp_path):
    vae, model, _ = stages
    (tmp_path / "two").mkdir()
    for path in model.parent.glob("state-*"):
        (tmp_path / "two" / path.name).write_bytes(path.read_bytes())
    again = tiny.train_transformer(recipe(tmp_path, toy.TRANSFORMER), vae, tmp_path / "two", True, ignore)
    for path in model.glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes()


# --- batches ---------------------------------------------------------------------------------------------------------


def test_the_same_number_gives_the_same_batch_and_others_give_others(tmp_path):
    _, batch_at, _ = tiny.autoencoder_trainer(recipe(tmp_path, toy.AUTOENCODER), tmp_path)
    one, same, other = (np.array(batch_at(index)["whole"]) for index in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_windows_and_whole_clips_take_turns(tmp_path):
    crops = {"num_frames": 3, "width": 8, "height": 8}
    config = recipe(tmp_path, toy.AUTOENCODER, crops=crops, whole_every=3)
    _, batch_at, _ = tiny.autoencoder_trainer(config, tmp_path)
    kinds = [next(iter(batch_at(index))) for index in range(6)]
    assert kinds == ["cropped", "cropped", "whole"] * 2
    assert (batch_at(0)["cropped"].shape[0], batch_at(2)["whole"].shape[0]) == (2, 1)


def test_captions_are_dropped_and_first_frames_given_as_often_as_asked(stages, tmp_path):
    vae = tiny.load_autoencoder(stages[0])
    config = recipe(tmp_path, toy.TRANSFORMER, train__batch_size=400, caption_dropout=0.25, image_to_video=0.6)
    _, batch_at, _ = tiny.transformer_trainer(config, vae, build_tokenizer(), tmp_path)
    batch = {name: np.array(array.astype(mx.float32)) for name, array in batch_at(7).items()}
    empty = (batch["ids"] == tiny.tokenise(build_tokenizer(), [""], 48)[0]).all(axis=1)
    assert abs(empty.mean() - 0.25) < 0.07
    assert abs(batch["keep_first"].mean() - 0.6) < 0.08
    assert batch["latents"].shape == (400, 3, 4, 4, 4)
    assert len({latents.tobytes() for latents in batch["latents"]}) == 6  # the pool
    for name, array in batch_at(7).items():
        np.testing.assert_array_equal(batch[name], np.array(array.astype(mx.float32)))


def test_the_pool_for_validation_shows_only_what_training_never_does(stages, tmp_path, monkeypatch):
    asked = []
    real = tiny.sample_batch

    def spying(rng, n, held_out=False, two_objects=0.35):
        scenes, params, captions = real(rng, n, held_out, two_objects)
        asked.append({is_held_out(scene) for scene in scenes})
        return scenes, params, captions

    monkeypatch.setattr(tiny, "sample_batch", spying)
    tiny.transformer_trainer(
        recipe(tmp_path, toy.TRANSFORMER), tiny.load_autoencoder(stages[0]), build_tokenizer(), tmp_path
    )
    assert asked == [{False}, {True}]


def test_tokens_are_padded_and_a_text_too_long_is_an_error():
    tokenizer = build_tokenizer()
    ids = tiny.tokenise(tokenizer, ["a red circle", ""], 6)
    assert ids.tolist() == [[*tokenizer.encode("a red circle").ids, 0, 0], [tiny.EOS, 0, 0, 0, 0, 0]]
    with pytest.raises(UserError, match="a caption has 4 tokens; text_len is 3"):
        tiny.tokenise(tokenizer, ["a red circle"], 3)


# --- kill -9 ---------------------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from pathlib import Path
import mlx_wan
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_wan.training import checkpoint, loop, tiny
from mlx_wan.training.recipe import read_recipe

tiny.latent_statistics.__defaults__ = (32, 16)
folder, when, where = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def saving(*arguments):
    if when and arguments[1] >= when and where == "save":
        os.fsync = kill  # the file is written but has no name yet
    return checkpoint.save_state(*arguments)

def report(row):
    if when and row["step"] >= when and where == "step":
        kill()

loop.save_state = saving
recipe = read_recipe(folder / "recipe.yaml")
run = folder / "run"
if hasattr(recipe, "text_encoder"):
    tiny.train_transformer(recipe, folder.parent / "vae", run, True, report)
else:
    tiny.train_autoencoder(recipe, run, True, report)
"""


def child(folder, when=0, where="step"):
    line = [sys.executable, "-c", CHILD, str(folder), str(when), where]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("stage", ["one", "two"])
def test_killed_three_times_the_result_is_the_same_byte_for_byte(stages, tmp_path, stage):
    base, result = (toy.AUTOENCODER, "vae") if stage == "one" else (toy.TRANSFORMER, "model")
    (tmp_path / "vae").symlink_to(stages[0])
    config = toy.changed(base, train__steps=9, train__keep=3)
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        toy.write(tmp_path / name / "recipe.yaml", config)
    assert child(tmp_path / "straight").returncode == 0
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    steps = [int(rng.integers(low, low + 3)) for low in (1, 4, 7)]
    for when, where in zip(steps, ("step", "save", "step"), strict=True):
        done = child(tmp_path / "killed", when, where)
        assert done.returncode == -signal.SIGKILL, (when, where, done.stderr)
    done = child(tmp_path / "killed")
    assert done.returncode == 0, (steps, done.stderr)
    files = sorted((tmp_path / "straight" / "run" / result).iterdir())
    assert len(files) >= 2
    for path in files:
        other = tmp_path / "killed" / "run" / result / path.name
        assert path.read_bytes() == other.read_bytes(), (steps, path.name)
    assert not list(Path(tmp_path / "killed" / "run").glob(".*partial*"))


def test_a_fresh_text_encoder_tells_which_word_stands_by_which(tmp_path):
    mx.random.seed(0)
    encoder = UMT5Encoder(TextEncoderConfig(vocab_size=480, dim=40, dim_attn=40, dim_ffn=64, num_heads=5, num_layers=2))
    encoder.init_weights()
    tokenizer = build_tokenizer()
    ids = tiny.tokenise(tokenizer, ["red circle and blue square", "blue circle and red square"], 8)

    def circle_moves():
        one, other = encoder(mx.array(ids))[:, 1]  # "circle", after the same words in another order
        return (mx.abs(one - other).max() / mx.abs(one).max()).item()

    blind = circle_moves()
    tiny.look_near(encoder)
    assert circle_moves() > 0.2 > 3 * blind


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_heads_begin_by_looking_left_and_right_and_near(heads):
    encoder = UMT5Encoder(TextEncoderConfig(vocab_size=9, dim=4, dim_attn=10, dim_ffn=4, num_heads=heads, num_layers=1))
    tiny.look_near(encoder)
    bias = np.array(encoder.blocks[0].pos_embedding(mx.array(relative_buckets(40, 32))))[0]
    for head, row in enumerate(bias[:, 20]):  # from the middle of 40 tokens
        left, right = row[20::-1], row[20:]
        both = head == heads - 1 and heads % 2
        for side, sees in ((left, both or head % 2 == 0), (right, both or head % 2 == 1)):
            falls = (np.diff(side) <= 0).all() and side[1] > -1
            assert falls if sees else (side[1:] == -3).all()


def test_the_text_encoder_can_begin_anew_where_the_transformer_goes_on(stages, tmp_path):
    vae = load_vae(locate(stages[1]))
    names = {}
    for fresh in (False, True):
        two = recipe(tmp_path, toy.TRANSFORMER, fresh_text_encoder=fresh)
        start = tiny.load_start(stages[1], two, build_tokenizer())
        trainer, *_ = tiny.transformer_trainer(two, vae, build_tokenizer(), tmp_path / str(fresh), start)
        tensors = dict(tree_flatten(trainer.model.parameters()))
        before = dict(tree_flatten(load_text_encoder(start, mx.float32).parameters()))
        names[fresh] = [n for n, a in before.items() if not mx.array_equal(a, tensors["text_encoder." + n])]
        head = load_transformer(start, mx.float32).head.head.weight
        assert mx.array_equal(tensors["transformer.head.head.weight"], head)
    assert names[False] == []
    assert "token_embedding.weight" in names[True]


def test_muon_leaves_the_text_encoder_to_adamw(stages, tmp_path):
    two = recipe(tmp_path, toy.TRANSFORMER, train__optimizer="muon", pool=16)
    vae = load_vae(locate(stages[1]))
    trainer, *_ = tiny.transformer_trainer(two, vae, build_tokenizer(), tmp_path / "muon")
    muon, adamw = (dict(tree_flatten(part)) for part in trainer.optimizer.state["states"])
    assert "transformer.blocks.0.self_attn.q.weight.v" in muon
    assert not any(name.startswith("text_encoder.") for name in muon)
    assert "text_encoder.blocks.0.attn.q.weight.v" in adamw


def test_the_embedded_text_encoder_is_no_bag_of_words():
    pipe = mlx_wan.WanPipeline.from_pretrained("tiny", dtype=mx.float32)
    one, other = (
        pipe.encode_prompt(f"a {first} circle moves left and a {second} square grows")
        for first, second in (("red", "blue"), ("blue", "red"))
    )
    circle, square = 2, 8
    for word in (circle, square):  # the same words around it, in another order
        difference = mx.linalg.norm(one[word] - other[word]) / mx.linalg.norm(one[word])
        assert difference.item() > 0.1
