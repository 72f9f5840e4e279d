"""Both experts of a model in one run: turn by turn, each trained exactly as in a run of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_wan.training.adapt import frozen
from mlx_wan.training.loop import Batch, Loop, Numbers, Row
from mlx_wan.training.trainer import TrainConfig, Trainer


class Turns:
    """Whose turn a step is: `every` steps of the first, as many of the second, and so on."""

    def __init__(self, names: tuple[str, ...], every: int):
        self.names, self.every = names, every

    def at(self, step: int) -> str:
        """Who makes a step."""
        return self.names[step // self.every % len(self.names)]

    def made(self, name: str, step: int) -> int:
        """How many of the steps before `step` were `name`'s."""
        rounds, rest = divmod(step, self.every * len(self.names))
        return rounds * self.every + min(max(rest - self.names.index(name) * self.every, 0), self.every)


class Joint(Loop):
    """Trainers that take turns at the steps of one run, with one log and one state.

    Args:
        trainers: by name, each configured for its own share of the steps.
        config: of the run: its steps, and how often things happen.
        folder: of the run; those of the trainers are not written to.
        turns: whose a step is.
        fetch: fills the frozen weights of a trainer's model when its turn comes; they are let go of when it ends. Those
            of the first are there already, and no others. None: all are, and stay.
    """

    def __init__(
        self,
        trainers: dict[str, Trainer],
        config: TrainConfig,
        folder: Path,
        turns: Turns,
        fetch: Callable[[str, nn.Module], None] | None = None,
    ):
        super().__init__(config, folder)
        self.trainers, self.turns, self._fetch = trainers, turns, fetch
        self._rows: dict[str, Row] = {}
        self._there = set(turns.names[:1] if fetch else turns.names)

    def enter(self, name: str) -> Trainer:
        """The trainer, its model's weights in memory."""
        if name not in self._there:
            assert self._fetch is not None
            for other in self._there:
                let_go(self.trainers[other].model)
            mx.clear_cache()
            self._fetch(name, self.trainers[name].model)
            self._there = {name}
        return self.trainers[name]

    def advance(self, batch_at: Callable[[int], Batch]) -> Numbers:
        name = self.turns.at(self.step)
        trainer = self.enter(name)
        trainer.step = self.turns.made(name, self.step)
        return trainer.advance(batch_at)

    def arrays(self) -> list[Any]:
        trainers = [self.trainers[name] for name in sorted(self._there)]
        return [trainer.arrays() for trainer in trainers]

    def checked(self, numbers: Numbers, step: int) -> Row:
        """The newest numbers of each, by names such as loss_high."""
        name = self.turns.at(step)
        row = self.trainers[name].checked(numbers, self.turns.made(name, step), called=step + 1)
        self._rows[name] = {f"{key}_{name}": value for key, value in row.items()}
        return {key: value for name in self.turns.names for key, value in self._rows.get(name, {}).items()}

    def measured(self, evaluate: dict[str, Callable[[nn.Module], tuple[Row, float]]]) -> Row:
        """What each says of its own, in one row; "val_loss" is the mean. evaluate: name -> model -> (row, weight)."""
        total, row = 0.0, {}
        for name in reversed(self.turns.names):  # the lower levels first
            found, weight = self.enter(name).with_averaged_weights(evaluate[name])
            total += weight * found.pop("val_loss")
            row |= found
        return {"val_loss": total, **row}

    def with_averaged_weights(self, function: Callable[[Callable[[str], nn.Module]], Any]) -> Any:
        """function(name -> model) while the models hold the moving averages of their weights."""
        before = {name: trainer.model.trainable_parameters() for name, trainer in self.trainers.items()}
        for trainer in self.trainers.values():
            trainer.model.update(trainer.ema["weights"])
        try:
            return function(lambda name: self.enter(name).model)
        finally:
            for name, trainer in self.trainers.items():
                trainer.model.update(before[name])

    def facts(self) -> Row:
        return self.trainers[self.turns.at(max(0, self.step - 1))].facts()

    def state(self) -> dict[str, Any]:
        return {name: self.trainers[name].state() for name in sorted(self.trainers)}

    def outline(self) -> dict[str, Any]:
        return {name: self.trainers[name].outline() for name in sorted(self.trainers)}

    def restore(self, state: dict[str, Any]) -> None:
        for name, trainer in self.trainers.items():
            trainer.restore(state[name])


def let_go(model: nn.Module) -> None:
    """Puts what takes no memory in the place of the frozen weights: arrays of their kind that nobody has asked for."""
    model.load_weights([(name, mx.zeros(a.shape, a.dtype)) for name, a in frozen(model).items()], strict=False)
