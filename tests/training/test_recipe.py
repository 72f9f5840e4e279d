"""Recipes: everything wrong in one is named, with its key and file; a run remembers its own."""

from pathlib import Path

import pytest
import toy
import yaml

from mlx_wan.errors import UserError
from mlx_wan.training.recipe import (
    AutoencoderRecipe,
    Clips,
    TransformerRecipe,
    check_same_run,
    check_writable,
    describe,
    read_recipe,
    remember_run,
)

RECIPES = Path(__file__).parents[2] / "recipes"


def read(tmp_path, recipe, **overrides):
    return read_recipe(toy.write(tmp_path / "r.yaml", recipe), overrides)


@pytest.mark.parametrize("names", [("tiny-vae", "tiny"), ("tiny-vae-gpu", "tiny-gpu")])
def test_the_recipes_of_the_embedded_model_are_valid_and_fit_together(names):
    vae, model = (read_recipe(RECIPES / f"{name}.yaml") for name in names)
    assert isinstance(vae, AutoencoderRecipe)
    assert isinstance(model, TransformerRecipe)
    model.check_autoencoder(vae.model)


def test_values_come_as_their_types(tmp_path):
    recipe = read(tmp_path, toy.changed(toy.AUTOENCODER, crops={"num_frames": 3, "width": 8, "height": 8}))
    assert recipe.crops == Clips(3, 8, 8)
    assert recipe.model.temporal_downsample == (True,)
    # YAML takes a number without a point for text, and a whole number is a number.
    text = "stage: autoencoder\nkl_weight: 1e-5\n"
    rest = {name: value for name, value in toy.AUTOENCODER.items() if name != "stage"}
    (tmp_path / "r.yaml").write_text(text + yaml.safe_dump(rest))
    recipe = read_recipe(tmp_path / "r.yaml", {"learning_rate": 1})
    assert (recipe.kl_weight, recipe.train.learning_rate) == (1e-5, 1.0)
    assert isinstance(recipe.train.learning_rate, float)


