"""Finds a checkpoint, tells its layout, and checks that its parts are there, of the right model, and fit."""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.models.clip import ImageEncoderConfig
from mlx_wan.models.transformer import TransformerConfig
from mlx_wan.models.umt5 import TextEncoderConfig
from mlx_wan.models.vae21 import VAE21Config
from mlx_wan.models.vae22 import VAEConfig
from mlx_wan.weights import spiece
from mlx_wan.weights.checkpoint import (
    DIFFUSERS,
    EMBEDDED,
    EXPERT_FOLDERS,
    LAYOUTS,
    NATIVE,
    OFFICIAL,
    OFFICIAL_21,
    OFFICIAL_21_I2V,
    OFFICIAL_EXPERTS,
    SINGLE_FILES,
    WAN22_MLX,
    Checkpoint,
    Component,
    Layout,
    native_layout,
)
from mlx_wan.weights.diffusers import INDEX, read_configs
from mlx_wan.weights.files import INDEX_SUFFIX, TENSOR_SUFFIXES, read_index, read_tensors
from mlx_wan.weights.fit import component_tensors
from mlx_wan.weights.identify import LABELS, identify
from mlx_wan.weights.layouts import official_names
from mlx_wan.weights.loose import NEEDED, by_content, find_tokenizer, has_parts, without
from mlx_wan.weights.quantize import Quantization
from mlx_wan.weights.shapes import (
    PATCH_SIZE,
    image_encoder_fields,
    text_encoder_fields,
    transformer_fields,
    vae_fields,
)
from mlx_wan.weights.tensors import TensorInfo
from mlx_wan.zoo import HEAD_DIM, LATENT_STATISTICS, LATENTS_MEAN, MODELS, SAMPLING_TYPES, ModelSpec

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MODEL_TYPES = ("t2v", "ti2v", "i2v", "flf2v")  # of the transformers that run, in config.json
VAE_CONFIGS = {"Wan2.2": VAEConfig, "Wan2.1": VAE21Config}


def locate(
    where: str | Path | None = None,
    *,
    transformer: str | Path | None = None,
    transformer_2: str | Path | None = None,
    text_encoder: str | Path | None = None,
    image_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Checkpoint:
    """The checkpoint in a folder, of a Hub id ("Wan-AI/Wan2.2-TI2V-5B") or "tiny", the one in this package.

    Single files take the place of the folder's own; with all of them given, `where` can be None.

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
        return _read_parts(files["transformer"].parent, files)
    if str(where) == "tiny":
        if not (EMBEDDED / "config.json").is_file():
            raise CheckpointError(f"{EMBEDDED}: the embedded model is missing; install mlx-wan again")
        return _read_parts(EMBEDDED, files)
    folder = Path(where).expanduser()
    if folder.is_dir():
        return _read_parts(folder, files)
    if folder.is_file():
        identity = identify({name: info.shape for name, info in read_tensors(folder).items()})
        hint = "give it to --lora" if identity.component == "lora" else "give the folder of a whole checkpoint"
        raise UserError(f"{folder}: is a single file ({identity.model}); {hint}")
    if HUB_ID.fullmatch(str(where)):
        return _read_parts(_download(str(where)), files)
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
        return DIFFUSERS
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


def _read_parts(folder: Path, given: Mapping[str, Path]) -> Checkpoint:
    """The checkpoint in a folder, with the `given` files in place of its own."""
    config, extra, config_file, layout = _read_configs(folder, given)
    if layout is OFFICIAL_21_I2V and "transformer" not in given:
        _check_no_lone_expert(folder, layout)
    if layout is SINGLE_FILES:
        found = dict(given) if given.keys() >= set(NEEDED) else {**by_content(folder, given), **given}
    else:
        if missing := _missing(folder, layout, given):
            raise CheckpointError(_missing_message(folder, layout, missing))
        found = {part: _find(folder, names) or folder for part, names in layout.files.items()} | dict(given)
    if "quantization" in extra and (packed := given.keys() & {"transformer", "transformer_2", "text_encoder"}):
        raise UserError(f"{folder}: is quantized, so its {packed.pop()} cannot be another file's")
    parts = {name: _read_component(path, name, layout) for name, path in found.items() if name != "tokenizer"}
    own_tokenizer = parts["text_encoder"].tensors.get(spiece.TENSOR)
    parts = {name: without(part, spiece.TENSOR) for name, part in parts.items()}
    transformer = _transformer_config(config_file, config, parts["transformer"])
    if "transformer_2" in parts and _transformer_config(config_file, config, parts["transformer_2"]) != transformer:
        raise CheckpointError(f"{parts['transformer_2'].path}: is of another size than the high-noise expert")
    text_encoder = _text_encoder_config(config_file, extra.get("text_encoder"), parts["text_encoder"])
    vae = _vae_config(config_file, extra.get("vae"), parts["vae"])
    image_encoder = _image_encoder_config(config_file, extra.get("image_encoder"), parts.get("image_encoder"))
    _check_fit(folder, transformer, text_encoder, image_encoder, vae)
    kind, spec = _spec(config_file, extra, parts, transformer, vae)
    if layout is SINGLE_FILES and "model_type" not in config:
        transformer = replace(transformer, model_type=MODELS[kind].task)
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


def _read_configs(folder: Path, given: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, Any], Path, Layout]:
    """The transformer's config, what is said of the other parts, the file to blame for it, and the layout."""
    if (folder / INDEX).is_file():
        config, extra = read_configs(folder)
        return config, extra, folder / INDEX, DIFFUSERS
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


def _shapes(part: Component) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in part.tensors.items()}


