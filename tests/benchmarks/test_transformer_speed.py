"""benchmarks/transformer_speed.py at toy size; the official code's half needs PyTorch and is not run here."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import transformer_speed


def rows(out):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]


def test_numbers_are_the_hash_of_their_place():
    """As any framework has to compute them, in 64-bit integers."""
    got = np.array(transformer_speed.drawn(mx, "blocks.0.ffn.0.weight", (50, 40), 0.5))
    h = (
        np.arange(2000, dtype=np.uint64) + (transformer_speed.zlib.crc32(b"blocks.0.ffn.0.weight") & 0x7FFFFFFF)
    ) % 2**32
    for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13), (0xC2B2AE3D, 16)):
        h = h * np.uint64(factor) % 2**32
        h ^= h >> np.uint64(shift)
    np.testing.assert_allclose(got.ravel(), h / 2**32 - 0.5, atol=1e-6)
    assert abs(got.mean()) < 0.03
    assert abs(got.std() - 0.5 / 3**0.5) < 0.01


def test_our_calls_are_compared_with_what_was_kept(capsys, tmp_path):
    transformer_speed.main(["compare", "--toy", "--only", "ours", "--keep", str(tmp_path), "--runs", "1"])
    (_, _, first) = rows(capsys.readouterr().out)
    assert first[0] == "mlx-wan"
    assert first[3] == "", "nothing to compare with"
    output = np.load(tmp_path / "ours.npy")
    assert output.shape == (2, 8, 8, 48)
    np.save(tmp_path / "float32.npy", 1.25 * output)
    transformer_speed.main(["compare", "--toy", "--only", "ours", "--keep", str(tmp_path), "--runs", "1"])
    assert float(rows(capsys.readouterr().out)[2][3]) == 0.2


def test_scaling_fits_both_terms(capsys, tmp_path):
    file = tmp_path / "scaling.json"
    transformer_speed.main(["scaling", "--toy", "--runs", "1", "--json", str(file)])
    assert [row[0] for row in rows(capsys.readouterr().out)[2:]] == ["24", "44", "92", "124", "228", "340"]
    assert file.exists()
    known = [{"tokens": n, "seconds": 3e-5 * n + 2e-9 * n * n} for n in (1000, 5000, 20000)]
    np.testing.assert_allclose(transformer_speed.fitted(known), (3e-5, 2e-9), rtol=1e-6)
