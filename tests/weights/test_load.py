"""Checkpoints of every layout, found, checked and loaded."""

import json
import shutil
from dataclasses import fields, replace

import cases
import checkpoint
import mlx.core as mx
import numpy as np
import pytest
import small
from mlx.utils import tree_flatten

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.models.transformer import FLOAT32_PARAMETERS
from mlx_wan.models.vae22 import VAEConfig, WanVAE22
from mlx_wan.weights import locate as locating
from mlx_wan.weights.checkpoint import PARTS
from mlx_wan.weights.load import load_image_encoder, load_text_encoder, load_transformer, load_vae, locate
from mlx_wan.weights.save import save_native
from mlx_wan.weights.shapes import text_encoder_fields, transformer_fields, vae_fields
from mlx_wan.zoo import LATENT_STATISTICS, LATENTS_MEAN, LATENTS_STD, MODELS

from . import checkpoints
from .torch_files import save_pth

LAYOUTS = {
    "official": checkpoints.write_official,
    "shards": lambda folder: checkpoints.write_official(folder, shards=3),
    "mlx": checkpoints.write_wan22_mlx,
    "mlx-turned": lambda folder: checkpoints.write_wan22_mlx(folder, turned=True),
    "diffusers": checkpoints.write_diffusers,
}


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write_official(tmp_path / "model")


