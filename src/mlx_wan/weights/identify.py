"""Which released model a tensor file belongs to, judged from the names and shapes in it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mlx_wan.errors import CheckpointError
from mlx_wan.lora import dialects
from mlx_wan.weights.layouts import official_names, unwrapped
from mlx_wan.weights.shapes import FIELDS, Shape, vae_family
from mlx_wan.zoo import RELEASES

COMPONENTS = ("transformer", "text_encoder", "image_encoder", "vae")  # kinds; of transformers there may be two
LABELS = {
    "transformer": "transformer",
    "text_encoder": "text encoder",
    "image_encoder": "image encoder",
    "vae": "VAE",
}

# Names that only one kind of model has: (start of a name, component, model). First match wins.
MARKS: tuple[tuple[str, str, str], ...] = (
    ("casual_audio_encoder.", "transformer", "Wan2.2 S2V-14B"),
    ("face_adapter.", "transformer", "Wan2.2 Animate-14B"),
    ("pose_patch_embedding.", "transformer", "Wan2.2 Animate-14B"),
    ("wav2vec2.", "other", "wav2vec2 audio encoder"),
)

# What an adapter's factors tell of the transformer: (field, layer in any dialect, role whose shape says it).
ADAPTER_SIZES = (
    ("dim", r"(self_attn|attn1)[._](q|to_q)$", "lora_a"),
    ("ffn_dim", r"ffn[._](0|net[._]0[._]proj)$", "lora_b"),
)

# Starts of names that make a file a component of ours.
KEYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("transformer", ("patch_embedding.", "blocks.0.self_attn.")),
    ("text_encoder", ("blocks.0.attn.", "blocks.0.ffn.gate.")),
    ("image_encoder", ("cls_embedding", "transformer.0.attn.to_qkv.")),
    ("vae", ("encoder.downsamples.0.downsamples.", "decoder.upsamples.0.upsamples.")),
    ("vae", ("encoder.downsamples.0.residual.", "decoder.upsamples.0.residual.")),
)


@dataclass(frozen=True)
class Identity:
    """What a file is.

    Attributes:
        component: one of `COMPONENTS`, "lora", "other" or "unknown".
        model: its name for people, e.g. "Wan2.2 VAE" or "transformer of an unknown size".
        runs: whether it is of a kind that this package can use.
        models: the names in `zoo.MODELS` that a released transformer may belong to.
        family: of a VAE, "Wan2.1" or "Wan2.2".
    """

    component: str
    model: str
    runs: bool = False
    models: tuple[str, ...] = ()
    family: str | None = None


def identify(shapes: Mapping[str, Shape]) -> Identity:
    """Judges a file by its tensors' names (of any dialect) and shapes. Never fails: what it does not know is
    "unknown"."""
    if dialects.is_adapter(shapes):
        return Identity("lora", _adapter(shapes))
    shapes = {unwrapped(name): shape for name, shape in shapes.items()}
    for start, component, model in MARKS:
        if any(name.startswith(start) for name in shapes):
            return Identity(component, model)
    try:
        renamed = official_names(shapes)
    except CheckpointError:
        return Identity("unknown", "unknown")
    shapes = {renamed[name]: shape for name, shape in shapes.items()}
    for component, keys in KEYS:
        if all(any(name.startswith(key) for name in shapes) for key in keys):
            return _release(component, shapes)
    return Identity("unknown", "unknown")


def _adapter(shapes: Mapping[str, Shape]) -> str:
    """What an adapter file is, and the released transformers whose blocks it fits, as far as its shapes tell."""
    found: dict[str, int] = {}
    blocks, roles = 0, set()
    for name, shape in shapes.items():
        key = dialects.parse(name)
        if key is None:
            continue
        roles.add(key.role)
        blocks = max([blocks, *(int(number) + 1 for number in re.findall(r"blocks[._](\d+)[._]", key.layer))])
        for field, layer, role in ADAPTER_SIZES:
            if re.search(layer, key.layer) and key.role == role and len(shape) >= 2:
                found[field] = shape[0] if role == "lora_b" else math.prod(shape[1:])
    kind = next((kind for mark, kind in dialects.KINDS if any(role.startswith(mark) for role in roles)), "LoRA")
    if not found:
        return kind
    found["num_layers"] = blocks
    names = [r.name for r in RELEASES if r.component == "transformer" and found.items() <= r.dims.items()]
    sizes = ", ".join(f"{field} {size}" for field, size in found.items())
    return f"{kind} for {' or '.join(names) or f'a transformer of an unreleased size ({sizes})'}"


def _release(component: str, shapes: Mapping[str, Shape]) -> Identity:
    family = vae_family(shapes) if component == "vae" else None
    try:
        fields = FIELDS[component](shapes)
    except CheckpointError:
        return Identity(component, f"{LABELS[component]} with missing or odd tensors", runs=True, family=family)
    for release in RELEASES:
        if release.component == component and release.dims.items() <= fields.items():
            return Identity(component, release.name, True, release.models, family)
    kinds = {"transformer": "Wan transformer", "text_encoder": "UMT5 encoder", "image_encoder": "CLIP image encoder"}
    kind = kinds.get(component, f"{family}-type VAE")
    if component == "transformer" and fields["vace_in_dim"]:
        kind = "VACE transformer"
    elif component == "transformer" and fields["in_dim"] != fields["out_dim"]:
        kind = "image-to-video transformer"
    return Identity(component, f"{kind} of an unreleased size", runs=True, family=family)
