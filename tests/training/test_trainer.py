"""The training loop: it learns, averages, resumes bit for bit, and stops in order whatever stops it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.training.checkpoint import newest_state
from mlx_wan.training.shares import deal
from mlx_wan.training.trainer import OPTIMIZERS, TrainConfig, Trainer, in_compute_dtype, learning_rates

TARGET = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)


class Toy(nn.Module):
    """Two matrices that Muon takes and an output layer that it leaves to AdamW; layers without weights between."""

    def __init__(self):
        super().__init__()
        self.blocks = [nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 16), nn.Identity()]
        self.head = nn.Linear(16, 4)

    def __call__(self, x):
        for layer in self.blocks:
            x = layer(x)
        return self.head(x)


def loss(model, batch, key):
    error = mx.square(model(batch["x"]) - batch["y"]).mean()
    return error, {"noise": mx.random.normal(key=key)}


def batch_at(index):
    x = np.random.default_rng([1, index]).standard_normal((8, 4)).astype(np.float32)
    return {"x": mx.array(x), "y": mx.array(x @ TARGET)}


def trainer(folder, loss=loss, processes=None, **changes):
    values = {"steps": 6, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 2, "compile": False}
    values |= {"report_every": 1, "save_every": 2, "ema_decay": 0.9}
    mx.random.seed(5)
    return Trainer(Toy(), loss, TrainConfig(**{**values, **changes}), Path(folder), processes=processes)


def weights(tree):
    return {name: np.array(array) for name, array in tree_flatten(tree)}


def assert_same(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("cosine", lambda x: 0.5 * (1 + np.cos(np.pi * x))),
        ("linear", lambda x: 1 - x),
        ("constant", lambda x: 1.0),
    ],
)
def test_learning_rate_rises_in_a_line_and_then_follows_its_schedule(schedule, after):
    rate = learning_rates(0.5, 4, 24, schedule)
    got = [rate(mx.array(step)).item() for step in range(25)]
    rise = [0.125 + 0.375 * step / 4 for step in range(4)]
    rest = [0.5 * after(step / 20) for step in range(21)]
    np.testing.assert_allclose(got, rise + rest, rtol=1e-5, atol=1e-7)
    assert learning_rates(0.5, 0, 24, schedule)(mx.array(0)).item() == pytest.approx(0.5)


RATES = {"adafactor": 0.05, "sgd": 0.3}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_every_optimizer_learns(tmp_path, optimizer, accumulated):
    run = trainer(
        tmp_path,
        steps=150,
        optimizer=optimizer,
        learning_rate=RATES.get(optimizer, 0.01),
        grad_accumulation_steps=accumulated,
        report_every=10,
        save_every=150,
    )
    run.fit(batch_at)
    losses = [row["loss"] for row in log(tmp_path)]
    assert losses[-1] < losses[0] / 8
    batch = batch_at(10_000)
    assert run.with_averaged_weights(lambda model: loss(model, batch, mx.random.key(0))[0].item()) < losses[0] / 8


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_compiled_step_computes_the_same(tmp_path, optimizer, accumulated):
    runs = []
    for part in ({}, {"compile": True}, {"compile_update": True}):
        options = {"optimizer": optimizer, "grad_accumulation_steps": accumulated, **part}
        runs.append(trainer(tmp_path / "-".join(["run", *part]), **options))
        runs[-1].fit(batch_at)
    plain, *compiled = (weights(run.state()) for run in runs)
    for other in compiled:
        for name in plain:
            np.testing.assert_allclose(plain[name], other[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path):
    """And the numbers of a step are the means of its batches'."""

    def joined(index):
        parts = [batch_at(3 * index + i) for i in range(3)]
        return {name: mx.concatenate([part[name] for part in parts]) for name in ("x", "y")}

    def silent(model, batch, key):
        return loss(model, batch, key)[0], {}

    small = trainer(tmp_path / "small", silent, grad_accumulation_steps=3)
    large = trainer(tmp_path / "large", silent, batch_size=24)
    small.fit(batch_at)
    large.fit(joined)
    for one, other in zip(log(tmp_path / "small"), log(tmp_path / "large"), strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)
        assert one["clips_per_s"] / one["steps_per_s"] == pytest.approx(24)
    one, other = weights(small.model.parameters()), weights(large.model.parameters())
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6)


