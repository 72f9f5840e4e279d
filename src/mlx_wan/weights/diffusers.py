"""The configuration files of a Diffusers repository, to our words for dimensions and back.

A repository is a folder for each part with a config.json of its own, and model_index.json above them. Each table
below holds what that config calls our fields; what it says beyond them must be what the models that run have.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_wan.errors import CheckpointError
from mlx_wan.models.clip import MEAN, STD, ImageEncoderConfig
from mlx_wan.models.transformer import TransformerConfig
from mlx_wan.models.umt5 import MAX_DISTANCE, TextEncoderConfig
from mlx_wan.models.vae21 import VAE21Config
from mlx_wan.models.vae22 import VAEConfig
from mlx_wan.zoo import FASTWAN, ModelSpec

if TYPE_CHECKING:
    from mlx_wan.weights.checkpoint import Checkpoint

INDEX = "model_index.json"
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")
DISTILLED_PIPELINES = ("WanDMDPipeline", "WanImageToVideoDmdPipeline")  # FastVideo's, sampled in three steps
# The class of each part, our field for each of its keys, and the only values of its other keys.
TRANSFORMER = (
    "WanTransformer3DModel",
    {
        "num_attention_heads": "num_heads",
        "in_channels": "in_dim",
        "out_channels": "out_dim",
        "ffn_dim": "ffn_dim",
        "freq_dim": "freq_dim",
        "text_dim": "text_dim",
        "num_layers": "num_layers",
        "patch_size": "patch_size",
        "cross_attn_norm": "cross_attn_norm",
        "eps": "eps",
        "image_dim": "image_dim",
        "pos_embed_seq_len": "image_positions",
    },
    {"rope_max_seq_len": 1024},
)
VACE_TRANSFORMER = (
    "WanVACETransformer3DModel",
    {**TRANSFORMER[1], "vace_layers": "vace_layers", "vace_in_channels": "vace_in_dim"},
    TRANSFORMER[2],
)
VAE = (
    "AutoencoderKLWan",
    {
        "base_dim": "dim",
        "decoder_base_dim": "dec_dim",
        "z_dim": "z_dim",
        "dim_mult": "dim_mult",
        "num_res_blocks": "num_res_blocks",
        "temperal_downsample": "temporal_downsample",
        "patch_size": "patch_size",
        "latents_mean": "latents_mean",
        "latents_std": "latents_std",
    },
    {"is_residual": True, "attn_scales": [], "dropout": 0.0, "clip_output": True},
)
# The Wan2.1 kind: what has no field must be as if it were not said.
_21 = ("decoder_base_dim", "patch_size")
VAE21 = (
    "AutoencoderKLWan",
    {key: field for key, field in VAE[1].items() if key not in _21},
    {**VAE[2], "is_residual": False, **dict.fromkeys(_21)},
)
TEXT_ENCODER = (
    "UMT5EncoderModel",
    {
        "vocab_size": "vocab_size",
        "d_model": "dim",
        "d_ff": "dim_ffn",
        "num_heads": "num_heads",
        "num_layers": "num_layers",
        "relative_attention_num_buckets": "num_buckets",
    },
    {
        "model_type": "umt5",
        "relative_attention_max_distance": MAX_DISTANCE,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    },
)
# Either class: the pipelines use what is before the projection.
IMAGE_ENCODERS = ("CLIPVisionModel", "CLIPVisionModelWithProjection")
IMAGE_ENCODER = (
    IMAGE_ENCODERS[0],
    {
        "image_size": "image_size",
        "patch_size": "patch_size",
        "hidden_size": "dim",
        "intermediate_size": "ffn_dim",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "layer_norm_eps": "eps",
    },
    {"model_type": "clip_vision_model", "num_channels": 3},
)
QK_NORM = {"rms_norm_across_heads": True, None: False}


def read_configs(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The transformer's fields as an official config.json has them, and {"vae": fields, "text_encoder": fields}, of
    two experts "boundary" too, and "image_encoder" where there is one.

    Raises:
        CheckpointError: a file is missing or no JSON, or describes another model than this package runs.
    """
    index = _json(folder / INDEX)
    known, name = (*PIPELINES, *DISTILLED_PIPELINES), index.get("_class_name")
    if name not in known:
        raise CheckpointError(f"{folder}: is a {name}, not one of {', '.join(known)}")
    extra: dict[str, Any] = {"sampling": dict(FASTWAN)} if name in DISTILLED_PIPELINES else {}
    if (boundary := index.get("boundary_ratio")) is not None:
        if type(boundary) is not float or not 0 < boundary < 1:
            raise CheckpointError(f"{folder / INDEX}: boundary_ratio cannot be {boundary!r}")
        extra["boundary"] = boundary
        _check_experts(folder)
    elif (folder / "transformer_2").is_dir():
        raise CheckpointError(f"{folder}: transformer_2 is there, but {INDEX} names no boundary_ratio")
    vae_table = VAE if _json(folder / "vae" / "config.json").get("is_residual") else VAE21
    table = VACE_TRANSFORMER if index["_class_name"] == "WanVACEPipeline" else TRANSFORMER
    found = {
        name: _translated(folder / name / "config.json", table)
        for name, table in (("transformer", table), ("vae", vae_table), ("text_encoder", TEXT_ENCODER))
    }
    transformer, said = found["transformer"]
    if said.get("qk_norm") not in QK_NORM:
        raise CheckpointError(f"{folder / 'transformer' / 'config.json'}: qk_norm cannot be {said['qk_norm']!r}")
    transformer |= {"qk_norm": QK_NORM[said.get("qk_norm")], "_class_name": "WanModel"}
    if "num_heads" in transformer and "attention_head_dim" in said:
        transformer["dim"] = _product(folder, transformer["num_heads"], said["attention_head_dim"])
    _take_image_words(folder, transformer, said)
    if index.get("image_encoder", [None, None]) != [None, None]:
        extra["image_encoder"] = _image_encoder(folder / "image_encoder" / "config.json")
    text_encoder, said = found["text_encoder"]
    if "num_heads" in text_encoder and "d_kv" in said:
        text_encoder["dim_attn"] = _product(folder, text_encoder["num_heads"], said["d_kv"])
    return transformer, {"vae": found["vae"][0], "text_encoder": text_encoder, **extra}