def modules(checkpoint, dtype=mx.float32):
    return {
        "transformer": load_transformer(checkpoint, dtype),
        "text_encoder": load_text_encoder(checkpoint, dtype),
        "vae": load_vae(checkpoint),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_modules(tmp_path, layout):
    checkpoint = locate(LAYOUTS[layout](tmp_path / "model"))
    for part, module in modules(checkpoint).items():
        got, want = dict(tree_flatten(module.parameters())), checkpoints.native(part)
        assert got.keys() == want.keys()
        assert all(mx.array_equal(got[name], want[name]) for name in want)


def test_dimensions_are_read_off_the_tensors(folder):
    checkpoint = locate(folder)
    want = {**small.TRANSFORMER, "image_dim": 0, "image_positions": 0, "vace_layers": (), "vace_in_dim": 0}
    assert {
        f.name: getattr(checkpoint.transformer_config, f.name) for f in fields(checkpoint.transformer_config)
    } == want
    assert vars(checkpoint.text_encoder_config) == small.TEXT_ENCODER
    vae = replace(checkpoint.vae_config, latents_mean=(), latents_std=())
    assert vars(vae) == {"patch_size": 2, **small.VAE, "latents_mean": (), "latents_std": ()}
    assert (checkpoint.vae_config.latents_mean, checkpoint.vae_config.latents_std) == (LATENTS_MEAN, LATENTS_STD)
    assert checkpoint.spec.name == "custom"
    assert checkpoint.spec.negative_prompt == MODELS["ti2v-5B"].negative_prompt
    assert checkpoint.tokenizer.read_text() == checkpoints.TOKENIZER


def test_the_policy_of_types(folder):
    loaded = modules(locate(folder), mx.bfloat16)
    for name, array in tree_flatten(loaded["transformer"].parameters()):
        exact = any(fragment in name for fragment in FLOAT32_PARAMETERS)
        assert array.dtype == (mx.float32 if exact else mx.bfloat16), name
    assert {a.dtype for _, a in tree_flatten(loaded["text_encoder"].parameters())} == {mx.bfloat16}
    assert {a.dtype for _, a in tree_flatten(loaded["vae"].parameters())} == {mx.float32}
    assert loaded["transformer"].dtype == mx.bfloat16


def test_bfloat16_files_load_as_float32(tmp_path):
    checkpoint = locate(checkpoints.write_official(tmp_path / "model", dtype=mx.bfloat16))
    got = dict(tree_flatten(load_transformer(checkpoint, mx.float32).parameters()))
    for name, want in checkpoints.native("transformer").items():
        assert got[name].dtype == mx.float32
        assert mx.array_equal(got[name], want.astype(mx.bfloat16).astype(mx.float32))


def test_a_vae_in_half_precision_keeps_its_biases_and_norms(tmp_path):
    folder = checkpoints.write_official(tmp_path / "model")
    exact = dict(tree_flatten(load_vae(locate(folder)).parameters()))
    for name, array in tree_flatten(load_vae(locate(folder), mx.bfloat16).parameters()):
        assert array.dtype == (mx.bfloat16 if name.endswith(".weight") else mx.float32), name
        assert mx.array_equal(array, exact[name].astype(array.dtype)), name


def test_a_vae_of_another_width_has_no_statistics(tmp_path):
    folder = checkpoints.write_official(tmp_path / "model")
    narrow_model(folder)
    checkpoint = locate(folder)
    assert checkpoint.vae_config.z_dim == 2
    assert checkpoint.vae_config.latents_mean == (0.0, 0.0)
    assert checkpoint.vae_config.latents_std == (1.0, 1.0)
    assert load_transformer(checkpoint, mx.float32).config.in_dim == 2


@pytest.mark.parametrize("turned", [False, True])
def test_convolutions_as_wide_as_their_kernel(tmp_path, turned):
    # With three channels some kernels are 3×3×3×3 in either order; the file's other convolutions tell.
    folder = checkpoints.write_wan22_mlx(tmp_path / "model", turned=turned)
    vae = WanVAE22(VAEConfig(dim=3, dec_dim=3, dim_mult=(1, 2), temporal_downsample=(True,), num_res_blocks=1))
    want = {name: np.array(array) for name, array in tree_flatten(vae.parameters())}
    assert any(a.shape[1:] == (3, 3, 3, 3) for a in want.values())
    torch = {name: np.moveaxis(a, -1, 1) if a.ndim > 3 else a for name, a in want.items()}
    checkpoints.save_safetensors(folder / "vae_mlx.safetensors", want if turned else torch)
    got = dict(tree_flatten(load_vae(locate(folder)).parameters()))
    assert all(np.array_equal(np.array(got[name]), want[name]) for name in want)


def narrow_model(folder) -> None:
    """Cuts the latents of a checkpoint down to two channels."""
    vae = checkpoints.official("vae")
    vae["conv1.weight"], vae["conv1.bias"] = vae["conv1.weight"][:4, :4], vae["conv1.bias"][:4]
    vae["conv2.weight"], vae["conv2.bias"] = vae["conv2.weight"][:2, :2], vae["conv2.bias"][:2]
    vae["encoder.head.2.weight"], vae["encoder.head.2.bias"] = (
        vae["encoder.head.2.weight"][:4],
        vae["encoder.head.2.bias"][:4],
    )
    vae["decoder.conv1.weight"] = vae["decoder.conv1.weight"][:, :2]
    save_pth(folder / "Wan2.2_VAE.pth", vae)
    transformer = checkpoints.official("transformer")
    transformer["patch_embedding.weight"] = transformer["patch_embedding.weight"][:, :2]
    transformer["head.head.weight"], transformer["head.head.bias"] = (
        transformer["head.head.weight"][:8],
        transformer["head.head.bias"][:8],
    )
    checkpoints.save_safetensors(folder / "diffusion_pytorch_model.safetensors", transformer)
    checkpoints.edit_json(folder / "config.json", in_dim=2, out_dim=2)


# --- native ---------------------------------------------------------------------------------------------------


def save(folder, source, **options):
    sampling = {"width": 64, "height": 32, "num_frames": 5, "fps": 8, "guidance_scale": 2, "scheduler": "euler"}
    options = {"model": "mine", "tokenizer_json": checkpoints.TOKENIZER, "sampling": sampling, **options}
    save_native(folder, **modules(locate(source)), **options)
    return folder


def test_native_there_and_back(tmp_path, folder):
    checkpoint = locate(save(tmp_path / "native", folder))
    assert checkpoint.layout.name == "native"
    spec = checkpoint.spec
    assert (spec.name, spec.width, spec.fps, spec.guidance_scale, spec.scheduler) == ("mine", 64, 8, 2, "euler")
    assert spec.num_inference_steps == MODELS["ti2v-5B"].num_inference_steps
    for part, module in modules(checkpoint).items():
        got, want = dict(tree_flatten(module.parameters())), checkpoints.native(part)
        assert all(mx.array_equal(got[name], want[name]) for name in want)


def test_native_in_shards_and_bfloat16(tmp_path, folder):
    native = save(tmp_path / "native", folder, dtype=mx.bfloat16, max_shard_bytes=200_000)
    shards = sorted(file.name for file in native.glob("transformer-*"))
    assert len(shards) > 1
    assert shards[0] == f"transformer-00001-of-{len(shards):05d}.safetensors"
    assert all(file.stat().st_size < 230_000 for file in native.glob("transformer-*"))
    for name, array in tree_flatten(load_transformer(locate(native), mx.float32).parameters()):
        want = checkpoints.native("transformer")[name].astype(mx.bfloat16).astype(mx.float32)
        assert mx.array_equal(array, want)
    # A later, smaller model leaves nothing of these shards behind.
    save(native, folder)
    assert not list(native.glob("transformer-*"))
    assert not list(native.glob(".*"))
    locate(native)


def test_mlx_reads_what_we_write(tmp_path, folder):
    native = save(tmp_path / "native", folder)
    loaded = mx.load(str(native / "vae.safetensors"))
    want = checkpoints.native("vae")
    assert loaded.keys() == want.keys()
    assert all(mx.array_equal(loaded[name], want[name]) for name in want)


def test_a_failed_save_is_recognised_as_half_written(tmp_path, folder):
    native = save(tmp_path / "native", folder)
    with pytest.raises(FileNotFoundError):
        save(native, folder, tokenizer_json=tmp_path / "none.json")
    with pytest.raises(CheckpointError, match=r"native: half-written model: config\.json is missing"):
        locate(native)


def test_unknown_sampling_settings_are_not_written(tmp_path, folder):
    with pytest.raises(ValueError, match="unknown sampling settings: guidance"):
        save(tmp_path / "native", folder, sampling={"guidance": 3})


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vae", {"dim": 16}, r"config\.json: dim is 16, but the tensors in vae\.safetensors say 8"),
        ("vae", {"latents_std": [1.0]}, "latents_std of the VAE must be 48 numbers"),
        ("vae", {"latents_std": [0.0] * 48}, "latents_std of the VAE must be positive"),
        ("vae", {"latents_mean": [float("nan")] * 48}, "latents_mean of the VAE must be 48 numbers"),
        ("vae", {"colour": 1}, "unexpected entries under mlx_wan.vae"),
        ("text_encoder", {"num_heads": 2}, "num_heads is 2, but the tensors"),
        ("sampling", {"colour": 1}, "unexpected entries under mlx_wan.sampling"),
        ("sampling", {"width": "64"}, "mlx_wan.sampling.width cannot be '64'"),
        ("quantization", {"bits": 3, "group_size": 64}, "quantization .* is not supported"),
        ("colours", {"red": 1}, "unexpected entries under mlx_wan: colours"),
        ("quantization", {"bits": 4, "group_size": 32}, "does not fit the transformer"),
    ],
)
def test_a_native_config_must_tell_the_truth(tmp_path, folder, section, change, message):
    native = save(tmp_path / "native", folder)
    config = json.loads((native / "config.json").read_text())
    config["mlx_wan"].setdefault(section, {}).update(change)
    (native / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        locate(native)


@pytest.mark.parametrize("extra", [{"format": 2, "model": "tiny"}, {"format": 1}, {"format": 1, "model": []}, 5])
def test_a_future_native_format(tmp_path, folder, extra):
    native = save(tmp_path / "native", folder)
    checkpoints.edit_json(native / "config.json", mlx_wan=extra)
    with pytest.raises(CheckpointError, match="not a native format this version reads"):
        locate(native)


# --- what is refused ------------------------------------------------------------------------------------------


def test_missing_files_are_listed(folder):
    (folder / "Wan2.2_VAE.pth").unlink()
    (folder / "google" / "umt5-xxl" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        locate(folder)
    assert str(caught.value) == (
        f"{folder}: incomplete official checkpoint, missing: Wan2.2_VAE.pth or Wan2.2_VAE.safetensors, "
        "google/umt5-xxl/tokenizer.json; get the rest and try again"
    )


@pytest.mark.parametrize("instead", ["folder", "dangling link"])
def test_what_is_there_but_no_file_is_missing(folder, instead):
    vae = folder / "Wan2.2_VAE.pth"
    vae.unlink()
    if instead == "folder":
        vae.mkdir()
    else:
        vae.symlink_to(folder / "nowhere")
    with pytest.raises(CheckpointError, match=r"missing: Wan2\.2_VAE\.pth"):
        locate(folder)


def test_missing_shards_are_listed(tmp_path):
    folder = checkpoints.write_official(tmp_path / "model", shards=3)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing: .*-00002-of-00003\.safetensors; get the rest"):
        locate(folder)


def test_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing: config\.json, diffusion_pytorch_model\.safetensors or"):
        locate(tmp_path)


@pytest.mark.parametrize("layout", ["official", "mlx"])
@pytest.mark.parametrize("part", range(3))
def test_truncated_files_are_found_before_anything_is_read(tmp_path, layout, part):
    folder = LAYOUTS[layout](tmp_path / "model")
    file = sorted(f for f in folder.iterdir() if f.suffix in (".pth", ".safetensors"))[part]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{file.name}: (truncated|is cut off)"):
        locate(folder)


def test_paths_that_are_no_checkpoint(tmp_path, folder):
    with pytest.raises(UserError, match=r"none: no such folder"):
        locate(tmp_path / "none")
    alone = r"Wan2\.2_VAE\.pth: is a single file \(Wan2\.2-type VAE .*\); give the folder of a whole checkpoint, or "
    alone += r"--vae Wan2\.2_VAE\.pth with a folder for the rest, or with --transformer FILE and --text_encoder FILE$"
    with pytest.raises(UserError, match=alone):
        locate(folder / "Wan2.2_VAE.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 128}, "dim is 128, but the tensors in diffusion_pytorch_model.safetensors say 96"),
        ({"num_layers": 3}, "num_layers is 3, but the tensors in .* say 2"),
        ({"text_dim": 63}, "text_dim is 63, but the tensors in .* say 64"),
        ({"dim": "96"}, "dim is '96', but"),
        ({"patch_size": [1, 4, 4]}, r"does not fit the patch size \(1, 4, 4\)"),
        ({"patch_size": "small"}, "patch_size"),
        ({"num_heads": None}, "lacks num_heads"),
        ({"num_heads": 7}, "num_heads 7 does not divide dim 96"),
        ({"num_heads": "3"}, "num_heads cannot be '3'"),
        ({"num_heads": 0}, "num_heads cannot be 0"),
        ({"eps": -1.0}, "eps cannot be -1.0"),
        ({"in_dim": 36}, "in_dim is 36, but the tensors in .* say 48"),
        ({"model_type": "s2v"}, "is a Wan model of the type s2v, which is not supported"),
    ],
)
def test_configs_that_are_wrong_or_of_other_models(folder, changes, message):
    checkpoints.edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        locate(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_a_damaged_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        locate(folder)


def test_folders_of_other_kinds(tmp_path):
    (tmp_path / "lora").mkdir()
    lora = {"blocks.0.cross_attn.q.lora_A.weight": mx.zeros((4, 8))}
    mx.save_safetensors(str(tmp_path / "lora" / "style.safetensors"), lora)
    with pytest.raises(CheckpointError, match=r"missing: .*\(but style\.safetensors is LoRA\)"):
        locate(tmp_path / "lora")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"blocks.0.cross_attn.q.lora_A.weight": (4, 8)}, "is LoRA, not the VAE"),
        ({"token_embedding.weight": (4, 8)}, "holds no VAE of a Wan model"),
    ],
)
def test_files_of_other_models(folder, weights, message):
    save_pth(folder / "Wan2.2_VAE.pth", {name: small.random(name, shape) for name, shape in weights.items()})
    with pytest.raises(CheckpointError, match=r"Wan2\.2_VAE\.pth: " + message):
        locate(folder)


