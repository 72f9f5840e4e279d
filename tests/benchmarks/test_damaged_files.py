"""A sample of what benchmarks/damage.py does: the whole run is a thousand files a reader."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "damage.py"
spec = importlib.util.spec_from_file_location("damage", FILE)
assert spec is not None
assert spec.loader is not None
damage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(damage)


@pytest.mark.parametrize("reader", damage.READERS)
def test_damaged_files_end_in_values_or_one_line(tmp_path, reader):
    errors, longest = damage.run(reader, 60, seed=1, folder=tmp_path)
    assert errors > 20
    assert longest < damage.SECONDS
