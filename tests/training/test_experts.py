"""Fine-tuning of models with two experts, and of those that are shown frames of the clip beside the noise."""

import checkpoint
import clips
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_wan.cli.previews import Previews
from mlx_wan.conditioning import frame_to_image, image_to_frame
from mlx_wan.errors import UserError
from mlx_wan.models.transformer import WanTransformer
from mlx_wan.pipeline import WanPipeline
from mlx_wan.training import finetune
from mlx_wan.training.adapt import frozen
from mlx_wan.training.cache import load_clip
from mlx_wan.training.dataset import read_clip
from mlx_wan.training.evaluate import evaluate
from mlx_wan.training.finetune import Examples, fill_cache, run
from mlx_wan.training.joint import let_go
from mlx_wan.training.objective import flow_loss, sample_sigmas, shift_sigma, unshift_sigma
from mlx_wan.training.options import FinetuneRecipe
from mlx_wan.training.plan import make_plan
from mlx_wan.weights.load import load_transformer, load_vae, locate

TWO_EXPERTS = ("small-t2v-A14B", "small-i2v-A14B")
ALONE = ("small-t2v-14B", "small-i2v-14B", "small-flf2v-14B")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: checkpoint.write_official(folder / name, name) for name in (*TWO_EXPERTS, *ALONE)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = clips.write_folder(tmp_path_factory.mktemp("data") / "clips", 3, frames=9, height=32, width=32, fps=16)
    clips.write_image(folder / "p.png")
    (folder / "p.txt").write_text("a picture")
    return folder


def plan(model, data, folder, **changes):
    values = {"rank": 2, "iters": 2, "num_frames": (5,), "width": 32, "height": 32, "fps": 16.0, "warmup_steps": 0}
    values |= {"steps_per_report": 1, "hold_out": 0.3, "learning_rate": 1e-2, "batch_size": 2, **changes}
    return make_plan(FinetuneRecipe(model=str(model), data=str(data), adapter_path=str(folder), **values))


def test_an_experts_levels_are_those_of_the_whole_range_within_its_own():
    key, within = mx.random.key(0), (0.875, 1.0)
    for sampling in ("uniform", "logit-normal", "sigmoid"):
        found = np.sort(np.array(sample_sigmas(key, 4096, 5.0, sampling, 0.3, 0.8, within)))
        every = np.array(sample_sigmas(mx.random.key(1), 1 << 17, 5.0, sampling, 0.3, 0.8))
        wanted = np.sort(every[(every >= within[0]) & (every <= within[1])])
        shares = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(np.quantile(found, shares), np.quantile(wanted, shares), atol=1.5e-3)
        assert found[0] >= np.float32(within[0])
        assert found[-1] <= 1
    assert shift_sigma(unshift_sigma(0.9, 5.0), 5.0) == pytest.approx(0.9, abs=1e-12)


@pytest.mark.parametrize("name", TWO_EXPERTS)
@pytest.mark.parametrize("expert", ["high", "low"])
def test_one_expert_is_trained_at_its_own_levels(models, data, tmp_path, name, expert, monkeypatch):
    seen, call = [], WanTransformer.__call__
    monkeypatch.setattr(WanTransformer, "__call__", lambda s, x, t, *rest: seen.append(t) or call(s, x, t, *rest))
    made, rows = plan(models[name], data, tmp_path, expert=expert, shift=3.0), []
    result, broken = run(made, False, rows.append)
    boundary = {"small-t2v-A14B": 0.875, "small-i2v-A14B": 0.9}[name]
    low, high = (boundary, 1.0) if expert == "high" else (0.0, boundary)
    levels = np.concatenate([np.array(t).ravel() for t in seen]) / 1000
    assert not broken
    assert len(levels)
    assert levels.min() >= low - 1e-6
    assert levels.max() <= high + 1e-6
    assert result.name == f"adapters_{expert}_noise.safetensors"
    bands = [key for key in rows[-1] if key.startswith("val_loss_")]
    assert bands[0].startswith(f"val_loss_{1000 * low:.0f}_")
    assert bands[-1].endswith(f"_{1000 * high:.0f}")
    text = "\n".join(made.lines())
    assert f"expert: {expert} noise, timesteps {1000 * low:g} to {1000 * high:g}" in text
    pipe = WanPipeline.from_pretrained(models[name])
    pipe.load_lora_weights(result, expert=expert)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_the_other_expert_stays_as_it_was(models, data, tmp_path, expert):
    source = models["small-t2v-A14B"]
    result, _ = run(plan(source, data, tmp_path, expert=expert, fine_tune_type="full"), False, lambda row: None)
    before, after = locate(source), locate(result)
    assert after.spec.boundary == before.spec.boundary
    for part, trained in (("transformer", expert == "high"), ("transformer_2", expert == "low")):
        pairs = [dict(tree_flatten(load_transformer(c, mx.float32, part).parameters())) for c in (before, after)]
        same = all(mx.array_equal(pairs[0][name], pairs[1][name]) for name in pairs[0])
        assert same != trained


