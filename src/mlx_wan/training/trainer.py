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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map, tree_map_with_path

from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.training.checkpoint import damaged_states, load_state, newest_state, save_state

Batch = dict[str, mx.array]
Loss = Callable[[nn.Module, Batch, mx.array], tuple[mx.array, dict[str, mx.array]]]

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    steps: optimizer steps in all. learning_rate: after `warmup_steps` of linear rise; a cosine takes it to zero at
    `steps`. optimizer: "adamw", or "muon" for matrices with AdamW for the rest. grad_clip: largest gradient norm.
    ema_decay: of the exponential moving average of the weights, which is what gets exported. compute_dtype: of
    weights and activations inside the loss. *_every: in steps. keep: how many states stay on disk.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
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

    def __post_init__(self) -> None:
        if self.compute_dtype not in _DTYPES:
            raise UserError(f"compute_dtype is {self.compute_dtype!r}; choose one of {', '.join(_DTYPES)}")
        if self.optimizer not in ("adamw", "muon"):
            raise UserError(f"optimizer is {self.optimizer!r}; choose adamw or muon")
        for name in ("steps", "batch_size", "report_every", "eval_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "muon_learning_rate", "grad_clip"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("warmup_steps", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1")

    @property
    def dtype(self) -> mx.Dtype:
        return _DTYPES[self.compute_dtype]


def warmup_cosine(peak: float, warmup: int, steps: int) -> Callable[[mx.array], mx.array]:
    """Learning rate of a step: rises linearly to `peak`, then falls to 0 along a cosine."""
    decay = optim.cosine_decay(peak, max(1, steps - warmup), 0.0)
    if warmup == 0:
        return decay
    return optim.join_schedules([optim.linear_schedule(peak / warmup, peak, warmup), decay], [warmup])


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """AdamW with bias correction (MLX leaves it off by default), alone or for what Muon does not take."""
    adamw = optim.AdamW(
        warmup_cosine(config.learning_rate, config.warmup_steps, config.steps),
        betas=[0.9, config.beta2],
        weight_decay=config.weight_decay,
        bias_correction=True,
    )
    if config.optimizer == "adamw":
        return adamw
    muon = optim.Muon(
        warmup_cosine(config.muon_learning_rate, config.warmup_steps, config.steps), weight_decay=config.weight_decay
    )
    return optim.MultiOptimizer([muon, adamw], [_is_hidden_matrix])


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
    """

    def __init__(self, model: nn.Module, loss: Loss, config: TrainConfig, folder: Path, float32: tuple[str, ...] = ()):
        self.model, self.config, self.folder = model, config, folder
        self.world = mx.distributed.init()
        self.optimizer = make_optimizer(config)
        self.optimizer.init(model.trainable_parameters())
        self.ema = {"weights": tree_map(lambda a: a + 0, model.trainable_parameters())}
        self.step = 0
        self._value_and_grad = nn.value_and_grad(model, in_compute_dtype(loss, config.dtype, float32))
        mx.eval(self._arrays())
        self._update = self._compiled_step()

    def _arrays(self) -> list[Any]:
        return [self.model.state, self.optimizer.state, self.ema]

    def _compiled_step(self) -> Callable[[Batch, mx.array], dict[str, mx.array]]:
        if not self.config.compile:
            return self._step
        arrays = self._arrays()
        return partial(mx.compile, inputs=arrays, outputs=arrays)(self._step)

    def _step(self, batch: Batch, key: mx.array) -> dict[str, mx.array]:
        (loss, parts), grads = self._value_and_grad(self.model, batch, key)
        grads = nn.average_gradients(grads, self.world)
        grads, norm = optim.clip_grad_norm(grads, self.config.grad_clip)
        self.optimizer.update(self.model, grads)
        decay = self.config.ema_decay
        self.ema["weights"] = tree_map(
            lambda e, w: decay * e + (1 - decay) * w, self.ema["weights"], self.model.trainable_parameters()
        )
        return {"loss": loss, "grad_norm": norm, **parts}

    def state(self) -> dict[str, Any]:
        """All that a later run needs to go on."""
        return {
            "model": self.model.trainable_parameters(),
            "optimizer": self.optimizer.state,
            "ema": self.ema["weights"],
        }

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
        self.ema["weights"] = state["ema"]
        # The compiled step holds on to the trees it was made with: make it again over the loaded ones.
        self._update = self._compiled_step()
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
    ) -> None:
        """Runs from the current step to the last.

        batch_at: batch number i; the same number must give the same batch. evaluate: numbers of the averaged model,
        every `eval_every` steps and at the end. report: gets each row that goes to the log. SIGINT or SIGTERM, in
        any of the processes, lets the step end, writes a state and raises KeyboardInterrupt. A loss that is not
        finite stops with the states of before kept.
        """
        config, clock, stop = self.config, _Clock(self.step), None
        self._trim_log()
        with _Signals() as signals:
            while self.step < config.steps:
                index = self.step * self.world.size() + self.world.rank()
                numbers = self._update(batch_at(index), mx.random.key(config.seed * 1_000_003 + index))
                stop, stop_before = self._share(signals.asked), stop
                mx.async_eval(numbers, self._arrays(), stop)
                self.step += 1
                if self._due(config.report_every):
                    row = self._finite(numbers)
                    rate = clock.rate(self.step)
                    self._log({**row, "steps_per_s": rate, "peak_gib": mx.get_peak_memory() / 2**30}, report)
                if evaluate and self._due(config.eval_every) and self.is_first:
                    self._log(self.with_averaged_weights(evaluate), report)
                    clock = _Clock(self.step)
                stopping = self._agreed(signals.asked, stop_before)
                if self._due(config.save_every) or stopping:
                    self._finite(numbers)
                    self.save()
                if stopping:
                    raise KeyboardInterrupt

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

    def with_averaged_weights(self, function: Callable[[nn.Module], Any]) -> Any:
        """function(model) while the model holds the moving average of its weights."""
        weights = self.model.trainable_parameters()
        self.model.update(self.ema["weights"])
        try:
            return function(self.model)
        finally:
            self.model.update(weights)

    def _finite(self, numbers: Mapping[str, mx.array]) -> dict[str, float]:
        """The numbers of a step; WanError if one is not finite: then the weights are not either."""
        row = {name: _number(value) for name, value in numbers.items()}
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            last = newest_state(self.folder)
            raise WanError(
                f"{bad[0]} is {row[bad[0]]} at step {self.step}: training stopped; the last good state is "
                f"{last or 'none'}; lower the learning rate or use compute_dtype float32"
            )
        return row

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
