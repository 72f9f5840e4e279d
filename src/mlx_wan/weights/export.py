"""Back to the layouts of others: the official repository's and Diffusers', with their names and in torch's order."""

import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_wan.errors import UserError
from mlx_wan.models.vae22 import VAEConfig
from mlx_wan.weights.checkpoint import (
    CLIP,
    OFFICIAL,
    OFFICIAL_21,
    OFFICIAL_21_I2V,
    OFFICIAL_EXPERTS,
    Checkpoint,
    Layout,
    diffusers_layout,
)
from mlx_wan.weights.clip import TEXT_HALF, separated
from mlx_wan.weights.diffusers import write_configs
from mlx_wan.weights.files import read_tensors
from mlx_wan.weights.layouts import (
    DIFFUSERS_TRANSFORMER,
    DIFFUSERS_VAE,
    DIFFUSERS_VAE21,
    HF_IMAGE_ENCODER,
    HF_TEXT_ENCODER,
    Dialect,
    nested,
)
from mlx_wan.weights.layouts import OFFICIAL as OFFICIAL_NAMES
from mlx_wan.weights.pickles import STORAGE_DTYPES
from mlx_wan.weights.save import replacing, tensor_bytes, write_json, write_sharded
from mlx_wan.weights.tensors import TensorInfo

Parts = Mapping[str, list[TensorInfo]]
# The fields of the official config.json; what it leaves out, the official code knows.
CONFIG_KEYS = (
    "model_type", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "out_dim", "num_heads", "num_layers", "eps",
)  # fmt: skip
TOKENIZER_CONFIG = {
    "tokenizer_class": "T5TokenizerFast",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


def write_official(folder: Path, checkpoint: Checkpoint, parts: Parts, max_shard_bytes: int) -> None:
    """The repository Wan's own code reads: .pth for text encoder, image encoder and VAE too.

    Raises UserError for a model whose image encoder was read from a file without CLIP's text half, which the official
    code wants and this package does not keep.
    """
    if checkpoint.transformer_2 is not None:
        layout = OFFICIAL_EXPERTS
    elif checkpoint.image_encoder is not None:
        layout = OFFICIAL_21_I2V
    else:
        layout = OFFICIAL if checkpoint.vae.identity.family == OFFICIAL.vae else OFFICIAL_21
    files = _first_files(layout)
    rest = [] if checkpoint.image_encoder is None else _text_half(checkpoint.image_encoder.path)
    for part in layout.configs:
        _write_shards(folder / files[part], parts[part], OFFICIAL_NAMES, max_shard_bytes)
    for part in ("text_encoder", "vae"):
        write_pth(folder / files[part], [torch_order(info, OFFICIAL_NAMES) for info in parts[part]])
    if rest:
        seeing = [torch_order(info, OFFICIAL_NAMES) for info in parts["image_encoder"]]
        write_pth(folder / files["image_encoder"], [*rest, *(replace(i, name=f"visual.{i.name}") for i in seeing)])
    _write_tokenizer(folder / files["tokenizer"], checkpoint)
    known = vars(checkpoint.transformer_config)
    keys = (*CONFIG_KEYS, *(("vace_layers", "vace_in_dim") if checkpoint.transformer_config.vace_layers else ()))
    name = "VaceWanModel" if checkpoint.transformer_config.vace_layers else "WanModel"
    config = {"_class_name": name, **{key: known[key] for key in keys}}
    for name in layout.configs.values():
        write_json(folder / name, config)


def _text_half(path: Path) -> list[TensorInfo]:
    """What an official file of CLIP has besides the half that sees."""
    rest = [info for name, info in read_tensors(path).items() if name.startswith(TEXT_HALF)]
    if not rest:
        raise UserError(
            f"{path}: has no text half, which Wan's own code wants; give the official file, --image_encoder {CLIP}.pth"
        )
    return rest


def write_diffusers(folder: Path, checkpoint: Checkpoint, parts: Parts, max_shard_bytes: int) -> None:
    """The repository that diffusers' pipeline of such a model reads; model_index.json is written last."""
    layout = diffusers_layout(checkpoint.transformer_2 is not None, checkpoint.image_encoder is not None)
    files = _first_files(layout)
    vae = checkpoint.vae_config
    dialects = {
        **dict.fromkeys(("transformer", "transformer_2"), DIFFUSERS_TRANSFORMER),
        "text_encoder": HF_TEXT_ENCODER,
        "image_encoder": HF_IMAGE_ENCODER,
        "vae": DIFFUSERS_VAE if isinstance(vae, VAEConfig) else DIFFUSERS_VAE21,
    }
    for part, tensors in parts.items():
        if part == "image_encoder":
            tensors = separated(tensors)
        elif part == "vae" and not isinstance(vae, VAEConfig):
            tensors = [replace(info, name=nested(info.name, vae.num_res_blocks)) for info in tensors]
        _write_shards(folder / files[part], tensors, dialects[part], max_shard_bytes)
    _write_tokenizer(folder / files["tokenizer"], checkpoint)
    for name, content in write_configs(checkpoint).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, content)


