"""parity/train_parity.py as far as it goes without PyTorch: data, our side, and the learning rates of both."""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import toy_model

from mlx_wan.training.trainer import learning_rates
from mlx_wan.weights import load

FILE = Path(__file__).parents[1] / "parity" / "train_parity.py"


@pytest.fixture
def parity(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("train_parity", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    toy = load.locate(str(toy_model.write_model(tmp_path / "toy")))
    monkeypatch.setattr(load, "locate", lambda name: toy)
    return module


def test_our_side_runs_on_what_was_prepared(parity, tmp_path, capsys):
    folder = tmp_path / "run"
    sizes = {"steps": 3, "batch": 2, "clips": 5, "val_clips": 2, "learning_rate": 1e-3, "seed": 0}
    parity.prepare(Namespace(folder=folder, schedule="cosine", **sizes))
    assert "5 clips of (3, 4, 4, 4)" in capsys.readouterr().out
    for side in ("mlx", "again"):
        parity.run_mlx(Namespace(command=side, folder=folder, dtype="float32", compile=False, compile_update=False))
    rows = [json.loads(line) for line in (folder / "mlx-float32.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    assert rows[-1]["val_loss"] != rows[0]["val_loss"]
    assert (folder / "mlx-float32.safetensors").read_bytes() != (folder / "again-float32.safetensors").read_bytes()
    parity.compare(Namespace(folder=folder, dtype="float32", sides=("mlx", "again"), plot=None))
    assert "3 steps, float32; relative difference of mlx and again" in capsys.readouterr().out


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_both_sides_have_the_same_learning_rates(parity, schedule):
    settings = {"learning_rate": 1e-3, "warmup": 5, "steps": 40, "schedule": schedule}
    ours = learning_rates(1e-3, 5, 40, schedule)
    theirs = parity.rates(settings)
    got = [ours(mx.array(step)).item() for step in range(40)]
    np.testing.assert_allclose(got, [theirs(step) for step in range(40)], rtol=1e-5)
