"""Fine-tuning as a user does it: clips on disk, a command, an interruption, a video made with what was learned."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser

import clips
import numpy as np
import pytest
import safetensors.numpy
import toy
import toy_model
from PIL import Image

from mlx_wan.cli.main import main
from mlx_wan.training.checkpoint import newest_state
from mlx_wan.video import read_video


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_model.write_model(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture
def here(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").symlink_to(model)
    clips.write_folder(tmp_path / "data", 5)
    recipe = {"stage": "finetune", "model": "toy", "data": "data", "rank": 2, "iters": 6, "learning_rate": 1e-2}
    recipe |= {"warmup_steps": 0, "batch_size": 2, "steps_per_report": 2, "steps_per_eval": 3, "save_every": 2}
    toy.write(tmp_path / "lora.yaml", recipe | {"hold_out": 0.2, "adapter_path": "run"})
    return tmp_path


def run(line, capsys):
    code = main(line.split() if isinstance(line, str) else line)
    out, err = capsys.readouterr()
    return code, out, err


def test_from_clips_to_a_video_made_with_the_lora(here, capsys):
    (here / "data" / "broken.mp4").write_bytes(b"no video")
    (here / "data" / "broken.txt").write_text("x")
    code, out, err = run("train -c lora.yaml --dry-run", capsys)
    assert code == 0
    assert "skipped data/broken.mp4: cannot be read as a video" in out
    assert "4 of 4 files, 1 for validation, 1 files skipped" in out
    assert "LoRA of rank 2" in out
    assert not (here / "run").exists()
    assert not (here / "data" / ".mlx-wan-cache").exists()

    line = ["train", "-c", "lora.yaml", "--preview-prompts", "a bar, moving", "two", "--preview-every", "4"]
    code, out, err = run([*line, "--report-to", "csv", "tensorboard"], capsys)
    assert (code, out) == (0, "saved run/adapters.safetensors\n")
    assert "encoding clip 5/5" in err
    assert "step 6/6  loss" in err
    assert "left 0 s" in err
    assert {path.name for path in (here / "run" / "previews").iterdir()} == {"0000004.png", "0000006.png"}
    with Image.open(here / "run" / "previews" / "0000006.png") as sheet:
        assert sheet.size == (6 * 20, 2 * 20)
    assert [line.split(",")[1] for line in (here / "run" / "log.csv").read_text().splitlines()[:2]] == ["name", "loss"]

    code, out, err = run("train -c lora.yaml", capsys)
    assert code == 2
    assert "run holds a run already; add --resume to go on with it, or choose another --adapter-path" in err
    assert run("train -c lora.yaml --resume", capsys)[0] == 0

    make = "generate --ckpt_dir toy --prompt a_bar_number_1_moves_right --base_seed 3 --save_file"
    assert run(f"{make} plain.mp4", capsys)[0] == 0
    assert run(f"{make} tuned.mp4 --lora run/adapters.safetensors", capsys)[0] == 0
    plain, tuned = (read_video(here / name)[0] for name in ("plain.mp4", "tuned.mp4"))
    assert plain.shape == tuned.shape
    assert not np.array_equal(plain, tuned)


def test_a_dora_and_a_whole_model_are_used_too(here, capsys):
    assert run("train -c lora.yaml --fine-tune-type dora --adapter-path dora", capsys)[0] == 0
    assert run("train -c lora.yaml --fine-tune-type full --adapter-path full", capsys)[:2] == (0, "saved full/model\n")
    losses = {}
    for name, what in {"plain": "toy", "dora": "toy --lora dora/adapters.safetensors", "full": "full/model"}.items():
        code, out, _ = run(f"evaluate {what} --data data --json", capsys)
        assert code == 0
        losses[name] = json.loads(out)["val_loss"]
    assert losses["dora"] < losses["plain"]
    assert losses["full"] < losses["plain"]


def test_flags_win_over_the_recipe(here, capsys):
    line = "train -c lora.yaml --iters 2 --targets q ffn.0 --num-frames 3 5 --rank 4 --flip --aspect-buckets false"
    assert run(line + " --learning-rate 1e-3", capsys)[0] == 0
    facts = json.loads((here / "run" / "run.json").read_text())["finetune"]
    wanted = {"iters": 2, "targets": ["q", "ffn.0"], "num_frames": [3, 5], "rank": 4, "flip": True}
    wanted |= {"aspect_buckets": False, "learning_rate": 1e-3, "batch_size": 2}
    assert {name: facts[name] for name in wanted} == wanted


def test_a_recipe_is_not_needed(here, capsys):
    line = "train --model toy --data data --iters 1 --rank 2 --adapter-path a --cache c"
    assert run(line, capsys)[0] == 0
    assert (here / "a" / "adapters.safetensors").exists()
    assert list((here / "c").iterdir())


def test_evaluation_for_people_and_for_programs(here, capsys):
    code, out, _ = run("evaluate toy --data data", capsys)
    assert code == 0
    assert out.startswith("5 clips of the train set, 0 files skipped\nval_loss  ")
    clips.write_folder(here / "data" / "valid", 2)
    code, out, _ = run("evaluate toy --data data --json", capsys)
    facts = json.loads(out)
    assert (facts["split"], facts["clips"], facts["lora"]) == ("valid", 2, [])
    assert facts.keys() >= {"val_loss", "val_loss_0_250", "val_loss_750_1000", "vae_psnr", "vae_ssim"}
    assert json.loads(run("evaluate toy --data data --json", capsys)[1]) == facts
    assert json.loads(run("evaluate toy --data data --json --limit 1", capsys)[1])["clips"] == 1
    for line, message in (
        ("evaluate toy --data none", "none: no such folder or file"),
        ("evaluate toy --data data --limit 0", "--limit is 0; it must be at least 1"),
        ("evaluate toy --data data --lora none", "none: no such LoRA file"),
        ("evaluate toy --data data --num-frames 4", "num_frames is 4; it must be 2n+1"),
    ):
        code, out, err = run(line, capsys)
        assert (code, out) == (2, "")
        assert message in err


class Page(HTMLParser):
    """Which elements a page has, and what it would load from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.outside = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [v for n, v in attrs if n in ("src", "href") and not v.startswith("data:")]