def test_components_in_each_others_place(folder):
    save_pth(folder / "Wan2.2_VAE.pth", checkpoints.official("text_encoder"))
    with pytest.raises(CheckpointError, match=r"Wan2\.2_VAE\.pth: is UMT5 encoder of an unreleased size, not the VAE"):
        locate(folder)


@pytest.mark.parametrize("extra", ["casual_audio_encoder.weights", "face_adapter.x"])
def test_transformers_with_other_parts(folder, extra):
    change = lambda weights: weights.update({extra: mx.zeros(3)})  # noqa: E731
    checkpoints.edit_safetensors(folder / "diffusion_pytorch_model.safetensors", change)
    with pytest.raises(CheckpointError, match=r"is Wan2\..* not the transformer of a Wan2\.2 TI2V model"):
        locate(folder)


def test_parts_that_do_not_fit_each_other(tmp_path):
    folder = checkpoints.write_official(tmp_path / "model")
    narrow_model(folder)
    save_pth(folder / "Wan2.2_VAE.pth", checkpoints.official("vae"))
    with pytest.raises(CheckpointError, match="takes 2 and makes 2 latent channels, but the VAE has 48"):
        locate(folder)


def strict_message(folder, change) -> str:
    checkpoints.edit_safetensors(folder / "diffusion_pytorch_model.safetensors", change)
    with pytest.raises(CheckpointError) as caught:
        locate(folder)
    return str(caught.value)


