"""Names and convolution orders of other people's files."""

import json

import cases
import mlx.core as mx
import pytest

from mlx_wan.errors import CheckpointError
from mlx_wan.weights.layouts import (
    DIALECTS,
    DIFFUSERS_TRANSFORMER,
    DIFFUSERS_VAE,
    DIFFUSERS_VAE21,
    GGUF_TEXT_ENCODER,
    HF_IMAGE_ENCODER,
    HF_TEXT_ENCODER,
    KEEP,
    MLX_VIDEO_TEXT_ENCODER,
    MLX_VIDEO_TRANSFORMER,
    MLX_VIDEO_VAE,
    OFFICIAL,
    SQUEEZE,
    TURN,
    UNFOLD,
    WAN22_MLX,
    detect_dialect,
    fits,
    official_names,
    plan_turns,
    turn,
)


@pytest.mark.parametrize(
    ("own", "official"),
    [
        ("blocks.17.ffn.layer_0.weight", "blocks.17.ffn.0.weight"),
        ("blocks.3.ffn.layer_2.bias", "blocks.3.ffn.2.bias"),
        ("head.1.weight", "head.head.weight"),
        ("head_modulation", "head.modulation"),
        ("blocks.3.modulation", "blocks.3.modulation"),
        ("decoder.head.2.weight", "decoder.head.2.weight"),
        ("text_embedding.0.weight", "text_embedding.0.weight"),
    ],
)
def test_the_first_users_names(own, official):
    assert WAN22_MLX.to_official(own) == official
    assert WAN22_MLX.from_official(official) == own


