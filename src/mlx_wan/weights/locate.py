"""Finds a checkpoint, tells its layout, and checks that its parts are there, of the right model, and fit."""

import contextlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.models.transformer import TransformerConfig
from mlx_wan.models.umt5 import TextEncoderConfig
from mlx_wan.models.vae22 import VAEConfig
from mlx_wan.weights import spiece
from mlx_wan.weights.checkpoint import (
    DIFFUSERS,
    EMBEDDED,
    LAYOUTS,
    NATIVE,
    OFFICIAL,
    SINGLE_FILES,
    UMT5_TOKENIZER,
    WAN22_MLX,
    Checkpoint,
    Component,
    Layout,
)
from mlx_wan.weights.diffusers import INDEX, read_configs
from mlx_wan.weights.files import INDEX_SUFFIX, TENSOR_SUFFIXES, read_index, read_tensors
from mlx_wan.weights.fit import component_tensors
from mlx_wan.weights.identify import COMPONENTS, LABELS, identify
from mlx_wan.weights.layouts import official_names
from mlx_wan.weights.quantize import Quantization
from mlx_wan.weights.shapes import PATCH_SIZE, text_encoder_fields, transformer_fields, vae_fields
from mlx_wan.weights.tensors import TensorInfo
from mlx_wan.zoo import HEAD_DIM, LATENTS_MEAN, LATENTS_STD, MODELS, RELEASES, SAMPLING_TYPES, ModelSpec

TOKENIZERS = ("tokenizer.json", "tokenizer/tokenizer.json", UMT5_TOKENIZER)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(
    where: str | Path | None = None,
    *,
    transformer: str | Path | None = None,
    text_encoder: str | Path | None = None,
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
    given = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "tokenizer": tokenizer}
    files = {part: Path(path).expanduser() for part, path in given.items() if path is not None}
    for part, path in files.items():
        if not path.is_file():
            raise UserError(f"{path}: no such file (given as the {LABELS.get(part, part)})")
    if where is None:
        if lacking := [part for part in COMPONENTS if part not in files]:
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

    wanted = [name for layout in LAYOUTS for names in layout.files.values() for name in names]
    wanted += [name.replace(".safetensors", "-*-of-*.safetensors") for name in wanted if name.endswith("safetensors")]
    try:
        # First the small file that tells what it is: another model is refused before its gigabytes arrive.
        small = ["config.json", INDEX, "*/config.json"]
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
    """config.json, once it is clear that it describes a model this package runs."""
    if (folder / "high_noise_model").is_dir() or (folder / "low_noise_model").is_dir():
        raise CheckpointError(f"{folder}: is a two-expert Wan2.2 A14B model, which is not supported; use TI2V-5B")
    path = folder / "config.json"
    if not path.is_file():
        if any((folder / name).is_file() for name in NATIVE.files["transformer"]):
            raise CheckpointError(f"{folder}: half-written model: config.json is missing; convert it again")
        raise CheckpointError(_missing_message(folder, OFFICIAL, ["config.json", *_missing(folder, OFFICIAL)]))
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    if other := _other_model(config):
        raise CheckpointError(f"{folder}: is {other}, which is not supported; use Wan2.2 TI2V-5B")
    return config


def _other_model(config: Mapping[str, Any]) -> str | None:
    """The model config.json describes if it is another one than this package runs."""
    kind = config.get("model_type", "t2v")
    for release in RELEASES:
        if release.component == "transformer" and not release.runs and release.dims.items() <= config.items():
            return release.name
    if kind not in ("t2v", "ti2v"):
        return f"a Wan model of the type {kind}"
    if {"in_dim", "out_dim"} <= config.keys() and config["in_dim"] != config["out_dim"]:
        return f"an image-to-video model (in_dim {config['in_dim']}, out_dim {config['out_dim']})"
    return None


