"""Fine-tuning steps of TI2V-5B at its true size on a GPU, random weights: seconds and peak memory, PyTorch's too.

    python benchmarks/training_true_size.py attention           # forward and backward of one layer's attention
    python benchmarks/training_true_size.py lora                # rank 32, 480×832×49 frames, gradient checkpointing
    python benchmarks/training_true_size.py full                # all weights, 256×256×17, Adafactor
    python benchmarks/training_true_size.py lora --torch        # the same with diffusers' WanTransformer3DModel

One clip a step, bfloat16 beside float32 masters of what is trained (torch: autocast). MLX hands out memory ahead of its
work and waits where its limit is passed: `--limits 70 24` measures under one after the other, in GiB. `--layers 2 --dim
256 --frames 9 --size 64*64` tries the same on a small machine.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

DEFAULTS = {"lora": (49, (480, 832)), "full": (17, (256, 256)), "attention": (49, (480, 832))}
WARM, TIMED, RANK = 2, 5, 32
TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time fine-tuning steps at the size of TI2V-5B.")
    parser.add_argument("what", choices=tuple(DEFAULTS))
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dim", type=int, default=3072, help="a multiple of 128")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", help="HEIGHT*WIDTH")
    parser.add_argument("--limits", type=float, nargs="+", default=[70.0], help="of MLX's memory, GiB")
    args = parser.parse_args()
    frames, size = DEFAULTS[args.what]
    height, width = map(int, args.size.split("*")) if args.size else size
    shape = (1, ((args.frames or frames) - 1) // 4 + 1, height // 16, width // 16, 48)
    if args.what == "attention":
        attention(shape, args.dim)
    else:
        (torch_steps if args.torch else mlx_steps)(args, shape)


def report(args, shape, seconds: list[float], peak: float, loss: float, limit: float = 0) -> None:
    tokens = shape[1] * shape[2] * shape[3] // 4
    median, side = statistics.median(seconds), "torch" if args.torch else f"mlx below {limit:g} GiB"
    print(
        f"{args.what}, {side}, {args.layers} layers of {args.dim}, {tokens} tokens: "
        f"{median:.3f} s a step ({1 / median:.2f} steps/s; {min(seconds):.3f} to {max(seconds):.3f}), "
        f"peak {peak / 2**30:.2f} GiB, loss {loss:.3f}",
        flush=True,
    )


def mlx_steps(args, shape) -> None:
    import mlx_wan  # noqa: F401  before mlx.core: it chooses the BLAS

    import mlx.core as mx  # isort: skip
    from mlx.utils import tree_flatten

    from mlx_wan.models.transformer import FLOAT32_PARAMETERS, TransformerConfig, WanTransformer
    from mlx_wan.training.adapt import make_trainable
    from mlx_wan.training.objective import flow_loss
    from mlx_wan.training.options import FinetuneRecipe
    from mlx_wan.training.trainer import TrainConfig, Trainer

    mx.set_memory_limit(int(args.limits[0] * 2**30))
    mx.set_cache_limit(4 << 30)
    config = TransformerConfig(
        dim=args.dim, ffn_dim=args.dim * 14 // 3, num_heads=args.dim // 128, num_layers=args.layers
    )
    model, full = WanTransformer(config, mx.bfloat16), args.what == "full"
    for name, array in tree_flatten(model.parameters()):
        kept = full or any(part in name for part in FLOAT32_PARAMETERS)
        value = mx.ones(array.shape) if "norm" in name else 0.02 * mx.random.normal(array.shape)
        value = value.astype(mx.float32 if kept else mx.bfloat16)
        mx.eval(value)  # one after the other: random numbers are float32 first
        model.load_weights([(name, value)], strict=False)
    recipe = FinetuneRecipe(model="", data="", fine_tune_type=args.what, rank=RANK, targets=TARGETS)
    make_trainable(model, recipe)
    model.save_memory(True)
    keys = mx.random.split(mx.random.key(0), 3)
    latents, noise = (mx.random.normal(shape, key=key) for key in keys[:2])
    context = mx.random.normal((1, config.text_len, config.text_dim), key=keys[2])

    def loss(model, batch, key):
        sigma, keep = mx.array([0.5]), mx.array([False])
        return flow_loss(model, batch["latents"], batch["context"], batch["noise"], sigma, keep).mean(), {}

    settings = TrainConfig(
        steps=100,
        batch_size=1,
        learning_rate=1e-5,
        optimizer="adafactor" if full else "adamw",
        ema_decay=0.0,
        compute_dtype="bfloat16",
        compile=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, loss, settings, Path(folder), FLOAT32_PARAMETERS)

        def step() -> tuple[float, float]:
            start = time.perf_counter()
            numbers = trainer.advance(lambda _: {"latents": latents, "context": context, "noise": noise})
            mx.eval(numbers, model.trainable_parameters(), trainer.optimizer.state)
            return time.perf_counter() - start, numbers["loss"].item()

        for limit in args.limits:
            mx.set_memory_limit(int(limit * 2**30))
            mx.clear_cache()
            for i in range(WARM):
                print(f"step {i}: {step()[0]:.1f} s, peak {mx.get_peak_memory() / 2**30:.1f} GiB", flush=True)
            mx.reset_peak_memory()
            rows = [step() for _ in range(TIMED)]
            report(args, shape, [row[0] for row in rows], mx.get_peak_memory(), rows[-1][1], limit)


def torch_steps(args, shape) -> None:
    import torch
    from diffusers import WanTransformer3DModel

    device, full = "cuda" if torch.cuda.is_available() else "cpu", args.what == "full"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if full else torch.bfloat16)
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=args.dim // 128,
            attention_head_dim=128,
            in_channels=48,
            out_channels=48,
            ffn_dim=args.dim * 14 // 3,
            num_layers=args.layers,
            cross_attn_norm=True,
        )
    torch.set_default_dtype(torch.float32)
    model.train().enable_gradient_checkpointing()
    if not full:
        model.requires_grad_(False)
        names = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name.startswith("blocks.") and name.endswith(names):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, lora_beside(module))
    trained = [p for p in model.parameters() if p.requires_grad]
    if full:
        optimizer = torch.optim.Adafactor(trained, lr=1e-5, foreach=False)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.99))
    batch, t, h, w, channels = shape
    latents, noise = (torch.randn(batch, channels, t, h, w, device=device) for _ in range(2))
    context = torch.randn(batch, 512, 4096, device=device)
    timesteps = torch.full((batch, t * h * w // 4), 500.0, device=device)
    seconds = []
    for step in range(WARM + TIMED):
        if step == WARM and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            velocity = model(0.5 * latents + 0.5 * noise, timesteps, context, return_dict=False)[0]
        loss = (velocity.float() - (noise - latents)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        value = loss.item()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    report(args, shape, seconds[WARM:], peak, value)


def lora_beside(linear):
    """A frozen torch Linear with float32 matrices of a LoRA beside it, as PEFT computes them."""
    import torch

    class Beside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base = linear
            options = {"device": linear.weight.device, "dtype": torch.float32}
            self.a = torch.nn.Parameter(torch.randn(RANK, linear.in_features, **options) / linear.in_features**0.5)
            self.b = torch.nn.Parameter(torch.zeros(linear.out_features, RANK, **options))

        def forward(self, x):
            hidden = torch.nn.functional.linear(x, self.a)
            return self.base(x) + torch.nn.functional.linear(hidden, self.b)

    return Beside()


def attention(shape, dim: int) -> None:
    """One layer's attention, forward and backward: MLX's own, filled up to whole tiles, and our pieces.

    One process a case, because one is lost if a kernel reads where it must not.
    """
    import subprocess
    import sys

    tokens = shape[1] * shape[2] * shape[3] // 4
    for queries, keys in ((tokens, 512), (tokens, tokens), (320, 320), (320, 512)):
        for way in ("MLX", "pieces"):
            code = _ATTENTION.format(queries=queries, keys=keys, dim=dim, way=way)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            said = done.stdout.strip() or (done.stderr.strip().splitlines() or ["nothing"])[-1]
            print(f"{queries} queries, {keys} keys, {way}: {said} (exit code {done.returncode})", flush=True)


_ATTENTION = """
import mlx_wan, time
import mlx.core as mx
from mlx_wan.models import layers
tile, heads, scale = 128, {dim} // 128, 128**-0.5
arrays = [mx.random.normal((1, n, {dim})).astype(mx.bfloat16) for n in ({queries}, {keys}, {keys}, {queries})]
def whole(x):
    return mx.pad(x, [(0, 0), (0, -x.shape[1] % tile), (0, 0)])
