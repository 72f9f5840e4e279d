"""benchmarks/whole_run.py at toy size."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import checkpoint
import mlx.core as mx
import pytest

from mlx_wan.errors import UserError
from mlx_wan.memory.plan import Dimensions, Setting
from mlx_wan.weights.locate import locate
from mlx_wan.weights.quantize import Quantization

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import whole_run


def test_every_stage_of_a_packed_model_is_measured(tmp_path, capsys):
    file = tmp_path / "run.json"
    assert whole_run.main(["--frame_num", "5", "--steps", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert list(found["stages"]) == ["text", "denoise", "frames"]
    assert all(stage["planned"] and stage["peak"] and stage["seconds"] for stage in found["stages"].values())
    assert [stage["events"] for stage in found["stages"].values()] == [2, 1, 2]
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == ["stage", "---", "text", "denoise", "frames"]


def test_both_experts_are_written_and_take_their_turns(tmp_path, monkeypatch):
    small = Dimensions.of_checkpoint(locate(checkpoint.write_official(tmp_path / "official", "small-t2v-A14B")))
    text_encoder = replace(small.text_encoder, dim_ffn=128)  # which the group size divides
    small = replace(small, text_encoder=text_encoder, quantization=Quantization(4, 32))
    asked = []
    load = whole_run.mlx_wan.WanPipeline._load_transformer
    monkeypatch.setattr(
        whole_run.mlx_wan.WanPipeline, "_load_transformer", lambda pipe, part: asked.append(part) or load(pipe, part)
    )
    setting = Setting(64, 48, 9, mx.float32)
    found = whole_run.measure(
        small, setting, 2**30, tmp_path / "packed", steps=2, shift=5.0, tokenizer=whole_run.TOKENIZER
    )
    assert asked == ["transformer", "transformer_2"]
    packed = locate(tmp_path / "packed")
    assert packed.quantization == small.quantization
    weights = [next(iter(packed.parts[name].tensors.values())).load() for name in ("transformer", "transformer_2")]
    assert not mx.array_equal(*weights)
    assert found["planned_peak"] <= 2**30


def test_what_does_not_fit_is_not_run():
    with pytest.raises(UserError, match="of memory can be used"):
        whole_run.main(["--frame_num", "5", "--memory", "0.02"])