def _agree(path: Path, given: Mapping[str, Any], found: Mapping[str, Any], tensors: Path) -> None:
    """What a config says must be what the tensors are."""
    for name, value in found.items():
        said = given.get(name, value)
        said = tuple(said) if isinstance(said, list) else said
        if said != value or type(said) is not type(value):
            raise CheckpointError(f"{path}: {name} is {said!r}, but the tensors in {tensors.name} say {value!r}")


def _transformer_config(path: Path, config: Mapping[str, Any], part: Component) -> TransformerConfig:
    patch_size = config.get("patch_size", PATCH_SIZE)
    try:
        patch_size = tuple(map(int, patch_size))
    except (TypeError, ValueError):
        raise CheckpointError(f"{path}: patch_size cannot be {patch_size!r}") from None
    try:
        found = transformer_fields(_shapes(part), patch_size)
    except CheckpointError as error:
        raise CheckpointError(f"{part.path}: {error}") from error
    _agree(path, config, found, part.path)
    types = {"num_heads": (int,), "text_len": (int,), "eps": (float, int), "model_type": (str,)}
    rest = {name: config[name] for name in types if name in config}
    for name, value in rest.items():
        if type(value) not in types[name] or (name != "model_type" and value <= 0):
            raise CheckpointError(f"{path}: {name} cannot be {value!r}")
    if "num_heads" not in rest and part.identity.models:
        rest["num_heads"] = found["dim"] // HEAD_DIM
    if "num_heads" not in rest:
        raise CheckpointError(f"{path}: lacks num_heads, which the tensors do not tell")
    if found["dim"] % (2 * rest["num_heads"]):
        raise CheckpointError(f"{path}: num_heads {rest['num_heads']} does not divide dim {found['dim']} evenly")
    return TransformerConfig(**found, **rest)


def _text_encoder_config(path: Path, given: Any, part: Component) -> TextEncoderConfig:
    try:
        found = text_encoder_fields(_shapes(part))
    except CheckpointError as error:
        raise CheckpointError(f"{part.path}: {error}") from error
    _agree(path, _section(path, "text_encoder", given, TextEncoderConfig), found, part.path)
    return TextEncoderConfig(**found)


def _image_encoder_config(path: Path, given: Any, part: Component | None) -> ImageEncoderConfig | None:
    if part is None:
        return None
    try:
        found = image_encoder_fields(_shapes(part))
    except CheckpointError as error:
        raise CheckpointError(f"{part.path}: {error}") from error
    given = _section(path, "image_encoder", given, ImageEncoderConfig)
    _agree(path, given, found, part.path)
    # Tensors do not tell the heads; those of ViT-H are 80 wide.
    rest = {"num_heads": max(found["dim"] // 80, 1), "eps": ImageEncoderConfig.eps}
    rest |= {name: given[name] for name in rest if name in given}
    if type(rest["num_heads"]) is not int or rest["num_heads"] <= 0 or found["dim"] % rest["num_heads"]:
        raise CheckpointError(f"{path}: {rest['num_heads']!r} heads do not divide the image encoder's {found['dim']}")
    if not isinstance(rest["eps"], float) or rest["eps"] <= 0:
        raise CheckpointError(f"{path}: eps of the image encoder cannot be {rest['eps']!r}")
    return ImageEncoderConfig(**found, **rest)


def _vae_config(path: Path, given: Any, part: Component) -> VAEConfig | VAE21Config:
    try:
        found = vae_fields(_shapes(part))
    except CheckpointError as error:
        raise CheckpointError(f"{part.path}: {error}") from error
    family = part.identity.family or ""
    config = VAE_CONFIGS[family]
    given = _section(path, "vae", given, config)
    _agree(path, given, found, part.path)
    z_dim = found["z_dim"]
    # The official files leave the statistics to the code, which knows them for the released width. A model of another
    # width in that layout brings none: its latents are used as they are.
    mean, std = LATENT_STATISTICS[family]
    if z_dim != len(mean):
        mean, std = (0.0,) * z_dim, (1.0,) * z_dim
    mean, std = given.get("latents_mean", mean), given.get("latents_std", std)
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
        if not numbers or len(values) != z_dim or not all(math.isfinite(v) for v in values):
            raise CheckpointError(f"{path}: {name} of the VAE must be {z_dim} numbers")
    if min(std) <= 0:
        raise CheckpointError(f"{path}: latents_std of the VAE must be positive")
    return config(**found, latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std)))