def layout_of(folder: Path, config: Mapping[str, Any]) -> Layout | None:
    """The layout that `folder` has, at least in part; None if it has nothing of any."""
    if "mlx_wan" in config:
        return NATIVE
    if (folder / INDEX).is_file():
        return DIFFUSERS
    for layout in (WAN22_MLX, OFFICIAL, NATIVE):
        if any((folder / name).is_file() for part in COMPONENTS for name in layout.files[part]):
            return layout
    return None


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _missing(folder: Path, layout: Layout, given: Collection[str] = ()) -> list[str]:
    missing = []
    for part, names in layout.files.items():
        if part in given:
            continue
        path = _find(folder, names)
        if path is None:
            missing.append(" or ".join(names))
        elif path.name.endswith(INDEX_SUFFIX):
            shards = {file.name for file in read_index(path, must_exist=False).values()}
            missing += sorted(name for name in shards if not (folder / name).is_file())
    return missing


def _missing_message(folder: Path, layout: Layout, missing: list[str]) -> str:
    strangers = []
    for file in sorted(folder.iterdir()):
        if file.suffix in TENSOR_SUFFIXES and file.is_file() and len(strangers) < 3:
            try:
                identity = identify({name: info.shape for name, info in read_tensors(file).items()})
            except CheckpointError:
                continue
            if not identity.runs and identity.component != "unknown":
                strangers.append(f"{file.name} is {identity.model}")
    hint = f" (but {'; '.join(strangers)})" if strangers else ""
    what = f"{folder}: incomplete {layout.name} checkpoint, missing: {', '.join(missing)}{hint}"
    return f"{what}; get the rest and try again"


def _read_parts(folder: Path, given: Mapping[str, Path]) -> Checkpoint:
    """The checkpoint in a folder, with the `given` files in place of its own."""
    config, extra, config_file, layout = _read_configs(folder, given)
    if layout is SINGLE_FILES:
        found = dict(given) if given.keys() >= set(COMPONENTS) else {**_by_content(folder, given), **given}
    else:
        if missing := _missing(folder, layout, given):
            raise CheckpointError(_missing_message(folder, layout, missing))
        found = {part: _find(folder, names) or folder for part, names in layout.files.items()} | dict(given)
    if "quantization" in extra and (packed := given.keys() & {"transformer", "text_encoder"}):
        raise UserError(f"{folder}: is quantized, so its {LABELS[packed.pop()]} cannot be another file's")
    parts = {name: _read_component(found[name], name) for name in COMPONENTS}
    own_tokenizer = parts["text_encoder"].tensors.get(spiece.TENSOR)
    parts = {name: _without(part, spiece.TENSOR) for name, part in parts.items()}
    transformer = _transformer_config(config_file, config, parts["transformer"])
    text_encoder = _text_encoder_config(config_file, extra.get("text_encoder"), parts["text_encoder"])
    vae = _vae_config(config_file, extra.get("vae"), parts["vae"])
    _check_fit(folder, transformer, text_encoder, vae)
    checkpoint = Checkpoint(
        layout=layout,
        folder=folder,
        config=config,
        spec=_spec(config_file, extra, parts["transformer"], vae),
        **parts,
        tokenizer=_tokenizer(folder, found, own_tokenizer),
        transformer_config=transformer,
        text_encoder_config=text_encoder,
        vae_config=vae,
        quantization=Quantization.from_config(extra["quantization"]) if "quantization" in extra else None,
    )
    for component in COMPONENTS:
        component_tensors(checkpoint, component, None)
    return checkpoint


def _without(part: Component, name: str) -> Component:
    return replace(part, tensors={other: info for other, info in part.tensors.items() if other != name})


