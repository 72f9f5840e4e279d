"""Recipes: what a training run does, read from YAML, checked, and remembered beside its states."""

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from mlx_wan.errors import UserError
from mlx_wan.models.transformer import TransformerConfig
from mlx_wan.models.umt5 import TextEncoderConfig
from mlx_wan.models.vae22 import VAEConfig
from mlx_wan.schedulers import SCHEDULERS
from mlx_wan.training.captions import build_tokenizer
from mlx_wan.training.fields import build
from mlx_wan.training.options import FREE_OPTIONS, FinetuneRecipe
from mlx_wan.training.trainer import TrainConfig
from mlx_wan.training.world import TWO_OBJECTS
from mlx_wan.zoo import SAMPLING_TYPES

RUN_FILE = "run.json"
# A run may go on with other values of these: they leave its weights alone.
_FREE = ("train.report_every", "train.eval_every", "train.save_every", "train.keep", "validation_clips", "sampling.")
_FREE += ("train.shard_optimizer", *(f"finetune.{name}" for name in FREE_OPTIONS))
_SECTIONS = {"train": TrainConfig, "finetune": FinetuneRecipe}


@dataclass(frozen=True)
class Clips:
    """Size of the drawn clips: frames are 4n + 1, sides in multiples of the autoencoder's stride."""

    num_frames: int = 25
    width: int = 128
    height: int = 128

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_frames", "width", "height")

    def check_stride(self, name: str, vae: VAEConfig, patch: tuple[int, int, int] = (1, 1, 1)) -> None:
        """UserError if the autoencoder, or the transformer's patches on its latents, cannot divide them."""
        time, rows, columns = vae.stride
        rows, columns = rows * patch[1], columns * patch[2]
        if self.num_frames % time != 1 % time:
            raise UserError(f"{name}.num_frames is {self.num_frames}; it must be {time}n+1, such as {6 * time + 1}")
        if self.width % columns or self.height % rows:
            raise UserError(f"{name} are {self.width}x{self.height}; sides must be multiples of {columns} and {rows}")


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Stage one.

    kl_weight: of the pull towards unit Gaussians, a mean over latent values. crops: if given, training sees windows of
    this size and length, and every `whole_every`-th batch is of `whole_batch` whole clips. validation_clips: whole.
    """

    model: VAEConfig
    train: TrainConfig
    clips: Clips
    crops: Clips | None = None
    whole_every: int = 8
    whole_batch: int = 1
    kl_weight: float = 5e-5
    validation_clips: int = 64

    def __post_init__(self) -> None:
        _at_least(self, 1, "whole_every", "whole_batch", "validation_clips")
        _at_least(self, 0, "kl_weight")
        vae, clips, crops = self.model, self.clips, self.crops
        _check_widths(vae)
        clips.check_stride("clips", vae)
        if crops is None:
            return
        crops.check_stride("crops", vae)
        if crops.num_frames > clips.num_frames or crops.width > clips.width or crops.height > clips.height:
            raise UserError("crops are larger or longer than clips; windows must fit into them")
        if crops.width * clips.height != crops.height * clips.width:
            raise UserError(f"crops are {crops.width}x{crops.height}; windows must have the aspect ratio of clips")


@dataclass(frozen=True)
class TransformerRecipe:
    """Stage two.

    pool: clips drawn and encoded once, `encode_batch` at a time. two_objects: share of them that show two, not one.
    captions: different captions of each. shift: of the noise levels (see objective.py). caption_dropout: share of
    samples without a caption, for guidance. image_to_video: share of samples whose first latent frame is given clean.
    sampling: how the finished model is sampled by default. fresh_text_encoder: when it goes on from a model, the text
    encoder begins anew.
    """

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    train: TrainConfig
    clips: Clips
    sampling: dict[str, Any]
    pool: int = 65536
    encode_batch: int = 16
    two_objects: float = TWO_OBJECTS
    captions: int = 4
    shift: float = 3.0
    caption_dropout: float = 0.1
    image_to_video: float = 0.25
    validation_clips: int = 512
    fresh_text_encoder: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 1, "pool", "encode_batch", "captions", "validation_clips")
        if self.shift <= 0:
            raise UserError(f"shift is {self.shift}; it must be above 0")
        for name in ("two_objects", "caption_dropout", "image_to_video"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        _check_dimensions(self.transformer, self.text_encoder)
        _check_sampling(self.sampling)

    def check_autoencoder(self, vae: VAEConfig) -> None:
        """UserError if the transformer cannot work on the latents of `vae`."""
        if self.transformer.in_dim != vae.z_dim:
            raise UserError(f"transformer.in_dim is {self.transformer.in_dim}; the autoencoder's z_dim is {vae.z_dim}")
        patch = self.transformer.patch_size
        self.clips.check_stride("clips", vae, patch)
        size = {name: self.sampling[name] for name in ("num_frames", "width", "height")}
        Clips(**size).check_stride("sampling", vae, patch)


def _check_widths(vae: VAEConfig) -> None:
    _at_least(vae, 1, "dim", "dec_dim", "z_dim", "num_res_blocks", "patch_size", section="model")
    if not vae.dim_mult or min(vae.dim_mult) < 1 or len(vae.temporal_downsample) != len(vae.dim_mult) - 1:
        raise UserError(
            f"model.dim_mult is {list(vae.dim_mult)} and model.temporal_downsample has "
            f"{len(vae.temporal_downsample)} entries; it needs one less than dim_mult, whose entries are 1 or more"
        )
    # A strided stage's shortcut folds a block of pixels into channels (or back) and averages (or repeats) groups of
    # them, so the width of the one side must divide what the block of the other holds.
    folds = [4 * (2 if temporal else 1) for temporal in vae.temporal_downsample]
    mult = vae.dim_mult
    encoder = zip((1, *mult), mult, (*folds, 1), strict=False)
    decoder = zip(mult[1:], mult[2:], folds, strict=False)
    for narrow, wide, fold in (*encoder, *decoder):
        if narrow * fold % wide:
            raise UserError(f"model.dim_mult goes from {narrow} to {wide}; the second must divide {narrow * fold}")
    if vae.latents_mean or vae.latents_std:
        raise UserError("model.latents_mean and model.latents_std are measured after training; leave them out")


def _check_dimensions(transformer: TransformerConfig, text: TextEncoderConfig) -> None:
    sizes = ("in_dim", "dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len")
    _at_least(transformer, 1, *sizes, section="transformer")
    sizes = ("dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets")
    _at_least(text, 1, *sizes, section="text_encoder")
    head = transformer.dim / transformer.num_heads
    if head % 2:
        raise UserError(f"transformer.dim / num_heads is {head:g}; it must be an even whole number")
    if transformer.freq_dim % 2:
        raise UserError(f"transformer.freq_dim is {transformer.freq_dim}; it must be even")
    if min(transformer.patch_size) < 1 or transformer.patch_size[0] != 1:
        raise UserError(f"transformer.patch_size is {list(transformer.patch_size)}; it must be [1, rows, columns]")
    if transformer.image_dim or transformer.image_positions:
        raise UserError("transformer.image_dim and image_positions must be 0: no stage trains with image tokens")
    if transformer.in_dim != transformer.out_dim:
        raise UserError(f"transformer.in_dim is {transformer.in_dim} and out_dim {transformer.out_dim}: must be equal")
    if transformer.text_dim != text.dim:
        raise UserError(
            f"transformer.text_dim is {transformer.text_dim} and text_encoder.dim {text.dim}: must be equal"
        )
    if text.dim_attn % text.num_heads:
        raise UserError(f"text_encoder.dim_attn is {text.dim_attn}; {text.num_heads} heads must divide it")
    words = build_tokenizer().get_vocab_size()
    if text.vocab_size < words:
        raise UserError(f"text_encoder.vocab_size is {text.vocab_size}; the tokenizer has {words} entries")


def _check_sampling(sampling: dict[str, Any]) -> None:
    if sampling.keys() != SAMPLING_TYPES.keys():
        wrong = sorted(sampling.keys() ^ SAMPLING_TYPES.keys())[0]
        raise UserError(f"sampling: {wrong!r} is missing or unknown; the keys are {', '.join(SAMPLING_TYPES)}")
    for name, kind in SAMPLING_TYPES.items():
        accepted = (int, float) if kind is float else kind
        if not isinstance(sampling[name], accepted) or isinstance(sampling[name], bool):
            raise UserError(f"sampling.{name} is {sampling[name]!r}; it must be of type {kind.__name__}")
        if kind is not str and sampling[name] <= 0:
            raise UserError(f"sampling.{name} is {sampling[name]}; it must be above 0")
    if sampling["scheduler"] not in SCHEDULERS:
        raise UserError(f"sampling.scheduler is {sampling['scheduler']!r}; choose one of {', '.join(SCHEDULERS)}")


def _at_least(config: Any, least: int, *names: str, section: str = "") -> None:
    for name in names:
        if getattr(config, name) < least:
            where = f"{section}.{name}" if section else name
            raise UserError(f"{where} is {getattr(config, name)}; it must be at least {least}")


# --- reading ---------------------------------------------------------------------------------------------------------

_STAGES = {"autoencoder": AutoencoderRecipe, "transformer": TransformerRecipe, "finetune": FinetuneRecipe}
Recipe = AutoencoderRecipe | TransformerRecipe | FinetuneRecipe


def read_recipe(path: Path | None, changes: dict[str, Any] | None = None) -> Recipe:
    """The recipe in `path`, or of `changes` alone for fine-tuning. UserError says what is wrong and where.

    changes: values that go before the file's: keys of the recipe for stage finetune, of its train section for others.
    """
    if path is None:
        return build(FinetuneRecipe, changes or {}, "the command line")
    values = _read_yaml(path)
    stage = values.pop("stage", "finetune") if isinstance(values, dict) else None
    if not isinstance(stage, str) or stage not in _STAGES:
        raise UserError(f"{path}: stage must be one of {', '.join(_STAGES)}")
    section = values if stage == "finetune" else values.get("train")
    if isinstance(section, dict):
        section.update(changes or {})
    return build(_STAGES[stage], values, str(path))


def stage_of(path: Path) -> str | None:
    """The stage that a recipe says it is of, fine-tuning if it says none; None if it is no recipe. UserError as
    `read_recipe`."""
    values = _read_yaml(path)
    return values.get("stage", "finetune") if isinstance(values, dict) else None


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{path} is not YAML{line}: {getattr(error, 'problem', None) or error}") from None


# --- the folder of a run ---------------------------------------------------------------------------------------------


def describe(
    recipe: AutoencoderRecipe | TransformerRecipe, processes: int, vae: Path | None, init: str | None = None
) -> dict[str, Any]:
    """All that decides a run's weights, as JSON has it: the recipe, how many processes, the autoencoder's contents.

    init: fingerprint of the model that stage two goes on from.
    """
    stage = next(name for name, cls in _STAGES.items() if isinstance(recipe, cls))
    facts: dict[str, Any] = {"stage": stage, **asdict(recipe), "processes": processes}
    if init is not None:
        facts["init"] = init
    if vae is not None:
        try:
            facts["autoencoder"] = hashlib.sha256((vae / "vae.safetensors").read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(
                f"{vae} is no finished autoencoder ({error.strerror}: vae.safetensors); train stage one first"
            ) from None
    return json.loads(json.dumps(facts))


def check_writable(folder: Path) -> None:
    """UserError if nothing can be written into the folder of a run, which is made if needed. Before hours of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); choose another folder") from None