def test_strictness_lists_the_first_few_of_each_kind(folder):
    def change(weights):
        for name in [name for name in weights if name.startswith("blocks.1.self_attn")]:
            del weights[name]
        weights["blocks.0.extra"] = mx.zeros(2)
        weights["blocks.0.norm3.bias"] = mx.zeros(5)
        weights["blocks.0.self_attn.q.bias"] = mx.zeros(96, mx.int32)

    message = strict_message(folder, change)
    assert message.startswith(f"{folder / 'diffusion_pytorch_model.safetensors'}: does not fit the transformer: ")
    assert "10 missing (blocks.1.self_attn." in message
    assert ", and 6 more)" in message
    assert "1 unexpected (blocks.0.extra)" in message
    assert "1 misshapen (blocks.0.norm3.bias (5,) instead of (96,))" in message
    assert "1 of a wrong type (blocks.0.self_attn.q.bias int32)" in message


@pytest.mark.parametrize("name", ["patch_embedding.weight", "head.head.weight", "blocks.0.ffn.0.weight"])
def test_a_tensor_that_tells_a_dimension_is_missing(folder, name):
    message = strict_message(folder, lambda weights: weights.pop(name))
    assert message.endswith(f"diffusion_pytorch_model.safetensors: missing tensor {name}")