def _tokenizer(folder: Path, found: Mapping[str, Path], own: TensorInfo | None) -> Path | bytes:
    """The tokenizer.json that was found, or the one the text encoder's file carries as a tensor."""
    if "tokenizer" in found:
        return found["tokenizer"]
    if own is not None:
        try:
            return spiece.tokenizer_json(bytes(np.array(own.load())))
        except CheckpointError as error:
            raise CheckpointError(f"{own.file}: {error}") from error
    if beside := _find(folder, TOKENIZERS):
        return beside
    raise CheckpointError(
        f"{folder}: there is no tokenizer, neither in the text encoder's file nor as tokenizer.json; "
        "give one with --tokenizer (google/umt5-xxl has it)"
    )


def _by_content(folder: Path, given: Collection[str]) -> dict[str, Path]:
    """Transformer, text encoder and VAE among the tensor files in and under a folder, told by what they hold.

    Raises:
        CheckpointError: there is not exactly one of each that is not `given`.
    """
    found: dict[str, list[Path]] = {part: [] for part in COMPONENTS if part not in given}
    for file in tensor_files(folder):
        identity = identify({name: info.shape for name, info in read_tensors(file).items()})
        if identity.component in found:
            found[identity.component].append(file)
    for part, files in found.items():
        if len(files) != 1:
            names = ", ".join(file.relative_to(folder).as_posix() for file in files[:4])
            what = f"several files with a {LABELS[part]} ({names})" if files else f"no {LABELS[part]}"
            raise CheckpointError(f"{folder}: has {what}; say which with --{part} FILE")
    return {part: files[0] for part, files in found.items()}


def tensor_files(folder: Path) -> list[Path]:
    """Every tensor file in and under a folder; the shards of an index are one, the index."""
    files = [
        f for f in sorted(folder.rglob("*")) if f.is_file() and not f.relative_to(folder).as_posix().startswith(".")
    ]
    indices = [file for file in files if file.name.endswith(INDEX_SUFFIX)]
    shards = {shard for index in indices for shard in read_index(index, must_exist=False).values()}
    return indices + [file for file in files if file.suffix in TENSOR_SUFFIXES and file not in shards]


def _read_configs(folder: Path, given: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, Any], Path, Layout]:
    """The transformer's config, what is said of the other parts, the file to blame for it, and the layout."""
    if (folder / INDEX).is_file():
        config, extra = read_configs(folder)
        return config, extra, folder / INDEX, DIFFUSERS
    path = folder / "config.json"
    complete = given.keys() >= set(COMPONENTS)
    if complete or (layout_of(folder, {}) is None and _has_parts(folder)):
        config = _read_config(folder) if path.is_file() else {}
        return {name: value for name, value in config.items() if name != "mlx_wan"}, {}, path, SINGLE_FILES
    config = _read_config(folder)
    return config, _native_extra(path, config), path, layout_of(folder, config) or OFFICIAL


def _has_parts(folder: Path) -> bool:
    """Whether some tensor file under the folder, whatever its name, is a component."""
    for file in tensor_files(folder):
        with contextlib.suppress(CheckpointError):
            if identify({n: i.shape for n, i in read_tensors(file).items()}).component in COMPONENTS:
                return True
    return False


