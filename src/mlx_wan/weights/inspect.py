"""Describes tensor files and checkpoint folders from their headers alone: what is in them, and which model it is."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.weights.bundle import sections
from mlx_wan.weights.checkpoint import EMBEDDED, PARTS, SINGLE_FILES, Layout
from mlx_wan.weights.files import INDEX_SUFFIX, TENSOR_SUFFIXES, read_index, read_metadata, read_tensors
from mlx_wan.weights.identify import COMPONENTS, LABELS, Identity, identify
from mlx_wan.weights.locate import layout_of
from mlx_wan.weights.loose import NEEDED
from mlx_wan.weights.tensors import TensorInfo

# The part of a name that says where in the model a tensor sits: "blocks.7", "encoder.downsamples.2", "head".
BLOCK = re.compile(
    r"((?:encoder|decoder)\.)?(?:blocks|downsamples|upsamples|middle)\.\d+|((?:encoder|decoder)\.)?[^.]+"
)


def describe(path: str | Path) -> dict[str, Any]:
    """Everything headers tell about a .safetensors or .pth file, an index of shards, a folder, or "tiny".

    Returns:
        A dict that JSON can hold:
        path, model (what it is), use (the flag of `mlx-wan generate` it goes to, None if to none),
        layout (of a checkpoint folder, else None), quantization (None if there is none),
        total: {tensors, parameters, bytes},
        components: name ("transformer_2": the second expert) -> {model, tensors, parameters, bytes,
        dtypes: {dtype: bytes}, blocks: {block: {tensors, parameters, bytes}}},
        tensors: [{name, shape, dtype, bytes, file, component}],
        problems: [one line for each file of a folder that is damaged or missing].

    Raises:
        UserError: nothing there, or no tensors in it.
        CheckpointError: a single file that is damaged.
    """
    path = EMBEDDED if str(path) == "tiny" and not Path(path).exists() else Path(path).expanduser()
    problems: list[str] = []
    groups = _groups(path, problems)
    identities = [_identity(group) for group in groups]
    config = _config(path / "config.json", problems) if path.is_dir() else {}
    quantization = _quantization(config, groups)
    root = path if path.is_dir() else path.parent
    layout = layout_of(path, config) if path.is_dir() else None
    parts = [_part(identity, group, layout, root) for group, identity in zip(groups, identities, strict=True)]
    rows = [
        _row(info, part, group, root, quantization)
        for group, part in zip(groups, parts, strict=True)
        for info in group.values()
    ]
    if layout is None and path.is_dir() and _whole(identities):
        layout = SINGLE_FILES
    return {
        "path": str(path),
        "model": _model(config, identities),
        "use": _use(path, layout, identities),
        "layout": layout and layout.name,
        "quantization": quantization,
        "total": _sum(rows),
        "components": _components(rows, parts, identities),
        "tensors": [{key: value for key, value in row.items() if key != "parameters"} for row in rows],
        "problems": problems,
    }


def _whole(identities: list[Identity]) -> bool:
    """Whether there is exactly one of each part that every model has, of a kind that runs."""
    found = sorted(identity.component for identity in identities if identity.component in NEEDED)
    return found == sorted(NEEDED) and all(i.runs for i in identities if i.component in COMPONENTS)


def _use(path: Path, layout: Layout | None, identities: list[Identity]) -> str | None:
    if any(identity.component in COMPONENTS and not identity.runs for identity in identities):
        return None
    if path.is_dir():
        adapter = len(identities) == 1 and identities[0].component == "lora"  # as PEFT and diffusers write them
        flag = "lora" if adapter else "ckpt_dir"
        return f"mlx-wan generate --{flag} {path}" if adapter or layout is not None else None
    if len(identities) > 1:  # ComfyUI's checkpoint
        return f"mlx-wan generate --ckpt_dir {path}" if _whole(identities) else None
    component = identities[0].component
    if component == "lora":
        return f"mlx-wan generate --lora {path} [STRENGTH]"
    return f"mlx-wan generate --ckpt_dir DIR --{component} {path}" if component in COMPONENTS else None


def _groups(path: Path, problems: list[str]) -> list[dict[str, TensorInfo]]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [dict(part) for part in sections(read_tensors(path))]
    groups = _folder_groups(path, problems)
    if not groups and not problems:
        raise UserError(f"{path}: no tensor files in this folder ({', '.join(TENSOR_SUFFIXES)})")
    return groups


def _folder_groups(folder: Path, problems: list[str]) -> list[dict[str, TensorInfo]]:
    """The tensors of every file under `folder`, shards of one index together."""
    groups = []
    files = [file for file in sorted(folder.rglob("*")) if not _hidden(file, folder) and file.is_file()]
    sharded: set[Path] = set()
    for index in (file for file in files if file.name.endswith(INDEX_SUFFIX)):
        try:
            shards = set(read_index(index, must_exist=False).values())
            if shards == {index.with_name(index.name.removesuffix(".index.json"))}:
                continue  # the index of one whole file, which speaks for itself
            groups.append(read_tensors(index))
            sharded |= shards
        except CheckpointError as error:
            problems.append(str(error))
    for file in files:
        if file.suffix in TENSOR_SUFFIXES and file not in sharded:
            try:
                groups += map(dict, sections(read_tensors(file)))
            except CheckpointError as error:
                problems.append(str(error))
    return groups


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
        if isinstance(config, dict):
            return config
    except (OSError, ValueError, RecursionError):
        pass
    problems.append(f"{path}: cannot be read as a JSON object")
    return {}


def _shapes(group: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in group.items()}


def _identity(group: Mapping[str, TensorInfo]) -> Identity:
    shapes = _shapes(group)
    identity = identify(shapes)
    if identity.model.endswith("unreleased size") and shapes == _embedded_shapes(identity.component):
        return Identity(identity.component, f"{LABELS[identity.component]} of the embedded model (tiny)", runs=True)
    return identity


def _embedded_shapes(component: str) -> dict[str, tuple[int, ...]] | None:
    for name in (f"{component}{INDEX_SUFFIX}", f"{component}.safetensors"):
        if (EMBEDDED / name).is_file():
            return _shapes(read_tensors(EMBEDDED / name))
    return None


def _quantization(config: Mapping[str, Any], groups: list[dict[str, TensorInfo]]) -> dict[str, Any] | None:
    """How matrices are packed, as config.json or the files' own metadata say; {} if only the tensors show it."""
    extra = config.get("mlx_wan")
    said = extra.get("quantization") if isinstance(extra, dict) else config.get("quantization")
    if isinstance(said, dict):
        return said
    packed = [group for group in groups if any(_is_packed(name, group) for name in group)]
    for group in packed:
        file = next(iter(group.values())).file
        if file.suffix == ".safetensors" and "quantization" in (metadata := read_metadata(file)):
            return json.loads(metadata["quantization"])
    return {} if packed else None


