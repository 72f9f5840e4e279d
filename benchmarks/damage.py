"""Feeds every reader of other people's files randomly damaged ones; each must end in values or in one clear line.

    uv run python benchmarks/damage.py              # 1,000 files a reader
    uv run python benchmarks/damage.py --files 100 --seed 3

Bytes are changed, lost and added, sizes and counts in headers made huge, files cut off. A file may take 5 seconds
and the process 1 GB; anything but values or a WanError is a failure. tests/weights/test_damage.py runs a sample.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx_wan  # noqa: F401  first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip

from mlx_wan import backend
from mlx_wan.errors import WanError
from mlx_wan.lora.load import read_lora, transformer_shapes
from mlx_wan.models.transformer import TransformerConfig
from mlx_wan.resume import arrays_of, expected, load_done, load_point, read_record, save_point, with_arrays
from mlx_wan.schedulers import make_scheduler
from mlx_wan.text import Tokenizer
from mlx_wan.weights.checkpoint import EMBEDDED
from mlx_wan.weights.clip import image_half
from mlx_wan.weights.diffusers import read_configs
from mlx_wan.weights.files import read_tensors
from mlx_wan.weights.locate import locate
from mlx_wan.weights.loose import find_tokenizer
from mlx_wan.weights.spiece import TENSOR, tokenizer_json

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))
import checkpoint  # noqa: E402
import small  # noqa: E402

SHARDS, TOKENIZER = "diffusion_pytorch_model.safetensors.index.json", "google/umt5-xxl/tokenizer.json"
FIXTURES, GOLDEN = TESTS / "weights" / "fixtures", TESTS / "golden"
SECONDS, BYTES = 5.0, 10**9
HEADER = 2500  # bytes at the start that half of the damage hits


def read_values(path: Path) -> None:
    mx.eval([info.load() for info in read_tensors(path).values()])


def read_text_encoder(path: Path) -> None:
    """One with a tokenizer in it, which is found after the tensors."""
    read_values(path)
    find_tokenizer(path.parent, {}, read_tensors(path).get(TENSOR))


def read_adapter(path: Path) -> None:
    lora = read_lora(path, transformer_shapes(TransformerConfig(**small.TRANSFORMER)))
    for layer in lora.layers:
        mx.eval(lora.adapter(layer).delta())
    mx.eval([lora.shift(name) for name in lora.shifts])


def read_repository(path: Path) -> None:
    """The damaged file is the vae's config.json of an otherwise whole Diffusers repository."""
    golden = json.loads((GOLDEN / "diffusers.json").read_text())
    folder = path.parent / "repository"
    golden["image_encoder"] = json.loads((GOLDEN / "diffusers_image.json").read_text())["i2v"]["image_encoder"]
    for part in ("transformer", "text_encoder", "image_encoder", "vae"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(golden[part]["config"]))
    (folder / "model_index.json").write_text(json.dumps(golden["model_index"]))
    shutil.copy(path, folder / "vae" / "config.json")
    read_configs(folder)


def read_index(path: Path) -> None:
    """The same of its model_index.json."""
    good = path.parent / "vae.json"
    good.write_bytes(_vae_config())
    read_repository(good)
    shutil.copy(path, path.parent / "repository" / "model_index.json")
    read_configs(path.parent / "repository")


def read_image_encoder(path: Path) -> None:
    mx.eval([info.load() for info in image_half(path, read_tensors(path)).values()])


def read_tokenizer(path: Path) -> None:
    tokenizer_json(path.read_bytes())


def read_checkpoint(name: str) -> Callable[[Path], None]:
    """The damaged file is `name` in an otherwise whole official checkpoint; a native one if that is `native/...`."""

    def read(path: Path) -> None:
        folder = path.parent / name.split("/")[0]
        if not folder.exists():
            if name.startswith("native/"):
                shutil.copytree(EMBEDDED, folder)
            else:
                checkpoint.write_official(folder)
        target = folder / name.partition("/")[2]
        shutil.copy(path, target)
        found = locate(folder)
        if target.name == "tokenizer.json":
            Tokenizer(found.tokenizer, found.transformer_config.text_len)("a red circle")

    return read


def _official(name: str) -> Callable[[], bytes]:
    def whole() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return (checkpoint.write_official(Path(folder) / "model") / name).read_bytes()

    return whole


def read_state(path: Path) -> None:
    read_record(path)
    load_done(path)
    mx.eval(list(arrays_of(load_point(path, make_scheduler("unipc", 5, 5.0))).values()))


def _state() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        latents = mx.random.normal((1, 1, 2, 2, 4), key=mx.random.key(0))
        point = expected(make_scheduler("unipc", 5, 5.0), 2)
        arrays = dict.fromkeys(arrays_of(point), latents)
        save_point(Path(folder) / "a.safetensors", with_arrays(point, arrays), {"settings": {"prompt": "a"}}, [latents])
        return (Path(folder) / "a.safetensors").read_bytes()


def _plain() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        arrays = {"a": mx.zeros((3, 4)), "b.c": mx.ones((5,), mx.bfloat16)}
        mx.save_safetensors(f"{folder}/a.safetensors", arrays, {"x": "y"})
        return Path(folder, "a.safetensors").read_bytes()


def _vae_config() -> bytes:
    return json.dumps(json.loads((GOLDEN / "diffusers.json").read_text())["vae"]["config"]).encode()


