"""Files of any names: which is which part of a model, told by what is in them, and where the tokenizer is."""

import contextlib
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlx_wan.errors import CheckpointError
from mlx_wan.weights import spiece
from mlx_wan.weights.bundle import sections
from mlx_wan.weights.checkpoint import UMT5_TOKENIZER, Component
from mlx_wan.weights.files import INDEX_SUFFIX, TENSOR_SUFFIXES, read_index, read_tensors
from mlx_wan.weights.identify import LABELS, identify
from mlx_wan.weights.tensors import TensorInfo

NEEDED = ("transformer", "text_encoder", "vae")  # the parts that every model has
SHOWN = 2  # files that cannot be read, in a message
NOISE = re.compile(r"(high|low)[ _-]?noise")  # wan2.2_t2v_high_noise_14B_fp16, Wan2.2-I2V-A14B-HighNoise-Q4_K_M
TOKENIZERS = ("tokenizer.json", "tokenizer/tokenizer.json", UMT5_TOKENIZER)


def by_content(folder: Path, given: Collection[str]) -> dict[str, Path]:
    """Transformer, text encoder and VAE among the tensor files in and under a folder, told by what they hold.

    Two transformers are told apart by their paths, as far as those say which is of high and which of low noise. Files
    that cannot be read are passed over, since ComfyUI's folders hold other models too.

    Raises:
        CheckpointError: there is not exactly one of each that is not `given`; it names the files that cannot be read.
    """
    found: dict[str, list[Path]] = {part: [] for part in (*NEEDED, "image_encoder") if part not in given}
    unread = []
    for file in tensor_files(folder):
        try:
            kinds = components(file)
        except CheckpointError as error:
            unread.append(str(error))
            continue
        for component in kinds:
            if component in found:
                found[component].append(file)
    if "transformer" in found and (pair := _experts(folder, found["transformer"])):
        found |= pair
    for part, files in found.items():
        if len(files) != 1 and (files or part in NEEDED):
            names = ", ".join(file.relative_to(folder).as_posix() for file in files[:4])
            what = f"several files with a {LABELS[part]} ({names})" if files else f"no {LABELS[part]}"
            passed = f" (passed over: {'; '.join(unread[:SHOWN])})" if unread and not files else ""
            two = " and, for a model of two experts, --transformer_2 FILE" if part == "transformer" and files else ""
            raise CheckpointError(f"{folder}: has {what}; say which with --{part} FILE{two}{passed}")
    return {part: files[0] for part, files in found.items() if files}


def _experts(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Two files of which one path below the folder says high noise and the other low, as all who publish them do."""
    said = {tuple(sorted(set(NOISE.findall(file.relative_to(folder).as_posix().lower())))): file for file in files}
    if len(files) != 2 or said.keys() != {("high",), ("low",)}:
        return {}
    return {"transformer": [said["high",]], "transformer_2": [said["low",]]}


def has_parts(folder: Path) -> bool:
    """Whether some tensor file under the folder, whatever its name, is a part that every model has."""
    for file in tensor_files(folder):
        with contextlib.suppress(CheckpointError):
            if set(components(file)) & set(NEEDED):
                return True
    return False


def components(file: Path) -> list[str]:
    """What a file holds: kinds of parts, more than one in ComfyUI's checkpoints, or what else it is."""
    found = [identify({name: info.shape for name, info in part.items()}) for part in sections(read_tensors(file))]
    return [identity.component for identity in found]


def tensor_files(folder: Path) -> list[Path]:
    """Every tensor file in a folder and two levels below; the shards of an index are one, the index."""
    files = [file for depth in ("*", "*/*", "*/*/*") for file in sorted(folder.glob(depth)) if file.is_file()]
    indices = [file for file in files if file.name.endswith(INDEX_SUFFIX)]
    shards = {shard for index in indices for shard in read_index(index, must_exist=False).values()}
    return indices + [file for file in files if file.suffix in TENSOR_SUFFIXES and file not in shards]


def find_tokenizer(folder: Path, found: Mapping[str, Path], own: TensorInfo | None) -> Path | bytes:
    """The tokenizer.json that was found, or the one the text encoder's file carries as a tensor."""
    if "tokenizer" in found:
        return found["tokenizer"]
    if own is not None:
        try:
            return spiece.tokenizer_json(bytes(np.array(own.load())))
        except CheckpointError as error:
            raise CheckpointError(f"{own.file}: {error}") from error
    for name in TOKENIZERS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder}: there is no tokenizer, neither in the text encoder's file nor as tokenizer.json; "
        "give one with --tokenizer (google/umt5-xxl has it)"
    )


def without(part: Component, name: str) -> Component:
    """A part without the tensor called `name`, which is none of its parameters."""
    return replace(part, tensors={other: info for other, info in part.tensors.items() if other != name})