def test_without_an_average_the_weights_themselves_count(tmp_path):
    run = trainer(tmp_path, ema_decay=0)
    run.fit(batch_at, evaluate=lambda model: {"same": float(weights(model.parameters())["head.bias"].sum())})
    assert log(tmp_path)[-1]["same"] == weights(run.model.parameters())["head.bias"].sum()
    assert "ema" not in run.state()


def test_what_is_frozen_stays_and_is_in_no_state(tmp_path):
    mx.random.seed(5)
    model = Toy()
    model.blocks[0].freeze()
    model.blocks[0].set_dtype(mx.bfloat16)
    before = np.array(model.blocks[0].weight.astype(mx.float32))
    run = Trainer(model, loss, TrainConfig(4, 8, 0.01, compile=False), tmp_path)
    run.fit(batch_at)
    np.testing.assert_array_equal(np.array(model.blocks[0].weight.astype(mx.float32)), before)
    assert not [name for name, _ in tree_flatten(run.state()) if "blocks.0." in name]


def test_parts_of_a_state_are_written_before_it(tmp_path):
    seen = []

    def saving(step):
        seen.append((step, newest_state(tmp_path)))

    trainer(tmp_path).fit(batch_at, saving=saving)
    assert [(step, state and int(state.stem[-8:])) for step, state in seen] == [(2, None), (4, 2), (6, 4)]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_bad_loss_stops_at_once_and_names_the_clip(tmp_path, accumulated):
    """Batch 7 has a clip that is not finite: with 2 batches a step that is step 4, else step 8."""

    def each(model, batch, key):
        error = mx.square(model(batch["x"]) - batch["y"]).mean(axis=1)
        return error.mean(), {"each": error}

    def bad(index):
        batch = batch_at(index)
        if index == 7:
            batch["y"][3, 1] = float("inf")
        return batch

    run = trainer(tmp_path, each, steps=20, grad_accumulation_steps=accumulated, report_every=20, save_every=3)
    run._names = lambda index: [f"clip {index}.{i}" for i in range(8)]
    step = 8 // accumulated
    saved = tmp_path / f"state-{(step - 1) // 3 * 3:08d}.safetensors"
    with pytest.raises(WanError, match=rf"is (inf|nan) at step {step} \(at clip 7\.3\).*good state is {saved}"):
        run.fit(bad)
    assert newest_state(tmp_path) == saved


def test_a_spike_stops_with_the_state_before_it(tmp_path):
    def spiking(model, batch, key):
        error = mx.square(model(batch["x"]) - batch["y"]).mean(axis=1) * batch["factor"]
        return error.mean(), {"each": error}

    def bad(index):
        factor = np.ones(8, np.float32)
        factor[5] = 1000 if index == 33 else 1
        return {**batch_at(index), "factor": mx.array(factor)}

    options = {"steps": 40, "report_every": 40, "save_every": 30, "learning_rate": 1e-5}
    run = trainer(tmp_path / "a", spiking, spike_factor=5.0, **options)
    run._names = lambda index: [f"clip {index}.{i}" for i in range(8)]
    with pytest.raises(
        WanError, match=r"loss is .* was .* on average at step 34 \(at clip 33\.5\).*raise spike_factor"
    ):
        run.fit(bad)
    assert newest_state(tmp_path / "a").stem.endswith("30")
    trainer(tmp_path / "b", spiking, **options).fit(bad)


def test_muon_takes_the_matrices_inside_and_adamw_the_rest(tmp_path):
    state = trainer(tmp_path, optimizer="muon").optimizer.state
    muon, adamw = (
        {name.rsplit(".", 1)[0] for name, value in tree_flatten(part) if value.ndim} for part in state["states"]
    )
    assert muon == {"blocks.0.weight", "blocks.2.weight"}
    assert adamw == {"blocks.0.bias", "blocks.2.bias", "head.weight", "head.bias"}