def _native_extra(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the native config.json adds under "mlx_wan"; {} in other layouts."""
    if "mlx_wan" not in config:
        return {}
    extra = config["mlx_wan"]
    if not isinstance(extra, dict) or extra.get("format") != 1 or not isinstance(extra.get("model"), str):
        raise CheckpointError(f"{path}: not a native format this version reads; convert the model again")
    if unknown := extra.keys() - {"format", "model", "vae", "text_encoder", "sampling", "quantization"}:
        raise CheckpointError(f"{path}: unexpected entries under mlx_wan: {', '.join(sorted(unknown))}")
    return extra


def _read_component(path: Path, component: str) -> Component:
    tensors = read_tensors(path)
    identity = identify({name: info.shape for name, info in tensors.items()})
    if identity.component == "unknown":
        raise CheckpointError(f"{path}: holds no {LABELS[component]} of a Wan model")
    if identity.component != component or not identity.runs:
        raise CheckpointError(f"{path}: is {identity.model}, not the {LABELS[component]} of a Wan2.2 TI2V model")
    renamed = official_names(tensors)
    return Component(path, {renamed[name]: info for name, info in tensors.items()}, identity)


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
    if "num_heads" not in rest and any(part.identity.model == release.name for release in RELEASES):
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
    _agree(path, _section(path, "text_encoder", given), found, part.path)
    return TextEncoderConfig(**found)


def _vae_config(path: Path, given: Any, part: Component) -> VAEConfig:
    try:
        found = vae_fields(_shapes(part))
    except CheckpointError as error:
        raise CheckpointError(f"{part.path}: {error}") from error
    given = _section(path, "vae", given)
    _agree(path, given, found, part.path)
    z_dim = found["z_dim"]
    # The official files leave the statistics to the code, which knows them for 48 channels. A model of another
    # width in that layout brings none: its latents are used as they are.
    released = z_dim == len(LATENTS_MEAN)
    mean = given.get("latents_mean", LATENTS_MEAN if released else (0.0,) * z_dim)
    std = given.get("latents_std", LATENTS_STD if released else (1.0,) * z_dim)
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
        if not numbers or len(values) != z_dim or not all(math.isfinite(v) for v in values):
            raise CheckpointError(f"{path}: {name} of the VAE must be {z_dim} numbers")
    if min(std) <= 0:
        raise CheckpointError(f"{path}: latents_std of the VAE must be positive")
    return VAEConfig(**found, latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std)))


def _section(path: Path, name: str, given: Any) -> dict[str, Any]:
    """A part of "mlx_wan" in a native config.json, {} in other layouts; unknown keys are errors."""
    known = {f.name for f in fields(VAEConfig if name == "vae" else TextEncoderConfig)}
    given = {} if given is None else given
    if not isinstance(given, dict) or not given.keys() <= known:
        raise CheckpointError(f"{path}: unexpected entries under mlx_wan.{name}")
    return given


def _check_fit(folder: Path, transformer: TransformerConfig, text_encoder: TextEncoderConfig, vae: VAEConfig) -> None:
    """The three parts must be made for each other."""
    if not transformer.in_dim == transformer.out_dim == vae.z_dim:
        raise CheckpointError(
            f"{folder}: the transformer takes {transformer.in_dim} and makes {transformer.out_dim} latent channels, "
            f"but the VAE has {vae.z_dim}"
        )
    if transformer.text_dim != text_encoder.dim:
        raise CheckpointError(
            f"{folder}: the transformer wants text of width {transformer.text_dim}, "
            f"but the text encoder makes {text_encoder.dim}"
        )


def _spec(path: Path, extra: Mapping[str, Any], transformer: Component, vae: VAEConfig) -> ModelSpec:
    """The known model, or for others one that is sampled like TI2V-5B unless config.json says otherwise."""
    released = transformer.identity.model == "Wan2.2 TI2V-5B"
    name = extra.get("model", "ti2v-5B" if released else "custom")
    spec = MODELS.get(name) or replace(MODELS["ti2v-5B"], name=str(name), hub_id=None, sizes=())
    sampling = extra.get("sampling", {})
    if not isinstance(sampling, dict) or not sampling.keys() <= SAMPLING_TYPES.keys():
        raise CheckpointError(f"{path}: unexpected entries under mlx_wan.sampling")
    for key, value in sampling.items():
        allowed = (int, float) if SAMPLING_TYPES[key] is float else (SAMPLING_TYPES[key],)
        if type(value) not in allowed:
            raise CheckpointError(f"{path}: mlx_wan.sampling.{key} cannot be {value!r}")
    spec = replace(spec.with_sampling(sampling), vae_stride=vae.stride)
    size = (spec.width, spec.height)
    # A config.json that asks for another size than the zoo knows speaks of a model trained for that size.
    return spec if not spec.sizes or size in spec.sizes else replace(spec, sizes=(size,))
