"""`--save_every` and `--resume` with real processes: stopped by Ctrl-C or killed, a run goes on to the same file."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
import numpy as np
import pytest
from PIL import Image

from mlx_wan.cli import generate
from mlx_wan.cli.main import main
from mlx_wan.errors import WanError
from mlx_wan.outputs import read_settings
from mlx_wan.resume import read_record
from mlx_wan.video import read_video

LINE = ["--prompt", "a red circle", "--seed", "3", "--size", "64*32", "--frame_num", "5"]
KEPT = "a.mp4.resume.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (320, 200), (200, 0, 0)).save(tmp_path / "photo.png")
    return tmp_path


def run(model: str, *flags: str) -> int:
    return main(["generate", "--ckpt_dir", model, *LINE, *flags])


def stop(model: str, *flags: str, sign: int, after: int = 2) -> tuple[int, str]:
    """Starts a run in a process of its own and stops it once `after` steps are kept; its exit code and errors."""
    line = [sys.executable, "-m", "mlx_wan.cli.main", "generate", "--ckpt_dir", model, *LINE, *flags]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (Path(KEPT).exists() and steps(KEPT) >= after):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(sign)
    return process.wait(60), process.communicate()[1]


def steps(file: str) -> int:
    from mlx_wan.resume import _read

    return _read(Path(file))["step"]


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on_to_the_same_file(folder, capsys, sign, code):
    model, flags = str(checkpoint.write_official(folder / "model")), ("--steps", "150", "--codec", "lossless")
    ended, errors = stop(model, *flags, "--save_every", "2", "-o", "a.mp4", sign=sign)
    assert ended == code
    assert not Path("a.mp4").exists()
    before = steps(KEPT)
    assert 2 <= before < 150
    if code == 130:
        assert f"note: {KEPT} has the run as it stood after step {before} of 150: generate --resume" in errors
        assert errors.splitlines()[-1] == "stopped"
    assert main(["generate", "--resume", KEPT]) == 0
    assert "a.mp4\nseed 3\n" in capsys.readouterr().out
    assert run(model, *flags, "-o", "b.mp4") == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    assert not Path(KEPT).exists()
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("small", ("--image", "photo.png", "--sample_solver", "dpm++")),
        ("small-t2v-A14B", ("--sample_solver", "euler", "--guidance", "2,3")),
        ("small-i2v-A14B", ("--image", "photo.png", "--last_frame", "photo.png")),
        ("small", ("--sample_solver", "dmd", "--timesteps", "1000,900,757,600,522", "--guidance", "1")),
    ],
)
def test_of_every_kind_by_the_file_alone(folder, monkeypatch, kind, flags):
    """From another folder, and with the last step kept, after which the decoder failed."""
    from mlx_wan import pipeline

    model = str(checkpoint.write_official(folder / "model", kind))
    flags = (*flags, "--steps", "5", "--fps", "7")
    monkeypatch.setattr(pipeline, "_check_piece", failing)
    assert run(model, *flags, "--save_every", "100", "-o", "frames/") == 1
    monkeypatch.undo()
    assert steps(str(folder / "frames.resume.safetensors")) == 5
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert main(["generate", "--resume", "../frames.resume.safetensors"]) == 0
    monkeypatch.chdir(folder)
    assert run(model, *flags, "-o", "again/") == 0
    for one, other in zip(sorted(Path("frames").iterdir()), sorted(Path("again").iterdir()), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert read_settings(Path("frames"))["fps"] == 7


def failing(*given):
    raise WanError("piece 1 of the decoded video is not finite")


@pytest.fixture
def stopped(folder, monkeypatch, capsys) -> str:
    """A run of the small model that was stopped in its third step; its model."""
    model = str(checkpoint.write_official(folder / "model"))
    stop_in_step_three(monkeypatch)
    assert run(model, "--steps", "5", "--save_every", "2", "--image", "photo.png", "-o", "a.mp4") == 130
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    capsys.readouterr()
    return model


def stop_in_step_three(monkeypatch):
    from mlx_wan import sampling

    original = sampling._check

    def check(latents, step, steps):
        if step == 4:
            raise KeyboardInterrupt
        original(latents, step, steps)

    monkeypatch.setattr(sampling, "_check", check)


def test_ctrl_c_keeps_the_newest_step(stopped):
    assert steps(KEPT) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seed 4", f"{KEPT}: is of a run with another seed (3, this is 4); it goes on as it began"),
        ("--steps 6", f"{KEPT}: is of a run with another num_inference_steps (5, this is 6)"),
        ("--guidance 2", f"{KEPT}: is of a run with another guidance_scale (5.0, this is 2.0)"),
        ("--sample_solver euler", f"{KEPT}: is of a run with another scheduler (unipc, this is euler)"),
        ("--dtype bfloat16", f"{KEPT}: is of a run with another dtype (float32, this is bfloat16)"),
        ("--image other.png --size 64*32", f"{KEPT}: is of a run with another image file ("),
        ("--ckpt_dir other", f"{KEPT}: is of a run of another model ("),
        ("--lora photo.png", f"{KEPT}: is of a run with another set of LoRAs (none, this is ["),
        ("--from a.json", "--resume and --from: one run goes on"),
        ("--use_prompt_extend", "--use_prompt_extend: a run goes on with the prompt it has"),
        ("--resume photo.png", "photo.png: is damaged, or not the state of a run"),
        ("--resume absent", "absent: no such file"),
        ("--resume=", "--resume is empty"),
        ("--save_every 0", "--save_every 0: must be at least 1"),
    ],
)
def test_what_cannot_go_on_is_one_line(stopped, folder, capsys, flags, message):
    Image.new("RGB", (320, 200), (0, 200, 0)).save("other.png")
    shutil.copytree("model", "other")
    file = next(Path("other").glob("diffusion*-00001-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = sorted(os.listdir(folder))
    assert main(["generate", "--resume", KEPT, *flags.split()]) in (1, 2)
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}"), errors
    assert errors.count("\n") == 1
    assert sorted(os.listdir(folder)) == before


def test_a_damaged_file_is_refused_before_the_model_is_read(stopped, folder, capsys, monkeypatch):
    monkeypatch.setattr(generate, "_make", None)
    data = bytearray(Path(KEPT).read_bytes())
    data[-1] ^= 1
    Path(KEPT).write_bytes(data)
    assert main(["generate", "--resume", KEPT]) == 1
    assert capsys.readouterr().err == f"error: {KEPT}: is damaged, or not the state of a run; start the run again\n"


def test_the_output_may_be_another(stopped, folder, capsys):
    assert main(["generate", "--resume", KEPT, "-o", "other.gif", "--fps", "5"]) == 0
    assert read_settings(Path("other.gif"))["fps"] == 5
    assert Path(KEPT).exists()  # another video's, which may still be wanted
    os.rename(KEPT, "kept")
    assert main(["generate", "--resume", "kept"]) == 2
    assert "kept: its name does not tell that of the video; give -o" in capsys.readouterr().err
    assert main(["info", KEPT]) == 2
    os.rename("kept", KEPT)
    assert main(["info", KEPT]) == 0
    assert "a red circle" in capsys.readouterr().out


def test_a_full_disk_is_said_and_the_run_goes_on(folder, capsys, monkeypatch):
    from mlx_wan import resume

    def full(*given):
        raise WanError("a.mp4.resume.safetensors: cannot be written (no space left)")

    monkeypatch.setattr(resume, "save_point", full)
    model = str(checkpoint.write_official(folder / "model"))
    assert run(model, "--steps", "2", "--save_every", "1", "-o", "a.mp4") == 0
    assert capsys.readouterr().err.count("cannot be written (no space left)") == 2
    assert read_video("a.mp4")[0].shape == (5, 32, 64, 3)


def test_progress_counts_from_where_it_stood(stopped, capsys):
    assert main(["generate", "--resume", KEPT, "--progress", "json"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if '"progress"' in line]
    assert [line[line.index('"step"') : line.index(', "piece"')] for line in lines[:2]] == [
        '"step": 4, "steps": 5',
        '"step": 5, "steps": 5',
    ]


def test_the_record_holds_no_more_than_it_needs(stopped):
    record = read_record(KEPT)
    assert set(record) == {"settings", "flags", "places", "processes"}
    assert np.all([Path(place).exists() for place in record["places"].values()])
    assert set(record["places"]) == {"image photo.png", "ckpt_dir model"}
