"""This package's side of the comparison with PyTorch on the CPU: times, and all that the other side needs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cpu_vs_torch.py"


def test_what_the_other_side_is_given(tmp_path):
    file = tmp_path / "cpu.npz"
    line = [sys.executable, str(SCRIPT), "mlx", str(file), "--repeat", "1", "--threads", "1"]
    out = subprocess.run(line, capture_output=True, text=True, check=True, timeout=120).stdout
    assert [text.partition(":")[0] for text in out.splitlines()] == ["one transformer call", "VAE decode of a clip"]
    with np.load(file) as stored:
        arrays = dict(stored)
    about = json.loads(str(arrays["about"]))
    assert all(found["wall"] > 0 and found["cpu"] > 0 for found in about["times"].values())
    assert arrays["answer/decode"].shape == (1, 25, 128, 128, 3)
    assert arrays["answer/transformer"].shape == arrays["latents"].shape
    assert arrays["transformer/patch_embedding.weight"].shape == (256, 1, 2, 2, 24)
    assert any(name.startswith("vae/decoder.") for name in arrays)
