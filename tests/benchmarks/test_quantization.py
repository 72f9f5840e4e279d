"""benchmarks/quantization.py at toy size."""

import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import quantization


def rows(out):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]


def test_every_mode_is_measured_on_the_embedded_model(capsys):
    assert quantization.main(["--steps", "1", "--size", "64", "--frames", "5"]) == 0
    head, _, exact, *modes = rows(capsys.readouterr().out)
    assert len(head) == 5
    assert len(modes) == len(quantization.WAYS) == 5
    bytes_, errors = {m[0]: float(m[1]) for m in modes}, {m[0]: float(m[3]) for m in modes}
    assert all(0 < size < 0.5 * float(exact[1]) for size in bytes_.values())
    assert errors["affine, 8 bits, groups of 32"] < 0.02 < errors["affine, 4 bits, groups of 32"] < 0.5


def test_the_true_size_at_toy_size(capsys, monkeypatch):
    config = quantization.TransformerConfig

    def small(num_layers):
        return config(dim=128, ffn_dim=256, num_heads=2, num_layers=num_layers, text_dim=64, text_len=8)

    monkeypatch.setattr(quantization, "TransformerConfig", small)
    assert quantization.main(["--true_size", "--layers", "1", "--size", "64", "--frames", "5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 blocks, 8 tokens")
    assert [re.sub(" .*", "", row[0]) for row in rows(out)[3:]] == ["affine,", "affine,", "mxfp4,", "mxfp8,", "nvfp4,"]


def test_measures():
    assert quantization.psnr(np.zeros(4, np.uint8), np.full(4, 255, np.uint8)) == pytest.approx(0)
    assert quantization.relative(mx.array([1.0, 1.0]), mx.array([1.0, 0.0])) == pytest.approx(1)