def test_a_block_is_missing(folder):
    def change(weights):
        for name in [name for name in weights if name.startswith("blocks.0.")]:
            weights[name.replace("blocks.0.", "blocks.5.")] = weights[name]

    assert strict_message(folder, change).endswith("missing tensors blocks.2.*")


# --- two experts ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["t2v-A14B", "i2v-A14B"])
def experts(tmp_path, request):
    return checkpoint.write_official(tmp_path / "experts", f"small-{request.param}"), request.param


def test_two_experts(experts):
    folder, kind = experts
    found = locate(folder)
    assert (found.kind, found.spec.name, found.layout.name) == (kind, "custom", "official")
    assert found.spec == replace(MODELS[kind], name="custom", hub_id=None, sizes=())
    assert list(found.parts) == ["transformer", "transformer_2", "text_encoder", "vae"]
    assert (found.vae_config.latents_mean, found.vae_config.latents_std) == LATENT_STATISTICS["Wan2.1"]
    for part in ("transformer", "transformer_2"):
        got = dict(tree_flatten(load_transformer(found, mx.float32, part).parameters()))
        want = checkpoint.official_weights(part, f"small-{kind}")
        assert got.keys() == want.keys()
        assert all(np.array_equal(np.array(got[n]), cases.native(n, want[n])) for n in want)
    got, want = load_vae(found), checkpoint.official_weights("vae", f"small-{kind}")
    for name, array in tree_flatten(got.parameters()):
        assert np.array_equal(np.array(array), cases.native(name, want[name]))


