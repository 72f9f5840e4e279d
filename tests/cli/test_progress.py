import pytest

from mlx_wan.cli import progress as module
from mlx_wan.cli.progress import PIECE_COST, Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told: clock(3) lets three seconds pass."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def forward(seconds):
        now[0] += seconds

    return forward


def test_seconds_per_stage_and_time_left(clock, capsys):
    with Progress(steps=4, pieces=2) as progress:
        progress.stage("load")
        clock(7)
        progress.stage("denoise")
        assert progress.time_left() is None
        clock(10)
        progress.step_done()
        assert progress.time_left() == pytest.approx(3 * 10 + 2 * PIECE_COST * 10)
        clock(4)  # in the middle of the second step
        assert progress.time_left() == pytest.approx(3 * 10 + 2 * PIECE_COST * 10 - 4)
        clock(2)
        progress.step_done()  # from here on without the first, which compiles
        assert progress.time_left() == pytest.approx(2 * 6 + 2 * PIECE_COST * 6)
        clock(8)
        progress.step_done()
        assert progress.time_left() == pytest.approx(7 + 2 * PIECE_COST * 7)
        progress.step_done()
        progress.stage("decode")
        clock(5)
        progress.piece_done()
        assert progress.time_left() == pytest.approx(5)
        clock(5)
        progress.piece_done()
        assert progress.time_left() == 0
    assert progress.seconds == {"load": 7, "denoise": 24, "decode": 10}
    shown = capsys.readouterr().err
    assert "decode" in shown
    assert "100%" in shown
    assert "done" in shown


def test_the_time_left_never_falls_below_zero(clock):
    with Progress(steps=2, pieces=1) as progress:
        progress.stage("denoise")
        clock(1)
        progress.step_done()
        clock(60)
        assert progress.time_left() == 0


def test_an_interrupted_run_does_not_claim_to_be_done(clock, capsys):
    def interrupted():
        with Progress(steps=2, pieces=1) as progress:
            progress.stage("denoise")
            progress.step_done()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown = capsys.readouterr().err
    assert "100%" not in shown
    assert "done" not in shown
    assert shown.endswith("\n")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