def check_same_run(folder: Path, facts: dict[str, Any]) -> None:
    """UserError if the run in `folder` was started with other facts than `describe` gives now."""
    path = folder / RUN_FILE
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{path} cannot be read; remove it to go on without checking that the recipe is the same"
        ) from None
    # A key that is younger than the run had its default then.
    now = _leaves(facts)
    keys = [(f"{section}.", field) for section, cls in _SECTIONS.items() for field in fields(cls)]
    keys += [("", field) for field in fields(_STAGES[facts["stage"]])]
    defaults = {name: field.default for section, field in keys if (name := section + field.name) in now}
    then = defaults | _leaves(before)
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name) and not name.startswith(_FREE)]
    if changed:
        name, flag = changed[0], "--adapter-path" if facts["stage"] == "finetune" else "--run"
        raise UserError(
            f"{folder} was started with another recipe: {name} was {then.get(name)!r} and is {now.get(name)!r} now; "
            f"go on with the old value, or choose another {flag}"
        )


def processes_of(folder: Path, resume: bool) -> int:
    """With how many processes the run in `folder` was begun; of a new one, how many there are now."""
    now = mx.distributed.init().size()
    try:
        before = json.loads((folder / RUN_FILE).read_text())["processes"] if resume else now
    except (OSError, ValueError, KeyError, TypeError):
        return now  # nothing to go by; `check_same_run` complains of a file that cannot be read
    return before if isinstance(before, int) and before > 0 else now


def remember_run(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the facts of `describe` beside the states."""
    partial = folder / f".{RUN_FILE}.partial"
    partial.write_text(json.dumps(facts, indent=2) + "\n")
    partial.replace(folder / RUN_FILE)


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
