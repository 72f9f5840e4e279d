"""Memory: that the VAE's does not grow with the clip, which parts of a pipeline are loaded when, and what was planned.

    uv run python benchmarks/memory.py              # about two minutes on one CPU core
    uv run python benchmarks/memory.py --size 256   # frames of 256x256

Everything has random weights; the pipeline's model is written to a temporary folder first. What is counted is what
MLX holds (mx.get_peak_memory, mx.get_active_memory), less the clip itself, which is the caller's.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import mlx_wan  # first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten

from mlx_wan import backend
from mlx_wan.memory.plan import Dimensions, Setting, plans
from mlx_wan.models.transformer import TransformerConfig, WanTransformer, rope_table
from mlx_wan.models.umt5 import TextEncoderConfig, UMT5Encoder
from mlx_wan.models.vae22 import VAEConfig, WanVAE22
from mlx_wan.text import Tokenizer, clean_prompt
from mlx_wan.weights.locate import locate
from mlx_wan.weights.save import save_native

FRAMES = (5, 21, 81)
Z_DIM = 16
PROMPT = "a red circle"
TOKENIZER = Path(__file__).resolve().parent.parent / "tests" / "golden" / "tokenizer.json"
MIB = 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what the VAE and the pipeline hold in memory.")
    parser.add_argument("--size", type=int, default=128, help="side of the VAE's frames, a multiple of 16")
    args = parser.parse_args(argv)
    if args.size < 16 or args.size % 16:
        print(f"error: --size {args.size}: must be a multiple of 16", file=sys.stderr)
        return 2
    print(f"VAE, {args.size}x{args.size}, peak less weights and clip, MiB\n\n| frames | decode | encode |")
    print("| ---: | ---: | ---: |")
    for frames, decode, encode in vae_peaks(small_vae(), args.size, FRAMES):
        print(f"| {frames} | {decode / MIB:.1f} | {encode / MIB:.1f} |")
    with tempfile.TemporaryDirectory() as folder:
        sizes = write_model(Path(folder))
        print("\nweights, MiB: " + ", ".join(f"{name} {size / MIB:.0f}" for name, size in sizes.items()))
        for low_memory in (True, False):
            print(f"\nlow_memory={low_memory}: held at the end of each stage, and the most within it, MiB\n")
            planned = planned_peaks(Path(folder), low_memory)
            print("| stage | held | peak | planned peak |\n| --- | ---: | ---: | ---: |")
            for stage, held, peak in pipeline_memory(Path(folder), low_memory):
                plan = f"{planned[stage] / MIB:.0f}" if stage in planned else ""
                print(f"| {stage} | {held / MIB:.0f} | {peak / MIB:.0f} | {plan} |")
    return 0


def small_vae() -> WanVAE22:
    """A VAE of the released one's kind at an eighth of its width, evaluated."""
    stats = {"latents_mean": (0.0,) * Z_DIM, "latents_std": (1.0,) * Z_DIM}
    model = WanVAE22(VAEConfig(dim=20, dec_dim=32, z_dim=Z_DIM, **stats))
    mx.eval(model.parameters())
    return model


def vae_peaks(model: WanVAE22, size: int, lengths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(frames, bytes of stream_decode, bytes of stream_encode) for clips of each length; pieces are let go of."""
    _, stride_h, stride_w = model.config.stride
    for frames in lengths:
        latents = mx.random.normal((1, (frames - 1) // 4 + 1, size // stride_h, size // stride_w, model.config.z_dim))
        video = mx.random.uniform(-1, 1, (1, frames, size, size, 3))
        mx.eval(latents, video)
        yield frames, _peak(model.stream_decode(latents)), _peak(model.stream_encode(video))


def _peak(pieces: Iterator[mx.array]) -> int:
    """The most memory on the way through `pieces`, beyond what was held before."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in pieces:
        pass
    return mx.get_peak_memory() - before


def write_model(folder: Path) -> dict[str, int]:
    """A native model whose parts are large beside what they compute; returns the bytes of each part's weights."""
    text_dim, vae = 512, small_vae()
    parts = {
        "text encoder": UMT5Encoder(TextEncoderConfig(16384, text_dim, text_dim, 2048, 8, 6)),
        "transformer": WanTransformer(TransformerConfig(Z_DIM, Z_DIM, 768, 3072, 12, 6, text_dim=text_dim)),
        "VAE": vae,
    }
    save_native(
        folder,
        model="memory",
        text_encoder=parts["text encoder"],
        transformer=parts["transformer"],
        vae=vae,
        tokenizer_json=TOKENIZER,
        sampling={"width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 2},
    )
    arrays = {name: tree_flatten(part.parameters()) for name, part in parts.items()}
    return {name: sum(array.nbytes for _, array in named) for name, named in arrays.items()}


def planned_peaks(folder: Path, low_memory: bool) -> dict[str, int]:
    """Stage -> the most bytes within it, as `memory.plan` has it for this device, of the run of `pipeline_memory`."""
    checkpoint = locate(folder)
    spec, device = checkpoint.spec, backend.device_name()
    tokens = Tokenizer(TOKENIZER, checkpoint.transformer_config.text_len)
    longest = max(int(tokens(clean_prompt(text))[1].sum()) for text in (PROMPT, spec.negative_prompt))
    setting = Setting(spec.width, spec.height, spec.num_frames, mx.float32, tokens=longest)
    plan = plans(Dimensions.of_checkpoint(checkpoint), setting, device)[low_memory]
    return {{"decode": "frames"}.get(stage.name, stage.name): stage.peak for stage in plan.stages}


def pipeline_memory(folder: Path, low_memory: bool) -> Iterator[tuple[str, int, int]]:
    """(stage, bytes held at its end, most bytes within it) of one run, beyond what was held before."""
    rope_table.cache_clear()  # of another size, which would leave memory in the middle of the run
    mx.clear_cache()
    before = mx.get_active_memory()
    pipe = mlx_wan.WanPipeline.from_pretrained(folder, dtype=mx.float32, low_memory=low_memory)
    mx.reset_peak_memory()
    for event in pipe.stream(PROMPT, seed=0):
        if event.index == event.total:
            held = mx.get_active_memory()
            yield event.stage, held - before, max(held, mx.get_peak_memory()) - before
            mx.reset_peak_memory()


if __name__ == "__main__":
    start = time.perf_counter()
    code = main()
    print(f"\n{time.perf_counter() - start:.0f} s", file=sys.stderr)
    sys.exit(code)