@pytest.mark.parametrize("lost", ["high_noise_model", "low_noise_model"])
def test_one_expert_alone(experts, lost):
    folder, _ = experts
    shutil.rmtree(folder / lost)
    with pytest.raises(
        CheckpointError, match=rf"incomplete official checkpoint, missing: {lost}/config\.json"
    ) as caught:
        locate(folder)
    assert "\n" not in str(caught.value)


def test_the_folder_of_one_expert(experts):
    folder, _ = experts
    with pytest.raises(CheckpointError, match="is one expert of two; give the folder that holds both"):
        locate(folder / "low_noise_model")


def test_an_image_to_video_expert_in_the_place_of_a_whole_model(tmp_path):
    folder = checkpoint.write_official(tmp_path / "experts", "small-i2v-A14B")
    for file in (folder / "high_noise_model").iterdir():
        file.rename(folder / file.name)
    for name in ("high_noise_model", "low_noise_model"):
        shutil.rmtree(folder / name)
    with pytest.raises(CheckpointError, match="without another expert or image tokens; an A14B model has its"):
        locate(folder)


def test_experts_of_different_models(tmp_path):
    folder = checkpoint.write_official(tmp_path / "a", "small-t2v-A14B")
    other = checkpoint.write_official(tmp_path / "b", "small-i2v-A14B")
    shutil.rmtree(folder / "low_noise_model")
    shutil.copytree(other / "low_noise_model", folder / "low_noise_model")
    with pytest.raises(CheckpointError, match=r"low_noise_model/config\.json: differs from high_noise_model/config"):
        locate(folder)


@pytest.mark.parametrize(("model", "own"), [("small", "Wan2.2"), ("small-t2v-A14B", "Wan2.1")])
def test_a_vae_of_the_other_family(tmp_path, model, own):
    folder, other = checkpoint.write_official(tmp_path / "model", model), {"Wan2.2": "Wan2.1", "Wan2.1": "Wan2.2"}[own]
    vae = folder / f"{own}_VAE.pth"
    vae.unlink()
    source = "small" if other == "Wan2.2" else "small-t2v-A14B"
    checkpoint.write_pth(folder / f"{other}_VAE.pth", checkpoint.official_weights("vae", source))
    missing = rf"missing: {own}_VAE.*\(but {other}_VAE\.pth is {other}-type VAE of an unreleased size\)"
    with pytest.raises(CheckpointError, match=missing):
        locate(folder)
    (folder / f"{other}_VAE.pth").rename(vae)
    with pytest.raises(CheckpointError, match=rf"is {other}-type VAE of an unreleased size, not the VAE of a Wan"):
        locate(folder)


