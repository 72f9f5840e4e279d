"""Conversion to the native layout, and quantization on the way."""

import json
from types import SimpleNamespace

import checkpoint
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.models.transformer import FLOAT32_PARAMETERS, TransformerConfig, WanTransformer
from mlx_wan.models.umt5 import TextEncoderConfig, UMT5Encoder
from mlx_wan.models.vae21 import VAE21Config, WanVAE21
from mlx_wan.models.vae22 import VAEConfig, WanVAE22
from mlx_wan.weights import convert as converting
from mlx_wan.weights import save as saving
from mlx_wan.weights.convert import convert
from mlx_wan.weights.files import read_tensors
from mlx_wan.weights.load import load_image_encoder, load_text_encoder, load_transformer, load_vae, locate
from mlx_wan.weights.quantize import Quantization, is_quantized, quantize_module
from mlx_wan.weights.save import save_native

from . import checkpoints


@pytest.fixture
def src(tmp_path):
    return checkpoints.write_official(tmp_path / "src")


@pytest.fixture
def dst(tmp_path):
    return tmp_path / "out" / "dst"


def parameters(folder, dtype=mx.float32) -> dict[str, mx.array]:
    checkpoint = locate(folder)
    modules = {
        "transformer": load_transformer(checkpoint, dtype),
        "text_encoder": load_text_encoder(checkpoint, dtype),
        "vae": load_vae(checkpoint),
    }
    return {f"{part}/{n}": a for part, module in modules.items() for n, a in tree_flatten(module.parameters())}


def same(got: dict[str, mx.array], want: dict[str, mx.array]) -> bool:
    return got.keys() == want.keys() and all(mx.array_equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("write", [checkpoints.write_official, checkpoints.write_wan22_mlx])
def test_converted_is_the_same_model(tmp_path, dst, write):
    src = write(tmp_path / "model")
    assert convert(src, dst) == dst
    assert sorted(file.name for file in dst.iterdir()) == [
        "config.json",
        "text_encoder.safetensors",
        "tokenizer.json",
        "transformer.safetensors",
        "vae.safetensors",
    ]
    assert same(parameters(dst), parameters(src))
    before, after = locate(src), locate(dst)
    assert after.layout.name == "native"
    for name in ("transformer_config", "text_encoder_config", "vae_config", "spec"):
        assert getattr(after, name) == getattr(before, name)
    assert after.tokenizer.read_text() == checkpoints.TOKENIZER
    config = json.loads((dst / "config.json").read_text())
    assert (config["patch_size"], config["text_dim"], config["mlx_wan"]["format"]) == ([1, 2, 2], 64, 1)


def test_native_can_be_converted_again_and_in_shards(src, dst, tmp_path):
    convert(src, dst)
    again = convert(dst, tmp_path / "again", max_shard_bytes=100_000)
    assert len(list(again.glob("vae-*-of-*.safetensors"))) > 1
    assert same(parameters(again), parameters(src))


def test_dtype_leaves_float32_where_it_is_needed(src, dst):
    convert(src, dst, mx.bfloat16)
    for name, info in read_tensors(dst / "transformer.safetensors").items():
        exact = any(fragment in name for fragment in FLOAT32_PARAMETERS)
        assert info.dtype == ("float32" if exact else "bfloat16"), name
    assert {info.dtype for info in read_tensors(dst / "text_encoder.safetensors").values()} == {"bfloat16"}
    assert {info.dtype for info in read_tensors(dst / "vae.safetensors").values()} == {"float32"}
    assert same(parameters(dst, mx.bfloat16), parameters(src, mx.bfloat16))


def test_one_tensor_in_memory_at_a_time(src, dst):
    sizes = [i.nbytes for part in checkpoints.PARTS for i in getattr(locate(src), part).tensors.values()]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert(src, dst)
    # As stored, turned and cast: never more than three copies of the largest one.
    assert mx.get_peak_memory() - before <= 3 * max(sizes) < sum(sizes) / 5


def test_progress_counts_the_bytes(src, dst):
    seen = []
    convert(src, dst, progress=lambda done, total: seen.append((done, total)))
    total = sum(i.nbytes for part in checkpoints.PARTS for i in getattr(locate(dst), part).tensors.values())
    assert {t for _, t in seen} == {total}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0][0] == 0


