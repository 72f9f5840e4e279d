"""`train` as two processes: they are the same, or say who is not; what happens to one of them happens to both."""

import signal
import socket
import time

import clips
import pytest
import ranks
import toy
import toy_model

from mlx_wan.training.checkpoint import newest_state

HERE = f"rank 1 ({socket.gethostname()})"
TRAIN = ["-m", "mlx_wan.cli.main", "train", "-c", "lora.yaml"]


@pytest.fixture
def here(tmp_path):
    toy_model.write_model(tmp_path / "toy")
    clips.write_folder(tmp_path / "data", 2)
    recipe = {"stage": "finetune", "model": "toy", "data": "data", "rank": 2, "iters": 100_000, "steps_per_report": 1}
    toy.write(tmp_path / "lora.yaml", recipe | {"adapter_path": "run", "save_every": 5})
    return tmp_path


def test_another_option_is_named_by_both(here):
    results = ranks.finish(ranks.start(here, 2, TRAIN, {1: [*TRAIN, "--seed", "4"]}, cwd=here))
    for code, out, errors in results:
        assert (code, out) == (2, ""), errors
        assert f"error: {HERE} was given another seed than rank 0 " in errors
    assert not list((here / "run").glob("*"))


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGKILL, [1, -9]), (signal.SIGINT, [130, 130])])
def test_what_ends_one_ends_the_other(here, number, codes):
    processes = ranks.start(here, 2, TRAIN, cwd=here)
    while newest_state(here / "run") is None:
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.05)
    processes[1].send_signal(number)
    results = ranks.finish(processes, timeout=30)
    assert [code for code, *_ in results] == codes, results
    said = results[0][2].splitlines()
    if number == signal.SIGKILL:
        assert any(line.startswith(f"error: {HERE} died; all other ranks stop") for line in said), said
    else:
        assert any("is saved; the same command with --resume goes on from it" in line for line in said), said
        assert said[-1] == "stopped"
