"""benchmarks/true_size.py: the sparse folder it times is what the package takes for the released model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import true_size

from mlx_wan.weights.inspect import describe
from mlx_wan.weights.locate import locate


def test_the_sparse_folder_is_a_whole_released_model(tmp_path):
    folder = true_size.write_sparse(tmp_path)
    assert locate(folder).spec.name == "ti2v-5B"
    found = describe(folder)
    assert (found["model"], found["problems"]) == ("Wan2.2 TI2V-5B", [])
    assert 34e9 < found["total"]["bytes"] < 35e9