# --- where it may write -----------------------------------------------------------------------------------------


def files_under(folder) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def test_a_full_destination_is_left_alone(src, dst):
    dst.mkdir(parents=True)
    (dst / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; choose another folder or pass --overwrite"):
        convert(src, dst)
    with pytest.raises(UserError, match="is not a converted model, so --overwrite leaves it alone"):
        convert(src, dst, overwrite=True)
    assert files_under(dst.parent) == {"dst", "dst/notes.txt"}


def test_overwrite_replaces_the_model_and_keeps_the_rest(src, dst):
    convert(src, dst, mx.bfloat16, max_shard_bytes=100_000)
    (dst / "README.md").write_text("mine")
    convert(src, dst, overwrite=True)
    assert not list(dst.glob("*-of-*"))
    assert (dst / "README.md").read_text() == "mine"
    assert same(parameters(dst), parameters(src))


def test_destinations_that_cannot_be(src, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        convert(src, tmp_path / "file")
    with pytest.raises(UserError, match="file/dst: cannot be written: Not a directory"):
        convert(src, tmp_path / "file" / "dst")
    for inside in (src, src / "native"):
        with pytest.raises(UserError, match="lies in the checkpoint that is read"):
            convert(src, inside)


def test_too_little_space_is_said_at_once(src, dst, monkeypatch):
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"dst: needs 0\.0 GB of disk space"):
        convert(src, dst)
    assert files_under(dst.parent) == set()


class Stop(BaseException):
    pass


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_interruption_leaves_nothing_behind(src, dst, share):
    def progress(done, total):
        if done >= share * total:
            raise Stop

    with pytest.raises(Stop):
        convert(src, dst, progress=progress)
    assert files_under(dst.parent) == set()
    convert(src, dst)
    before = parameters(dst)
    with pytest.raises(Stop):
        convert(src, dst, mx.bfloat16, overwrite=True, progress=progress)
    assert same(parameters(dst), before)
    assert files_under(dst.parent) == {"dst", *(f"dst/{name}" for name in files_under(dst))}


def test_a_full_disk_is_one_line_and_leaves_nothing(src, dst, monkeypatch):
    def full(info):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "tensor_bytes", full)
    with pytest.raises(WanError, match=r"transformer\.safetensors: cannot be written: No space left on device"):
        convert(src, dst)
    assert files_under(dst.parent) == set()


def test_a_bad_source_makes_no_destination(src, dst):
    (src / "Wan2.2_VAE.pth").unlink()
    with pytest.raises(CheckpointError, match="missing: "):
        convert(src, dst)
    assert not dst.parent.exists()


# --- quantization -----------------------------------------------------------------------------------------------


