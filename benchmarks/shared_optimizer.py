"""Several processes train one model, the optimizer's state whole in each or shared out: bits, bytes and seconds.

    mlx.launch -n 2 -- python benchmarks/shared_optimizer.py                     # two processes on the CPU
    mlx.launch -n 2 --backend nccl -- python benchmarks/shared_optimizer.py --dim 2048 --layers 12 --dtype bfloat16

A transformer of the embedded model's kind, `--dim` wide, from random weights on random clips, all of it trained.
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import mlx_wan  # noqa: F401  first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
import numpy as np

from mlx_wan.models.transformer import FLOAT32_PARAMETERS, TransformerConfig, WanTransformer
from mlx_wan.training.loop import part
from mlx_wan.training.objective import flow_loss
from mlx_wan.training.trainer import DTYPES, OPTIMIZERS, TrainConfig, Trainer
from mlx_wan.weights.whole import flat

WARM = 2
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training with a shared optimizer.")
    parser.add_argument("--dim", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="clips a process")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--optimizers", nargs="+", choices=tuple(OPTIMIZERS), default=("adamw",))
    args = parser.parse_args()
    world = mx.distributed.init(strict=True)
    for optimizer in args.optimizers:
        whole, shared = (train(args, optimizer, shard) for shard in (False, True))
        if world.rank() == 0:
            same = all(np.array_equal(whole[name], shared[name], equal_nan=True) for name in whole)
            print(f"{optimizer}: {'the same' if same else 'OTHER'} weights and states", flush=True)
    part(world)


def train(args: argparse.Namespace, optimizer: str, shard: bool) -> dict[str, np.ndarray]:
    """The arrays of the state after some steps; prints what they took."""
    config = TransformerConfig(
        in_dim=24, out_dim=24, dim=args.dim, ffn_dim=3 * args.dim, num_heads=args.dim // 128, num_layers=args.layers,
        text_dim=160, text_len=48,
    )  # fmt: skip
    mx.random.seed(0)
    model = WanTransformer(config, DTYPES[args.dtype])
    model.init_weights()
    settings = TrainConfig(
        steps=args.steps + WARM, batch_size=args.batch, learning_rate=1e-3, warmup_steps=2, optimizer=optimizer,
        ema_decay=0.0, compute_dtype=args.dtype, compile=False, shard_optimizer=shard,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer, seconds = Trainer(model, loss, settings, Path(folder), FLOAT32_PARAMETERS), []
        for trainer.step in range(settings.steps):
            if trainer.step == WARM:
                mx.reset_peak_memory()
            start = time.perf_counter()
            mx.eval(trainer.advance(lambda index: batch_at(args.batch, index)), trainer.arrays())
            seconds.append(time.perf_counter() - start)
    kept, weights = (
        sum(array.nbytes for array in flat(tree).values()) / MIB
        for tree in (trainer.optimizer.state, model.trainable_parameters())
    )
    print(
        f"process {trainer.world.rank()}, {optimizer}, {'shared' if shard else 'whole'}: "
        f"{1000 * statistics.median(seconds[WARM:]):.0f} ms a step, weights {weights:.0f} MiB, "
        f"optimizer {kept:.0f} MiB, peak {mx.get_peak_memory() / MIB:.0f} MiB",
        flush=True,
    )
    state = flat(trainer.state())
    arrays = {name: np.array(array) for name, array in state.items()} if trainer.is_first else {}
    del trainer, model, state
    gc.collect()
    mx.clear_cache()
    return arrays


def batch_at(size: int, index: int) -> dict[str, mx.array]:
    rng = np.random.default_rng([0, index])
    shape = (size, 7, 8, 8, 24)
    shapes = {"latents": shape, "noise": shape, "context": (size, 48, 160)}
    return {name: mx.array(rng.standard_normal(each, dtype=np.float32)) for name, each in shapes.items()}


def loss(model: WanTransformer, batch: dict[str, mx.array], key: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
    size = len(batch["latents"])
    sigmas, given = mx.full((size,), 0.5), mx.zeros((size,), mx.bool_)
    return flow_loss(model, batch["latents"], batch["context"], batch["noise"], sigmas, given).mean(), {}


if __name__ == "__main__":
    main()
