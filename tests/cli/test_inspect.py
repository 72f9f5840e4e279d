"""`mlx-wan inspect` and inspect_model.py as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from weights import checkpoints

from mlx_wan.cli.inspect import _size, render
from mlx_wan.cli.main import main
from mlx_wan.weights.inspect import describe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write_official(tmp_path / "model")


def test_the_door_and_the_command_say_the_same(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, ROOT / "inspect_model.py", folder], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_text_lists_every_tensor_and_the_totals(folder):
    found = describe(folder)
    lines = render(found).splitlines()
    words = [line.split() for line in lines]
    for tensor in found["tensors"]:
        shape = "×".join(map(str, tensor["shape"]))
        assert any(w[:3] == [tensor["name"], shape, tensor["dtype"]] for w in words), tensor["name"]
    assert any(w[:3] == ["text", "encoder", "32"] for w in words)
    assert ["blocks.1", "27", f"{found['components']['transformer']['blocks']['blocks.1']['parameters']:,}"] in [
        w[:3] for w in words
    ]
    assert lines[-5:] == [
        f"path          {folder}",
        "model         Wan transformer of an unreleased size",
        "layout        official",
        f"to use it     mlx-wan generate --ckpt_dir {folder}",
        "quantization  none",
    ]


def test_json(folder, capsys):
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe(folder)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (1_234_567, "1.23 MB"), (10**10, "10 GB")],
)
def test_sizes(nbytes, text):
    assert _size(nbytes) == text


def test_a_damaged_file_in_a_folder_is_told_and_fails(folder, capsys):
    file = folder / "Wan2.2_VAE.pth"
    file.write_bytes(file.read_bytes()[:-9])
    assert main(["inspect", str(folder)]) == 1
    said = capsys.readouterr()
    assert said.err == f"error: {file}: is cut off: its {file.stat().st_size:,} bytes end before the zip directory; " \
        "download it again\n"  # fmt: skip
    assert "blocks.1.modulation" in said.out


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [("none", 2, "no such file or folder"), ("evil.pth", 1, "refused: its pickle asks for posix.system")],
)
def test_failures_are_one_line(capsys, name, code, message):
    path = ROOT / "tests" / "weights" / "fixtures" / name
    assert main(["inspect", str(path)]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {path}: {message}")
    assert said.err.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error(folder):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, ROOT / "inspect_model.py", folder],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.stderr == ""


def test_quantization_is_shown(tmp_path, capsys):
    weights = {"a.weight": mx.zeros((4, 8), mx.uint32), "a.scales": mx.zeros((4, 1)), "a.biases": mx.zeros((4, 1))}
    metadata = {"quantization": '{"bits": 4, "group_size": 64, "mode": "affine"}'}
    mx.save_safetensors(str(tmp_path / "m.safetensors"), weights, metadata)
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    assert "quantization  4 bits, groups of 64, affine" in capsys.readouterr().out


def test_quantization_of_others_is_shown_too(capsys):
    assert main(["inspect", str(ROOT / "tests" / "weights" / "fixtures" / "umt5.gguf")]) == 0
    assert "quantization  Q4_0; unpacked when loaded" in capsys.readouterr().out


def test_a_folder_with_a_lora_says_its_flag(capsys):
    assert main(["inspect", str(ROOT / "tests" / "golden" / "lora" / "peft")]) == 0
    assert "to use it     mlx-wan generate --lora " in capsys.readouterr().out