def test_the_report_is_one_page_with_curves_and_previews(here, capsys):
    line = ["train", "-c", "lora.yaml", "--preview-prompts", "x", "--preview-every", "3"]
    assert run(line, capsys)[0] == 0
    assert run("train report run", capsys)[:2] == (0, "saved run/report.html\n")
    text = (here / "run" / "report.html").read_text()
    page = Page(text)
    assert page.outside == []
    assert page.tags.count("img") == 2
    assert page.tags.count("svg") == 6
    assert "val_loss_250_500" in text
    assert "learning_rate" in text


def test_killed_from_outside_it_goes_on_to_the_same_adapters(here):
    """The command itself, killed three times wherever it happens to be, then left to finish."""

    def command(name, *more):
        line = [sys.executable, "-m", "mlx_wan.cli.main", "train", "-c", "lora.yaml", "--adapter-path", name]
        line += ["--iters", "40", "--save-every", "1", "--steps-per-report", "1", "--resume", *more]
        return subprocess.Popen(line, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    straight = command("straight")
    assert "saved" in straight.communicate(timeout=120)[0]
    rng = np.random.default_rng()
    for part in range(3):
        process = command("killed")
        end = time.monotonic() + 60
        while (state := newest_state(here / "killed")) is None or int(state.stem[-8:]) < 8 * part + 2:
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = command("killed")
    _, err = last.communicate(timeout=120)
    assert last.returncode == 0, err
    assert "going on from killed/state-" in err
    for name in ("adapters.safetensors", newest_state(here / "straight").name):
        one, other = (safetensors.numpy.load_file(here / run / name) for run in ("straight", "killed"))
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_two_processes_share_encoding_and_training(here):
    """Over MLX's ring: each encodes its part, both make the same steps, the first writes."""
    holders = [socket.socket() for _ in range(2)]
    for holder in holders:
        holder.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{holder.getsockname()[1]}"] for holder in holders]
    for holder in holders:
        holder.close()
    (here / "hosts.json").write_text(json.dumps(hosts))
    line = [sys.executable, "-m", "mlx_wan.cli.main", "train", "-c", "lora.yaml"]
    processes = [
        subprocess.Popen(
            line,
            cwd=here,
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(here / "hosts.json")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["saved run/adapters.safetensors\n", ""]
    assert "encoding clip 3/3" in outputs[0][1]
    assert "encoding clip 2/2" in outputs[1][1]
    assert "step 6/6" in outputs[0][1]
    assert "step" not in outputs[1][1]
    facts = json.loads((here / "run" / "run.json").read_text())
    assert facts["processes"] == 2