# --- Wan2.1 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "like"), [("t2v-14B", "t2v-1.3B"), ("i2v-14B",) * 2, ("flf2v-14B",) * 2])
def test_models_of_the_wan21_kind(tmp_path, kind, like):
    found = locate(checkpoint.write_official(tmp_path / "model", f"small-{kind}"))
    assert (found.kind, found.spec.name, found.layout.name) == (like, "custom", "official")
    assert list(found.parts) == [part for part in PARTS if part in small.MODELS[f"small-{kind}"]]
    for f in fields(found.transformer_config):
        none = {"image_dim": 0, "image_positions": 0, "vace_layers": (), "vace_in_dim": 0}
        want = {**none, **small.MODELS[f"small-{kind}"]["transformer"]}
        assert getattr(found.transformer_config, f.name) == want[f.name]
    if kind == "t2v-14B":
        assert found.image_encoder_config is None
        return
    assert vars(found.image_encoder_config) == small.IMAGE_ENCODER
    want = checkpoint.official_weights("image_encoder", f"small-{kind}")
    got = dict(tree_flatten(load_image_encoder(found, mx.float32).parameters()))
    assert got.keys() == want.keys()
    assert all(np.array_equal(np.array(got[n]), cases.native(n, want[n])) for n in want)


@pytest.fixture
def with_tokens(tmp_path):
    return checkpoint.write_official(tmp_path / "model", "small-i2v-14B")


def test_an_image_encoder_that_is_missing(with_tokens):
    (with_tokens / f"{checkpoint.CLIP}.pth").unlink()
    with pytest.raises(CheckpointError, match=f"missing: {checkpoint.CLIP}"):
        locate(with_tokens)


def test_an_image_encoder_with_something_else(with_tokens):
    weights = checkpoint.clip_weights("small-i2v-14B")
    checkpoint.write_pth(with_tokens / f"{checkpoint.CLIP}.pth", weights | {"audio.weight": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"does not fit the image encoder: unexpected audio\.weight"):
        locate(with_tokens)
    del weights["visual.transformer.1.mlp.2.bias"]
    checkpoint.write_pth(with_tokens / f"{checkpoint.CLIP}.pth", weights)
    with pytest.raises(CheckpointError, match=r"image encoder: 1 missing \(transformer\.1\.mlp\.2\.bias\)"):
        locate(with_tokens)


# --- the embedded model --------------------------------------------------------------------------------------


def test_an_installation_without_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setattr(locating, "EMBEDDED", tmp_path / "none")
    with pytest.raises(CheckpointError, match="the embedded model is missing; install mlx-wan again"):
        locate("tiny")


def test_tiny_is_the_embedded_folder(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(locating, "EMBEDDED", save(tmp_path / "embedded", folder, model="tiny", sampling={}))
    checkpoint = locate("tiny")
    assert checkpoint.spec.name == "tiny"
    assert checkpoint.spec.negative_prompt == ""


def test_the_default_size_is_a_trained_one(tmp_path, folder):
    sampling = {"width": 96, "height": 64}
    spec = locate(save(tmp_path / "native", folder, model="tiny", sampling=sampling)).spec
    assert (spec.width, spec.height, spec.sizes) == (96, 64, ((96, 64),))


def test_dimensions_of_the_5b():
    shapes = {
        part: {n: tuple(s) for n, s in cases.official_names("ti2v-5B", part).items()} for part in checkpoints.PARTS
    }
    transformer = transformer_fields(shapes["transformer"])
    assert (transformer["dim"], transformer["num_layers"], transformer["text_dim"]) == (3072, 30, 4096)
    assert text_encoder_fields(shapes["text_encoder"])["vocab_size"] == 256384
    assert vae_fields(shapes["vae"]) == {
        "dim": 160,
        "dec_dim": 256,
        "z_dim": 48,
        "dim_mult": (1, 2, 4, 4),
        "num_res_blocks": 2,
        "temporal_downsample": (False, True, True),
        "patch_size": 2,
    }