def _take_image_words(folder: Path, transformer: dict[str, Any], said: Mapping[str, Any]) -> None:
    """What it says of image tokens: none, in our words, is 0. Their keys and values are as wide as the model's."""
    transformer |= {TRANSFORMER[1][key]: 0 for key in ("image_dim", "pos_embed_seq_len") if said.get(key, 0) is None}
    width, wide = said.get("added_kv_proj_dim"), bool(transformer.get("image_dim"))
    if wide != (width is not None) or (width is not None and width != transformer.get("dim", width)):
        raise CheckpointError(
            f"{folder / 'transformer' / 'config.json'}: added_kv_proj_dim is {width!r} with an image_dim of "
            f"{said.get('image_dim')!r}, of which no model that runs is"
        )


def _image_encoder(path: Path) -> dict[str, Any]:
    """Its fields; transformers leaves out what CLIP's defaults are, of which one is not this model's."""
    said = _json(path)
    name = next(iter(said.get("architectures") or [IMAGE_ENCODERS[0]]), None)
    if name not in IMAGE_ENCODERS or said.get("hidden_act") != "gelu":
        raise CheckpointError(
            f"{path}: is a {name} with the activation {said.get('hidden_act', 'quick_gelu')}, not Wan's image encoder, "
            f"a {IMAGE_ENCODERS[0]} with gelu"
        )
    return _translated(path, (name, *IMAGE_ENCODER[1:]))[0]


def _check_experts(folder: Path) -> None:
    """Both transformers' configs must say the same."""
    high, low = (_json(folder / name / "config.json") for name in ("transformer", "transformer_2"))
    if {**high, "_name_or_path": ""} != {**low, "_name_or_path": ""}:
        raise CheckpointError(f"{folder / 'transformer_2' / 'config.json'}: differs from transformer/config.json")


def _product(folder: Path, heads: Any, width: Any) -> int:
    if type(heads) is not int or type(width) is not int:
        raise CheckpointError(f"{folder}: heads and their width must be whole numbers, not {heads!r} and {width!r}")
    return heads * width


def _translated(path: Path, table: tuple[str, Mapping[str, str], Mapping[str, Any]]) -> tuple[dict, dict]:
    """Our fields, and all that the config says."""
    name, fields, fixed = table
    said = _json(path)
    if said.get("_class_name", *said.get("architectures", [name])[:1]) != name:
        raise CheckpointError(f"{path}: is of another model than {name}; use a Wan repository")
    for key, value in fixed.items():
        if said.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} is {said[key]!r}, in the models that run it is {value!r}")
    return {ours: said[key] for key, ours in fields.items() if said.get(key) is not None}, said


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing from this Diffusers repository; get the rest and try again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return content


