"""Writes the small checkpoint in the official repository's layout, without torch."""

import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import small

CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
GOLDEN = Path(__file__).parent / "golden"
# The official config.json has these; patch_size, text_dim and the like are left to the code.
CONFIG_KEYS = (
    "model_type", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "out_dim", "num_heads", "num_layers", "eps",
)  # fmt: skip


def official_weights(part: str, model: str = "small") -> dict[str, np.ndarray]:
    """Every tensor of a component under its official name and in its official layout."""
    names = json.loads((GOLDEN / "names.json").read_text())[model][part]
    return {name: small.weight(part, name, tuple(shape)) for name, shape in names.items()}


def clip_weights(model: str) -> dict[str, np.ndarray]:
    """The image encoder as its file has it: beside a text encoder, here a stub of one."""
    visual = {f"visual.{name}": array for name, array in official_weights("image_encoder", model).items()}
    return {"log_scale": np.zeros((), np.float32), "textual.norm.weight": np.ones(4, np.float32), **visual}


def write_official(folder: Path, model: str = "small") -> Path:
    """config.json, sharded transformers, text encoder and VAE as .pth, and the tokenizer; float32 throughout.

    model: one of `small.MODELS` that is small; two experts go into folders of their own.
    """
    parts = small.MODELS[model]
    experts = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
    for part in (name for name in parts if name.startswith("transformer")):
        place = folder / experts[part] if "transformer_2" in parts else folder
        place.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "WanModel"} | {key: parts[part][key] for key in CONFIG_KEYS}
        config |= {key: parts[part][key] for key in ("vace_layers", "vace_in_dim") if key in parts[part]}
        (place / "config.json").write_text(json.dumps(config))
        write_shards(place, official_weights(part, model))
    write_pth(folder / "models_t5_umt5-xxl-enc-bf16.pth", official_weights("text_encoder", model))
    if "image_encoder" in parts:
        write_pth(folder / f"{CLIP}.pth", clip_weights(model))
    vae = "Wan2.2_VAE.pth" if "dec_dim" in parts["vae"] else "Wan2.1_VAE.pth"
    write_pth(folder / vae, official_weights("vae", model))
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    shutil.copy(GOLDEN / "tokenizer.json", folder / "google" / "umt5-xxl" / "tokenizer.json")
    return folder


def write_shards(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    names, where = sorted(tensors), {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"diffusion_pytorch_model-{i:05}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_pth(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """What torch.save makes of a state dict of float32 tensors: a zip of a pickle and raw storages."""
    pickle = [b"\x80\x02", b"ccollections\nOrderedDict\n", b")R("]
    with zipfile.ZipFile(path, "w") as archive:
        for key, (name, tensor) in enumerate(tensors.items()):
            pickle += [_text(name), _tensor(str(key), tensor)]
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(tensor).tobytes())
        archive.writestr("archive/data.pkl", b"".join([*pickle, b"u."]))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _whole(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _tensor(key: str, tensor: np.ndarray) -> bytes:
    """Opcodes for torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""
    strides = [s // tensor.itemsize for s in tensor.strides]
    storage = [b"(", _text("storage"), b"ctorch\nFloatStorage\n", _text(key), _text("cpu"), _whole(tensor.size), b"tQ"]
    numbers = [b"(", *map(_whole, tensor.shape), b"t", b"(", *map(_whole, strides), b"t"]
    rest = [b"\x89", b"ccollections\nOrderedDict\n", b")R", b"tR"]
    return b"".join([b"ctorch._utils\n_rebuild_tensor_v2\n", b"(", *storage, _whole(0), *numbers, *rest])
