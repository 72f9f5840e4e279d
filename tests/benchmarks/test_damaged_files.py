"""A sample of what benchmarks/damage.py does: the whole run is a thousand files a reader."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import damage


@pytest.mark.parametrize("reader", damage.READERS)
def test_damaged_files_end_in_values_or_one_line(tmp_path, reader):
    errors, longest = damage.run(reader, 60, seed=1, folder=tmp_path)
    assert errors > 20
    assert longest < damage.SECONDS