WRONG_AUTOENCODERS = [
    ({"clip": {}}, "unknown key 'clip'; known are clips, crops"),
    ({"model": ...}, "the key 'model' is missing"),
    ({"train": ...}, "the key 'train' is missing"),
    ({"train": 3}, "train: must be keys with values, not 3"),
    ({"train__steps": "abc"}, "train: steps is 'abc'; it must be a whole number"),
    ({"train__steps": 2.5}, "train: steps is 2.5; it must be a whole number"),
    ({"train__steps": True}, "train: steps is True; it must be a whole number"),
    ({"train__steps": 0}, "train: steps is 0; it must be at least 1"),
    ({"train__steps": ...}, "train: the key 'steps' is missing"),
    ({"train__stepz": 3}, "train: unknown key 'stepz'"),
    ({"train__learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
    ({"train__learning_rate": float("nan")}, "learning_rate is nan; it must be a number"),
    ({"train__learning_rate": -1.0}, "learning_rate is -1.0; it must be above 0"),
    ({"train__compile": "yes please"}, "compile is 'yes please'; it must be true or false"),
    ({"train__optimizer": "sdg"}, "optimizer is 'sdg'; choose one of adamw, adam, muon"),
    ({"train__compute_dtype": "int8"}, "compute_dtype is 'int8'; choose one of float32"),
    ({"train__ema_decay": 1.0}, "ema_decay is 1.0; it must be from 0 to below 1"),
    ({"train__seed": -1}, "seed is -1; it must not be negative"),
    ({"clips__num_frames": 4}, r"clips.num_frames is 4; it must be 2n\+1, such as 13"),
    ({"clips__width": 18}, "clips are 18x16; sides must be multiples of 4 and 4"),
    ({"clips__width": 0}, "clips: width is 0; it must be at least 1"),
    ({"crops": {"num_frames": 5, "width": 8, "height": 16}}, "crops are 8x16; windows must have the aspect ratio"),
    ({"crops": {"num_frames": 5, "width": 32, "height": 32}}, "crops are larger or longer than clips"),
    ({"crops": {"num_frames": 7, "width": 8, "height": 8}}, "crops are larger or longer than clips"),
    ({"crops": {"num_frames": 2, "width": 8, "height": 8}}, "crops.num_frames is 2"),
    ({"crops": {"num_frames": 3, "width": 6, "height": 6}}, "crops are 6x6; sides must be multiples"),
    ({"model__dim_mult": [1, 2, 4]}, "temporal_downsample has 1 entries; it needs one less"),
    ({"model__dim_mult": "12"}, "model: dim_mult is '12'; it must be a list"),
    ({"model__dim_mult": [1, 2]}, "dim_mult goes from 1 to 2; the second must divide 1"),
    ({"model__dim_mult": [3, 3]}, "dim_mult goes from 1 to 3; the second must divide 8"),
    ({"model__dim": 0}, "model.dim is 0; it must be at least 1"),
    ({"model__latents_mean": [0, 0, 0, 0]}, "are measured after training"),
    ({"kl_weight": -1.0}, "kl_weight is -1.0; it must be at least 0"),
    ({"validation_clips": 0}, "validation_clips is 0"),
    ({"stage": "three"}, "stage must be one of autoencoder, transformer"),
    ({"stage": [1]}, "stage must be one of autoencoder, transformer"),
]
WRONG_TRANSFORMERS = [
    ({"transformer__text_dim": 16}, "transformer.text_dim is 16 and text_encoder.dim 8"),
    ({"transformer__image_dim": 8}, "transformer.image_dim and image_positions must be 0"),
    ({"transformer__out_dim": 8}, "transformer.in_dim is 4 and out_dim 8"),
    ({"transformer__num_heads": 3}, "dim / num_heads is 5.33333; it must be an even whole number"),
    ({"transformer__freq_dim": 15}, "freq_dim is 15; it must be even"),
    ({"transformer__patch_size": [1, 2]}, "patch_size has 2 entries; it must have 3"),
    ({"transformer__patch_size": [2, 2, 2]}, r"it must be \[1, rows, columns\]"),
    ({"text_encoder__num_heads": 3}, "dim_attn is 8; 3 heads must divide it"),
    ({"text_encoder__vocab_size": 100}, "vocab_size is 100; the tokenizer has"),
    ({"sampling__fps": ...}, "sampling: 'fps' is missing or unknown"),
    ({"sampling__speed": 1}, "sampling: 'speed' is missing or unknown"),
    ({"sampling__fps": "12"}, "sampling.fps is '12'; it must be of type int"),
    ({"sampling__scheduler": "ddim"}, "sampling.scheduler is 'ddim'; choose one of unipc"),
    ({"sampling__width": 0}, "sampling.width is 0; it must be above 0"),
    ({"sampling": [1]}, "sampling is .1.; it must be a mapping"),
    ({"shift": 0}, "shift is 0.0; it must be above 0"),
    ({"caption_dropout": 1.5}, "caption_dropout is 1.5; it must be from 0 to 1"),
    ({"image_to_video": "half"}, "image_to_video is 'half'; it must be a number"),
    ({"pool": 0}, "pool is 0; it must be at least 1"),
]


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [(toy.AUTOENCODER, *case) for case in WRONG_AUTOENCODERS]
    + [(toy.TRANSFORMER, *case) for case in WRONG_TRANSFORMERS],
    ids=lambda value: "-".join(value) if isinstance(value, dict) and len(value) == 1 else None,
)
def test_what_is_wrong_is_named_with_its_file(tmp_path, base, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, toy.changed(base, **changes))
    assert str(caught.value).startswith(str(tmp_path / "r.yaml"))
    assert "\n" not in str(caught.value)


def test_an_override_is_checked_as_the_recipe_is(tmp_path):
    assert read(tmp_path, toy.AUTOENCODER, steps=9).train.steps == 9
    with pytest.raises(UserError, match="steps is 0"):
        read(tmp_path, toy.AUTOENCODER, steps=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", r"not YAML \(line 1\)"),
        (b"", "stage must be"),
        (b"- 1", "stage must be"),
        (b"\xff\xfe\xfa", "not text"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_recipe(path)
    with pytest.raises(UserError, match=r"cannot read the recipe .*No such file"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer__in_dim": 8, "transformer__out_dim": 8}, "in_dim is 8; the autoencoder's z_dim is 4"),
        ({"clips__width": 20}, "clips are 20x16; sides must be multiples of 8 and 8"),
        ({"clips__num_frames": 6}, r"clips.num_frames is 6; it must be 2n\+1"),
        ({"sampling__num_frames": 6}, r"sampling.num_frames is 6; it must be 2n\+1"),
        ({"sampling__height": 4}, "sampling are 16x4"),
    ],
)
def test_the_transformer_must_fit_its_autoencoder(tmp_path, changes, message):
    vae = read(tmp_path, toy.AUTOENCODER).model
    read(tmp_path, toy.TRANSFORMER).check_autoencoder(vae)
    with pytest.raises(UserError, match=message):
        read(tmp_path, toy.changed(toy.TRANSFORMER, **changes)).check_autoencoder(vae)


def facts_of(tmp_path, processes=1, vae=None, **changes):
    return describe(read(tmp_path, toy.changed(toy.AUTOENCODER, **changes)), processes, vae)


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path):
    run = tmp_path / "run"
    check_writable(run)
    check_same_run(run, facts_of(tmp_path))  # nothing remembered yet
    remember_run(run, facts_of(tmp_path))
    check_same_run(run, facts_of(tmp_path, train__save_every=1, train__keep=9, validation_clips=3))
    for changes, message in [
        ({"train__steps": 5}, "train.steps was 4 and is 5 now"),
        ({"train__seed": 1}, "train.seed was 0 and is 1 now"),
        ({"model__z_dim": 8}, "model.z_dim was 4 and is 8 now"),
        ({"crops": {"num_frames": 5, "width": 8, "height": 8}}, "crops"),
        ({"processes": 2}, "processes was 1 and is 2 now"),
    ]:
        with pytest.raises(UserError, match=message):
            check_same_run(run, facts_of(tmp_path, **changes))
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        check_same_run(run, facts_of(tmp_path))


def test_another_autoencoder_is_another_run(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "vae.safetensors").write_text(name)
    remember_run(tmp_path, facts_of(tmp_path, vae=tmp_path / "a"))
    check_same_run(tmp_path, facts_of(tmp_path, vae=tmp_path / "a"))
    with pytest.raises(UserError, match="autoencoder was"):
        check_same_run(tmp_path, facts_of(tmp_path, vae=tmp_path / "b"))
    with pytest.raises(UserError, match="is no finished autoencoder"):
        facts_of(tmp_path, vae=tmp_path / "c")


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        check_writable(tmp_path / "file" / "run")
