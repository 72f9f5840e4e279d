"""The training loop: a loss and batches in, a trained model, its states on disk and a log of numbers out.

Weights, gradients and optimizer are float32; the loss sees weights cast to the compute dtype. Batch and random key of
a step follow from the seed and the step alone, so a run that was interrupted goes on exactly as if it had not been.
Under `mlx.launch -n N` every process takes its own batches, gradients are averaged, and the first process writes.
"""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_map_with_path

from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.training.checkpoint import damaged_states, load_state, newest_state, save_state
from mlx_wan.training.muon import BatchedMuon

Batch = dict[str, mx.array]
Numbers = dict[str, mx.array]
# (model, batch, key) -> loss, and named numbers for the log; an array (B,) among them holds the loss of each clip.
Loss = Callable[[nn.Module, Batch, mx.array], tuple[mx.array, Numbers]]
SPIKE_AFTER = 20  # steps, before which there is no telling what a spike is

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    steps: optimizer steps in all. batch_size: clips of a batch; `grad_accumulation_steps` batches make a step.
    learning_rate: after `warmup_steps` of linear rise; `schedule` says what follows until `steps`. optimizer: a key of
    OPTIMIZERS. grad_clip: largest gradient norm. ema_decay: of the exponential moving average of the weights, which is
    what gets exported; it is smaller in the first steps, whose weights would linger otherwise; 0 exports the weights
    themselves. compute_dtype: of weights and activations inside the loss. *_every: in steps. keep: how many states stay
    on disk. compile: the whole step; compile_update: without it, at least what follows the gradients. spike_factor: a
    loss of so many times the running mean stops the run; 0 lets it pass.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    schedule: str = "cosine"
    grad_accumulation_steps: int = 1
    optimizer: str = "adamw"
    muon_learning_rate: float = 0.02
    weight_decay: float = 0.01
    beta2: float = 0.99
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    compute_dtype: str = "float32"
    report_every: int = 50
    eval_every: int = 500
    save_every: int = 1000
    keep: int = 2
    compile: bool = True
    compile_update: bool = False
    spike_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.compute_dtype not in DTYPES:
            raise UserError(f"compute_dtype is {self.compute_dtype!r}; choose one of {', '.join(DTYPES)}")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        counts = ("steps", "batch_size", "grad_accumulation_steps", "report_every", "eval_every", "save_every", "keep")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "muon_learning_rate", "grad_clip"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("warmup_steps", "weight_decay", "seed", "spike_factor"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1")

    @property
    def dtype(self) -> mx.Dtype:
        return DTYPES[self.compute_dtype]


# What follows the warm-up: (peak, steps) -> learning rate.
SCHEDULES: dict[str, Callable[[float, int], Callable[[mx.array], mx.array]]] = {
    "cosine": lambda peak, steps: optim.cosine_decay(peak, steps, 0.0),
    "linear": lambda peak, steps: optim.linear_schedule(peak, 0.0, steps),
    "constant": lambda peak, steps: lambda step: mx.array(peak),
}


def learning_rates(peak: float, warmup: int, steps: int, schedule: str) -> Callable[[mx.array], mx.array]:
    """Learning rate of a step: rises linearly to `peak`, then falls to 0 at `steps`, or stays."""
    after = SCHEDULES[schedule](peak, max(1, steps - warmup))
    if warmup == 0:
        return after
    return optim.join_schedules([optim.linear_schedule(peak / warmup, peak, warmup), after], [warmup])


Rate = Callable[[mx.array], mx.array]


def _adamw(rate: Rate, config: TrainConfig) -> optim.Optimizer:
    # With bias correction, which MLX leaves off by default.
    betas = [0.9, config.beta2]
    return optim.AdamW(rate, betas=betas, weight_decay=config.weight_decay, bias_correction=True)


def _muon(rate: Rate, config: TrainConfig) -> optim.Optimizer:
    peak = config.muon_learning_rate
    muon = BatchedMuon(_rates(peak, config), weight_decay=config.weight_decay)
    return optim.MultiOptimizer([muon, _adamw(rate, config)], [_is_hidden_matrix])


OPTIMIZERS: dict[str, Callable[[Rate, TrainConfig], optim.Optimizer]] = {
    "adamw": _adamw,
    "adam": lambda rate, config: optim.Adam(rate, betas=[0.9, config.beta2], bias_correction=True),
    "muon": _muon,  # for matrices, with AdamW for what it does not take
    "lion": lambda rate, config: optim.Lion(rate, weight_decay=config.weight_decay),
    "adafactor": lambda rate, config: optim.Adafactor(
        rate, scale_parameter=False, relative_step=False, weight_decay=config.weight_decay
    ),
    "sgd": lambda rate, config: optim.SGD(rate, weight_decay=config.weight_decay),
}


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """The optimizer that `config` names, with its schedule."""
    return OPTIMIZERS[config.optimizer](_rates(config.learning_rate, config), config)


def _rates(peak: float, config: TrainConfig) -> Rate:
    return learning_rates(peak, config.warmup_steps, config.steps, config.schedule)


def _is_hidden_matrix(name: str, weight: mx.array) -> bool:
    # Muon orthogonalises the update of matrices and kernels inside the blocks. Embeddings, modulation, first and last
    # layers, norms and biases are AdamW's.
    inside = any(part in name for part in ("blocks.", "downsamples.", "middle.", "upsamples."))
    return inside and weight.ndim >= 2 and "embedding" not in name and "modulation" not in name


def in_compute_dtype(loss: Loss, dtype: mx.Dtype, float32: tuple[str, ...]) -> Loss:
    """`loss` with the model's weights cast to `dtype` meanwhile, except those whose name has a part of `float32`.

    The casts are part of the graph, so gradients reach the float32 weights as float32.
    """
    if dtype == mx.float32:
        return loss

    def cast(name: str, weight: mx.array) -> mx.array:
        return weight if any(part in name for part in float32) else weight.astype(dtype)

    def wrapped(model: nn.Module, batch: Batch, key: mx.array):
        masters = model.trainable_parameters()
        model.update(tree_map_with_path(cast, masters))
        try:
            return loss(model, batch, key)
        finally:
            model.update(masters)

    return wrapped


def _steps_of(optimizer: optim.Optimizer) -> mx.array:
    """How many updates it has made; all parts of a MultiOptimizer make them together."""
    return optimizer.optimizers[0].step if isinstance(optimizer, optim.MultiOptimizer) else optimizer.step


def _number(array: mx.array) -> float:
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


class Trainer:
    """Trains `model` in place.

    Args:
        model: float32 weights.
        loss: (model, batch, key) -> (scalar, {name: scalar}); pure in its arrays.
        config: how.
        folder: where states and `log.jsonl` go.
        float32: parts of names of parameters that the compute dtype leaves alone.
        names: batch number -> what its clips are called, for messages.

    Frozen parameters of the model are left alone, in whatever type they are, and are no part of a state.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        config: TrainConfig,
        folder: Path,
        float32: tuple[str, ...] = (),
        names: Callable[[int], Sequence[str]] = lambda index: (),
    ):
        self.model, self.config, self.folder, self._names = model, config, folder, names
        self.world = mx.distributed.init()
        self.optimizer = make_optimizer(config)
        self.optimizer.init(model.trainable_parameters())
        self.ema = {"weights": self._average(None)}
        self.step, self._mean_loss, self._seen = 0, 0.0, 0
        self._value_and_grad = nn.value_and_grad(model, in_compute_dtype(loss, config.dtype, float32))
        mx.eval(self._arrays())
        self._make_steps()

    def _arrays(self) -> list[Any]:
        return [self.model.state, self.optimizer.state, self.ema]

    def _make_steps(self) -> None:
        """The parts of a step, compiled over the trees of arrays as they are now."""
        arrays, whole = self._arrays(), self.config.compile

        def compiled(function: Callable, wanted: bool) -> Callable:
            return mx.compile(function, arrays, arrays) if wanted else function

        self._add_gradients = compiled(self._accumulate, whole)
        self._apply = compiled(self._move, whole or self.config.compile_update)
        self._whole_step = compiled(self._step, whole)

    def _step(self, batch: Batch, key: mx.array) -> Numbers:
        (loss, parts), grads = self._value_and_grad(self.model, batch, key)
        return {"loss": loss, "grad_norm": self._apply(grads), **parts}

    def _accumulate(self, batch: Batch, key: mx.array, sums: Any) -> tuple[Numbers, Any]:
        (loss, parts), grads = self._value_and_grad(self.model, batch, key)
        share = 1 / self.config.grad_accumulation_steps
        return {"loss": loss, **parts}, tree_map(lambda s, g: s + share * g, sums, grads)

    def _move(self, grads: Any) -> mx.array:
        """Changes weights, optimizer and average by the gradients; returns their norm before clipping."""
        grads = nn.average_gradients(grads, self.world)
        grads, norm = optim.clip_grad_norm(grads, self.config.grad_clip)
        self.optimizer.update(self.model, grads)
        self.ema["weights"] = self._average(self.ema["weights"])
        return norm

    def _average(self, before: Any) -> Any:
        weights, decay = self.model.trainable_parameters(), self.config.ema_decay
        if decay == 0:
            return weights
        if before is None:
            return tree_map(lambda a: a + 0, weights)
        steps = _steps_of(self.optimizer).astype(mx.float32)
        decay = mx.minimum(decay, steps / (steps + 9))
        return tree_map(lambda e, w: decay * e + (1 - decay) * w, before, weights)

    def advance(self, batch_at: Callable[[int], Batch]) -> Numbers:
        """One step from as many batches as it takes; its numbers, means over the batches, not evaluated yet.

        `fit` does this and all around it.
        """
        batches = self._batches(self.step)
        keys = [mx.random.key(self.config.seed * 1_000_003 + index) for index in batches]
        if len(batches) == 1:
            return self._whole_step(batch_at(batches[0]), keys[0])
        sums = tree_map(mx.zeros_like, self.model.trainable_parameters())
        rows = []
        for index, key in zip(batches, keys, strict=True):
            row, sums = self._add_gradients(batch_at(index), key, sums)
            mx.eval(row, sums)  # one batch's activations in memory at a time
            rows.append(row)
        joined = {name: [row[name] for row in rows] for name in rows[0]}
        numbers = {name: mx.concatenate(v) if v[0].ndim else mx.stack(v).mean() for name, v in joined.items()}
        return {**numbers, "grad_norm": self._apply(sums)}

    def _batches(self, step: int) -> list[int]:
        """Numbers of the batches that this process takes for a step."""
        count = self.config.grad_accumulation_steps
        return [(step * count + i) * self.world.size() + self.world.rank() for i in range(count)]

    def state(self) -> dict[str, Any]:
        """All that a later run needs to go on."""
        state = {"model": self.model.trainable_parameters(), "optimizer": self.optimizer.state}
        return state | ({"ema": self.ema["weights"]} if self.config.ema_decay else {})

    def resume(self) -> bool:
        """Takes up the newest whole state in the folder; False if there is none at all.

        CheckpointError if there are only damaged ones, or if it is of another configuration. UserError if other
        processes found another state.
        """
        path = newest_state(self.folder)
        if path is None and (damaged := damaged_states(self.folder)):
            raise CheckpointError(f"{damaged[-1]} is damaged and there is no whole state; remove it to start again")
        if path is not None:
            self.step, state = load_state(path, self.state())
        self._agree_on_step()
        if path is None:
            return False
        self.model.update(state["model"])
        self.optimizer.state = state["optimizer"]
        self.ema["weights"] = state["ema"] if self.config.ema_decay else self.model.trainable_parameters()
        self._make_steps()  # the ones before hold on to the trees they were made with
        return True

    def _agree_on_step(self) -> None:
        step = mx.array(self.step)
        low, high = (f(step, group=self.world).item() for f in (mx.distributed.all_min, mx.distributed.all_max))
        if low != high:
            raise UserError(
                f"the processes found states of different steps ({low} and {high}) in {self.folder}; "
                "copy the folder of the first process to every machine"
            )

    def save(self) -> None:
        """Writes the state of this moment, in the first process."""
        if self.is_first:
            save_state(self.folder, self.step, self.state(), self.config.keep)

    def fit(
        self,
        batch_at: Callable[[int], Batch],
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        report: Callable[[dict[str, float]], None] = lambda row: None,
        saving: Callable[[int], None] = lambda step: None,
        visit: Callable[[int], bool] = lambda step: False,
    ) -> None:
        """Runs from the current step to the last.

        SIGINT or SIGTERM, in any of the processes, lets the step end, writes a state and raises KeyboardInterrupt. A
        loss that is not finite, or spikes, stops with the states of before kept.

        Args:
            batch_at: batch number i; the same number must give the same batch.
            evaluate: numbers of the averaged model, every `eval_every` steps and at the end.
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
                mx.async_eval(numbers, self._arrays(), stop)
                if unread is not None:
                    self._checked(unread)  # a step behind: nobody waits for the one under way
                self.step, unread = self.step + 1, numbers
                stopping = self._agreed(signals.asked, stop_before)
                if self._due(config.report_every) or self._due(config.save_every) or stopping:
                    row, unread = self._checked(numbers), None
                    if self._due(config.report_every):
                        self._log({**row, **self._pace(clock)}, report)
                if evaluate and self._due(config.eval_every) and self.is_first:
                    self._log(self.with_averaged_weights(evaluate), report)
                    clock = _Clock(self.step)
                if self.is_first and visit(self.step):
                    clock = _Clock(self.step)
                if self._due(config.save_every) or stopping:
                    if self.is_first:
                        saving(self.step)
                    self.save()
                if stopping:
                    raise KeyboardInterrupt

    def _pace(self, clock: "_Clock") -> dict[str, float]:
        rate, config = clock.rate(self.step), self.config
        return {
            "learning_rate": _number(self.optimizer.learning_rate),
            "steps_per_s": rate,
            "clips_per_s": rate * config.batch_size * config.grad_accumulation_steps * self.world.size(),
            "peak_gib": mx.get_peak_memory() / 2**30,
        }

    def _share(self, asked: bool) -> mx.array:
        return mx.distributed.all_sum(mx.array(int(asked)), group=self.world)

    def _agreed(self, asked: bool, stop: mx.array | None) -> bool:
        # Alone, one's own wish counts. Together all must stop at the same step or wait for each other for ever: they
        # go by what they told each other a step ago, which is there without waiting.
        if self.world.size() == 1:
            return asked
        return stop is not None and _number(stop) > 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.world.rank() == 0

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def with_averaged_weights(self, function: Callable[[Any], Any]) -> Any:
        """function(model) while the model holds the moving average of its weights."""
        weights = self.model.trainable_parameters()
        self.model.update(self.ema["weights"])
        try:
            return function(self.model)
        finally:
            self.model.update(weights)

    def _checked(self, numbers: Numbers) -> dict[str, float]:
        """The numbers of the step before `self.step`; WanError if one is not finite or the loss spikes.

        Not finite: then the weights are not either. Values of single clips are for the message alone.
        """
        row = {name: _number(value) for name, value in numbers.items() if value.ndim == 0}
        clips = next((np.array(value) for value in numbers.values() if value.ndim), np.zeros(0))
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            self._stop(f"{bad[0]} is {row[bad[0]]}", ~np.isfinite(clips), "use compute_dtype float32")
        loss, limit = row["loss"], self.config.spike_factor * self._mean_loss
        if self._seen >= SPIKE_AFTER and 0 < limit < loss:
            what = f"loss is {loss:.4g}, and was {self._mean_loss:.4g} on average"
            self._stop(what, clips == clips.max(initial=0.0), "raise spike_factor")
        self._seen += 1
        self._mean_loss += (loss - self._mean_loss) * max(0.02, 1 / self._seen)
        return row

    def _stop(self, what: str, guilty: np.ndarray, other: str) -> NoReturn:
        names = [name for index in self._batches(self.step - 1) for name in self._names(index)]
        if guilty.any() and len(guilty) == len(names):
            names = [name for name, at_fault in zip(names, guilty, strict=True) if at_fault]
        where = f" (at {'; '.join(names[:4])})" if names else ""
        raise WanError(
            f"{what} at step {self.step}{where}: training stopped; the last good state is "
            f"{newest_state(self.folder) or 'none'}; lower the learning rate or {other}"
        )

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

    def _log(self, row: dict[str, float], report: Callable[[dict[str, float]], None]) -> None:
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