def _image_encoder() -> bytes:
    """An image encoder with transformers' names, eight wide."""
    names = json.loads((GOLDEN / "diffusers_image.json").read_text())["with_projection"]["tensors"]
    shapes = {"cls_embedding": (8,), "patch_embedding.weight": (8, 3, 2, 2), "pos_embedding": (5, 8), "head": (4, 8)}
    arrays = {
        own: mx.zeros(shapes.get(name, (8, 8) if name.endswith("weight") else (8,))) for own, name in names.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        mx.save_safetensors(f"{folder}/a.safetensors", arrays)
        return Path(folder, "a.safetensors").read_bytes()


def _scaled() -> bytes:
    """A safetensors file of ComfyUI's scaled 8-bit floats."""
    tensors = {
        "a.weight": ("F8_E4M3", [8, 16], bytes(range(128))),
        "a.scale_weight": ("F32", [], b"\0\0\0?"),
        "b.weight": ("F8_E4M3", [4, 4], bytes(16)),
        "b.weight_scale": ("F32", [4], b"\0\0\x80?" * 4),
        "b.comfy_quant": ("U8", [27], b'{"format": "float8_e4m3fn"}'),
        "scaled_fp8": ("F8_E4M3", [2], bytes(2)),
    }
    header, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


# name -> (suffix, a whole file, what reads it)
READERS: dict[str, tuple[str, Callable[[], bytes], Callable[[Path], None]]] = {
    "safetensors": (".safetensors", _plain, read_values),
    "pth": (".pth", (FIXTURES / "tensors.pth").read_bytes, read_values),
    "index": (".json", _official(SHARDS), read_checkpoint(f"official/{SHARDS}")),
    "config": (".json", _official("config.json"), read_checkpoint("official/config.json")),
    "native config": (".json", (EMBEDDED / "config.json").read_bytes, read_checkpoint("native/config.json")),
    "tokenizer": (".json", _official(TOKENIZER), read_checkpoint(f"official/{TOKENIZER}")),
    "kept run": (".safetensors", _state, read_state),
    "gguf": (".gguf", (FIXTURES / "wan.gguf").read_bytes, read_values),
    "gguf text encoder": (".gguf", (FIXTURES / "umt5.gguf").read_bytes, read_text_encoder),
    "scaled": (".safetensors", _scaled, read_values),
    "comfy_quant": (".safetensors", (FIXTURES / "comfy_quant.safetensors").read_bytes, read_values),
    "lora": (".safetensors", (GOLDEN / "lora" / "diffusers.safetensors").read_bytes, read_adapter),
    "kohya": (".safetensors", (GOLDEN / "lora" / "kohya.safetensors").read_bytes, read_adapter),
    "lokr": (".safetensors", (GOLDEN / "lora" / "lokr.safetensors").read_bytes, read_adapter),
    "spiece": (".model", (FIXTURES / "spiece.model").read_bytes, read_tokenizer),
    "loha": (".safetensors", (GOLDEN / "lora" / "loha.safetensors").read_bytes, read_adapter),
    "image encoder": (".safetensors", _image_encoder, read_image_encoder),
    "diffusers": (".json", _vae_config, read_repository),
    "diffusers index": (
        ".json",
        lambda: json.dumps(json.loads((GOLDEN / "diffusers_image.json").read_text())["i2v"]["model_index"]).encode(),
        read_index,
    ),
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 5, 30))):
        if not changed:
            break
        at = rng.randrange(len(changed) if rng.random() < 0.5 else min(len(changed), HEADER))
        kind = rng.random()
        if kind < 0.5:
            changed[at] = rng.randrange(256)
        elif kind < 0.65:
            del changed[at : at + rng.randrange(1, 9)]
        elif kind < 0.8:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind < 0.9:  # a length or a count that is huge
            changed[at : at + 8] = (2 ** rng.randrange(16, 64)).to_bytes(8, "little")
        elif kind < 0.95:
            changed[at : at + 1] = b"9" * rng.randrange(1, 12)  # the same in JSON
        else:
            del changed[at:]
    return bytes(changed)


def run(reader: str, files: int, seed: int, folder: Path) -> tuple[int, float]:
    """Reads `files` damaged files; returns how many ended in an error, and the longest time one took.

    Raises:
        AssertionError: one took too long, or ended in a message of several lines or without its path.
        Exception: whatever a reader let through.
    """
    suffix, whole, read = READERS[reader]
    data, rng, path = whole(), random.Random(seed), folder / f"file{suffix}"
    path.write_bytes(data)
    read(path)  # whole, it can be read
    errors, longest = 0, 0.0
    for i in range(files):
        path.write_bytes(damaged(data, rng))
        start = time.perf_counter()
        message = _message(read, path, f"{reader}, seed {seed}, file {i}")
        if message is not None:
            errors += 1
            assert "\n" not in message, f"{reader} {i}: {message}"
            assert message.startswith((str(folder), "holds")), f"{reader} {i}: {message}"
        longest = max(longest, time.perf_counter() - start)
        assert longest < SECONDS, f"{reader}, seed {seed}, file {i}: {longest:.1f} s"
    return errors, longest


def _message(read: Callable[[Path], None], path: Path, which: str) -> str | None:
    """What the reader says of a file, None if it read it."""
    try:
        read(path)
    except WanError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{which}: {type(error).__name__}: {error}") from error
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Feed damaged files to every reader.")
    parser.add_argument("--files", type=int, default=1000, help="a reader")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| reader | files | errors | longest |\n| --- | --- | --- | --- |")
    for reader in READERS:
        with tempfile.TemporaryDirectory() as folder:
            errors, longest = run(reader, args.files, args.seed, Path(folder))
        print(f"| {reader} | {args.files} | {errors} | {longest:.3f} s |")
    peak = backend.peak_memory()
    print(f"peak memory of the process {peak / 1e6:.0f} MB")
    assert peak < BYTES


if __name__ == "__main__":
    main()
