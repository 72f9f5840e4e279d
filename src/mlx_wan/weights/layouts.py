"""Dialects of checkpoints: what others call our parameters, and which way round they keep their convolutions.

Inside this package parameters have the names of the official files and convolutions are channels last. A dialect is
a table of patterns; nothing else in the package knows other names.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from mlx_wan.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dialect:
    """A naming of parameters.

    Attributes:
        name: how it is called in messages.
        marks: starts of names, any of which gives the dialect away.
        pairs: (this dialect's pattern, official pattern). N stands for a number, * for any rest, and L, on the
            official side, for the number that follows the last of its siblings. Names that no pattern matches are
            the same in both.
    """

    name: str
    marks: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()

    def to_official(self, name: str) -> str:
        """The official name of a parameter that this dialect calls `name`; an L in it is left to `official_names`."""
        return _rename(name, self.pairs)

    def from_official(self, name: str) -> str:
        """What this dialect calls the parameter with the official `name`."""
        return _rename(name, tuple((official, own) for own, official in self.pairs))


OFFICIAL = Dialect("official")
# wan_model_mlx.safetensors, as the Wan2.2-mlx conversion script wrote it; its VAE and T5 files have official names.
WAN22_MLX = Dialect(
    "Wan2.2-mlx",
    ("blocks.0.ffn.layer_", "head.1.", "head_modulation"),
    (
        ("blocks.N.ffn.layer_0.*", "blocks.N.ffn.0.*"),
        ("blocks.N.ffn.layer_2.*", "blocks.N.ffn.2.*"),
        ("head.1.*", "head.head.*"),
        ("head_modulation", "head.modulation"),
    ),
)
# diffusers' WanTransformer3DModel and WanVACETransformer3DModel. Its norm2 is the official norm3.
_DIFFUSERS_BLOCK = (
    ("blocks.N.attn1.to_out.0.*", "blocks.N.self_attn.o.*"),
    ("blocks.N.attn1.norm_*", "blocks.N.self_attn.norm_*"),
    ("blocks.N.attn1.to_*", "blocks.N.self_attn.*"),
    ("blocks.N.attn2.to_out.0.*", "blocks.N.cross_attn.o.*"),
    ("blocks.N.attn2.add_k_proj.*", "blocks.N.cross_attn.k_img.*"),
    ("blocks.N.attn2.add_v_proj.*", "blocks.N.cross_attn.v_img.*"),
    ("blocks.N.attn2.norm_added_k.*", "blocks.N.cross_attn.norm_k_img.*"),
    ("blocks.N.attn2.norm_*", "blocks.N.cross_attn.norm_*"),
    ("blocks.N.attn2.to_*", "blocks.N.cross_attn.*"),
    ("blocks.N.norm2.*", "blocks.N.norm3.*"),
    ("blocks.N.ffn.net.0.proj.*", "blocks.N.ffn.0.*"),
    ("blocks.N.ffn.net.2.*", "blocks.N.ffn.2.*"),
    ("blocks.N.scale_shift_table", "blocks.N.modulation"),
)
DIFFUSERS_TRANSFORMER = Dialect(
    "Diffusers",
    ("condition_embedder.", "blocks.0.attn1."),
    (
        *_DIFFUSERS_BLOCK,
        *((f"vace_{own}", f"vace_{official}") for own, official in _DIFFUSERS_BLOCK),
        ("vace_blocks.N.proj_in.*", "vace_blocks.N.before_proj.*"),
        ("vace_blocks.N.proj_out.*", "vace_blocks.N.after_proj.*"),
        ("scale_shift_table", "head.modulation"),
        ("proj_out.*", "head.head.*"),
        ("condition_embedder.time_embedder.linear_1.*", "time_embedding.0.*"),
        ("condition_embedder.time_embedder.linear_2.*", "time_embedding.2.*"),
        ("condition_embedder.text_embedder.linear_1.*", "text_embedding.0.*"),
        ("condition_embedder.text_embedder.linear_2.*", "text_embedding.2.*"),
        ("condition_embedder.time_proj.*", "time_projection.1.*"),
        ("condition_embedder.image_embedder.norm1.*", "img_emb.proj.0.*"),
        ("condition_embedder.image_embedder.ff.net.0.proj.*", "img_emb.proj.1.*"),
        ("condition_embedder.image_embedder.ff.net.2.*", "img_emb.proj.3.*"),
        ("condition_embedder.image_embedder.norm2.*", "img_emb.proj.4.*"),
        ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ),
)
# transformers' UMT5EncoderModel. Files may hold the token table a second time, as encoder.embed_tokens.
HF_TEXT_ENCODER = Dialect(
    "Hugging Face",
    ("shared.weight", "encoder.block.0.layer.0.SelfAttention."),
    (
        ("shared.weight", "token_embedding.weight"),
        ("encoder.embed_tokens.weight", "token_embedding.weight"),
        ("encoder.final_layer_norm.weight", "norm.weight"),
        ("encoder.block.N.layer.0.layer_norm.weight", "blocks.N.norm1.weight"),
        ("encoder.block.N.layer.1.layer_norm.weight", "blocks.N.norm2.weight"),
        (
            "encoder.block.N.layer.0.SelfAttention.relative_attention_bias.weight",
            "blocks.N.pos_embedding.embedding.weight",
        ),
        ("encoder.block.N.layer.0.SelfAttention.*", "blocks.N.attn.*"),
        ("encoder.block.N.layer.1.DenseReluDense.wi_0.*", "blocks.N.ffn.gate.0.*"),
        ("encoder.block.N.layer.1.DenseReluDense.wi_1.*", "blocks.N.ffn.fc1.*"),
        ("encoder.block.N.layer.1.DenseReluDense.wo.*", "blocks.N.ffn.fc2.*"),
    ),
)
# UMT5 as llama.cpp names it.
GGUF_TEXT_ENCODER = Dialect(
    "GGUF",
    ("token_embd.weight", "enc.blk.0."),
    (
        ("token_embd.weight", "token_embedding.weight"),
        ("enc.output_norm.weight", "norm.weight"),
        ("enc.blk.N.attn_norm.weight", "blocks.N.norm1.weight"),
        ("enc.blk.N.ffn_norm.weight", "blocks.N.norm2.weight"),
        ("enc.blk.N.attn_rel_b.weight", "blocks.N.pos_embedding.embedding.weight"),
        *((f"enc.blk.N.attn_{name}.weight", f"blocks.N.attn.{name}.weight") for name in "qkvo"),
        ("enc.blk.N.ffn_gate.weight", "blocks.N.ffn.gate.0.weight"),
        ("enc.blk.N.ffn_up.weight", "blocks.N.ffn.fc1.weight"),
        ("enc.blk.N.ffn_down.weight", "blocks.N.ffn.fc2.weight"),
    ),
)
# transformers' CLIPVisionModel and CLIPVisionModelWithProjection, which ComfyUI's files are too; from its version 5 on
# the first has no prefix. Queries, keys and values are three matrices there, and the projection is turned:
# `clip.image_half` makes them one and turns it back.
HF_IMAGE_ENCODER = Dialect(
    "Hugging Face",
    ("vision_model.embeddings.", "embeddings.class_embedding", "encoder.layers.0.self_attn.q_proj."),
    (
        ("visual_projection.weight", "head"),
        *(
            (prefix + own, official)
            for prefix in ("vision_model.", "")
            for own, official in (
                ("embeddings.class_embedding", "cls_embedding"),
                ("embeddings.patch_embedding.*", "patch_embedding.*"),
                ("embeddings.position_embedding.weight", "pos_embedding"),
                ("pre_layrnorm.*", "pre_norm.*"),
                ("post_layernorm.*", "post_norm.*"),
                ("encoder.layers.N.layer_norm1.*", "transformer.N.norm1.*"),
                ("encoder.layers.N.layer_norm2.*", "transformer.N.norm2.*"),
                ("encoder.layers.N.self_attn.q_proj.*", "transformer.N.attn.to_qkv.q.*"),
                ("encoder.layers.N.self_attn.k_proj.*", "transformer.N.attn.to_qkv.k.*"),
                ("encoder.layers.N.self_attn.v_proj.*", "transformer.N.attn.to_qkv.v.*"),
                ("encoder.layers.N.self_attn.out_proj.*", "transformer.N.attn.proj.*"),
                ("encoder.layers.N.mlp.fc1.*", "transformer.N.mlp.0.*"),
                ("encoder.layers.N.mlp.fc2.*", "transformer.N.mlp.2.*"),
            )
        ),
    ),
)
TIED = {"encoder.embed_tokens.weight": "shared.weight"}  # the same tensor again: dropped where both are there


def _residual_blocks(homes: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    parts = (
        ("norm1.gamma", "residual.0.gamma"),
        ("conv1.*", "residual.2.*"),
        ("norm2.gamma", "residual.3.gamma"),
        ("conv2.*", "residual.6.*"),
        ("conv_shortcut.*", "shortcut.*"),
    )
    return tuple((f"{own}.{a}", f"{official}.{b}") for own, official in homes for a, b in parts)


# What both kinds of autoencoder have in their middle and at their ends.
_MIDDLE = tuple((f"{p}.mid_block.resnets.{i}", f"{p}.middle.{2 * i}") for p in ("encoder", "decoder") for i in (0, 1))
_VAE_ENDS = (
    *(
        (f"{part}.{own}.*", f"{part}.{official}.*")
        for part in ("encoder", "decoder")
        for own, official in (
            ("conv_in", "conv1"),
            ("mid_block.attentions.0", "middle.1"),
            ("norm_out", "head.0"),
            ("conv_out", "head.2"),
        )
    ),
    ("quant_conv.*", "conv1.*"),
    ("post_quant_conv.*", "conv2.*"),
)
# diffusers' AutoencoderKLWan of the Wan2.2 kind (is_residual). A stage's resampling has no number of its own there.
DIFFUSERS_VAE = Dialect(
    "Diffusers",
    ("encoder.down_blocks.0.resnets.",),
    (
        *_residual_blocks(
            (
                ("encoder.down_blocks.N.resnets.N", "encoder.downsamples.N.downsamples.N"),
                ("decoder.up_blocks.N.resnets.N", "decoder.upsamples.N.upsamples.N"),
                *_MIDDLE,
            )
        ),
        *(
            (f"{own}.{part}.*", f"{official}.{part}.*")
            for own, official in (
                ("encoder.down_blocks.N.downsampler", "encoder.downsamples.N.downsamples.L"),
                ("decoder.up_blocks.N.upsampler", "decoder.upsamples.N.upsamples.L"),
            )
            for part in ("resample", "time_conv")
        ),
        *_VAE_ENDS,
    ),
)
# And of the Wan2.1 kind: its encoder is flat in both, its decoder in the official files alone.
DIFFUSERS_VAE21 = Dialect(
    "Diffusers",
    ("encoder.down_blocks.0.norm1.",),
    (
        *_residual_blocks(
            (
                ("encoder.down_blocks.N", "encoder.downsamples.N"),
                ("decoder.up_blocks.N.resnets.N", "decoder.upsamples.N.flat.N"),
                *_MIDDLE,
            )
        ),
        *(
            (f"{own}.{part}.*", f"{official}.{part}.*")
            for own, official in (
                ("encoder.down_blocks.N", "encoder.downsamples.N"),
                ("decoder.up_blocks.N.upsamplers.0", "decoder.upsamples.N.flat.L"),
            )
            for part in ("resample", "time_conv")
        ),
        *_VAE_ENDS,
    ),
)
# mlx-video's conversions: no dot before a number, and the patch embedding as a matrix in torch's order.
MLX_VIDEO_TRANSFORMER = Dialect(
    "mlx-video",
    ("patch_embedding_proj.",),
    (
        ("patch_embedding_proj.*", "patch_embedding.*"),
        ("text_embedding_0.*", "text_embedding.0.*"),
        ("text_embedding_1.*", "text_embedding.2.*"),
        ("time_embedding_0.*", "time_embedding.0.*"),
        ("time_embedding_1.*", "time_embedding.2.*"),
        ("time_projection.*", "time_projection.1.*"),
        ("blocks.N.ffn.fc1.*", "blocks.N.ffn.0.*"),
        ("blocks.N.ffn.fc2.*", "blocks.N.ffn.2.*"),
    ),
)
MLX_VIDEO_TEXT_ENCODER = Dialect(
    "mlx-video", ("blocks.0.ffn.gate_proj.",), (("blocks.N.ffn.gate_proj.*", "blocks.N.ffn.gate.0.*"),)
)
MLX_VIDEO_VAE = Dialect(
    "mlx-video",
    ("decoder.head.layer_", "encoder.head.layer_"),
    (
        ("*.residual.layer_N.*", "*.residual.N.*"),
        ("*.head.layer_N.*", "*.head.N.*"),
        *(
            (f"*.{own}_{kind}", f"*.{official}.{kind}")
            for own, official in (("resample", "resample.1"), ("to_qkv", "to_qkv"), ("proj", "proj"))
            for kind in ("weight", "bias")
        ),
    ),
)
DIALECTS = (
    OFFICIAL,
    WAN22_MLX,
    DIFFUSERS_TRANSFORMER,
    HF_TEXT_ENCODER,
    GGUF_TEXT_ENCODER,
    HF_IMAGE_ENCODER,
    DIFFUSERS_VAE,
    DIFFUSERS_VAE21,
    MLX_VIDEO_TRANSFORMER,
    MLX_VIDEO_TEXT_ENCODER,
    MLX_VIDEO_VAE,
)
# What ComfyUI, its extensions and trainers put before every name, and CLIP before those of its image half.
WRAPPERS = ("model.diffusion_model.", "diffusion_model.", "model.", "visual.")


@cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    return re.compile(escaped.replace("N", r"(\d+)").replace("L", r"\d+").replace(r"\*", "(.+)"))


def _rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for source, target in pairs:
        if match := _pattern(source).fullmatch(name):
            parts = list(match.groups())[::-1]
            return re.sub(r"N|\*", lambda _, parts=parts: parts.pop(), target)
    return name


def unwrapped(name: str) -> str:
    """`name` without one of `WRAPPERS`."""
    return next((name.removeprefix(wrapper) for wrapper in WRAPPERS if name.startswith(wrapper)), name)


def detect_dialect(names: Iterable[str]) -> Dialect:
    """The dialect that one of `names` gives away; the official one when none does."""
    names = list(names)
    return next((d for d in DIALECTS if any(name.startswith(d.marks) for name in names)), OFFICIAL)


def official_names(names: Iterable[str]) -> dict[str, str]:
    """Each of `names` -> its official name; second copies of tied tensors are left out.

    Raises:
        CheckpointError: two of them are the same parameter.
    """
    names = list(names)
    bare = {name: unwrapped(name) for name in names}
    given = set(bare.values())
    dialect = detect_dialect(given)
    renamed = {n: dialect.to_official(own) for n, own in bare.items() if TIED.get(own) not in given}
    renamed = _flattened(_numbered(renamed))
    seen: dict[str, str] = {}
    for name, official in renamed.items():
        if official in seen:
            raise CheckpointError(f"holds the same parameter twice, as {seen[official]} and {name}")
        seen[official] = name
    return renamed


def _numbered(renamed: dict[str, str]) -> dict[str, str]:
    """Fills in each L: one more than the highest number among its siblings."""
    numbered = [official for official in renamed.values() if ".L." not in official]

    def fill(official: str) -> str:
        start, placeholder, rest = official.partition(".L.")
        if not placeholder:
            return official
        pattern = re.compile(re.escape(start) + r"\.(\d+)\.")
        last = max((int(match[1]) for other in numbered if (match := pattern.match(other))), default=-1)
        return f"{start}.{last + 1}.{rest}"

    return {name: fill(official) for name, official in renamed.items()}


def _flattened(renamed: dict[str, str]) -> dict[str, str]:
    """Counts the members of nested lists "x.1.flat.0" through, to "x.4"."""
    pattern = re.compile(r"(.+)\.(\d+)\.flat\.(\d+)\.(.+)")
    found = {name: match for name, official in renamed.items() if (match := pattern.fullmatch(official))}
    places = sorted({(match[1], int(match[2]), int(match[3])) for match in found.values()})
    number = {place: sum(place[0] == other[0] for other in places[:i]) for i, place in enumerate(places)}
    flat = {n: f"{m[1]}.{number[m[1], int(m[2]), int(m[3])]}.{m[4]}" for n, m in found.items()}
    return renamed | flat


def nested(name: str, num_res_blocks: int) -> str:
    """The way back from a flat list of the Wan2.1 decoder: "decoder.upsamples.4.x" -> "decoder.upsamples.1.flat.0.x".

    A stage has one residual block more than the encoder's, then what doubles it.
    """
    match = re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", name)
    if not match:
        return name
    stage, place = divmod(int(match[1]), num_res_blocks + 2)
    return f"decoder.upsamples.{stage}.flat.{place}.{match[2]}"


# What is done to a tensor on its way into a module.
KEEP, TURN, SQUEEZE, UNFOLD = "keep", "turn", "squeeze", "unfold"


def fits(found: Shape, wanted: Shape) -> set[str]:
    """The ways in which a tensor of shape `found` can become one of shape `wanted`.

    TURN takes a convolution from torch's order (O, I, *kernel) to channels last (O, *kernel, I). SQUEEZE drops
    the ones torch keeps around the VAE's norm weights: (C, 1, 1, 1) -> (C,). UNFOLD takes a convolution that was laid
    flat in torch's order, (O, I · kernel), to channels last. A convolution of as many channels as its kernel is wide
    fits both KEEP and TURN.
    """
    ways: set[str] = set()
    if found == wanted:
        ways.add(KEEP)
    elif len(wanted) == 1 and tuple(n for n in found if n != 1) == tuple(n for n in wanted if n != 1):
        ways.add(SQUEEZE)
    if len(wanted) in (4, 5) and found == (wanted[0], math.prod(wanted[1:])):
        ways.add(UNFOLD)
    is_convolution = len(wanted) in (4, 5) and len(found) == len(wanted)
    # One input channel and a kernel of one: both orders are the same numbers.
    if is_convolution and _turned(found) == wanted and not (found == wanted and found[1] == 1):
        ways.add(TURN)
    return ways


def _turned(shape: Shape) -> Shape:
    return (shape[0], *shape[2:], shape[1])


def plan_turns(found: Mapping[str, Shape], wanted: Mapping[str, Shape], usual: str | None = None) -> dict[str, str]:
    """What to do with each tensor, told by its shape; a tensor that fits no way is left out.

    Args:
        found, wanted: shapes by official name, in the file and in the module.
        usual: KEEP or TURN, what the file's origin promises; None if it promises nothing.

    Raises:
        CheckpointError: a convolution fits both ways, and neither the other convolutions of the file nor `usual`
            say which it is.
    """
    ways = {name: fits(shape, wanted[name]) for name, shape in found.items() if name in wanted}
    clear = {next(iter(w)) for name, w in ways.items() if len(w) == 1 and len(wanted[name]) >= 4} - {UNFOLD}
    plan: dict[str, str] = {}
    for name, options in ways.items():
        if len(options) == 1:
            plan[name] = next(iter(options))
        elif options:
            choices = clear or ({usual} if usual else options)
            if len(choices) != 1:
                raise CheckpointError(
                    f"cannot tell whether {name} {found[name]} is channels first or last, "
                    "and the file's other convolutions do not settle it"
                )
            plan[name] = next(iter(choices))
    return plan


def turn(array: mx.array, way: str, wanted: Shape) -> mx.array:
    """Carries out one entry of `plan_turns`."""
    if way == UNFOLD:
        array, way = array.reshape(wanted[0], wanted[-1], *wanted[1:-1]), TURN
    if way == TURN:
        return mx.contiguous(mx.moveaxis(array, 1, -1))
    return array.reshape(wanted) if way == SQUEEZE else array
