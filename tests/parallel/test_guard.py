"""Ranks that die, hang or fail end the others, which say who it was."""

import socket
import subprocess
import sys
import time

import mlx.core as mx
import pytest
import ranks

from mlx_wan.parallel import world
from mlx_wan.parallel.guard import Guard, Place, straggler
from mlx_wan.parallel.pulse import PATIENCE, STEADY, Pulse

HERE = f"rank 1 ({socket.gethostname()})"
WHY = {
    "die": f"error: {HERE} died; all other ranks stop",
    "hang": f"error: {HERE} has given no sign of life for 3 s",
    "sleep": f"error: {HERE} lives but has come no further for ",
    "fail": f"error: {HERE} stopped: a bad file; all other ranks stop",
}


@pytest.mark.parametrize("fate", ["die", "hang", "sleep", "fail"])
def test_all_others_end_and_name_the_rank(fate, tmp_path):
    unfinished = tmp_path / "unfinished"
    processes = ranks.start(tmp_path, 3, [str(ranks.HERE / "guarded.py"), fate, str(unfinished)])
    for rank in (0, 2):
        assert processes[rank].wait(timeout=30) == 1
    if fate == "sleep":
        assert processes[1].wait(timeout=10) == 1  # it is told too
    processes[1].kill()
    for rank in (0, 2):
        errors = processes[rank].communicate()[1]  # MLX itself writes of lost connections, in fragments, in between
        assert "Traceback" not in errors
        said = [line for line in errors.splitlines() if "error:" in line]
        assert len(said) == 1, errors
        assert said[0].startswith(WHY[fate]), errors
    assert not unfinished.exists()


def test_ranks_that_finish_leave_in_peace(tmp_path):
    unfinished = tmp_path / "unfinished"
    results = ranks.finish(ranks.start(tmp_path, 3, [str(ranks.HERE / "guarded.py"), "finish", str(unfinished)]))
    assert [(code, out) for code, out, _ in results] == [(0, "")] * 3, results
    assert unfinished.exists()


def test_nothing_is_said_after_goodbye(monkeypatch):
    """Rank 0 has stopped listening: what it leaves unread could reset the connection over its own goodbye."""
    guard, (link, other) = Guard(mx.distributed.init()), socket.socketpair()
    monkeypatch.setattr(guard, "_rank", 1)
    monkeypatch.setattr(guard, "_links", {0: link})
    guard._say("at 1")
    guard._part()
    guard._say("at 2")
    link.close()
    assert other.recv(100, socket.MSG_WAITALL) == b"at 1\nbye\n"


def test_every_rank_says_who_was_given_something_else(tmp_path):
    results = ranks.finish(ranks.start(tmp_path, 3, [str(ranks.HERE / "guarded.py"), "disagree", str(tmp_path / "x")]))
    for code, _, errors in results:
        assert code == 1
        assert errors.startswith(f"{HERE} was given another prompt than rank 0"), errors
        assert "a dog instead of a cat" in errors


def test_a_rank_that_never_comes_ends_those_that_wait(tmp_path):
    code = "from mlx_wan.parallel.world import meet; meet(1.0)"
    processes = ranks.start(tmp_path, 2, ["-c", code], {1: ["-c", "pass"]})
    start = time.monotonic()
    (waited, _, errors), _ = ranks.finish(processes, timeout=20)
    assert waited == -9
    assert "not all ranks came together within 1 s" in errors
    assert time.monotonic() - start < 15


def test_one_process_of_a_launcher_is_alone(tmp_path, monkeypatch):
    hosts = tmp_path / "hosts.json"
    hosts.write_text("\n")  # what mlx.launch -n 1 makes
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    assert not world.is_launched()
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    assert world.is_launched()


def test_meeting_alone_takes_no_time():
    code = "from mlx_wan.parallel.world import is_launched, meet; print(is_launched(), meet(1.0).size())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.stdout == "False 1\n"
    assert not world.is_launched()


def late(lines, seconds, silence=20.0):
    """Who is late when these "at" lines have been repeated for so many seconds."""
    places = {rank: Place() for rank in range(len(lines))}
    for now in range(seconds + 1):
        for place, line in zip(places.values(), lines, strict=True):
            place.hear(line)
        if (found := straggler(places, now, silence)) is not None:
            return found
    return None


def test_who_is_behind_for_too_long_is_named():
    steady = f"{STEADY} 0.5"
    assert late([f"7 {steady}", f"6 {steady}", f"7 {steady}"], 30) == (1, 21)
    assert late([f"5 {steady}", f"6 {steady}", f"7 {steady}"], 30) == (0, 21)  # the last of all
    assert late([f"7 {steady}"] * 3, 600) is None  # all compute, or all wait: nobody knows which
    assert late([f"7 {steady}"] * 3, 610) == (None, 601)
    assert late([f"7 {steady}", f"7 {PATIENCE} 0.5"], 10_000) is None  # the second decodes, or writes
    assert late([f"7 {steady}", f"6 {STEADY} 30"], 120) is None  # a step takes 30 s here
    assert late([f"7 {STEADY} 30", f"6 {steady}"], 130) == (1, 121)
    assert late([f"7 {steady}", f"6 {PATIENCE} 0.5"], 600) is None  # it loads weights
    assert late([f"7 {steady}", f"6 {PATIENCE} 0.5"], 610) == (1, 601)
    assert late([f"7 {steady}", "6 inf 0.5"], 10_000) is None  # it downloads


def test_whoever_moves_is_not_late():
    places = {0: Place(), 1: Place()}
    for now in range(100):
        places[0].hear(f"{now + 1} {STEADY} 1")
        places[1].hear(f"{now // 10} {STEADY} 1")
        assert straggler(places, now, 20.0) is None


def test_the_way_over_work_of_one_rank_alone_is_not_counted(monkeypatch):
    clock = iter([0.0, 3.0, 1000.0, 1002.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    pulse = Pulse()
    pulse.beat()
    pulse.beat()
    with pulse.taking():
        assert pulse.patience == float("inf")
    pulse.beat()
    pulse.beat()
    assert (pulse.count, pulse.longest, pulse.patience) == (4, 3.0, PATIENCE)