@pytest.fixture
def square(tmp_path):
    """A native model whose dimensions are multiples of 64."""
    transformer = TransformerConfig(4, 4, 64, 128, 2, 1, freq_dim=64, text_dim=64)
    vae = VAEConfig(dim=4, dec_dim=4, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    mx.random.seed(0)
    save_native(
        tmp_path / "square",
        model="mine",
        transformer=WanTransformer(transformer),
        text_encoder=UMT5Encoder(TextEncoderConfig(656, 64, 128, 192, 4, 2)),
        vae=WanVAE22(vae),
        tokenizer_json=checkpoints.TOKENIZER,
        sampling={},
    )
    return tmp_path / "square"


@pytest.fixture
def square_experts(tmp_path):
    """The same with two experts, which pictures go into."""
    config = TransformerConfig(12, 4, 64, 128, 2, 2, freq_dim=64, text_dim=64, model_type="i2v")
    mx.random.seed(0)
    save_native(
        tmp_path / "experts",
        model="mine",
        transformer=WanTransformer(config),
        transformer_2=WanTransformer(config),
        boundary=0.8,
        text_encoder=UMT5Encoder(TextEncoderConfig(656, 64, 128, 192, 4, 2)),
        vae=WanVAE21(VAE21Config(dim=4, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)),
        tokenizer_json=checkpoints.TOKENIZER,
        sampling={"guidance_scale": (1.5, 2.0)},
    )
    return tmp_path / "experts"


@pytest.mark.parametrize(
    ("bits", "group_size", "mode"),
    [
        *((4, 64, "affine"), (8, 64, "affine"), (4, 32, "affine"), (8, 32, "affine")),
        *((4, None, "mxfp4"), (8, None, "mxfp8"), (4, 16, "nvfp4")),
    ],
)
def test_quantized_as_mlx_does_it(square, dst, bits, group_size, mode):
    convert(square, dst, bits=bits, group_size=group_size, mode=mode)
    checkpoint = locate(dst)
    how = Quantization(bits, group_size, mode)
    assert checkpoint.quantization == how
    original = locate(square)
    for load in (load_transformer, load_text_encoder):
        component = "transformer" if load is load_transformer else "text_encoder"
        want = dict(tree_flatten(quantize_module(load(original, mx.float32), component, how).parameters()))
        got = dict(tree_flatten(load(checkpoint, mx.float32).parameters()))
        assert any(name.endswith(".scales") for name in want)
        assert same(got, want)
    assert same({n: a for n, a in parameters(dst).items() if n.startswith("vae/")},
                {n: a for n, a in parameters(square).items() if n.startswith("vae/")})  # fmt: skip


def test_eight_bits_stay_close_and_bfloat16_works(square, dst):
    convert(square, dst, mx.bfloat16, bits=8)
    x, t, context = mx.random.normal((1, 1, 4, 4, 4)), mx.array([500.0]), mx.random.normal((1, 3, 64))
    want = load_transformer(locate(square), mx.float32)(x, t, context)
    for dtype, bound in ((mx.float32, 0.01), (mx.bfloat16, 0.03)):
        model = load_transformer(locate(dst), dtype)
        assert model.blocks[0].ffn[0].scales.dtype == dtype
        got = model(x, t, context)
        assert (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item() < bound


def test_which_matrices_are_packed(square):
    packed = {
        component: {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and is_quantized(component, name)
        }
        for component, model in (
            ("transformer", load_transformer(locate(square), mx.float32)),
            ("text_encoder", load_text_encoder(locate(square), mx.float32)),
            ("vae", load_vae(locate(square))),
        )
    }
    attention = {f"blocks.0.{kind}.{m}" for kind in ("self_attn", "cross_attn") for m in "qkvo"}
    assert packed["transformer"] == attention | {"blocks.0.ffn.0", "blocks.0.ffn.2"}
    matrices = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
    assert packed["text_encoder"] == {f"blocks.{i}.{matrix}" for i in (0, 1) for matrix in matrices}
    assert packed["vae"] == set()


def test_what_cannot_be_quantized(src, square, dst):
    with pytest.raises(UserError, match=r"its 96 columns are not a multiple of the group size 64; choose another"):
        convert(src, dst, bits=4)
    for bits, group_size, mode in ((3, 64, "affine"), (4, 48, "affine"), (8, None, "mxfp4"), (4, 32, "nvfp4")):
        with pytest.raises(UserError, match=f"cannot quantize to {bits} bits .*: {mode} has"):
            convert(square, dst, bits=bits, group_size=group_size, mode=mode)
    with pytest.raises(UserError, match="cannot quantize in the mode 'int8'; choose one of affine, mxfp4"):
        convert(square, dst, bits=8, mode="int8")
    assert not dst.parent.exists()
    convert(square, dst, bits=4)
    with pytest.raises(UserError, match="is quantized already; convert the original"):
        convert(dst, dst.parent / "again", bits=4)


def test_a_quantization_that_the_rows_cannot_have(square, dst):
    convert(square, dst, bits=4, group_size=32)
    config = json.loads((dst / "config.json").read_text())
    config["mlx_wan"]["quantization"]["group_size"] = 128
    (dst / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"cannot be quantized as its config\.json says|does not fit"):
        locate(dst)


def test_quantized_modules_are_not_saved(square, tmp_path, dst):
    convert(square, dst, bits=4)
    checkpoint = locate(dst)
    with pytest.raises(ValueError, match="a quantized module cannot be saved"):
        save_native(
            tmp_path / "again",
            model="mine",
            transformer=load_transformer(checkpoint, mx.float32),
            text_encoder=load_text_encoder(checkpoint, mx.float32),
            vae=load_vae(checkpoint),
            tokenizer_json=checkpoints.TOKENIZER,
            sampling={},
        )
    assert not (tmp_path / "again").exists()


# --- two experts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t2v-A14B", "i2v-A14B"])
def test_two_experts_there_and_back(tmp_path, dst, kind):
    src = checkpoint.write_official(tmp_path / "experts", f"small-{kind}")
    convert(src, dst)
    assert sorted(file.name for file in dst.glob("*.safetensors")) == [
        "text_encoder.safetensors",
        "transformer.safetensors",
        "transformer_2.safetensors",
        "vae.safetensors",
    ]
    before, after = locate(src), locate(dst)
    for name in ("kind", "spec", "transformer_config", "text_encoder_config", "vae_config"):
        assert getattr(after, name) == getattr(before, name)
    for part in ("transformer", "transformer_2"):
        got, want = (dict(tree_flatten(load_transformer(c, mx.float32, part).parameters())) for c in (after, before))
        assert same(got, want)
    assert same(parameters(dst), parameters(src))
    extra = json.loads((dst / "config.json").read_text())["mlx_wan"]
    assert extra["boundary"] == {"t2v-A14B": 0.875, "i2v-A14B": 0.9}[kind]
    # Replaced by a model with one transformer, nothing of the second stays behind.
    convert(checkpoints.write_official(tmp_path / "src"), dst, overwrite=True)
    assert not (dst / "transformer_2.safetensors").exists()


@pytest.mark.parametrize("kind", ["t2v-14B", "i2v-14B", "flf2v-14B"])
def test_the_wan21_kind_there_and_back(tmp_path, dst, kind):
    src = checkpoint.write_official(tmp_path / "model", f"small-{kind}")
    convert(src, dst)
    before, after = locate(src), locate(dst)
    assert (dst / "image_encoder.safetensors").exists() == (kind != "t2v-14B")
    for name in ("kind", "spec", "transformer_config", "image_encoder_config", "vae_config"):
        assert getattr(after, name) == getattr(before, name)
    assert same(parameters(dst), parameters(src))
    if kind != "t2v-14B":
        got, want = (dict(tree_flatten(load_image_encoder(c, mx.float32).parameters())) for c in (after, before))
        assert same(got, want)


def test_keys_and_values_of_image_tokens_are_quantized():
    assert is_quantized("transformer", "blocks.3.cross_attn.k_img")
    assert is_quantized("transformer", "blocks.3.cross_attn.v_img")
    assert not is_quantized("transformer", "img_emb.proj.1")
    assert not is_quantized("image_encoder", "transformer.0.attn.to_qkv")


def test_both_experts_are_quantized(square_experts, dst):
    convert(square_experts, dst, bits=4)
    quantized, plain = locate(dst), locate(square_experts)
    for part in ("transformer", "transformer_2"):
        want = quantize_module(load_transformer(plain, mx.float32, part), "transformer", Quantization(4))
        got = dict(tree_flatten(load_transformer(quantized, mx.float32, part).parameters()))
        assert "blocks.1.cross_attn.o.scales" in got
        assert same(got, dict(tree_flatten(want.parameters())))
    assert quantized.spec == plain.spec
    assert plain.spec.guidance_scale == (1.5, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda extra: extra.pop("boundary"), "says t2v-A14B, but the files are those of a model like t2v-1.3B"),
        (lambda extra: extra.update(boundary=1.5), "mlx_wan.boundary cannot be 1.5; it must be between 0 and 1"),
        (lambda extra: extra.update(model="i2v-A14B"), "says i2v-A14B, but the files are those of a model like t2v"),
        (
            lambda extra: extra["sampling"].update(guidance_scale=[1]),
            r"mlx_wan.sampling.guidance_scale cannot be \[1\]",
        ),
    ],
)
def test_a_native_config_must_tell_the_truth_about_experts(tmp_path, dst, change, message):
    convert(checkpoint.write_official(tmp_path / "experts", "small-t2v-A14B"), dst)
    config = json.loads((dst / "config.json").read_text())
    config["mlx_wan"]["model"] = "t2v-A14B"
    change(config["mlx_wan"])
    (dst / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        locate(dst)


def test_an_expert_that_is_missing_from_a_native_folder(tmp_path, dst):
    convert(checkpoint.write_official(tmp_path / "experts", "small-t2v-A14B"), dst)
    (dst / "transformer_2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"incomplete native checkpoint, missing: transformer_2\.safetensors"):
        locate(dst)