@pytest.mark.parametrize(
    ("dialect", "part"),
    [
        *((OFFICIAL, part) for part in ("transformer", "text_encoder", "vae")),
        (WAN22_MLX, "transformer"),
        (DIFFUSERS_TRANSFORMER, "transformer"),
        (HF_TEXT_ENCODER, "text_encoder"),
        (DIFFUSERS_VAE, "vae"),
        (MLX_VIDEO_TRANSFORMER, "transformer"),
        (MLX_VIDEO_TEXT_ENCODER, "text_encoder"),
        (MLX_VIDEO_VAE, "vae"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_every_name_goes_there_and_back(dialect, part, prefix):
    names = list(cases.official_names("ti2v-5B", part))
    own = [prefix + dialect.from_official(name) for name in names]
    assert len(set(own)) == len(names)
    assert list(official_names(own).values()) == names


def test_the_flat_vae_of_diffusers():
    """Its decoder counts stages and members, the official one counts through; the pairs are diffusers' own."""
    pairs = json.loads((cases.GOLDEN / "diffusers.json").read_text())["experts"]["vae"]["tensors"]
    assert official_names(pairs) == pairs
    assert pairs["decoder.up_blocks.2.upsamplers.0.resample.1.bias"] == "decoder.upsamples.11.resample.1.bias"


def test_every_dialect_is_known():
    known = {OFFICIAL, WAN22_MLX, DIFFUSERS_TRANSFORMER, HF_TEXT_ENCODER, DIFFUSERS_VAE, DIFFUSERS_VAE21}
    known |= {GGUF_TEXT_ENCODER}
    assert set(DIALECTS) == known | {HF_IMAGE_ENCODER, MLX_VIDEO_TRANSFORMER, MLX_VIDEO_TEXT_ENCODER, MLX_VIDEO_VAE}


def test_a_tied_tensor_counts_once():
    names = ["shared.weight", "encoder.embed_tokens.weight", "encoder.final_layer_norm.weight"]
    assert official_names(names) == {
        "shared.weight": "token_embedding.weight",
        "encoder.final_layer_norm.weight": "norm.weight",
    }
    alone = official_names([*names[1:], "encoder.block.0.layer.0.SelfAttention.q.weight"])
    assert alone["encoder.embed_tokens.weight"] == "token_embedding.weight"


def test_detects_the_dialect():
    names = list(cases.official_names("ti2v-5B", "transformer"))
    assert detect_dialect(names) is OFFICIAL
    assert detect_dialect([WAN22_MLX.from_official(name) for name in names]) is WAN22_MLX


def test_one_parameter_under_two_names():
    with pytest.raises(CheckpointError, match=r"same parameter twice, as head\.head\.weight and head\.1\.weight"):
        official_names(["head.head.weight", "head.1.weight"])


@pytest.mark.parametrize(
    ("found", "wanted", "ways"),
    [
        ((4, 5), (4, 5), {KEEP}),
        ((5, 4), (4, 5), set()),
        ((8, 3, 3, 3, 6), (8, 3, 3, 3, 6), {KEEP}),
        ((8, 6, 3, 3, 3), (8, 3, 3, 3, 6), {TURN}),
        ((8, 6, 3, 3), (8, 3, 3, 6), {TURN}),
        ((8, 3, 3, 3, 3), (8, 3, 3, 3, 3), {KEEP, TURN}),
        ((8, 3, 3, 3), (8, 3, 3, 3), {KEEP, TURN}),
        ((8, 3, 1, 1, 3), (8, 3, 1, 1, 3), {KEEP}),
        ((8, 3, 3, 1, 1), (8, 3, 1, 1, 3), {TURN}),
        ((8, 1, 1, 1, 1), (8, 1, 1, 1, 1), {KEEP}),
        ((8, 7, 3, 3, 3), (8, 3, 3, 3, 6), set()),
        ((6, 1, 1, 1), (6,), {SQUEEZE}),
        ((6, 1, 1), (6,), {SQUEEZE}),
        ((1, 1, 1, 6), (6,), {SQUEEZE}),
        ((6,), (6,), {KEEP}),
        ((2, 3), (6,), set()),
        ((6, 20), (6, 1, 2, 2, 5), {UNFOLD}),
        ((6, 21), (6, 1, 2, 2, 5), set()),
        ((1, 6, 4), (1, 6, 4), {KEEP}),
    ],
)
def test_what_shapes_tell(found, wanted, ways):
    assert fits(found, wanted) == ways


def test_turning_is_the_transposition_torch_needs():
    array = mx.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert mx.array_equal(turn(array, TURN, (2, 4, 5, 3)), array.transpose(0, 2, 3, 1))
    assert turn(mx.ones((6, 1, 1)), SQUEEZE, (6,)).shape == (6,)


def test_a_flat_convolution_is_in_torchs_order():
    torch = mx.arange(2 * 3 * 1 * 2 * 2).reshape(2, 3, 1, 2, 2)
    assert mx.array_equal(turn(torch.reshape(2, -1), UNFOLD, (2, 1, 2, 2, 3)), turn(torch, TURN, (2, 1, 2, 2, 3)))


CLEAR_TORCH = ("a", (8, 6, 3, 3, 3), (8, 3, 3, 3, 6))
CLEAR_MLX = ("b", (8, 3, 3, 3, 6), (8, 3, 3, 3, 6))
UNCLEAR = ("c", (8, 3, 3, 3, 3), (8, 3, 3, 3, 3))


def plan(*tensors, usual=None):
    return plan_turns({n: f for n, f, _ in tensors}, {n: w for n, _, w in tensors}, usual)


def test_clear_convolutions_decide_for_unclear_ones():
    assert plan(CLEAR_TORCH, UNCLEAR)["c"] == TURN
    assert plan(CLEAR_MLX, UNCLEAR)["c"] == KEEP
    assert plan(CLEAR_MLX, UNCLEAR, usual=TURN)["c"] == KEEP


@pytest.mark.parametrize("usual", [KEEP, TURN])
def test_without_clear_ones_the_files_origin_decides(usual):
    assert plan(UNCLEAR, usual=usual) == {"c": usual}


@pytest.mark.parametrize("tensors", [(UNCLEAR,), (CLEAR_MLX, CLEAR_TORCH, UNCLEAR)])
def test_when_nothing_decides_it_is_an_error(tensors):
    with pytest.raises(CheckpointError, match=r"cannot tell whether c \(8, 3, 3, 3, 3\) is channels first or last"):
        plan(*tensors)


def test_a_file_may_mix_orders_where_each_is_clear():
    assert plan(CLEAR_MLX, CLEAR_TORCH) == {"a": TURN, "b": KEEP}
