"""The report of a run: what is in the log is on the page, and nothing in it is taken for HTML."""

import json
import re
from xml.etree import ElementTree

import pytest

from mlx_wan.errors import UserError
from mlx_wan.training.report import chart, running_mean, write_report


def points(svg):
    lines = ElementTree.fromstring(svg).findall("polyline")
    return [[tuple(map(float, pair.split(","))) for pair in line.get("points").split()] for line in lines]


def test_a_curve_goes_where_its_numbers_are():
    (line,) = points(chart({"loss": [(10, 4.0), (20, 2.0), (30, 0.0)]}))
    (x1, y1), (x2, y2), (x3, y3) = line
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 < y2 < y3  # down the page is less
    assert y2 - y1 == pytest.approx(y3 - y2, abs=0.2)
    assert 0 < x1 < x3 < 640
    assert 0 < y1 < y3 < 240


@pytest.mark.parametrize("line", [[(5, 1.0)], [(5, 1.0), (6, 1.0)], [(1, 0.0), (2, 0.0)]])
def test_single_points_and_flat_curves_are_drawn(line):
    svg = chart({"loss": line})
    assert "nan" not in svg
    assert points(svg)


def test_long_curves_have_their_mean_over_them():
    noisy = [(float(i), float(i % 2)) for i in range(100)]
    assert len(points(chart({"loss": noisy}))) == 2
    assert all(abs(y - 0.5) < 0.15 for _, y in running_mean(noisy)[30:])
    assert running_mean([(0, 3.0), (1, 3.0)]) == [(0, 3.0), (1, 3.0)]


def test_names_and_settings_are_escaped_and_a_line_that_was_cut_is_left_out(tmp_path):
    rows = [{"step": 1, "loss": 1.0, "val_<b>": 2.0, "val_x": 1.0}, {"step": 2, "loss": 0.5, "grad_norm": float("inf")}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "lo')
    (tmp_path / "run.json").write_text(json.dumps({"finetune": {"model": "<script>"}}))
    text = write_report(tmp_path).read_text()
    assert "<b>" not in text
    assert "<script>" not in text
    assert "val_&lt;b&gt;" in text
    assert re.search(r"<td>loss</td><td>0.5</td>", text)
    assert "Gradient norm" not in text  # it was never finite


def test_an_empty_log_makes_a_page_and_none_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"log.jsonl: cannot be read .* give the folder of a run"):
        write_report(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    assert "No step has been logged yet" in write_report(tmp_path).read_text()
    (tmp_path / "log.jsonl").write_text("{x}")
    with pytest.raises(UserError, match="not a log"):
        write_report(tmp_path)
