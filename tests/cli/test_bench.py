"""`mlx-wan bench`: the table, the JSON, and what it refuses."""

import json
import re

import pytest

from mlx_wan import backend
from mlx_wan.cli.main import main
from mlx_wan.memory.plan import Dimensions, Setting, plans

COLUMNS = ["part", "work", "first call", "median", "fastest–slowest", "calls", "weights", "peak memory", "planned"]


def bench(capsys, *line):
    code = main(["bench", *line])
    return code, *capsys.readouterr()


def test_the_table_has_a_row_for_each_part(capsys):
    code, out, err = bench(capsys, "--repeat", "2", "--pieces", "1", "--frame-num", "9")
    assert code == 0
    assert "random weights" in err
    title, _, machine, _, head, rule, *rows, _, last = out.splitlines()
    assert title == "**tiny**, 128×128, 9 frames, float32"
    assert f"MLX {backend.version('mlx')}" in machine
    assert [cell.strip() for cell in head.strip("|").split("|")] == COLUMNS
    assert rule.count("|") == head.count("|")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == [
        "text encoder",
        *["VAE encoder"] * 2,
        "transformer",
        *["VAE decoder"] * 2,
    ]
    assert all(re.fullmatch(r"[\d.]+ m?s", row[3]) and float(row[3].split()[0]) > 0 for row in cells)
    assert "40 calls of the transformer" in last  # 20 steps with guidance


def test_json_has_every_time_and_the_memory_that_was_planned(capsys):
    code, out, _ = bench(capsys, "--json", "--repeat", "3", "--parts", "transformer", "decode", "--pieces", "2")
    assert code == 0
    found = json.loads(out)
    assert (found["model"], found["width"], found["num_frames"]) == ("tiny", 128, 25)
    transformer, first, more = found["measurements"]
    assert [len(row["seconds"]) for row in found["measurements"]] == [3, 1, 1]
    assert sorted(transformer["seconds"])[1] == transformer["median"]
    assert transformer["work"] == "112 tokens"  # 7 latent frames of 8x8, in patches of 2x2
    assert first["weights"] == more["weights"] < more["peak"]
    import mlx.core as mx

    from mlx_wan.weights.locate import locate

    model = Dimensions.of_checkpoint(locate("tiny"))
    keeping, leaving = plans(model, Setting(128, 128, 25, mx.float32), "CPU")
    stages = {stage.name: stage for stage in leaving.stages}
    (decode,) = (stage for stage in keeping.stages if stage.name == "decode")
    assert transformer["weights"] == stages["denoise"].weights
    assert more["peak"] == pytest.approx(decode.peak - decode.weights + stages["decode"].weights, rel=0.15)


def test_packed_weights_are_measured_packed(capsys):
    line = ("--json", "--repeat", "1", "--parts", "transformer", "--frame-num", "5")
    plain, packed = (json.loads(bench(capsys, *line, *more)[1]) for more in ((), ("-q", "4", "--q-mode", "nvfp4")))
    assert packed["quantization"] == {"bits": 4, "group_size": 16, "mode": "nvfp4"}
    assert packed["measurements"][0]["weights"] < 0.4 * plain["measurements"][0]["weights"]


@pytest.mark.parametrize("flags", [("--with_image",), ("--frame-num", "1")])
def test_other_runs_of_the_model(capsys, flags):
    code, out, _ = bench(capsys, *flags, "--repeat", "1", "--pieces", "1")
    assert code == 0
    assert out.count("| VAE decoder |") == (1 if "1" in flags else 2)


def test_what_does_not_fit_is_refused_with_what_would(capsys, monkeypatch):
    monkeypatch.setattr(backend, "usable_memory", lambda: 8 * 2**30)
    code, out, err = bench(capsys, "--task", "t2v-1.3B", "--size", "256*256", "--frame-num", "9", "--parts", "text")
    assert (code, out) == (2, "")
    assert re.search(r"text takes [\d.]+ GiB .*: -q 4 (--size .*)?(--frame_num \d+ )?fits\n$", err), err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--repeat", "0"], "--repeat 0: must be at least 1"),
        (["--pieces", "0"], "--pieces 0: must be at least 1"),
        (["--parts", "all"], "invalid choice: 'all'"),
        (["--size", "100*96"], "width must be a multiple of 32"),
    ],
)
def test_mistakes_are_one_line(capsys, line, message):
    code, out, err = bench(capsys, *line)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
