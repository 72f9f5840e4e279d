"""What each rank of test_parallel.py does: every way of sharing that its number of ranks allows.

one_rank.py MODEL OUT: writes latents to OUT-RANK.safetensors, and to OUT-RANK.json how much it held of each model.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conftest  # noqa: F401  the CPU, as in the tests
import mlx.core as mx
import small
from mlx.utils import tree_flatten
from PIL import Image

import mlx_wan
from mlx_wan.models.autoencoder import WanVAE
from mlx_wan.models.vae21 import VAE21Config, WanVAE21
from mlx_wan.models.vae22 import VAEConfig, WanVAE22
from mlx_wan.parallel.plan import Parallel

REQUEST = {"width": 96, "height": 64, "num_frames": 9, "num_inference_steps": 2, "seed": 3, "output_type": "latent"}
DECODED = (1, 3, 6, 4, 48), (1, 3, 5, 3, 16), (1, 2, 1, 2, 16)  # latents; the last of fewer rows than ranks
ENCODED = {48: (1, 5, 96, 64, 3), 16: (1, 5, 40, 24, 3)}  # channels of latents -> videos, of so many rows as above
INPUTS = {"latents": (1, 2, 4, 6, 48), "context": (1, 5, 64)}


def ways(size: int) -> dict[str, dict]:
    """Name -> arguments of Parallel."""
    found = {
        "tokens": {"ulysses_size": size},
        "weights": {"ulysses_size": size, "dit_fsdp": True, "t5_fsdp": True},
        "image": {"ulysses_size": size},
        "cache": {"ulysses_size": size},
    }
    if size % 2 == 0:
        found["guidance"] = {"ulysses_size": size // 2, "cfg_parallel": True}
    return found


def run(pipe: mlx_wan.WanPipeline, way: str) -> mx.array:
    """The latents of the request, from a picture too if the way says so: its first frame's tokens have timestep 0."""
    picture = {"image": Image.fromarray(small.picture())} if way == "image" else {}
    if way == "cache":  # of several ranks the others would not reuse anything: the first one's threshold counts
        threshold = 0.7 if pipe.parallel.is_first else 1e-6
        return pipe("two cats", **REQUEST | {"num_inference_steps": 5}, cache=threshold).latents
    return pipe("two cats", **REQUEST, **picture).latents


def velocity(pipe: mlx_wan.WanPipeline) -> mx.array:
    """One transformer call with a timestep for each token."""
    latents, context = (mx.array(small.random(name, shape)) for name, shape in INPUTS.items())
    return pipe.transformer(latents, mx.arange(12).reshape(1, 12) * 80.0, context)


def vae_of(channels: int) -> WanVAE:
    """A small VAE of the kind that has so many channels, with the same random weights in every rank."""
    kind, config, sizes = (WanVAE22, VAEConfig, small.VAE) if channels == 48 else (WanVAE21, VAE21Config, small.VAE21)
    mx.random.seed(5)
    return kind(config(**sizes, latents_mean=(0.0,) * channels, latents_std=(1.0,) * channels))


def decoded(parallel: Parallel, shape: tuple[int, ...]) -> mx.array:
    """Frames of random latents; if this rank gets none, one zero."""
    pieces = list(parallel.stream_decode(vae_of(shape[-1]), mx.array(small.random("decoded", shape))))
    return mx.concatenate(pieces, axis=1) if pieces else mx.zeros((1,))


def encoded(parallel: Parallel, channels: int) -> mx.array:
    """Latents of a random video."""
    return parallel.encode(vae_of(channels), mx.array(small.random("encoded", ENCODED[channels])))


def nbytes(model) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def main(folder: str, out: str) -> None:
    world = mx.distributed.init(strict=True, backend="ring")
    latents, held = {}, {}
    for shape in DECODED:
        latents[f"decoded {shape}"] = decoded(Parallel(world, world.size()), shape)
    for channels in ENCODED:
        latents[f"encoded {channels}"] = encoded(Parallel(world, world.size()), channels)
    pipes = {}
    for way, sharing in ways(world.size()).items():
        key = tuple(sharing.items())
        if key not in pipes:
            pipes[key] = mlx_wan.WanPipeline.from_pretrained(folder, parallel=Parallel(world, **sharing))
        pipe = pipes[key]
        latents[way] = run(pipe, way)
        if way == "tokens":
            latents["timesteps"] = velocity(pipe)
        held[way] = [nbytes(pipe.transformer), nbytes(pipe.text_encoder)]
    mx.save_safetensors(f"{out}-{world.rank()}.safetensors", latents)
    Path(f"{out}-{world.rank()}.json").write_text(json.dumps(held))


if __name__ == "__main__":
    main(*sys.argv[1:])
