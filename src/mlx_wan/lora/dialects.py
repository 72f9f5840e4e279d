"""What trainers call the parts of an adapter, and which part of the model each belongs to.

A key is a prefix, a layer and a role: `diffusion_model.` `blocks.3.ffn.0` `.lora_A.weight`. Prefixes and roles are
tables. A layer is found by its name in any dialect of `weights.layouts`, its dots read as underscores, which is how
kohya's scripts write them; so no dialect needs code of its own.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlx_wan.weights.layouts import DIALECTS

# (prefix, who writes it); of those that fit, the first counts.
PREFIXES = (
    ("base_model.model.", "PEFT"),
    ("model.diffusion_model.", "ComfyUI"),
    ("diffusion_model.", "ComfyUI"),
    ("transformer.", "Diffusers"),
    ("pipe.dit.", "DiffSynth"),
    ("lora_unet__", "kohya"),  # VideoX-Fun's
    ("lora_unet_", "kohya"),
    ("lycoris_", "LyCORIS"),
)
PLAIN = "DiffSynth"  # writes no prefix

# The end of a key -> its role. `(?:\.\w+)?` is the name PEFT gives an adapter, where it is kept.
ROLES = (
    (r"lora_A(?:\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight", "lora_a"),
    (r"lora_B(?:\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight", "lora_b"),
    (r"lora_B(?:\.\w+)?\.bias", "lora_bias"),
    (r"alpha", "alpha"),
    (r"diff", "diff"),
    (r"diff_b", "diff_b"),
    (r"diff_m", "diff_m"),
    *((rf"({name})(?:\.\w+)?", name) for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")),
    *((rf"({name})(?:\.\w+)?", name) for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    *((rf"({name})(?:\.\w+)?", name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    *((rf"({name})(?:\.\w+)?", name) for name in ("hada_t1", "hada_t2")),
    (r"lora_mid\.weight", "lora_mid"),
    (r"dora_scale|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?", "dora"),
)
KINDS = (("lora_", "LoRA"), ("lokr_", "LoKr"), ("hada_", "LoHa"), ("diff", "differences"))
# Parts of methods that are not computed here: refused, since leaving them out would silently change the result.
REFUSED = {"lora_mid": "Tucker", "lokr_t2": "Tucker", "hada_t1": "Tucker", "hada_t2": "Tucker"}

_ROLES = tuple((re.compile(rf"(.+)\.(?:{pattern})"), role) for pattern, role in ROLES)


@dataclass(frozen=True)
class Key:
    """A key of an adapter file, taken apart.

    Attributes:
        layer: what the file calls the layer, without the prefix.
        role: a value of `ROLES`.
        writer: who writes such keys.
    """

    layer: str
    role: str
    writer: str


def parse(name: str) -> Key | None:
    """The parts of a key, None if it is no adapter's."""
    for pattern, role in _ROLES:
        if match := pattern.fullmatch(name):
            layer, writer = _split(match[1])
            return Key(layer, role, writer)
    return None


def _split(layer: str) -> tuple[str, str]:
    for prefix, writer in PREFIXES:
        if layer.startswith(prefix):
            rest = layer.removeprefix(prefix)
            return (_split(rest)[0] if writer == "PEFT" else rest), writer
    return layer, PLAIN


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a file with these names is an adapter: some role of one is in it that no model has."""
    keys = (key for name in names if (key := parse(name)) is not None)
    return any(key.role != "alpha" or key.writer in ("kohya", "LyCORIS") for key in keys)


def targets(parameters: Iterable[str]) -> Mapping[str, str]:
    """Every spelling of a layer, in any dialect and with dots as underscores -> its official name.

    Layers are the names of `parameters` (official) without ".weight" and ".bias"; a parameter such as
    "blocks.0.modulation" is its own layer.
    """
    found: dict[str, str] = {}
    for name in parameters:
        official = _layer(name)
        for dialect in DIALECTS:
            found[_flat(_layer(dialect.from_official(name)))] = official
    return found


def resolve(layer: str, spellings: Mapping[str, str]) -> str | None:
    """The official name of a layer, None if the model has none such."""
    return spellings.get(_flat(layer))


def _layer(parameter: str) -> str:
    return re.sub(r"\.(weight|bias)$", "", parameter)


def _flat(name: str) -> str:
    return name.replace(".", "_")
