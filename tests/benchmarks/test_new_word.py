"""The recipe of the new word, end to end at toy size: clips, LoRA, QLoRA and the judge's report."""

import importlib.util
import json
from pathlib import Path

import pytest
import toy_model

from mlx_wan.training.world import BACKGROUNDS, COLOURS

FILE = Path(__file__).parents[2] / "benchmarks" / "new_word.py"


@pytest.fixture
def new_word(monkeypatch):
    spec = importlib.util.spec_from_file_location("new_word", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "COLOURS", COLOURS)
    yield module
    COLOURS.pop(module.WORD, None)


def test_the_colour_is_far_from_all_others(new_word):
    def distance(one, other):
        return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5

    assert new_word.WORD not in COLOURS
    near = [*COLOURS.values(), *(BACKGROUNDS[name] for name in new_word.BEHIND)]
    assert min(distance(new_word.RGB, rgb) for rgb in near) > 100


def test_the_recipe_runs_end_to_end(new_word, tmp_path, capsys):
    model = toy_model.write_model(tmp_path / "toy")
    options = ["--model", str(model), "--prompts", "2", "--clips", "4", "--iters", "2", "--group-size", "32"]
    assert new_word.main([str(tmp_path / "run"), *options, "--set", "rank", "2", "--set", "batch_size", "2"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"before, new word", "lora, new word", "qlora, old words"} <= report.keys()
    assert all(0 <= rate <= 1 for rates in report.values() for rate in rates.values())
    captions = [path.read_text() for path in (tmp_path / "run" / "clips").glob("*.txt")]
    assert sum("chestnut" in text.lower() for text in captions) == 3
    for way in ("lora", "qlora"):
        assert (tmp_path / "run" / way / "adapters.safetensors").exists()
    assert "lora: trained in" in capsys.readouterr().out