def _section(path: Path, name: str, given: Any, config: type) -> dict[str, Any]:
    """A part of "mlx_wan" in a native config.json, {} in other layouts; unknown keys are errors."""
    known = {f.name for f in fields(config)}
    given = {} if given is None else given
    if not isinstance(given, dict) or not given.keys() <= known:
        raise CheckpointError(f"{path}: unexpected entries under mlx_wan.{name}")
    return given


def _check_fit(
    folder: Path,
    transformer: TransformerConfig,
    text_encoder: TextEncoderConfig,
    image_encoder: ImageEncoderConfig | None,
    vae: VAEConfig | VAE21Config,
) -> None:
    """The parts must be made for each other."""
    # What a picture adds: its latents, and a mask with a channel for each frame that one latent stands for.
    with_picture = 2 * vae.z_dim + vae.stride[0]
    if transformer.out_dim != vae.z_dim or transformer.in_dim not in (vae.z_dim, with_picture):
        raise CheckpointError(
            f"{folder}: the transformer takes {transformer.in_dim} and makes {transformer.out_dim} latent channels, "
            f"but the VAE has {vae.z_dim}"
        )
    if transformer.text_dim != text_encoder.dim:
        raise CheckpointError(
            f"{folder}: the transformer wants text of width {transformer.text_dim}, "
            f"but the text encoder makes {text_encoder.dim}"
        )
    width, tokens = (image_encoder.dim, 2 * image_encoder.num_tokens) if image_encoder else (0, 0)
    if transformer.image_dim != width or transformer.image_positions not in (0, tokens):
        raise CheckpointError(
            f"{folder}: the transformer wants image tokens of width {transformer.image_dim}, "
            f"but the image encoder makes {width or 'none'}"
        )


def _spec(
    path: Path,
    extra: Mapping[str, Any],
    parts: Mapping[str, Component],
    transformer: TransformerConfig,
    vae: VAEConfig | VAE21Config,
) -> tuple[str, ModelSpec]:
    """Which of `MODELS` it is or is like, and that model or, for others, one that is sampled like it unless
    config.json says otherwise."""
    family = parts["vae"].identity.family or ""
    if transformer.in_dim != transformer.out_dim:
        task = "flf2v" if transformer.image_positions else "i2v"
    else:
        task = {"Wan2.2": "ti2v", "Wan2.1": "t2v"}[family]
    traits = (task, family, "transformer_2" in parts)
    alike = [spec for spec in MODELS.values() if spec.traits == traits]
    if not alike:
        experts = "two experts" if traits[2] else "one transformer"
        raise CheckpointError(
            f"{path.parent}: {experts} for {task} with a {family} VAE: no model that this package runs; "
            f"those are {', '.join(MODELS)}"
        )
    known = parts["transformer"].identity.models
    released = next((spec.name for spec in alike if spec.name in known), None)
    name = extra.get("model", released or "custom")
    if name in MODELS and MODELS[name] not in alike:
        raise CheckpointError(f"{path}: says {name}, but the files are those of a model like {alike[0].name}")
    kind = name if name in MODELS else alike[0].name
    spec = MODELS.get(name) or replace(MODELS[kind], name=name, hub_id=None, sizes=())
    sampling = dict(_sampling(path, extra, two_experts=traits[2]))
    if "boundary" in extra:
        spec = replace(spec, boundary=extra["boundary"])
    spec = replace(spec.with_sampling(sampling), vae_stride=vae.stride)
    size = (spec.width, spec.height)
    # A config.json that asks for another size than the zoo knows speaks of a model trained for that size.
    return kind, spec if not spec.sizes or size in spec.sizes else replace(spec, sizes=(size,))


def _sampling(path: Path, extra: Mapping[str, Any], two_experts: bool) -> dict[str, Any]:
    sampling = extra.get("sampling", {})
    if not isinstance(sampling, dict) or not sampling.keys() <= SAMPLING_TYPES.keys():
        raise CheckpointError(f"{path}: unexpected entries under mlx_wan.sampling")
    values = {}
    for key, value in sampling.items():
        allowed = (int, float) if SAMPLING_TYPES[key] is float else (SAMPLING_TYPES[key],)
        pair = key == "guidance_scale" and two_experts and type(value) is list and len(value) == 2
        if not all(type(v) in allowed for v in (value if pair else [value])):
            raise CheckpointError(f"{path}: mlx_wan.sampling.{key} cannot be {value!r}")
        values[key] = tuple(value) if pair else value
    return values