def test_resuming_an_expert_is_exact(models, data, tmp_path):
    def stop(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    def made(folder):
        changes = {"expert": "low", "iters": 4, "save_every": 2, "batch_size": 1}
        return plan(models["small-i2v-A14B"], data, tmp_path / folder, **changes)

    whole, _ = run(made("whole"), False, lambda row: None)
    with pytest.raises(KeyboardInterrupt):
        run(made("halves"), False, stop)
    seen = []
    again, _ = run(made("halves"), True, seen.append)
    assert seen[0]["step"] == 3
    assert again.read_bytes() == whole.read_bytes()


def both(models, data, folder, **changes):
    values = {"expert": "both", "iters": 5, "switch_every": 2, "save_every": 2, "batch_size": 1, "ema_decay": 0.9}
    return plan(models["small-t2v-A14B"], data, folder, **{**values, **changes})


@pytest.mark.parametrize("keep", [False, True])
def test_both_experts_in_one_run_become_what_they_become_in_two(models, data, tmp_path, keep, monkeypatch):
    loaded = []
    monkeypatch.setattr(finetune, "load_transformer", lambda *a, **k: loaded.append(a[2]) or load_transformer(*a, **k))
    made, rows = both(models, data, tmp_path / "both", keep_both_experts=keep), []
    result, broken = run(made, False, rows.append)
    assert not broken
    assert result == tmp_path / "both"
    # Both to begin with; then the one whose turn it is, or that is validated.
    assert loaded == ["transformer_2", "transformer"] * (1 if keep else 3)
    for expert, steps in (("high", 3), ("low", 2)):
        alone = {"expert": expert, "iters": steps, "batch_size": 1, "ema_decay": 0.9}
        file, _ = run(plan(models["small-t2v-A14B"], data, tmp_path / expert, **alone), False, lambda row: None)
        pairs = mx.load(str(file)), mx.load(str(result / file.name))
        assert pairs[0].keys() == pairs[1].keys()
        assert all(mx.array_equal(pairs[0][name], pairs[1][name]) for name in pairs[0])
    assert {"loss_high", "loss_low", "grad_norm_low"} <= rows[-2].keys()
    low, high = [key for key in rows[-1] if key.endswith("_875")], [key for key in rows[-1] if key.endswith("_1000")]
    assert len(low) == len(high) == 1
    assert len([key for key in rows[-1] if key.startswith("val_loss_")]) == 8
    bands = {name: value for name, value in rows[-1].items() if name.startswith("val_loss_")}
    width = {name: (int(name.split("_")[3]) - int(name.split("_")[2])) / 1000 for name in bands}
    assert rows[-1]["val_loss"] == pytest.approx(sum(bands[name] * width[name] for name in bands), rel=1e-3)
    text = "\n".join(made.lines())
    assert "expert: high noise, timesteps 875 to 1000, 3 steps, written to adapters_high_noise.safetensors" in text
    assert "turns: 2 steps each, both in memory" if keep else "turns: 2 steps each, one in memory at a time" in text
    pipe = WanPipeline.from_pretrained(models["small-t2v-A14B"])
    for expert in ("high", "low"):
        pipe.load_lora_weights(result / f"adapters_{expert}_noise.safetensors", expert=expert)


def test_resuming_both_experts_is_exact_wherever_it_stopped(models, data, tmp_path):
    whole, _ = run(both(models, data, tmp_path / "whole"), False, lambda row: None)
    for at in (1, 3, 4):  # in the middle of a turn, after a state of the other's turn, at its end

        def stop(row, at=at):
            if row["step"] == at:
                raise KeyboardInterrupt

        again, seen = both(models, data, tmp_path / f"stopped{at}"), []
        with pytest.raises(KeyboardInterrupt):
            run(again, False, stop)
        result, _ = run(again, True, seen.append)
        assert seen[0]["step"] == (at - 1) // 2 * 2 + 1
        for expert in ("high", "low"):
            name = f"adapters_{expert}_noise.safetensors"
            assert (result / name).read_bytes() == (whole / name).read_bytes()
    # On from what one run made, by either of its files; and then another run's plan.
    start = both(models, data, tmp_path / "on", resume_adapter_file=str(whole / "adapters_low_noise.safetensors"))
    assert start.of("high").recipe.resume_adapter_file.endswith("adapters_high_noise.safetensors")
    run(start, False, lambda row: None)


def test_who_waits_for_its_turn_takes_no_memory(models, data, tmp_path):
    made = both(models, data, tmp_path, rank=1).of("low")
    model = finetune.load_trainable(made)
    mx.eval(model.parameters())
    names, size = set(frozen(model)), sum(array.nbytes for array in frozen(model).values())
    kept = {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}
    before = mx.get_active_memory()
    let_go(model)
    assert before - mx.get_active_memory() > 0.9 * size
    assert set(frozen(model)) == names
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert all(np.array_equal(np.array(trained[name]), array) for name, array in kept.items())


def test_both_experts_are_trained_whole(models, data, tmp_path):
    made = both(models, data, tmp_path, fine_tune_type="full", keep_both_experts=True, learning_rate=1e-3)
    result, _ = run(made, False, lambda row: None)
    before, after = locate(models["small-t2v-A14B"]), locate(result)
    for part in ("transformer", "transformer_2"):
        pairs = [dict(tree_flatten(load_transformer(c, mx.float32, part).parameters())) for c in (before, after)]
        assert not all(mx.array_equal(pairs[0][name], pairs[1][name]) for name in pairs[0])


@pytest.mark.parametrize("name", ["small-i2v-A14B", "small-i2v-14B"])
def test_previews_ask_the_expert_of_a_timestep_and_show_a_frame(models, data, tmp_path, name):
    """As the pipeline would make them, but for the size: the first frame is the held-out clip's."""
    seen, two = [], name in TWO_EXPERTS
    words = {"preview_prompts": ("a", "b"), "preview_every": 2, "preview_steps": 4, "iters": 3}
    words |= {"expert": "both", "switch_every": 1} if two else {}
    made = plan(models[name], data, tmp_path, batch_size=1, **words)
    previews = Previews(made)

    def preview(transformer_at, step, texts, shown):
        asked = []

        def at(timestep):
            asked.append((timestep, transformer_at(timestep)))
            return asked[-1][1]

        previews(at, step, texts, shown)
        seen.append(asked)
        assert len(shown) == 2
        assert shown[0].channels.shape[1:4] == (2, 4, 4)
        assert (shown[0].image is None) == two

    run(made, False, lambda row: None, preview=preview)
    assert {path.name for path in (tmp_path / "previews").iterdir()} == {"0000002.png", "0000003.png"}
    for asked in seen:
        assert len(asked) == 8
        high, low = ({id(model) for t, model in asked if (t >= 900) == side} for side in (True, False))
        assert len(high) == len(low) == 1
        assert (high != low) == two


def test_memory_of_both_experts(models, data, tmp_path):
    one = plan(models["small-t2v-A14B"], data, tmp_path, expert="high").memory
    taking_turns = both(models, data, tmp_path, ema_decay=0.0, batch_size=2).memory
    together = both(models, data, tmp_path, ema_decay=0.0, batch_size=2, keep_both_experts=True).memory
    assert one["weights"] < taking_turns["weights"] < together["weights"]
    assert together["weights"] == 2 * one["weights"]
    assert taking_turns["activations"] == one["activations"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iters": 2}, "iters is 2 and switch_every 2: the second expert would have no turn"),
        ({"switch_every": 0}, "switch_every is 0; it must be at least 1"),
        ({"fine_tune_type": "full"}, "full fine-tuning of both experts has both in memory; add keep_both_experts"),
        ({"resume_adapter_file": "a.safetensors"}, "a.safetensors: give a file whose name has high_noise or low_noise"),
    ],
)
def test_turns_that_cannot_be(models, data, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        both(models, data, tmp_path, **changes)


def test_one_transformer_has_no_experts(models, data, tmp_path):
    with pytest.raises(UserError, match="the model has one transformer"):
        plan(models["small-t2v-14B"], data, tmp_path, expert="both", iters=100)
    recipe = FinetuneRecipe(model=str(models["small-t2v-A14B"]), data=str(data), expert="both")
    with pytest.raises(UserError, match="evaluate one at a time"):
        evaluate(recipe, [], None)


@pytest.mark.parametrize("name", ["small-i2v-A14B", "small-i2v-14B", "small-flf2v-14B"])
def test_a_clip_is_conditioned_as_the_pipeline_conditions_a_video(models, data, tmp_path, name):
    expert = {"expert": "high"} if name in TWO_EXPERTS else {}
    made = plan(models[name], data, tmp_path, **expert)
    clip, file = fill_cache(made, lambda *_: None)[0].latents[0]
    found, pixels = load_clip(file), read_clip(clip)
    places = (0, 4) if "flf" in name else (0,)
    grey = np.zeros_like(pixels)
    for place in places:
        grey[:, place] = pixels[:, place]
    wanted = np.array(load_vae(made.checkpoint).encode(mx.array(grey)))[0]  # zeroed pixels, not zeroed latents
    np.testing.assert_allclose(np.array(found["channels"])[..., 4:], wanted, rtol=2e-3, atol=2e-3)
    mask = np.array(found["channels"])[..., :4].astype(int)
    assert (mask[0] == 1).all()
    assert (mask[1, ..., :3] == 0).all()
    assert (mask[1, ..., 3] == ("flf" in name)).all()
    pictures = {place: frame_to_image(pixels[:, [place]]) for place in places}
    options = {"image": pictures[0], **({"last_image": pictures[4]} if len(places) == 2 else {})}
    pipe, seen = WanPipeline.from_pretrained(models[name], dtype=mx.float32), []
    original = pipe._known_frames
    pipe._known_frames = lambda request: seen.append(original(request)) or seen[-1]
    pipe("a clip", num_frames=5, width=32, height=32, num_inference_steps=1, **options)
    np.testing.assert_allclose(np.array(found["channels"]), np.array(seen[0].channels)[0], rtol=2e-3, atol=2e-3)
    if seen[0].image is not None:
        np.testing.assert_allclose(np.array(found["image"]), np.array(seen[0].image)[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ALONE)
def test_wan21_models_are_trained(models, data, tmp_path, name):
    rows = []
    result, broken = run(plan(models[name], data, tmp_path, iters=3), False, rows.append)
    assert not broken
    assert result.name == "adapters.safetensors"
    assert rows[-1]["val_loss"] > 0
    recipe = FinetuneRecipe(model=str(models[name]), data=str(data), width=32, height=32, num_frames=(5,))
    assert evaluate(recipe, [result], None).numbers["val_loss"] > 0


@pytest.mark.parametrize("name", ["small-i2v-A14B", "small-flf2v-14B"])
def test_what_is_given_reaches_the_transformer(models, data, tmp_path, name):
    made = plan(models[name], data, tmp_path, **({"expert": "low"} if name in TWO_EXPERTS else {}))
    batch = Examples(made, fill_cache(made, lambda *_: None)[0]).batch(0)
    seen = []

    def transformer(latents, timesteps, context, image=None):
        seen.append((latents, image))
        return mx.zeros((*latents.shape[:-1], batch["latents"].shape[-1]))

    given = {part: batch[part] for part in ("channels", "image") if part in batch}
    noise, sigmas = mx.ones(batch["latents"].shape), mx.array([0.5] * 2)
    flow_loss(transformer, batch["latents"], batch["context"], noise, sigmas, batch["keep_first"], **given)
    assert not any(batch["keep_first"].tolist())
    assert mx.array_equal(seen[0][0][..., -batch["channels"].shape[-1] :], batch["channels"].astype(mx.float32))
    assert (seen[0][1] is None) == (name in TWO_EXPERTS)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("small-t2v-A14B", {}, "two experts; give expert high, low or both"),
        ("small-t2v-14B", {"expert": "low"}, "expert"),
        ("small-t2v-A14B", {"expert": "both"}, "expert"),
        ("small-i2v-A14B", {"expert": "low", "preview_prompts": ("a",)}, "preview_prompts"),
        ("small-i2v-14B", {"num_frames": (1, 5)}, "num_frames is 1"),
    ],
)
def test_what_cannot_be_is_refused(models, data, tmp_path, name, changes, message):
    with pytest.raises(UserError, match=message):
        plan(models[name], data, tmp_path, **changes)


def test_pictures_are_named_and_left_out_where_a_model_needs_videos(models, data, tmp_path):
    skipped = plan(models["small-i2v-A14B"], data, tmp_path, expert="high").skipped
    assert [one.path.name for one in skipped] == ["p.png"]
    assert "needs videos" in str(skipped[0])
    assert not plan(models["small-t2v-A14B"], data, tmp_path, expert="high").skipped


def test_a_frame_is_a_picture_and_back():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8))
    assert frame_to_image(image_to_frame(picture, 12, 8)) == picture
