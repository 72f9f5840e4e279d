"""Finds a checkpoint, tells its layout, and checks that its parts are there, of the right model, and fit."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.weights import spiece
from mlx_wan.weights.bundle import sections
from mlx_wan.weights.checkpoint import (
    EMBEDDED,
    EXPERT_FOLDERS,
    LAYOUTS,
    NATIVE,
    OFFICIAL,
    OFFICIAL_21_I2V,
    OFFICIAL_EXPERTS,
    PARTS,
    SINGLE_FILES,
    Checkpoint,
    Component,
    Layout,
    diffusers_layout,
    is_packed,
    layout_for,
    official_layout,
)
from mlx_wan.weights.clip import image_half
from mlx_wan.weights.diffusers import INDEX, read_configs
from mlx_wan.weights.dimensions import (
    check_fit,
    image_encoder_config,
    model_spec,
    text_encoder_config,
    transformer_config,
    vae_config,
)
from mlx_wan.weights.files import INDEX_SUFFIX, TENSOR_SUFFIXES, read_index, read_tensors
from mlx_wan.weights.fit import component_tensors
from mlx_wan.weights.hub import HUB_ID, download, is_hub_file, local_file
from mlx_wan.weights.identify import LABELS, identify
from mlx_wan.weights.layouts import official_names
from mlx_wan.weights.loose import NEEDED, by_content, components, find_tokenizer, has_parts, without
from mlx_wan.weights.quantize import Quantization
from mlx_wan.zoo import MODELS

USUAL = {"tokenizer": ("tokenizer.json",)}  # of a repository's files the one that is meant
MODEL_TYPES = ("t2v", "ti2v", "i2v", "flf2v", "vace")  # of the transformers that run, in config.json


def locate(
    where: str | Path | None = None,
    *,
    transformer: str | Path | None = None,
    transformer_2: str | Path | None = None,
    text_encoder: str | Path | None = None,
    image_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    task: str | None = None,
) -> Checkpoint:
    """The checkpoint in a folder, in one file of ComfyUI, of a Hub id ("Wan-AI/Wan2.2-TI2V-5B") or "tiny", this
    package's own.

    Single files take the place of the folder's own; with all that the model has given, `where` can be None. Files may
    be on the Hub, "OWNER/NAME/FILE", or "OWNER/NAME" of a repository with one file of tensors. `task` is one of
    `zoo.MODELS`, and needed only where files alone do not tell a model from an expert of another.

    Reads headers alone, and finds all that can be wrong with them, so that nobody waits for gigabytes to be read
    first. A Hub id downloads what is not in the cache yet.

    Raises:
        UserError: no such folder, or a file that is not a whole model.
        CheckpointError: files are missing, damaged, of another model or contradict config.json; tensors are
            missing, unexpected, misshapen or of a type that cannot be loaded.
    """
    given = {
        "transformer": transformer,
        "transformer_2": transformer_2,
        "text_encoder": text_encoder,
        "image_encoder": image_encoder,
        "vae": vae,
        "tokenizer": tokenizer,
    }
    files = {part: local_file(path, USUAL.get(part, ())) for part, path in given.items() if path is not None}
    for part, path in files.items():
        if not path.is_file():
            raise UserError(f"{path}: no such file (given as the {LABELS.get(part, part)})")
    if where is None:
        if lacking := [part for part in NEEDED if part not in files]:
            raise UserError(f"no checkpoint folder, and no {' and no '.join(lacking)}: give a folder or those files")
        return _read_parts(files["transformer"].parent, files, task)
    if str(where) == "tiny":
        if not (EMBEDDED / "config.json").is_file():
            raise CheckpointError(f"{EMBEDDED}: the embedded model is missing; install mlx-wan again")
        return _read_parts(EMBEDDED, files, task)
    folder = local_file(where) if is_hub_file(where) and not HUB_ID.fullmatch(str(where)) else Path(where).expanduser()
    if folder.is_dir():
        return _read_parts(folder, files, task)
    if folder.is_file():
        if len(parts := components(folder)) > 1:
            return _read_parts(folder.parent, dict.fromkeys(parts, folder) | files, task)
        identity = identify({name: info.shape for name, info in read_tensors(folder).items()})
        hint = "give it to --lora" if identity.component == "lora" else "give the folder of a whole checkpoint"
        if identity.component in NEEDED:
            others = " and ".join(f"--{part} FILE" for part in NEEDED if part != identity.component)
            hint += f", or --{identity.component} {folder.name} with a folder for the rest, or with {others}"
        raise UserError(f"{folder}: is a single file ({identity.model}); {hint}")
    if HUB_ID.fullmatch(str(where)):
        return _read_parts(download(str(where), _check_configs), files, task)
    raise UserError(f'{folder}: no such folder (a checkpoint folder, a Hub id, or "tiny" is needed)')


def _check_configs(folder: Path) -> None:
    """CheckpointError if a folder's configuration is of a model that does not run."""
    if (folder / INDEX).is_file():
        read_configs(folder)
    else:
        _read_config(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    """The transformer's config.json, once it is clear that it describes a model this package runs."""
    if _has_experts(folder):
        layout = OFFICIAL_EXPERTS
    elif folder.name in EXPERT_FOLDERS.values() and _has_experts(folder.parent):
        raise CheckpointError(f"{folder}: is one expert of two; give the folder that holds both, {folder.parent}")
    else:
        layout = OFFICIAL
    path = folder / layout.configs["transformer"]
    if not path.is_file():
        if any((folder / name).is_file() for name in NATIVE.files["transformer"]):
            raise CheckpointError(f"{folder}: half-written model: config.json is missing; convert it again")
        raise CheckpointError(_missing_message(folder, layout, _missing(folder, layout)))
    config = _read_json(path)
    for part, name in layout.configs.items():
        if part != "transformer" and (folder / name).is_file() and _read_json(folder / name) != config:
            raise CheckpointError(f"{folder / name}: differs from {path.relative_to(folder)}: not experts of one model")
    kind = config.get("model_type", "t2v")
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"{folder}: is a Wan model of the type {kind}, which is not supported; use one of {', '.join(MODEL_TYPES)}"
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return config


def _has_experts(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in EXPERT_FOLDERS.values())


def layout_of(folder: Path, config: Mapping[str, Any]) -> Layout | None:
    """The layout that `folder` has, at least in part; None if it has nothing of any."""
    return layout_for(_names(folder), config)


def _names(folder: Path) -> set[str]:
    """Which files and folders of all layouts are there, folders with a slash at the end."""
    files = {INDEX, *(name for layout in LAYOUTS for names in layout.files.values() for name in names)}
    folders = {f"{name}/" for name in (*EXPERT_FOLDERS.values(), "transformer_2")}
    return {name for name in files if (folder / name).is_file()} | {n for n in folders if (folder / n).is_dir()}


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _missing(folder: Path, layout: Layout, given: Collection[str] = ()) -> list[str]:
    missing = [name for name in layout.configs.values() if not (folder / name).is_file()]
    for part, names in layout.files.items():
        if part in given:
            continue
        path = _find(folder, names)
        if path is None:
            missing.append(" or ".join(names))
        else:
            missing += _missing_shards(path)
    return missing


def _missing_shards(path: Path) -> list[str]:
    """Of an index the files that are not there; nothing of a whole file."""
    if not path.name.endswith(INDEX_SUFFIX):
        return []
    shards = {file.name for file in read_index(path, must_exist=False).values()}
    return sorted(name for name in shards if not path.with_name(name).is_file())


def _missing_message(folder: Path, layout: Layout, missing: list[str]) -> str:
    known = {name for names in layout.files.values() for name in names}
    strangers = []
    for file in sorted(folder.iterdir()):
        if file.suffix in TENSOR_SUFFIXES and file.is_file() and file.name not in known and len(strangers) < 3:
            try:
                identity = identify({name: info.shape for name, info in read_tensors(file).items()})
            except CheckpointError:
                continue
            if identity.component == "vae" or not (identity.runs or identity.component == "unknown"):
                strangers.append(f"{file.name} is {identity.model}")
    hint = f" (but {'; '.join(strangers)})" if strangers else ""
    what = f"{folder}: incomplete {layout.name} checkpoint, missing: {', '.join(missing)}{hint}"
    return f"{what}; get the rest and try again"


def _read_parts(folder: Path, given: Mapping[str, Path], task: str | None) -> Checkpoint:
    """The checkpoint in a folder, with the `given` files in place of its own."""
    config, extra, config_file, layout = _read_configs(folder, given)
    if layout is OFFICIAL_21_I2V and "transformer" not in given:
        _check_no_lone_expert(folder, layout)
    if layout is SINGLE_FILES:
        found = dict(given) if given.keys() >= set(NEEDED) else {**by_content(folder, given), **given}
    else:
        if layout is OFFICIAL_21_I2V and "transformer" not in given:
            _check_no_lone_expert(folder, layout)
        if missing := _missing(folder, layout, given):
            raise CheckpointError(_missing_message(folder, layout, missing))
        found = {part: _find(folder, names) or folder for part, names in layout.files.items()} | dict(given)
    if "quantization" in extra and (packed := given.keys() & {"transformer", "transformer_2", "text_encoder"}):
        raise UserError(f"{folder}: is quantized, so its {LABELS[packed.pop()]} cannot be another file's")
    parts = {name: _read_component(found[name], name, layout) for name in PARTS if name in found}
    own_tokenizer = parts["text_encoder"].tensors.get(spiece.TENSOR)
    parts = {name: without(part, spiece.TENSOR) for name, part in parts.items()}
    if layout is SINGLE_FILES:
        _check_not_half(parts, task)
    transformer = transformer_config(config_file, config, parts["transformer"])
    if "transformer_2" in parts and transformer_config(config_file, config, parts["transformer_2"]) != transformer:
        raise CheckpointError(f"{parts['transformer_2'].path}: is of another size than the high-noise expert")
    text_encoder = text_encoder_config(config_file, extra.get("text_encoder"), parts["text_encoder"])
    vae = vae_config(config_file, extra.get("vae"), parts["vae"])
    image_encoder = image_encoder_config(config_file, extra.get("image_encoder"), parts.get("image_encoder"))
    check_fit(folder, transformer, text_encoder, image_encoder, vae)
    kind, spec = model_spec(config_file, extra, parts, transformer, vae)
    checkpoint = Checkpoint(
        layout=layout,
        folder=folder,
        config=config,
        kind=kind,
        spec=spec,
        **parts,
        tokenizer=find_tokenizer(folder, found, own_tokenizer),
        transformer_config=transformer,
        text_encoder_config=text_encoder,
        image_encoder_config=image_encoder,
        vae_config=vae,
        quantization=_quantization(config_file, extra if "mlx_wan" in config else config, parts),
    )
    for part in checkpoint.parts:
        component_tensors(checkpoint, part, None)
    return checkpoint


def _quantization(path: Path, said: Mapping[str, Any], parts: Mapping[str, Component]) -> Quantization | None:
    """How matrices are packed: as the native config.json says, or of mlx-video's, where there are scales."""
    packed = [part for part in parts.values() if is_packed(part)]
    if said.get("quantization") and (packed or "format" in said):
        return Quantization.from_config(said["quantization"])
    if packed:
        raise CheckpointError(f"{packed[0].path}: has packed matrices, and {path} does not say how many bits they have")
    return None


def _check_no_lone_expert(folder: Path, layout: Layout) -> None:
    """What I2V-A14B's experts lack, Wan2.1's transformers have: an embedding of image tokens."""
    path = _find(folder, layout.files["transformer"])
    if path is None or _missing_shards(path):
        return
    shapes = {name: info.shape for name, info in read_tensors(path).items()}
    if not any(name.startswith("img_emb.") for name in shapes):
        raise CheckpointError(
            f"{path}: is {identify(shapes).model}, without another expert or image tokens; an A14B model has "
            f"its experts in {' and '.join(EXPERT_FOLDERS.values())}"
        )


def _check_not_half(parts: Mapping[str, Component], task: str | None) -> None:
    """No folder says whether a transformer that might be an expert is one: then the task must."""
    transformer = parts["transformer"]
    whole = [name for name in transformer.identity.models if MODELS[name].boundary is None]
    if len(transformer.identity.models) == len(whole) or "transformer_2" in parts or task in whole:
        return
    other = f", or say --task {whole[0]}" if whole else ""
    raise CheckpointError(
        f"{transformer.path}: is {transformer.identity.model}; give the low-noise expert too, "
        f"with --transformer_2 (the same file, if it is for all noise){other}"
    )


def _read_configs(folder: Path, given: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, Any], Path, Layout]:
    """The transformer's config, what is said of the other parts, the file to blame for it, and the layout."""
    if (folder / INDEX).is_file():
        config, extra = read_configs(folder)
        return config, extra, folder / INDEX, diffusers_layout("boundary" in extra, "image_encoder" in extra)
    path = folder / "config.json"
    config, layout = _read_json(path) if path.is_file() else {}, layout_of(folder, {})
    nameless = layout is None or (layout is NATIVE and _find(folder, NATIVE.files["transformer"]) is None)
    if given.keys() >= set(NEEDED) or (nameless and "mlx_wan" not in config and has_parts(folder)):
        return {name: value for name, value in config.items() if name != "mlx_wan"}, {}, path, SINGLE_FILES
    config = _read_config(folder)
    layout = layout_of(folder, config) or official_layout((), config)
    path = folder / layout.configs["transformer"]
    return config, _native_extra(path, config), path, layout