def test_average_of_the_weights_is_what_is_evaluated(tmp_path):
    run = trainer(tmp_path, ema_decay=0.75, eval_every=3)
    steps, seen = [weights(run.model.parameters())], []
    run.fit(
        batch_at,
        evaluate=lambda model: seen.append(weights(model.parameters())) or {"val": 1.0},
        report=lambda row: "loss" in row and steps.append(weights(run.model.parameters())),
    )
    average = steps[0]
    averages = [average]
    for count, now in enumerate(steps[1:], 1):
        decay = min(0.75, count / (count + 9))
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
        averages.append(average)
    assert len(steps) == 7
    for got, expected in zip(seen, (averages[3], averages[6]), strict=True):
        for name in got:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(steps[-1]["head.weight"], np.array(run.model.head.weight))  # training's are back


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "compile": True},
        {"optimizer": "muon"},
        {"optimizer": "muon", "compile": True},
        {"optimizer": "adafactor", "schedule": "linear"},
        {"optimizer": "lion", "schedule": "constant", "ema_decay": 0},
        {"grad_accumulation_steps": 2},
        {"grad_accumulation_steps": 2, "compile": True},
    ],
    ids=str,
)
def test_a_resumed_run_is_bit_for_bit_the_straight_one(tmp_path, options):
    straight = trainer(tmp_path / "straight", **options)
    straight.fit(batch_at)

    class KilledError(Exception):
        pass

    def stop(row):
        if row["step"] == 3:
            raise KilledError

    first = trainer(tmp_path / "run", **options)
    with pytest.raises(KilledError):
        first.fit(batch_at, report=stop)
    again = trainer(tmp_path / "run", **options)
    mx.random.seed(99)  # the global random state has no say
    assert again.resume()
    assert again.step == 2
    again.fit(batch_at)
    assert_same(again.state(), straight.state())
    timings = ("steps_per_s", "clips_per_s", "peak_gib")
    rows = [
        [{k: v for k, v in row.items() if k not in timings} for row in log(tmp_path / d)] for d in ("run", "straight")
    ]
    assert rows[0] == rows[1], "each step is in the log once, with the same numbers"


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = trainer(tmp_path)
    first.fit(batch_at)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = trainer(tmp_path)
    assert again.resume()
    again.fit(batch_at)
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert_same(again.state(), first.state())


def test_resume_falls_back_to_the_older_whole_state(tmp_path):
    trainer(tmp_path).fit(batch_at)
    newest = newest_state(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-10])
    again = trainer(tmp_path)
    assert again.resume()
    assert again.step == 4
    newest_state(tmp_path).write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged and there is no whole state"):
        trainer(tmp_path).resume()
    assert not trainer(tmp_path / "new").resume()


def test_a_log_line_cut_short_or_of_steps_to_be_repeated_is_dropped(tmp_path):
    trainer(tmp_path).fit(batch_at)
    newest_state(tmp_path).unlink()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    again = trainer(tmp_path)
    again.resume()
    again.fit(batch_at)
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_step_saves_a_whole_one(tmp_path, number):
    straight = trainer(tmp_path / "straight", save_every=100)
    straight.fit(batch_at)
    handler = signal.getsignal(number)

    def interrupting(index):
        if index == 2:
            os.kill(os.getpid(), number)
        return batch_at(index)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", save_every=100).fit(interrupting)
    assert signal.getsignal(number) is handler
    again = trainer(tmp_path / "run", save_every=100)
    again.resume()
    assert again.step == 3
    again.fit(batch_at)
    assert_same(again.state(), straight.state())


def test_a_second_signal_does_not_wait(tmp_path):
    def interrupting(index):
        if index == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return batch_at(index)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path).fit(interrupting)
    assert newest_state(tmp_path).name == "state-00000002.safetensors"