def write_configs(checkpoint: "Checkpoint") -> dict[str, dict[str, Any]]:
    """File name -> content of every configuration in the Diffusers repository of a model."""
    spec = checkpoint.spec
    transformer = _transformer(checkpoint.transformer_config, spec)
    experts = checkpoint.transformer_2 is not None
    files = {
        "transformer/config.json": transformer,
        **({"transformer_2/config.json": transformer} if experts else {}),
        "text_encoder/config.json": _text_encoder(checkpoint.text_encoder_config),
        "vae/config.json": _vae(checkpoint.vae_config),
        "scheduler/scheduler_config.json": {
            "_class_name": "UniPCMultistepScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": spec.shift,
        },
    }
    diffusers, transformers = "diffusers", "transformers"
    index: dict[str, Any] = {
        "_class_name": {"i2v": PIPELINES[1], "flf2v": PIPELINES[1], "vace": PIPELINES[2]}.get(spec.task, PIPELINES[0]),
        "boundary_ratio": spec.boundary,
        "scheduler": [diffusers, "UniPCMultistepScheduler"],
        "text_encoder": [transformers, TEXT_ENCODER[0]],
        "tokenizer": [transformers, "T5TokenizerFast"],
        "transformer": [diffusers, transformer["_class_name"]],
        "transformer_2": [diffusers, transformer["_class_name"]] if experts else [None, None],
        "vae": [diffusers, VAE[0]],
    }
    if spec.task != "vace":
        index["expand_timesteps"] = spec.task == "ti2v"
    if spec.task in ("i2v", "flf2v"):
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    if checkpoint.image_encoder_config is not None:
        encoder = _clip(checkpoint.image_encoder_config)
        size = checkpoint.image_encoder_config.image_size
        files["image_encoder/config.json"] = encoder
        files["image_processor/preprocessor_config.json"] = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "image_mean": list(MEAN),
            "image_std": list(STD),
        }
        index |= {
            "image_encoder": [transformers, encoder["architectures"][0]],
            "image_processor": [transformers, "CLIPImageProcessor"],
        }
    return {**files, INDEX: index}


def _transformer(config: TransformerConfig, spec: ModelSpec) -> dict[str, Any]:
    written = _untranslated(config, VACE_TRANSFORMER if spec.task == "vace" else TRANSFORMER)
    return written | {
        "image_dim": config.image_dim or None,
        "added_kv_proj_dim": config.dim if config.image_dim else None,
        "pos_embed_seq_len": config.image_positions or None,
        "attention_head_dim": config.dim // config.num_heads,
        "qk_norm": next(word for word, used in QK_NORM.items() if used == config.qk_norm),
    }


def _text_encoder(config: TextEncoderConfig) -> dict[str, Any]:
    written = _untranslated(config, TEXT_ENCODER)
    return written | {
        "architectures": [written.pop("_class_name")],
        "d_kv": config.dim_attn // config.num_heads,
        "is_gated_act": True,
        "dense_act_fn": "gelu_new",
    }


def _vae(config: VAEConfig | VAE21Config) -> dict[str, Any]:
    written = _untranslated(config, VAE if isinstance(config, VAEConfig) else VAE21)
    written.pop("clip_output")
    channels, (stride_t, stride_s, _) = 3 * getattr(config, "patch_size", 1) ** 2, config.stride
    return written | {
        "in_channels": channels,
        "out_channels": channels,
        "scale_factor_temporal": stride_t,
        "scale_factor_spatial": stride_s,
    }


def _clip(config: ImageEncoderConfig) -> dict[str, Any]:
    written = _untranslated(config, IMAGE_ENCODER)
    del written["_class_name"]
    name = IMAGE_ENCODERS[bool(config.out_dim)]  # without a projection where there is none
    more = {"projection_dim": config.out_dim} if config.out_dim else {}
    return written | {"architectures": [name], "hidden_act": "gelu", **more}


def _untranslated(config: Any, table: tuple[str, Mapping[str, str], Mapping[str, Any]]) -> dict[str, Any]:
    name, fields, fixed = table
    ours = asdict(config)
    return {"_class_name": name, **{key: ours[field] for key, field in fields.items()}, **fixed}