def _native_extra(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the native config.json adds under "mlx_wan"; {} in other layouts."""
    if "mlx_wan" not in config:
        return {}
    extra = config["mlx_wan"]
    if not isinstance(extra, dict) or extra.get("format") != 1 or not isinstance(extra.get("model"), str):
        raise CheckpointError(f"{path}: not a native format this version reads; convert the model again")
    known = {"format", "model", "boundary", "vae", "text_encoder", "image_encoder", "sampling", "quantization"}
    if unknown := extra.keys() - known:
        raise CheckpointError(f"{path}: unexpected entries under mlx_wan: {', '.join(sorted(unknown))}")
    if "boundary" in extra and not (type(extra["boundary"]) is float and 0 < extra["boundary"] < 1):
        raise CheckpointError(f"{path}: mlx_wan.boundary cannot be {extra['boundary']!r}; it must be between 0 and 1")
    return extra


def _read_component(path: Path, part: str, layout: Layout) -> Component:
    component = "transformer" if part == "transformer_2" else part
    found = [(identify({name: info.shape for name, info in own.items()}), own) for own in sections(read_tensors(path))]
    identity, tensors = next((pair for pair in found if pair[0].component == component), found[0])
    if identity.component == "unknown":
        raise CheckpointError(f"{path}: holds no {LABELS[component]} of a Wan model")
    other_vae = component == "vae" and layout.vae not in (None, identity.family)
    if identity.component != component or not identity.runs or other_vae:
        flag = "lora" if identity.component == "lora" else identity.component if identity.runs else None
        where = f"; it goes to --{flag}" if flag not in (component, None) else ""
        raise CheckpointError(f"{path}: is {identity.model}, not the {LABELS[component]} of a {layout.model}{where}")
    if component == "image_encoder":
        return Component(path, image_half(path, tensors), identity)
    renamed = official_names(tensors)
    return Component(path, {renamed[name]: info for name, info in tensors.items()}, identity)