@pytest.mark.parametrize("report_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path, report_every):
    def breaking(index):
        batch = batch_at(index)
        return {**batch, "y": batch["y"] * mx.nan} if index == 4 else batch

    with pytest.raises(WanError, match=r"loss is nan at step [56]: training stopped; .*state-00000004"):
        trainer(tmp_path, steps=8, report_every=report_every).fit(breaking)
    assert newest_state(tmp_path).name == "state-00000004.safetensors"
    again = trainer(tmp_path, steps=8)
    again.resume()
    again.fit(batch_at)
    assert np.isfinite(weights(again.model.parameters())["head.weight"]).all()


def test_a_compute_dtype_leaves_the_masters_float32(tmp_path):
    seen = {}

    def spying(model, batch, key):
        seen.update({name: array.dtype for name, array in tree_flatten(model.trainable_parameters())})
        return loss(model, batch, key)

    config = TrainConfig(6, 8, learning_rate=1e-4, warmup_steps=0, compute_dtype="bfloat16", compile=False)
    mx.random.seed(5)
    run = Trainer(Toy(), spying, config, tmp_path, ("head.",))
    before = weights(run.model.parameters())
    run.fit(batch_at)
    after = weights(run.model.parameters())
    assert {name: dtype == mx.bfloat16 for name, dtype in seen.items()} == {
        name: not name.startswith("head.") for name in before
    }
    assert {array.dtype for array in after.values()} == {np.dtype(np.float32)}
    assert {array.dtype for _, array in tree_flatten(run.ema)} == {mx.float32}
    # Steps far below the resolution of bfloat16 (1/256 of a value) add up.
    change = np.abs(after["blocks.2.weight"] - before["blocks.2.weight"])
    assert 0 < change.max() < 1e-3
    assert (change > 0).mean() > 0.9


def test_gradients_reach_float32_weights_through_the_cast():
    model = Toy()
    cast = in_compute_dtype(loss, mx.bfloat16, ())
    (value, _), grads = nn.value_and_grad(model, cast)(model, batch_at(0), mx.random.key(0))
    (exact, _), exact_grads = nn.value_and_grad(model, loss)(model, batch_at(0), mx.random.key(0))
    assert value.item() == pytest.approx(exact.item(), rel=0.03)
    for (name, grad), (_, other) in zip(tree_flatten(grads), tree_flatten(exact_grads), strict=True):
        assert grad.dtype == mx.float32, name
        difference = mx.linalg.norm((grad - other).flatten()) / mx.linalg.norm(other.flatten())
        assert 0 < difference.item() < 0.05, name


# --- several processes -----------------------------------------------------------------------------------------------

STRAIGHT = {"save_every": 100, "optimizer": "muon"}
SCRIPT = """
import os, signal, sys
sys.path.insert(0, {here!r})
import mlx_wan
import mlx.core as mx
mx.set_default_device(mx.cpu)
import test_trainer as t
folder, stop_at = sys.argv[1], int(sys.argv[2])
world = mx.distributed.init(strict="MLX_HOSTFILE" in os.environ)
rank = world.rank()

def batch_at(index):
    if stop_at and rank == world.size() - 1 and index == stop_at * run.batches_a_step + rank:
        os.kill(os.getpid(), signal.SIGTERM)  # one of them is enough
    return t.batch_at(index)

processes, accumulated = int(sys.argv[3]) or None, int(sys.argv[4])
run = t.trainer(folder, processes=processes, grad_accumulation_steps=accumulated, **t.STRAIGHT)
resumed = run.resume()
try:
    run.fit(batch_at)
except KeyboardInterrupt:
    print("stopped at", run.step)
mx.save_safetensors(f"{{folder}}-{{rank}}.safetensors", dict(t.tree_flatten(run.state())))
"""


SHARED = """
import os, sys
sys.path.insert(0, {here!r})
import mlx_wan
import mlx.core as mx
mx.set_default_device(mx.cpu)
import test_trainer as t
from mlx_wan.weights.whole import flat
mx.distributed.init(strict=True)
for name in t.OPTIMIZERS:
    for shared in (False, True):
        folder = f"{{sys.argv[1]}}-{{name}}-{{shared}}"
        run = t.trainer(folder, optimizer=name, shard_optimizer=shared, steps=4)
        run.resume()
        run.fit(t.batch_at)
        print(name, sum(array.size for array in flat(run.optimizer.state).values()), flush=True)
"""


def launch(tmp_path, folder, stop_at=0, count=2, begun=0, accumulated=1, script=SCRIPT):
    """Runs a script as `count` processes over the ring backend; their outputs. begun: the trainer's `processes`."""
    holders = [socket.socket() for _ in range(count)]
    for holder in holders:
        holder.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{holder.getsockname()[1]}"] for holder in holders]
    for holder in holders:
        holder.close()
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    script = script.format(here=str(Path(__file__).parent))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / folder), *map(str, (stop_at, begun, accumulated))],
            env=os.environ
            | ({"MLX_RANK": str(rank), "MLX_HOSTFILE": str(tmp_path / "hosts.json")} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, outputs
    return [out for out, _ in outputs]


def test_two_processes_share_the_work_and_stop_and_resume_together(tmp_path):
    launch(tmp_path, "straight")
    ranks = [mx.load(str(tmp_path / f"straight-{rank}.safetensors")) for rank in range(2)]
    assert_same(ranks[0], ranks[1])

    # One process with both batches in one: the mean of the gradients is the gradient of the mean.
    def both(index):
        parts = [batch_at(2 * index), batch_at(2 * index + 1)]
        return {name: mx.concatenate([part[name] for part in parts]) for name in ("x", "y")}

    alone = trainer(tmp_path / "alone", save_every=100, optimizer="muon")
    alone.fit(both)
    for name, array in tree_flatten(alone.state()):
        np.testing.assert_allclose(ranks[0][name], array, rtol=1e-3, atol=1e-5, err_msg=name)

    stopped = launch(tmp_path, "run", stop_at=2)
    assert stopped == ["stopped at 4\n"] * 2  # asked in step 3, told with step 3's gradients, acted on a step later
    assert newest_state(tmp_path / "run").name == "state-00000004.safetensors"
    launch(tmp_path, "run")
    for rank in range(2):
        assert_same(mx.load(str(tmp_path / f"run-{rank}.safetensors")), ranks[rank])


@pytest.mark.parametrize(
    ("begun", "accumulated", "counts"),
    [(2, 1, (2, 1)), (1, 2, (1, 2)), (3, 1, (3, 2))],
)
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, begun, accumulated, counts):
    """The same batches make a step: the result is that of a run in one process, within the rounding of sums."""
    straight = trainer(tmp_path / "straight", processes=begun, **STRAIGHT | {"grad_accumulation_steps": accumulated})
    straight.fit(batch_at)
    launch(tmp_path, "run", 2, counts[0], begun, accumulated)
    stopped = "state-00000004" if counts[0] > 1 else "state-00000003"  # alone, a process need not ask the others
    assert newest_state(tmp_path / "run").stem == stopped
    launch(tmp_path, "run", 0, counts[1], begun, accumulated)
    found = weights(mx.load(str(tmp_path / "run-0.safetensors")))
    for name, array in weights(straight.state()).items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_shared_out_optimizer_computes_the_same_bits(tmp_path):
    """Each process keeps about half of the state; files are those of processes that keep all of it."""
    printed = launch(tmp_path, "run", script=SHARED)
    sizes = [[int(line.split()[1]) for line in out.splitlines()] for out in printed]
    for i, name in enumerate(OPTIMIZERS):
        whole, (one, other) = sizes[0][2 * i], (sizes[rank][2 * i + 1] for rank in range(2))
        assert whole <= one + other <= whole + 4  # steps and rates are everybody's
        assert max(one, other) < 0.75 * whole
        alone, shared = (tmp_path / f"run-{name}-{shared}" for shared in (False, True))
        for step in (2, 4):
            file = f"state-{step:08}.safetensors"
            assert (alone / file).read_bytes() == (shared / file).read_bytes()
    wanted = {name: (tmp_path / f"run-{name}-True" / "state-00000004.safetensors").read_bytes() for name in OPTIMIZERS}
    for name in OPTIMIZERS:
        (tmp_path / f"run-{name}-True" / "state-00000004.safetensors").unlink()
        shutil.copytree(tmp_path / f"run-{name}-True", tmp_path / f"one-{name}")
    launch(tmp_path, "run", script=SHARED)
    for name in OPTIMIZERS:
        assert (tmp_path / f"run-{name}-True" / "state-00000004.safetensors").read_bytes() == wanted[name]
        one = trainer(tmp_path / f"one-{name}", optimizer=name, shard_optimizer=True, steps=4, processes=2)
        assert one.resume()  # with another number of processes
        one.fit(batch_at)
        for key, array in weights(mx.load(str(tmp_path / f"run-{name}-True" / "state-00000004.safetensors"))).items():
            np.testing.assert_allclose(weights(one.state())[key], array, rtol=1e-4, atol=1e-6, err_msg=key)


def test_shares_are_about_equal_and_hold_everything():
    sizes = {f"w{i:02}": 1 + (i * 7919) % 1000 for i in range(31)}
    rounds = deal(sizes, 4)
    shares = [[each[rank] for each in rounds if rank < len(each) and each[rank]] for rank in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    held = [sum(sizes[name] for name in share) for share in shares]
    assert max(held) < 1.1 * min(held)


def test_more_processes_than_batches_are_refused(tmp_path, monkeypatch):
    class World:
        size, rank = staticmethod(lambda: 3), staticmethod(lambda: 0)

    monkeypatch.setattr(mx.distributed, "init", World)
    with pytest.raises(UserError, match="a step of this run has 2 batches, too few for 3 processes"):
        trainer(tmp_path, processes=2)
