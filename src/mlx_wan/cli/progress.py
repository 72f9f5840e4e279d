"""One bar for a whole run: which stage it is in, how far, and how long the rest will take."""

import sys
import threading
import time
from types import TracebackType

from mlx_wan.cli.report import event

# What one piece of decoded video costs in denoising steps, until the first piece has been timed.
PIECE_COST = 0.06


class Progress:
    """A context manager that shows the bar on stderr and times the stages.

    Args:
        steps: how many denoising steps there will be.
        pieces: how many pieces of video the decoder will hand out.
        done: how many steps an earlier run has done.

    `seconds` maps each stage, in order, to the time it took.
    """

    def __init__(self, steps: int, pieces: int, done: int = 0) -> None:
        self.seconds: dict[str, float] = {}
        self._steps, self._pieces, self._before = steps - done, pieces, done
        self._steps_done = self._pieces_done = 0
        self._first_step_end = 0.0
        self._step_seconds: float | None = None
        self._piece_seconds: float | None = None
        self._stage_name = ""
        self._stage_start = self._last_event = time.perf_counter()
        self._interactive = sys.stderr.isatty()
        self._finished = threading.Event()

    def __enter__(self) -> "Progress":
        from tqdm import tqdm  # here, since it takes longer to import than all of `--help`

        self._bar = tqdm(
            total=self._before + self._steps + PIECE_COST * self._pieces,
            initial=self._before,
            bar_format="{desc:<8}{percentage:3.0f}%|{bar}| {elapsed}{postfix}",
            mininterval=0.1 if self._interactive else 10,
            dynamic_ncols=True,
        )
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        if self._interactive:
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_stage()
        self._finished.set()
        if self._interactive:
            self._ticker.join()
        if kind is None:
            self._bar.n = self._bar.total
            self._bar.set_postfix_str("done", refresh=True)
        self._bar.close()

    def stage(self, name: str) -> None:
        """The stage `name` begins, and with it the one before ends."""
        self._end_stage()
        self._stage_name = name
        self._bar.set_description_str(name)

    def step_done(self) -> None:
        """One denoising step is done."""
        self._steps_done += 1
        now = time.perf_counter()
        if self._steps_done == 1:  # it compiles, and may have loaded weights: no measure once there is another
            self._first_step_end, self._step_seconds = now, now - self._stage_start
        else:
            self._step_seconds = (now - self._first_step_end) / (self._steps_done - 1)
        self._advance(1)

    def piece_done(self) -> None:
        """One piece of video is decoded and written."""
        self._pieces_done += 1
        self._piece_seconds = (time.perf_counter() - self._stage_start) / self._pieces_done
        self._advance(PIECE_COST)

    def time_left(self) -> float | None:
        """Seconds until everything is done, or None while no step has been timed."""
        if self._step_seconds is None:
            return None
        piece_seconds = self._piece_seconds or PIECE_COST * self._step_seconds
        steps, pieces = self._steps - self._steps_done, self._pieces - self._pieces_done
        since = time.perf_counter() - self._last_event
        return max(steps * self._step_seconds + pieces * piece_seconds - since, 0.0)

    def _advance(self, units: float) -> None:
        self._last_event = time.perf_counter()
        self._bar.set_postfix_str(self._words(), refresh=False)
        self._bar.update(units)

    def _end_stage(self) -> None:
        now = time.perf_counter()
        if self._stage_name:
            self.seconds[self._stage_name] = self.seconds.get(self._stage_name, 0.0) + now - self._stage_start
        self._stage_start = self._last_event = now

    def _words(self) -> str:
        left = self.time_left()
        return "" if left is None else f"{duration(left)} left"

    def _tick(self) -> None:
        """Keep the clock moving during steps that take minutes."""
        while not self._finished.wait(1.0):
            self._bar.set_postfix_str(self._words(), refresh=True)


class JsonProgress(Progress):
    """The same for programs: a JSON object a line (docs/outputs.md) instead of the bar."""

    def __enter__(self) -> "JsonProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_stage()

    def stage(self, name: str) -> None:
        self._end_stage()
        self._stage_name = name
        event("stage", stage=name)

    def _advance(self, units: float) -> None:
        self._last_event = time.perf_counter()
        left = self.time_left()
        steps = {"step": self._before + self._steps_done, "steps": self._before + self._steps}
        done = {**steps, "piece": self._pieces_done, "pieces": self._pieces}
        event("progress", **done, seconds_left=None if left is None else round(left, 1))


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
