"""The loop around training steps: when to log, evaluate, preview and save, how to stop, how to go on.

What a step does is for those who inherit: `trainer.Trainer` trains one model, `joint.Joint` the two experts of one.
"""

import contextlib
import json
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_wan.errors import CheckpointError, WanError
from mlx_wan.parallel.guard import DisagreementError, StoppedTogether
from mlx_wan.parallel.pulse import PULSE
from mlx_wan.training.checkpoint import damaged_states, load_state, newest_state, save_state
from mlx_wan.weights.whole import flat

if TYPE_CHECKING:
    from mlx_wan.training.trainer import TrainConfig

Batch = dict[str, mx.array]
Numbers = dict[str, mx.array]
Row = dict[str, float]


def number(array: mx.array) -> float:
    value = array.item()
    if isinstance(value, complex):
        raise TypeError("a loss must be real")
    return float(value)


class _Clock:
    """Steps a second since it was made or last asked."""

    def __init__(self, step: int):
        self.step, self.time = step, time.perf_counter()

    def rate(self, step: int) -> float:
        steps, self.step = step - self.step, step
        seconds, self.time = time.perf_counter() - self.time, time.perf_counter()
        return steps / seconds


class _Signals:
    """Holds SIGINT and SIGTERM back while a step is under way: a state saved in its middle would be of no step.

    The first signal sets `asked`; a second one raises KeyboardInterrupt at once. A context manager; in any thread but
    the main one, which gets the signals, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"stopping: finishing this step and saving its state (again to stop at once)\n")


def part(world: mx.distributed.Group) -> None:
    """Lets the processes end, or go on by themselves, when each has what the others sent.

    MLX's ring does not wait until all is sent: a process that ended at once would cut the others off.
    """
    if world.size() > 1:
        mx.eval(mx.distributed.all_sum(mx.array(1), group=world))  # all sent before is there when this is
        with contextlib.suppress(RuntimeError):  # whoever has ended needs nothing more
            mx.eval(mx.distributed.all_sum(mx.array(1), group=world))


class Loop(ABC):
    """Steps from `step` to the last of `config`; the first process writes states and `log.jsonl` into `folder`."""

    def __init__(self, config: "TrainConfig", folder: Path):
        self.config, self.folder = config, folder
        self.world = mx.distributed.init()
        self.step = 0

    @abstractmethod
    def advance(self, batch_at: Callable[[int], Batch]) -> Numbers:
        """One step from as many batches as it takes; its numbers, means over the batches, not evaluated yet.

        `fit` does this and all around it.
        """

    @abstractmethod
    def arrays(self) -> list[Any]:
        """What the last step changes: trees of arrays."""

    @abstractmethod
    def checked(self, numbers: Numbers, step: int) -> Row:
        """The numbers of step `step`, the first being 0, for the log; WanError if one is not finite or the loss spikes.

        Not finite: then the weights are not either.
        """

    @abstractmethod
    def measured(self, evaluate: Any) -> Row:
        """What `fit` was given to evaluate with says of the averaged weights."""

    @abstractmethod
    def facts(self) -> Row:
        """More for a row of the log: learning_rate, and clips_a_step of all processes."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that a later run needs to go on, a tree of arrays. To be asked in all processes at once."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Takes up such a state, not evaluated yet; `step` is its step already."""

    def outline(self) -> dict[str, Any]:
        """A tree like `state`, whose values mean nothing."""
        return self.state()

    def resume(self) -> bool:
        """Takes up the newest whole state in the folder; False if there is none at all.

        CheckpointError if there are only damaged ones, or if it is of another configuration. UserError if other
        processes found another state.
        """
        path = newest_state(self.folder)
        if path is None and (damaged := damaged_states(self.folder)):
            raise CheckpointError(f"{damaged[-1]} is damaged and there is no whole state; remove it to start again")
        if path is not None:
            self.step, state = load_state(path, self.outline())
        self._agree_on_step()
        if path is None:
            return False
        self.restore(state)
        return True

    def _agree_on_step(self) -> None:
        PULSE.beat()
        step = mx.array(self.step)
        low, high = (f(step, group=self.world).item() for f in (mx.distributed.all_min, mx.distributed.all_max))
        if low != high:
            raise DisagreementError(
                f"the processes found states of different steps ({low} and {high}) in {self.folder}; "
                "copy the folder of the first process to every machine"
            )

    def save(self) -> None:
        """Writes the state of this moment, in the first process."""
        state = self.state()
        if self.is_first:
            save_state(self.folder, self.step, state, self.config.keep)

    def fit(
        self,
        batch_at: Callable[[int], Batch],
        evaluate: Any = None,
        report: Callable[[Row], None] = lambda row: None,
        saving: Callable[[int], None] = lambda step: None,
        visit: Callable[[int], bool] = lambda step: False,
    ) -> None:
        """Runs from the current step to the last.

        SIGINT or SIGTERM, in any of the processes, lets the step end, writes a state and raises KeyboardInterrupt. A
        loss that is not finite, or spikes, stops with the states of before kept.

        Args:
            batch_at: batch number i; the same number must give the same batch.
            evaluate: for `measured`, every `eval_every` steps and at the end.
            report: gets each row that goes to the log.
            saving: called with the step in the first process, before its state is written.
            visit: called after every step in the first process; True: it took time, which the log's rates leave out.
        """
        config, clock, stop, unread = self.config, _Clock(self.step), None, None
        self._trim_log()
        with _Signals() as signals:
            while self.step < config.steps:
                numbers = self.advance(batch_at)
                stop, stop_before = self._share(signals.asked), stop
                mx.async_eval(numbers, self.arrays(), stop)
                if unread is not None:
                    self.checked(unread, self.step - 1)  # a step behind: nobody waits for the one under way
                self.step, unread = self.step + 1, numbers
                stopping = self._agreed(signals.asked, stop_before)
                if self._due(config.report_every) or self._due(config.save_every) or stopping:
                    row, unread = self.checked(numbers, self.step - 1), None
                    if self._due(config.report_every):
                        self._log({**row, **self._pace(clock)}, report)
                with PULSE.taking():  # others wait, however long it takes
                    if evaluate and self._due(config.eval_every) and self.is_first:
                        self._log(self.measured(evaluate), report)
                        clock = _Clock(self.step)
                    if self.is_first and visit(self.step):
                        clock = _Clock(self.step)
                    if self._due(config.save_every) or stopping:
                        if self.is_first:
                            saving(self.step)
                        self.save()
                if stopping:
                    part(self.world)
                    raise StoppedTogether
        part(self.world)

    def _pace(self, clock: _Clock) -> Row:
        rate, facts = clock.rate(self.step), self.facts()
        clips = rate * facts.pop("clips_a_step")
        return {**facts, "steps_per_s": rate, "clips_per_s": clips, "peak_gib": mx.get_peak_memory() / 2**30}

    def _share(self, asked: bool) -> mx.array:
        PULSE.beat()
        wish = mx.array(int(asked))
        if self.world.size() > 1:  # after what the step exchanges: all processes must exchange in one order
            (wish,) = mx.depends([wish], list(flat(self.arrays()).values()))
        return mx.distributed.all_sum(wish, group=self.world)

    def _agreed(self, asked: bool, stop: mx.array | None) -> bool:
        # Alone, one's own wish counts. Together all must stop at the same step or wait for each other for ever: they
        # go by what they told each other a step ago, which is there without waiting.
        if self.world.size() == 1:
            return asked
        return stop is not None and number(stop) > 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.world.rank() == 0

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _trim_log(self) -> None:
        """Drops what the log says of steps that will be done again, and a line that was cut short."""
        path = self.folder / "log.jsonl"
        if not self.is_first or not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        partial_log = path.with_name(".log.jsonl.partial")
        partial_log.write_text("".join(kept))
        partial_log.replace(path)

    def _log(self, row: Row, report: Callable[[Row], None]) -> None:
        if not self.is_first:
            return
        row = {"step": self.step, **row}
        path = self.folder / "log.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise WanError(f"{path}: cannot be written ({error.strerror}); go on with --resume") from None
        report(row)
