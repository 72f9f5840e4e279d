"""`mlx-wan train`: from a recipe to a result, what it refuses, and how it is stopped."""

import json
import signal
import subprocess
import sys
import time

import pytest
import toy

from mlx_wan.cli.main import main
from mlx_wan.cli.train import Reporter
from mlx_wan.training import tiny
from mlx_wan.training.checkpoint import newest_state


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny.latent_statistics, "__defaults__", (32, 16))
    monkeypatch.chdir(tmp_path)
    toy.write(tmp_path / "one.yaml", toy.AUTOENCODER)
    toy.write(tmp_path / "two.yaml", toy.TRANSFORMER)
    toy.write(tmp_path / "three.yaml", {"stage": "finetune", "iters": 4})
    toy.write(tmp_path / "four.yaml", {"ranc": 4})  # without a stage it is of fine-tuning


def run(line, capsys):
    code = main(["train", *line.split()])
    out, err = capsys.readouterr()
    return code, out, err


def test_two_commands_make_a_model_and_a_third_a_video(tmp_path, capsys):
    code, out, err = run("-c one.yaml --run one", capsys)
    assert (code, out) == (0, "saved one/vae\n")
    assert "step 4/4" in err
    assert run("-c two.yaml --run two --vae one/vae", capsys)[:2] == (0, "saved two/model\n")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["train"]["steps"] == 4
    line = ["generate", "--ckpt_dir", "two/model", "--prompt", "a red circle moves right", "--save_file", "a.mp4"]
    assert main(line) == 0
    assert (tmp_path / "a.mp4").stat().st_size > 0
    # Both runs again: refused without --resume, finished with it.
    capsys.readouterr()
    code, out, err = run("-c one.yaml --run one", capsys)
    assert code == 2
    assert "one holds a run already; add --resume" in err
    code, out, err = run("-c one.yaml --run one --resume", capsys)
    assert (code, out) == (0, "saved one/vae\n")
    assert "going on from one/state-00000004.safetensors" in err
    code, out, err = run("-c one.yaml --run one --resume --steps 8", capsys)
    assert code == 2
    assert "train.steps was 4 and is 8 now" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-c none.yaml --run r", "cannot read the recipe none.yaml: No such file"),
        ("-c one.yaml --run r --steps 0", "one.yaml: train: steps is 0; it must be at least 1"),
        ("-c one.yaml --run r --vae v", "one.yaml takes no --vae"),
        ("-c two.yaml --run r", "two.yaml needs --vae, the folder of a finished autoencoder, or --init"),
        ("-c two.yaml --run r --vae v --init m", "two.yaml needs --vae or --init, not both"),
        ("-c one.yaml --run r --init m", "one.yaml takes no --init; it is for stage transformer"),
        ("-c two.yaml --run r --init tiny", "tiny has another transformer than the recipe"),
        ("-c two.yaml --run r --vae none", "none is no finished autoencoder"),
        ("-c one.yaml --run one.yaml/r", "one.yaml/r: cannot write there (Not a directory)"),
        ("-c one.yaml --run r --batch-size x", "one.yaml: train: batch_size is 'x'; it must be a whole number"),
        ("-c one.yaml", "one.yaml needs --run, the folder for states, log and result"),
        ("-c one.yaml --run r --rank 4", "one.yaml takes no --rank; it is for stage finetune"),
        ("-c one.yaml --run r --dry-run", "one.yaml takes no --dry-run"),
        ("--run r", "give a recipe with -c, or at least --model and --data"),
        ("-c three.yaml --run r", "stage finetune takes no --run; use --adapter-path"),
        ("-c three.yaml --steps 3", "stage finetune takes no --steps; use --iters"),
        ("-c three.yaml --dry-run", "three.yaml: model is missing"),
        ("-c three.yaml --model m --dry-run", "three.yaml: data is missing"),
        ("--model m --data d --rank x", "the command line: rank is 'x'; it must be a whole number"),
        ("--model m --data d --flip 3", "the command line: flip is 3; it must be true or false"),
        ("--model m --data d --optimizer sdg", "optimizer is 'sdg'; choose one of adamw, adam"),
        ("--model m --data d --report-to wandb", "report_to is 'wandb'; choose of csv, tensorboard"),
        ("--model m --data d --ranc 4", "unknown flag --ranc, did you mean --rank?"),
        ("--model none --data d", "none: no such folder"),
        ("-c four.yaml --model m --data d", "four.yaml: unknown key 'ranc'; known are"),
        ("report", "only `mlx-wan train report RUN` takes words"),
        ("stop it", "only `mlx-wan train report RUN` takes words"),
        ("report none", "none/log.jsonl: cannot be read (No such file or directory); give the folder of a run"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, line, message):
    code, out, err = run(line, capsys)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_flags_replace_values_of_the_recipe(tmp_path, capsys):
    line = "-c one.yaml --run r --steps 2 --batch-size 1 --learning-rate 1e-4 --seed 7"
    assert run(line, capsys)[0] == 0
    train = json.loads((tmp_path / "r" / "run.json").read_text())["train"]
    assert [train[name] for name in ("steps", "batch_size", "learning_rate", "seed")] == [2, 1, 1e-4, 7]


def test_a_damaged_newest_state_is_passed_over_with_a_note(tmp_path, capsys):
    assert run("-c one.yaml --run r", capsys)[0] == 0
    newest = newest_state(tmp_path / "r")
    newest.write_bytes(newest.read_bytes()[:100])
    before = (tmp_path / "r" / "vae" / "vae.safetensors").read_bytes()
    code, _, err = run("-c one.yaml --run r --resume", capsys)
    assert code == 0
    assert "note: r/state-00000004.safetensors is damaged and passed over\n" in err
    assert "going on from r/state-00000002.safetensors" in err
    assert (tmp_path / "r" / "vae" / "vae.safetensors").read_bytes() == before
    for path in (tmp_path / "r").glob("state-*"):
        path.write_bytes(b"")
    code, _, err = run("-c one.yaml --run r --resume", capsys)
    assert code == 1
    assert "is damaged and there is no whole state" in err


def test_resume_without_a_state_starts_at_the_beginning(capsys):
    code, _, err = run("-c one.yaml --run new --resume", capsys)
    assert code == 0
    assert "no state in new: starting at step 0" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(tmp_path, number):
    line = [sys.executable, "-m", "mlx_wan.cli.main", "train", "-c", "one.yaml", "--run", "r", "--steps", "1000000"]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        log = tmp_path / "r" / "log.jsonl"
        end = time.monotonic() + 90
        while not (log.exists() and log.read_text().count("\n") > 2):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    state = newest_state(tmp_path / "r")
    last = [row for row in err.splitlines() if row.startswith("step ")][-1]
    assert int(state.stem[-8:]) == int(last.split("/")[0].split()[1])
    assert err.splitlines()[-2:] == [
        f"r/{state.name} is saved; the same command with --resume goes on from it",
        "stopped",
    ]
    assert "stopping: finishing this step" in err
    assert "Traceback" not in err


def test_the_reporter_tells_the_time_left(capsys):
    report = Reporter(100)
    report({"step": 20, "loss": 0.5, "steps_per_s": 4.0})
    report({"step": 20, "val_loss": 0.25})
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 20/100  loss 0.5  steps_per_s 4  left 20 s"
    assert second == "step 20/100  val_loss 0.25  left 20 s"
