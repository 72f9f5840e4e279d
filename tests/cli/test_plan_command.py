"""`mlx-wan plan`: what it prints, and its mistakes."""

import re

import pytest

from mlx_wan import backend
from mlx_wan.cli.main import main


def plan(capsys, *line):
    code = main(["plan", *line])
    return code, *capsys.readouterr()


def test_the_embedded_model_fits(capsys):
    code, out, err = plan(capsys)
    assert (code, err) == (0, "")
    first, head, *stages, last = out.splitlines()
    assert first.startswith("tiny, ")
    assert head.split() == ["stage", "weights", "work", "together"]
    assert [line.split()[0] for line in stages] == ["text", "denoise", "decode"]
    for line in stages:
        weights, work, together = map(float, re.findall(r"([\d.]+) GiB", line))
        assert weights + work == pytest.approx(together, abs=0.011)
    assert last.endswith("fits, everything stays loaded")


def test_a_released_model_needs_no_files_and_may_not_fit(capsys, monkeypatch):
    monkeypatch.setattr(backend, "usable_memory", lambda: 16 * 2**30)
    code, out, _ = plan(capsys, "--task", "t2v-1.3B", "--size", "256*256", "--frame-num", "9")
    assert code == 1
    assert "does not fit" in out
    assert re.search(r"nearest: .*mlx-wan convert -q \d.* fits\n$", out)
    code, packed, _ = plan(capsys, "--task", "t2v-1.3B", "--size", "256*256", "--frame-num", "9", "-q", "4")
    assert ", 4 bits, " in packed
    assert float(re.search(r"text +([\d.]+)", packed)[1]) < 0.8 * float(re.search(r"text +([\d.]+)", out)[1])


@pytest.mark.parametrize(("bits", "mode"), [("4", "mxfp4"), ("8", "mxfp8"), ("4", "nvfp4")])
def test_every_way_of_packing_can_be_planned(capsys, bits, mode):
    code, out, _ = plan(capsys, "--frame-num", "5", "-q", bits, "--q-mode", mode)
    assert code == 0
    assert f", {bits} bits, " in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--size", "100*96"], "--size 100*96: width must be a multiple of 32"),
        (["--frame_num", "6"], "--frame_num 6: must be 4n+1"),
        (["--task", "t2v-14B", "--with_image"], "t2v-14B takes no picture"),
        (["--task", "t2v-14B", "--ckpt_dir", "here"], "--task is for a model without files"),
        (["--task", "s2v-14B"], "invalid choice"),
        (["--ckpt_dir", "/nowhere"], "/nowhere: no such folder"),
        (["-q", "5"], "cannot quantize to 5 bits"),
    ],
)
def test_mistakes_are_one_line(capsys, line, message):
    code, out, err = plan(capsys, *line)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
