"""The benchmark of sampling's dials: what its table counts."""

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_cache.py"


def test_the_table_counts_calls_and_compares_with_every_step(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("step_cache_benchmark", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    line = ["--prompts", "1", "--steps", "12", "--size", "64", "--frames", "9", "--cache", "0.0001", "0.3"]
    assert bench.main([*line, "--json", str(tmp_path / "x.json")]) == 0
    out = capsys.readouterr().out
    found = {row["setting"]: row for row in json.loads((tmp_path / "x.json").read_text())}
    assert found["every step"]["calls"] == found["--cache 0.0001"]["calls"] == 24
    assert found["--cache 0.0001"]["psnr"] == 99, "nothing was left out"
    assert found["--cache 0.3"]["calls"] < 24
    assert 10 < found["--cache 0.3"]["psnr"] < 99
    assert 12 < found["--guidance_interval 0.6 1"]["calls"] < 24, "one pass where there is no guidance"
    assert found["--sample_steps 10"]["calls"] == 20
    assert all(f"| {'`' if '--' in name else ''}{name}" in out for name in found)
