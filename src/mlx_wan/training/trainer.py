"""The training loop: a loss and batches in, a trained model, its states on disk and a log of numbers out.

Weights, gradients and optimizer are float32; the loss sees weights cast to the compute dtype. Batch and random key of
a step follow from the seed and the step alone, so a run that was interrupted goes on exactly as if it had not been.
Under `mlx.launch -n N` every process takes its own batches, gradients are averaged, and the first process writes. How
many batches make a step is the run's, whatever the number of processes that go on with it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_map_with_path

from mlx_wan.errors import UserError, WanError
from mlx_wan.training.checkpoint import newest_state
from mlx_wan.training.loop import Batch, Loop, Numbers, Row, number
from mlx_wan.training.muon import BatchedMuon
from mlx_wan.training.shares import Shares
from mlx_wan.weights.whole import flat

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
    on disk. compile: the whole step; compile_update: without it, at least what follows the gradients. shard_optimizer:
    of several processes each keeps the optimizer's state of its share of the weights alone. spike_factor: a loss of so
    many times the running mean stops the run; 0 lets it pass.
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
    shard_optimizer: bool = False
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
    # layers, norms and biases are AdamW's. So is all of the text encoder: its attention scores are neither scaled nor
    # normalised, and updates that are large whatever the gradient grow them until each token attends to a single one.
    inside = any(part in name for part in ("blocks.", "downsamples.", "middle.", "upsamples."))
    inside = inside and not name.startswith("text_encoder.")
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


class Trainer(Loop):
    """Trains `model` in place.

    Args:
        model: float32 weights.
        loss: (model, batch, key) -> (scalar, {name: scalar}); pure in its arrays.
        config: how.
        folder: where states and `log.jsonl` go.
        float32: parts of names of parameters that the compute dtype leaves alone.
        names: batch number -> what its clips are called, for messages.
        processes: with how many the run was begun; each had `grad_accumulation_steps` batches a step. Now there may be
            fewer or more, up to one a batch; None: as many as there are.

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
        processes: int | None = None,
    ):
        super().__init__(config, folder)
        self.model, self._names = model, names
        self.batches_a_step = config.grad_accumulation_steps * (processes or self.world.size())
        if self.world.size() > self.batches_a_step:
            raise UserError(
                f"a step of this run has {self.batches_a_step} batches, too few for {self.world.size()} processes; "
                f"go on with {self.batches_a_step} or fewer"
            )
        self.optimizer = make_optimizer(config)
        weights = model.trainable_parameters()
        shared = config.shard_optimizer and self.world.size() > 1
        self.shares = Shares(weights, self.world) if shared else None
        self.optimizer.init(self.shares.of(weights) if self.shares else weights)
        self.ema = {"weights": self._average(None)}
        self._mean_loss, self._seen = 0.0, 0
        self._value_and_grad = nn.value_and_grad(model, in_compute_dtype(loss, config.dtype, float32))
        mx.eval(self.arrays())
        self._make_steps()

    def arrays(self) -> list[Any]:
        return [self.model.state, self.optimizer.state, self.ema]

    def _make_steps(self) -> None:
        """The parts of a step, compiled over the trees of arrays as they are now."""
        arrays, whole = self.arrays(), self.config.compile

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
        share = self.world.size() / self.batches_a_step  # processes are averaged over afterwards
        return {"loss": loss, **parts}, tree_map(lambda s, g: s + share * g, sums, grads)

    def _move(self, grads: Any) -> mx.array:
        """Changes weights, optimizer and average by the gradients; returns their norm before clipping."""
        grads = nn.average_gradients(grads, self.world)
        grads, norm = optim.clip_grad_norm(grads, self.config.grad_clip)
        if self.shares is None:
            self.optimizer.update(self.model, grads)
            self.ema["weights"] = self._average(self.ema["weights"])
        else:
            self.optimizer.update(self.model, self.shares.of(grads))  # the rest follows in `_exchange`
        return norm

    def _exchange(self, numbers: Numbers) -> Numbers:
        """What a step still has to do where the optimizer is shared out."""
        if self.shares is not None:
            if self.config.ema_decay == 0:
                self.ema["weights"] = {}  # which are the weights of before
            mx.eval(numbers, self.arrays())  # gradients leave memory
            self.shares.exchange(self.model)
            self.ema["weights"] = self._average(self.ema["weights"])
        return numbers

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
        batches = self._batches(self.step)
        keys = [mx.random.key(self.config.seed * 1_000_003 + index) for index in batches]
        if self.batches_a_step == self.world.size():
            return self._exchange(self._whole_step(batch_at(batches[0]), keys[0]))
        sums = tree_map(mx.zeros_like, self.model.trainable_parameters())
        rows = []
        for index, key in zip(batches, keys, strict=True):
            row, sums = self._add_gradients(batch_at(index), key, sums)
            mx.eval(row, sums)  # one batch's activations in memory at a time
            rows.append(row)
        joined = {name: [row[name] for row in rows] for name in rows[0]}
        numbers = {name: mx.concatenate(v) if v[0].ndim else mx.stack(v).mean() for name, v in joined.items()}
        norm = self._apply(sums)
        del sums
        return self._exchange({**numbers, "grad_norm": norm})

    def _batches(self, step: int) -> list[int]:
        """Numbers of the batches that this process takes for a step."""
        count = self.batches_a_step
        return list(range(step * count + self.world.rank(), (step + 1) * count, self.world.size()))

    def checked(self, numbers: Numbers, step: int, called: int | None = None) -> Row:
        """As in `Loop`; values of single clips are for the message alone. called: the step's number in it, from 1."""
        row = {name: number(value) for name, value in numbers.items() if value.ndim == 0}
        clips = next((np.array(value) for value in numbers.values() if value.ndim), np.zeros(0))
        where = step, step + 1 if called is None else called
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            self._stop(f"{bad[0]} is {row[bad[0]]}", *where, ~np.isfinite(clips), "compute in float32")
        loss, limit = row["loss"], self.config.spike_factor * self._mean_loss
        if self._seen >= SPIKE_AFTER and 0 < limit < loss:
            what = f"loss is {loss:.4g}, and was {self._mean_loss:.4g} on average"
            self._stop(what, *where, clips == clips.max(initial=0.0), "raise spike_factor")
        self._seen += 1
        self._mean_loss += (loss - self._mean_loss) * max(0.02, 1 / self._seen)
        return row

    def _stop(self, what: str, step: int, called: int, guilty: np.ndarray, other: str) -> NoReturn:
        names = [name for index in self._batches(step) for name in self._names(index)]
        if guilty.any() and len(guilty) == len(names):
            names = [name for name, at_fault in zip(names, guilty, strict=True) if at_fault]
        where = f" (at {'; '.join(names[:4])})" if names else ""
        raise WanError(
            f"{what} at step {called}{where}: training stopped; the last good state is "
            f"{newest_state(self.folder) or 'none'}; lower the learning rate or {other}"
        )

    def measured(self, evaluate: Callable[[nn.Module], Row]) -> Row:
        return self.with_averaged_weights(evaluate)

    def facts(self) -> Row:
        clips = self.config.batch_size * self.batches_a_step
        return {"learning_rate": number(self.optimizer.learning_rate), "clips_a_step": clips}

    def state(self) -> dict[str, Any]:
        return self._state(self._optimizer_state())

    def outline(self) -> dict[str, Any]:
        return self._state(self._whole_optimizer().state if self.shares else self.optimizer.state)

    def _state(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        state = {"model": self.model.trainable_parameters(), "optimizer": optimizer}
        return state | ({"ema": self.ema["weights"]} if self.config.ema_decay else {})

    def _whole_optimizer(self) -> optim.Optimizer:
        """One with the state of all weights, never evaluated."""
        whole = make_optimizer(self.config)
        whole.init(self.model.trainable_parameters())
        return whole

    def _optimizer_state(self) -> dict[str, Any]:
        if self.shares is None:
            return self.optimizer.state
        nothing = make_optimizer(self.config)
        nothing.init({})
        return self.shares.joined(self.optimizer.state, self._whole_optimizer().state, flat(nothing.state))

    def restore(self, state: dict[str, Any]) -> None:
        self.model.update(state["model"])
        arrays = flat(state["optimizer"])  # of which a share may be enough
        self.optimizer.state = tree_map_with_path(lambda name, _: arrays[name], self.optimizer.state)
        self.ema["weights"] = state["ema"] if self.config.ema_decay else self.model.trainable_parameters()
        mx.eval(self.arrays())
        self._make_steps()  # the ones before hold on to the trees they were made with

    def with_averaged_weights(self, function: Callable[[Any], Any]) -> Any:
        """function(model) while the model holds the moving average of its weights."""
        weights = self.model.trainable_parameters()
        self.model.update(self.ema["weights"])
        try:
            return function(self.model)
        finally:
            self.model.update(weights)
