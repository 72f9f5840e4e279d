"""Clips of many prompts, made together, are those that the pipeline makes one by one; and they are judged."""

import json
from concurrent.futures import ThreadPoolExecutor

import clips
import mlx.core as mx
import numpy as np
import pytest
import toy_model

from mlx_wan.conditioning import to_uint8
from mlx_wan.errors import UserError
from mlx_wan.pipeline import WanPipeline
from mlx_wan.training.adherence import judge_clips, judges, make_clips
from mlx_wan.training.captions import heldout_prompts
from mlx_wan.training.evaluate import evaluate
from mlx_wan.training.judge import judge
from mlx_wan.training.options import FinetuneRecipe
from mlx_wan.training.scenes import encode_scenes, render


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_model.write_model(tmp_path_factory.mktemp("models") / "toy")


def contexts(pipe, texts):
    length = pipe.checkpoint.transformer_config.text_len
    embeddings = [pipe.encode_prompt(text) for text in texts]
    return [mx.pad(each, [(0, length - each.shape[0]), (0, 0)])[None] for each in embeddings]


def test_clips_made_together_are_those_of_the_pipeline(model):
    pipe, prompts = WanPipeline.from_pretrained(model), ["a red circle", "a blue star moves up", "a ring"]
    negative, *each = contexts(pipe, [pipe.spec.negative_prompt, *prompts])
    made = list(make_clips(pipe.checkpoint, pipe.transformer, pipe.vae, each, negative, seed=7, batch=2))
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, seed=7 + i).frames
        assert made[i].shape == alone.shape
        assert np.abs(made[i].astype(int) - alone).max() <= 1  # rounding, where a batch sums in another order


def test_a_clip_is_judged_by_the_scene_at_its_place():
    told = heldout_prompts(4)
    frames = [to_uint8(render(mx.array(encode_scenes([scene])), 25, 64, 64)[0]) for _, scene in told]
    scenes = [scene for _, scene in told]
    with judges() as nobody:
        assert nobody is None  # on a CPU
    for pool in (None, ThreadPoolExecutor(2)):
        verdicts = judge_clips(iter(frames), scenes, pool)
        assert verdicts == [judge(*pair) for pair in zip(frames, scenes, strict=True)]
    assert all(verdict["colour"] for verdict in verdicts)
    assert not all(verdict["all"] for verdict in judge_clips(frames, scenes[::-1]))


def test_an_evaluation_judges_what_the_pipeline_makes(model, tmp_path):
    data = clips.write_folder(tmp_path / "clips", 1, frames=5, height=16, width=16, fps=12)
    recipe = FinetuneRecipe(model=str(model), data=str(data))
    with pytest.raises(UserError, match="adherence is judged of the embedded model's kind"):
        evaluate(recipe, [], None, prompts=2)
    config = json.loads((model / "config.json").read_text())
    config["mlx_wan"]["model"] = "tiny"
    (model / "config.json").write_text(json.dumps(config))
    found = evaluate(recipe, [], None, prompts=2).numbers
    pipe = WanPipeline.from_pretrained(model)
    verdicts = [judge(pipe(text, seed=i).frames, scene) for i, (text, scene) in enumerate(heldout_prompts(2))]
    for name in ("colour", "shape", "motion", "all"):
        assert found[f"adherence_{name}"] == np.mean([verdict[name] for verdict in verdicts])
    assert "adherence_all" not in evaluate(recipe, [], None).numbers
