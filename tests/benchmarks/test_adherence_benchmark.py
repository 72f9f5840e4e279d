"""The adherence benchmark: its report, its picture-to-video measure, and that ignoring the prompt fails."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_wan
from mlx_wan.training.captions import heldout_prompts
from mlx_wan.training.scenes import encode_scenes, render

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "adherence.py"


@pytest.fixture(scope="module")
def adherence():
    spec = importlib.util.spec_from_file_location("adherence", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakePipeline:
    """Shows the same clip whatever it is asked; remembers what it was asked."""

    def __init__(self):
        self.calls = []
        self.spec = SimpleNamespace(width=96, height=96)  # not the renderer's own size
        _, scene = heldout_prompts(1, seed=0)[0]
        clip = render(mx.array(encode_scenes([scene])), height=96, width=96)[0]
        self.frames = np.array(mx.round((clip + 1) * 127.5).astype(mx.uint8))

    def __call__(self, prompt, **options):
        self.calls.append((prompt, options))
        return SimpleNamespace(frames=self.frames)


@pytest.fixture
def pipeline(monkeypatch):
    pipe = FakePipeline()
    monkeypatch.setitem(vars(mlx_wan), "WanPipeline", SimpleNamespace(from_pretrained=lambda name: pipe))
    return pipe


def test_ground_truth_is_perfect_and_reported(adherence, tmp_path, capsys):
    out, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    arguments = ["--ground-truth", "--prompts", "5", "--json", str(out), "--sheet", str(sheet)]
    assert adherence.main(arguments) == 0
    report = json.loads(out.read_text())
    assert report["rates"]["all"] == 1.0
    assert [v["prompt"] for v in report["verdicts"]] == [prompt for prompt, _ in heldout_prompts(5, seed=0)]
    assert "by motion, over objects" in capsys.readouterr().out
    assert Image.open(sheet).size == (2 * 7 * 128, 3 * 128)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "sheet.png"]


def test_a_model_that_ignores_the_prompt_fails(adherence, pipeline, capsys):
    assert adherence.main(["--prompts", "4", "--steps", "7", "--guidance", "2.5"]) == 0
    assert re.search(r"^  all +25\.0%  goal 85%$", capsys.readouterr().out, re.MULTILINE)
    prompt, options = pipeline.calls[1]
    assert prompt == heldout_prompts(4, seed=0)[1][0]
    assert options == {"image": None, "seed": 1, "num_inference_steps": 7, "guidance_scale": 2.5}


def test_image_to_video_measures_the_first_frame(adherence, pipeline, tmp_path):
    out = tmp_path / "report.json"
    assert adherence.main(["--prompts", "2", "--i2v", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    right, wrong = (v["first_frame_psnr"] for v in report["verdicts"])
    assert right == 99.0
    assert wrong < 20
    assert report["first_frame_psnr"]["least"] == wrong
    given = np.array(pipeline.calls[0][1]["image"])
    np.testing.assert_array_equal(given, pipeline.frames[0])


def test_psnr(adherence):
    black = np.zeros((4, 4, 3), np.uint8)
    assert adherence.psnr(black, black) == 99.0
    assert adherence.psnr(black, black + 16) == pytest.approx(20 * np.log10(255 / 16))
    with pytest.raises(mlx_wan.errors.WanError, match="4x4"):
        adherence.psnr(black, np.zeros((8, 8, 3), np.uint8))


def test_no_prompts_is_an_error(adherence, capsys):
    assert adherence.main(["--ground-truth", "--prompts", "0"]) == 2
    assert capsys.readouterr().err == "error: --prompts 0: give at least 1\n"