def attend(q, k, v):
    if "{way}" == "pieces":
        return layers.attend(q, k, v, heads, scale, in_pieces=True)
    mask = mx.where(mx.arange({keys} + -{keys} % tile) < {keys}, 0.0, -1e30).astype(q.dtype)[None, None, None]
    mask = mask if {keys} % tile else None
    return layers.attend(whole(q), whole(k), whole(v), heads, scale, mask=mask)[:, :{queries}]
def loss(q, k, v, probe, precise=False):
    if precise:
        q, k, v, probe = (a.astype(mx.float32) for a in (q, k, v, probe))
        return (layers.attend(q, k, v, heads, scale) * probe).sum()
    return (attend(q, k, v) * probe).astype(mx.float32).sum()
step = mx.grad(loss, argnums=(0, 1, 2))
mx.eval(arrays, step(*arrays), step(*arrays))
mx.reset_peak_memory()
times = []
for _ in range(10):
    start = time.perf_counter()
    mx.eval(step(*arrays))
    times.append(time.perf_counter() - start)
peak = mx.get_peak_memory() / 2**20
exact = mx.grad(lambda *a: loss(*a, precise=True), argnums=(0, 1, 2))(*arrays)
pairs = [(g.astype(mx.float32), e.astype(mx.float32)) for g, e in zip(step(*arrays), exact)]
errors = ", ".join(f"{{(mx.linalg.norm(g - e) / mx.linalg.norm(e)).item():.1e}}" for g, e in pairs)
print(f"{{1e3 * sorted(times)[5]:.2f}} ms, peak {{peak:.0f}} MiB, gradients off by {{errors}}")
"""


if __name__ == "__main__":
    main()
