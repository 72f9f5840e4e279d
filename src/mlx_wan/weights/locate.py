"""Finds a checkpoint, tells its layout, and checks that its parts are there, of the right model, and fit."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.weights import spiece
from mlx_wan.weights.checkpoint import (
    DIFFUSERS,
    DIFFUSERS_EXPERTS,
    EMBEDDED,
    EXPERT_FOLDERS,
    LAYOUTS,
    NATIVE,
    OFFICIAL,
    OFFICIAL_21,
    OFFICIAL_21_I2V,
    OFFICIAL_EXPERTS,
    PARTS,
    SINGLE_FILES,
    WAN22_MLX,
    Checkpoint,
    Component,
    Layout,
    native_layout,
)
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
from mlx_wan.weights.identify import LABELS, identify
from mlx_wan.weights.layouts import official_names
from mlx_wan.weights.loose import NEEDED, by_content, find_tokenizer, has_parts, without
from mlx_wan.weights.quantize import Quantization
from mlx_wan.weights.tensors import TensorInfo
from mlx_wan.zoo import LATENTS_MEAN, MODELS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MODEL_TYPES = ("t2v", "ti2v", "i2v", "flf2v")  # of the transformers that run, in config.json


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
    """The checkpoint in a folder, of a Hub id ("Wan-AI/Wan2.2-TI2V-5B") or "tiny", the one in this package.

    Single files take the place of the folder's own; with all that the model has given, `where` can be None. `task` is
    one of `zoo.MODELS`, and needed only where files alone do not tell a model from an expert of another.

    Reads headers alone, and finds all that can be wrong with them, so that nobody waits for gigabytes to be read
    first. A Hub id downloads what is not in the cache yet.

    Raises:
        UserError: no such folder, or not a folder.
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
    files = {part: Path(path).expanduser() for part, path in given.items() if path is not None}
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
    folder = Path(where).expanduser()
    if folder.is_dir():
        return _read_parts(folder, files, task)
    if folder.is_file():
        identity = identify({name: info.shape for name, info in read_tensors(folder).items()})
        hint = "give it to --lora" if identity.component == "lora" else "give the folder of a whole checkpoint"
        raise UserError(f"{folder}: is a single file ({identity.model}); {hint}")
    if HUB_ID.fullmatch(str(where)):
        return _read_parts(_download(str(where)), files, task)
    raise UserError(f'{folder}: no such folder (a checkpoint folder, a Hub id, or "tiny" is needed)')


def _download(hub_id: str) -> Path:
    """The folder of a Hub repository in the local cache, with the files that any layout needs."""
    import huggingface_hub  # slow to import, and only needed here
    from huggingface_hub.errors import HfHubHTTPError

    small = ["config.json", INDEX, "*/config.json"]
    wanted = [name for layout in LAYOUTS for names in layout.files.values() for name in names]
    wanted += [name.replace(".safetensors", "-*-of-*.safetensors") for name in wanted if name.endswith("safetensors")]
    try:
        # First the small files that tell what it is: another model is refused before its gigabytes arrive.
        folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=small))
        if not (folder / INDEX).is_file():
            _read_config(folder)
        else:
            read_configs(folder)
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=[*small, *wanted]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, WanError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{hub_id}: no such folder here, and the Hugging Face Hub did not provide it ({reason}); "
            "check the name and the connection, or download it elsewhere and give its folder"
        ) from error


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
    if "mlx_wan" in config:
        extra = config["mlx_wan"]
        return native_layout(extra if isinstance(extra, dict) else {})
    if (folder / INDEX).is_file():
        return DIFFUSERS_EXPERTS if (folder / "transformer_2").is_dir() else DIFFUSERS
    if _has_experts(folder):
        return OFFICIAL_EXPERTS
    for layout in (WAN22_MLX, _official(folder, config), NATIVE):
        names = [name for part, names in layout.files.items() if part != "tokenizer" for name in names]
        if any((folder / name).is_file() for name in names):
            return layout
    return None


def _official(folder: Path, config: Mapping[str, Any]) -> Layout:
    """The official layout of a model with one transformer: Wan2.2's, whose latents are wider, or Wan2.1's."""
    if config:
        kind = config.get("model_type")
        if kind == "ti2v" or config.get("out_dim") == len(LATENTS_MEAN):
            return OFFICIAL
        return OFFICIAL_21_I2V if kind in ("i2v", "flf2v") else OFFICIAL_21
    return (
        OFFICIAL_21
        if _find(folder, OFFICIAL_21.files["vae"]) and not _find(folder, OFFICIAL.files["vae"])
        else OFFICIAL
    )


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
        quantization=Quantization.from_config(extra["quantization"]) if "quantization" in extra else None,
    )
    for part in checkpoint.parts:
        component_tensors(checkpoint, part, None)
    return checkpoint


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
        f"with --transformer_2{other}"
    )


def _read_configs(folder: Path, given: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, Any], Path, Layout]:
    """The transformer's config, what is said of the other parts, the file to blame for it, and the layout."""
    if (folder / INDEX).is_file():
        config, extra = read_configs(folder)
        return config, extra, folder / INDEX, DIFFUSERS_EXPERTS if "boundary" in extra else DIFFUSERS
    path = folder / "config.json"
    config, layout = _read_json(path) if path.is_file() else {}, layout_of(folder, {})
    nameless = layout is None or (layout is NATIVE and _find(folder, NATIVE.files["transformer"]) is None)
    if given.keys() >= set(NEEDED) or (nameless and "mlx_wan" not in config and has_parts(folder)):
        return {name: value for name, value in config.items() if name != "mlx_wan"}, {}, path, SINGLE_FILES
    config = _read_config(folder)
    layout = layout_of(folder, config) or _official(folder, config)
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
    tensors = read_tensors(path)
    identity = identify({name: info.shape for name, info in tensors.items()})
    if identity.component == "unknown":
        raise CheckpointError(f"{path}: holds no {LABELS[component]} of a Wan model")
    other_vae = component == "vae" and layout.vae not in (None, identity.family)
    if identity.component != component or not identity.runs or other_vae:
        raise CheckpointError(f"{path}: is {identity.model}, not the {LABELS[component]} of a {layout.model}")
    if component == "image_encoder":
        return Component(path, _image_half(path, tensors), identity)
    renamed = official_names(tensors)
    return Component(path, {renamed[name]: info for name, info in tensors.items()}, identity)


def _image_half(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """CLIP's image encoder without its text encoder, which the official file holds too."""
    own = {name.removeprefix("visual."): info for name, info in tensors.items() if name.startswith("visual.")}
    rest = [name for name in tensors if not name.startswith(("visual.", "textual.")) and name != "log_scale"]
    if own and rest:
        raise CheckpointError(f"{path}: does not fit the image encoder: unexpected {rest[0]}")
    return own or dict(tensors)
