"""`mlx-wan convert` as a user types it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cases import GOLDEN
from weights import checkpoints
from weights.test_convert import square  # noqa: F401

from mlx_wan.cli.main import main
from mlx_wan.weights.files import read_tensors
from mlx_wan.weights.load import locate


@pytest.fixture
def src(tmp_path):
    return checkpoints.write_official(tmp_path / "src")


def test_convert_says_where_and_how_much(src, tmp_path, capsys):
    dst = tmp_path / "dst"
    assert main(["convert", str(src), str(dst), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(dst)
    assert re.fullmatch(r"0\.01 GB in \d+\.\d s", said[1])
    assert read_tensors(dst / "transformer.safetensors")["blocks.0.ffn.0.weight"].dtype == "bfloat16"
    assert locate(dst).spec.name == "custom"


def test_single_files_in_place_of_the_folder_s_own(src, tmp_path):
    file = Path(__file__).parent.parent / "weights" / "fixtures" / "umt5.gguf"
    dst = tmp_path / "dst"
    assert main(["convert", str(src), str(dst), "--text_encoder", str(file), "--dtype", "float32"]) == 0
    got, want = locate(dst).text_encoder.tensors, locate(src, text_encoder=file).text_encoder.tensors
    assert all(np.array_equal(np.array(got[name].load()), np.array(info.load())) for name, info in want.items())
    lora = str(GOLDEN / "lora" / "kohya.safetensors")
    fused = ["fuse", "--model", str(src), "--text_encoder", str(file), "--lora", lora, "--out", str(tmp_path / "f")]
    assert main(fused) == 0
    assert (tmp_path / "f" / "text_encoder.safetensors").stat().st_size < file.stat().st_size * 4


@pytest.mark.parametrize("flag", [["-q", "8"], ["--bits", "8"]])
def test_quantizing(square, tmp_path, flag):  # noqa: F811
    assert main(["convert", str(square), str(tmp_path / "q"), *flag, "--group_size", "32"]) == 0
    how = locate(tmp_path / "q").quantization
    assert how is not None
    assert (how.bits, how.group_size) == (8, 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-q", "4"], "its 96 columns are not a multiple of the group size 64"),
        (["-q", "5"], "cannot quantize to 5 bits in groups of 64: affine has 4 or 8 bits"),
        (["-q", "four"], "invalid int value: 'four'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(src, tmp_path, capsys, flags, message):
    assert main(["convert", str(src), str(tmp_path / "dst"), *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["src"]


def test_overwriting_must_be_asked_for(src, tmp_path, capsys):
    command = ["convert", str(src), str(tmp_path / "dst")]
    assert main(command) == 0
    assert main(command) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_nothing(src, tmp_path, which):
    # The child stops in the middle of the copy and waits there for the signal.
    code = f"""
import sys, time
from mlx_wan.weights import convert
plain = convert._watched
def slow(parts, progress):
    def wait(done, total):
        if done > total / 2:
            print("half", flush=True)
            time.sleep(60)
    return plain(parts, wait)
convert._watched = slow
from mlx_wan.cli.main import main
sys.exit(main(["convert", {str(src)!r}, {str(tmp_path / "dst")!r}]))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "half\n"
    assert len(list(tmp_path.iterdir())) == 2
    time.sleep(0.1)
    os.kill(child.pid, which)
    _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (130, "stopped\n")
    assert [file.name for file in tmp_path.iterdir()] == ["src"]