WRITERS: dict[str, Callable[[Path, Checkpoint, Parts, int], None]] = {
    "official": write_official,
    "diffusers": write_diffusers,
}


def _first_files(layout: Layout) -> dict[str, str]:
    return {part: names[0] for part, names in layout.files.items()}


def _write_shards(path: Path, tensors: list[TensorInfo], dialect: Dialect, max_shard_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    renamed = [torch_order(info, dialect) for info in tensors]
    write_sharded(path.parent, path.name.removesuffix(".safetensors"), renamed, max_shard_bytes, {"format": "pt"})


def _write_tokenizer(path: Path, checkpoint: Checkpoint) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(checkpoint.tokenizer_json())
    write_json(path.with_name("tokenizer_config.json"), TOKENIZER_CONFIG)


def torch_order(info: TensorInfo, dialect: Dialect) -> TensorInfo:
    """A tensor of ours as `dialect` has it: its name there, channels second, norm weights with torch's ones."""
    name, shape = dialect.from_official(info.name), info.shape
    if len(shape) >= 4:
        turned = (shape[0], shape[-1], *shape[1:-1])
        return replace(info, name=name, shape=turned, load=lambda: mx.contiguous(mx.moveaxis(info.load(), -1, 1)))
    if info.name.endswith("gamma"):
        # Attention works on frames, everything else on clips: one dimension fewer.
        spread = (*shape, 1, 1) if info.name.endswith(".norm.gamma") else (*shape, 1, 1, 1)
        return replace(info, name=name, shape=spread, load=lambda: info.load().reshape(spread))
    return replace(info, name=name)


# --- .pth ----------------------------------------------------------------------------------------------------

STORAGES = {dtype: storage for storage, dtype in STORAGE_DTYPES.items()}
ZIP_ROOT = "archive"


def write_pth(path: Path, tensors: list[TensorInfo]) -> None:
    """A state dict as torch.save writes it, one tensor in memory at a time; `torch.load` reads it."""
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{ZIP_ROOT}/data.pkl", _pickle(tensors))
        archive.writestr(f"{ZIP_ROOT}/byteorder", "little")
        for key, info in enumerate(tensors):
            with archive.open(f"{ZIP_ROOT}/data/{key}", "w", force_zip64=True) as file:
                file.write(tensor_bytes(info))
        archive.writestr(f"{ZIP_ROOT}/version", "3\n")


def _pickle(tensors: list[TensorInfo]) -> bytes:
    """An OrderedDict of names and torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, {})."""
    empty = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02", empty, b"("]
    for key, info in enumerate(tensors):
        size = 1
        strides: list[int] = []
        for n in reversed(info.shape):
            strides.insert(0, size)
            size *= n
        storage = [b"(", _text("storage"), b"ctorch\n", STORAGES[info.dtype].encode(), b"\n", _text(str(key))]
        storage += [_text("cpu"), _whole(size), b"tQ"]
        numbers = [b"(", *map(_whole, info.shape), b"t(", *map(_whole, strides), b"t"]
        parts += [_text(info.name), b"ctorch._utils\n_rebuild_tensor_v2\n(", *storage, _whole(0), *numbers]
        parts += [b"\x89", empty, b"tR"]
    return b"".join([*parts, b"u."])


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _whole(value: int) -> bytes:
    """An integer of the pickle: four bytes, or as many as it needs."""
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + value.to_bytes(8, "little")