def _is_packed(name: str, group: Mapping[str, TensorInfo]) -> bool:
    base, _, last = name.rpartition(".")
    return last == "weight" and f"{base}.scales" in group and group[name].dtype == "uint32"


def _row(
    info: TensorInfo,
    component: str,
    group: Mapping[str, TensorInfo],
    root: Path,
    quantization: Mapping[str, Any] | None,
) -> dict[str, Any]:
    parameters = math.prod(info.shape)
    base, _, last = info.name.rpartition(".")
    if _is_packed(info.name, group) and quantization and quantization.get("bits"):
        parameters = parameters * 32 // int(quantization["bits"])
    elif last in ("scales", "biases") and f"{base}.weight" in group:
        parameters = 0  # part of how the weight is stored
    return {
        "name": info.name,
        "shape": list(info.shape),
        "dtype": info.stored,
        "bytes": info.nbytes,
        "file": info.file.relative_to(root).as_posix(),
        "component": component,
        "parameters": parameters,
    }


def _sum(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "tensors": len(rows),
        "parameters": sum(row["parameters"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
    }


def _part(identity: Identity, group: Mapping[str, TensorInfo], layout: Layout | None, root: Path) -> str:
    """The component, or "transformer_2" for what the layout keeps in the second expert's place."""
    file = next(iter(group.values())).file.relative_to(root).as_posix()
    places = layout.files.get("transformer_2", ()) if layout else ()
    second = any(file.startswith(name.removesuffix(".safetensors")) for name in places if name.endswith(".safetensors"))
    return "transformer_2" if second and identity.component == "transformer" else identity.component


def _components(rows: list[dict[str, Any]], parts: list[str], identities: list[Identity]) -> dict[str, Any]:
    summary = {}
    for component in dict.fromkeys((*PARTS, *parts)):
        own = [row for row in rows if row["component"] == component]
        if not own:
            continue
        blocks: dict[str, list[dict[str, Any]]] = {}
        dtypes: dict[str, int] = {}
        for row in own:
            match = BLOCK.match(row["name"])
            blocks.setdefault(match[0] if match else row["name"], []).append(row)
            dtypes[row["dtype"]] = dtypes.get(row["dtype"], 0) + row["bytes"]
        names = (identity.model for identity, part in zip(identities, parts, strict=True) if part == component)
        models = dict.fromkeys(names)
        summary[component] = {
            "model": "; ".join(models),
            **_sum(own),
            "dtypes": dtypes,
            "blocks": {block: _sum(members) for block, members in blocks.items()},
        }
    return summary


def _model(config: Mapping[str, Any], identities: list[Identity]) -> str:
    """One name for the whole: the transformer's when there is one, since it is what models differ by."""
    extra = config.get("mlx_wan")
    if isinstance(extra, dict) and "model" in extra:
        return str(extra["model"])
    transformers = [identity.model for identity in identities if identity.component == "transformer"]
    if len(transformers) == 2 and transformers[0] == transformers[1] and "A14B (one expert)" in transformers[0]:
        return transformers[0].split(" (one expert)")[0]  # both experts are here
    models = dict.fromkeys(transformers or [identity.model for identity in identities])
    return "; ".join(models) or "unknown"
