"""Diffusers repositories: read, refused where they are of another model, and written again."""

import json
import os
import shutil

import cases
import checkpoint
import mlx.core as mx
import numpy as np
import pytest
import small
from mlx.utils import tree_flatten
from PIL import Image

from mlx_wan.conditioning import stretched_frame
from mlx_wan.errors import CheckpointError
from mlx_wan.models.clip import ImageEncoderConfig
from mlx_wan.weights.convert import convert
from mlx_wan.weights.inspect import describe
from mlx_wan.weights.load import load_image_encoder, load_transformer, load_vae, locate
from mlx_wan.zoo import LATENTS_MEAN

from . import checkpoints


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write_diffusers(tmp_path / "model")


def test_what_its_configs_say(folder):
    checkpoint = locate(folder)
    assert checkpoint.layout.name == "Diffusers"
    assert checkpoint.transformer_config.num_heads == 3
    assert checkpoint.vae_config.latents_mean == pytest.approx(LATENTS_MEAN)
    assert checkpoint.tokenizer == folder / "tokenizer" / "tokenizer.json"


def test_the_vaes_own_statistics(folder):
    checkpoints.edit_json(folder / "vae" / "config.json", latents_mean=[0.5] * 48)
    assert locate(folder).vae_config.latents_mean == (0.5,) * 48


def test_a_distilled_repository_is_sampled_as_it_was_distilled(folder, tmp_path):
    """FastVideo's FastWan models, which only their pipeline's name tells from others; the native layout keeps it."""
    checkpoints.edit_json(folder / "model_index.json", _class_name="WanDMDPipeline")
    for path in (folder, convert(folder, tmp_path / "native", mx.float32)):
        spec = locate(path).spec
        assert (spec.scheduler, spec.timesteps, spec.guidance_scale) == ("dmd", (1000, 757, 522), 1.0)
        assert spec.check_timesteps(None, None, None) == (1000, 757, 522)
        assert spec.check_timesteps(None, 8, None) is None, "steps that are asked for count"
    for wrong in ([500, 600], 5, ["x"]):
        config = json.loads((tmp_path / "native" / "config.json").read_text())
        config["mlx_wan"]["sampling"]["timesteps"] = wrong
        (tmp_path / "native" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"mlx_wan.sampling.timesteps cannot be"):
            locate(tmp_path / "native")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline, not one of WanPipeline"),
        ("model_index.json", {"boundary_ratio": 2}, "boundary_ratio cannot be 2"),
        ("model_index.json", {"boundary_ratio": 0.875}, "transformer_2/config.json: missing from this Diffusers"),
        ("transformer/config.json", {"image_dim": 1280}, "added_kv_proj_dim is None with an image_dim of 1280"),
        ("transformer/config.json", {"qk_norm": "other"}, "qk_norm cannot be 'other'"),
        ("transformer/config.json", {"num_layers": 3}, "num_layers is 3, but the tensors in diffusion_pytorch_model"),
        ("transformer/config.json", {"attention_head_dim": 48}, "dim is 144, but the tensors"),
        ("transformer/config.json", {"num_attention_heads": "x"}, "must be whole numbers"),
        ("transformer/config.json", {"num_attention_heads": None}, "lacks num_heads"),
        ("transformer/config.json", {"_class_name": "X"}, "is of another model than WanTransformer3DModel"),
        ("vae/config.json", {"is_residual": False}, "decoder_base_dim is 12, in the models that run it is None"),
        ("vae/config.json", {"z_dim": 16}, "z_dim is 16, but the tensors"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type is 't5'"),
        ("text_encoder/config.json", {"d_kv": 16}, "dim_attn is 64, but the tensors"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "another model than UMT5EncoderModel"),
    ],
)
def test_other_models(folder, file, changes, message):
    checkpoints.edit_json(folder / file, **changes)
    with pytest.raises(CheckpointError) as error:
        locate(folder)
    assert message in str(error.value)


def test_missing_and_broken_parts(folder):
    (folder / "vae" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        locate(folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="missing from this Diffusers repository"):
        locate(folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "config.json").write_text(json.dumps(checkpoints.diffusers_golden()["vae"]["config"]))
    with pytest.raises(CheckpointError, match=r"incomplete Diffusers checkpoint, missing: vae/diffusion"):
        locate(folder)


def test_inspect_names_it(folder):
    found = describe(folder)
    assert (found["layout"], found["problems"]) == ("Diffusers", [])
    assert set(found["components"]) == {"transformer", "text_encoder", "vae"}


def test_written_as_diffusers_writes_it(tmp_path):
    src = checkpoints.write_official(tmp_path / "src", shards=2)
    dst = convert(src, tmp_path / "dst", to="diffusers")
    golden = checkpoints.diffusers_golden()
    for part in checkpoints.PARTS:
        stored = mx.load(str(dst / part / golden[part]["file"]))
        weights = checkpoints.official(part)
        assert stored.keys() == golden[part]["tensors"].keys()
        for own, name in golden[part]["tensors"].items():
            assert stored[own].shape == weights[name].shape
            assert mx.array_equal(stored[own], mx.array(weights[name])), own
        config = json.loads((dst / part / "config.json").read_text())
        want = golden[part]["config"]
        for key in config.keys() & want.keys():
            assert config[key] == (pytest.approx(want[key]) if key.startswith("latents") else want[key]), key
        assert not {"num_layers", "z_dim"} & (want.keys() - config.keys())
    index = json.loads((dst / "model_index.json").read_text())
    want = golden["model_index"]
    assert all(index[key] == want[key] for key in want.keys() - {"tokenizer", "_diffusers_version"})
    assert locate(dst).layout.name == "Diffusers"


# --- two experts and the Wan2.1 VAE ----------------------------------------------------------------------------


@pytest.fixture
def experts(tmp_path):
    """A T2V-A14B repository: configs, index and the VAE's names as diffusers writes them."""
    folder, golden, model = tmp_path / "experts", checkpoints.diffusers_golden(), "small-t2v-A14B"
    names = dict.fromkeys(("transformer", "transformer_2"), golden["transformer"]["tensors"])
    names |= {"text_encoder": golden["text_encoder"]["tensors"], "vae": golden["experts"]["vae"]["tensors"]}
    configs = dict.fromkeys(("transformer", "transformer_2"), golden["experts"]["transformer"]["config"])
    configs |= {"text_encoder": golden["text_encoder"]["config"], "vae": golden["experts"]["vae"]["config"]}
    for part in names:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(configs[part]))
        weights = checkpoint.official_weights(part, model)
        file = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
        tensors = {own: weights[name] for own, name in names[part].items()}
        checkpoints.save_safetensors(folder / part / file, tensors)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(checkpoints.TOKENIZER)
    (folder / "model_index.json").write_text(json.dumps(golden["experts"]["model_index"]))
    return folder


def test_two_experts(experts):
    found = locate(experts)
    assert (found.layout.name, found.kind, found.spec.boundary) == ("Diffusers", "t2v-A14B", 0.875)
    assert found.transformer_config.model_type == "t2v"
    for part in ("transformer", "transformer_2", "vae"):
        want = checkpoint.official_weights(part, "small-t2v-A14B")
        load = load_vae(found) if part == "vae" else load_transformer(found, mx.float32, part)
        got = dict(tree_flatten(load.parameters()))
        assert got.keys() == want.keys()
        assert all(np.array_equal(np.array(got[n]), cases.native(n, want[n])) for n in want)
    assert list(describe(experts)["components"]) == ["transformer", "transformer_2", "text_encoder", "vae"]


def test_two_experts_to_official_and_native(experts, tmp_path):
    back = locate(convert(convert(experts, tmp_path / "native"), tmp_path / "official", to="official"))
    assert (back.layout.name, back.kind, list(back.parts)) == ("official", "t2v-A14B", list(locate(experts).parts))


def test_experts_written_as_diffusers_writes_them(experts, tmp_path):
    dst = convert(convert(experts, tmp_path / "native"), tmp_path / "dst", to="diffusers")
    assert {p.relative_to(dst) for p in dst.rglob("*.safetensors")} == {
        p.relative_to(experts) for p in experts.rglob("*.safetensors")
    }
    for file in dst.rglob("*.safetensors"):
        got, want = (mx.load(str(folder / file.relative_to(dst))) for folder in (dst, experts))
        assert got.keys() == want.keys()
        assert all(mx.array_equal(got[name], want[name]) for name in got), file
    golden = checkpoints.diffusers_golden()["experts"]
    for file, want in (
        ("model_index.json", golden["model_index"]),
        ("transformer_2/config.json", golden["transformer"]["config"]),
        ("vae/config.json", golden["vae"]["config"]),
    ):
        got = json.loads((dst / file).read_text())
        own = {"text_encoder", "tokenizer", "_diffusers_version"}  # which the golden was made without
        assert got.keys() <= want.keys() | {"clip_output"}, file
        for key in got.keys() - own:
            assert got[key] == (pytest.approx(want[key]) if key.startswith("latents") else want[key]), (file, key)


def test_experts_that_do_not_fit(experts):
    checkpoints.edit_json(experts / "transformer_2" / "config.json", eps=1e-5)
    with pytest.raises(CheckpointError, match=r"transformer_2/config\.json: differs from transformer/config\.json"):
        locate(experts)
    shutil.rmtree(experts / "transformer_2")
    with pytest.raises(CheckpointError, match=r"transformer_2/config\.json: missing from this Diffusers repository"):
        locate(experts)


def test_a_wan21_repository(experts):
    shutil.rmtree(experts / "transformer_2")
    checkpoints.edit_json(experts / "model_index.json", boundary_ratio=None)
    for key in ("is_residual", "patch_size", "decoder_base_dim"):  # older files do not know of these
        checkpoints.edit_json(experts / "vae" / "config.json", **{key: None})
    assert (locate(experts).kind, list(locate(experts).parts)) == ("t2v-1.3B", ["transformer", "text_encoder", "vae"])


def test_a_second_expert_without_a_boundary(experts):
    checkpoints.edit_json(experts / "model_index.json", boundary_ratio=None)
    with pytest.raises(CheckpointError, match=r"transformer_2 is there, but model_index\.json names no boundary_ratio"):
        locate(experts)


# --- VACE -----------------------------------------------------------------------------------------------------


@pytest.fixture
def vace(experts):
    """A VACE repository: index, transformer's config and names as diffusers writes them, the rest as T2V's."""
    golden = json.loads((checkpoint.GOLDEN / "diffusers_vace.json").read_text())
    shutil.rmtree(experts / "transformer_2")
    (experts / "model_index.json").write_text(json.dumps(golden["model_index"]))
    (experts / "transformer" / "config.json").write_text(json.dumps(golden["config"]))
    weights = checkpoint.official_weights("transformer", "small-vace-14B")
    tensors = {own: weights[name] for own, name in golden["tensors"].items()}
    checkpoints.save_safetensors(experts / "transformer" / "diffusion_pytorch_model.safetensors", tensors)
    return experts


def test_a_vace_repository(vace, tmp_path):
    found = locate(vace)
    assert (found.layout.name, found.spec.task) == ("Diffusers", "vace")
    assert found.transformer_config.vace_layers == (0, 2)
    want = checkpoint.official_weights("transformer", "small-vace-14B")
    for folder in (vace, convert(vace, tmp_path / "native"), convert(vace, tmp_path / "official", to="official")):
        again = locate(folder)
        got = dict(tree_flatten(load_transformer(again, mx.float32).parameters()))
        assert (again.spec.task, again.transformer_config.vace_layers) == ("vace", (0, 2))
        assert got.keys() == want.keys()
        assert all(np.array_equal(np.array(got[n]), cases.native(n, want[n])) for n in want)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0], r"vace_layers is \[0\], but the tensors in .* have 2"),
        ([2, 0], r"vace_layers is \[2, 0\]"),
        ("x", "vace_layers is 'x'"),
        ([1, 2], r"vace_layers \[1, 2\] must begin with 0 and be less than 4"),
        ([0, 4], r"vace_layers \[0, 4\] must begin with 0 and be less than 4"),
    ],
)
def test_layers_of_vace_that_cannot_be(vace, layers, message):
    checkpoints.edit_json(vace / "transformer" / "config.json", vace_layers=layers)
    with pytest.raises(CheckpointError, match=message):
        locate(vace)


# --- image tokens: Wan2.1's I2V and FLF2V --------------------------------------------------------------------------


IMAGE = json.loads((checkpoint.GOLDEN / "diffusers_image.json").read_text())


def clip_tensors(names):
    """The small image encoder as transformers has it; names: own -> official."""
    weights = checkpoint.official_weights("image_encoder", "small-i2v-14B")
    special = {"cls_embedding": lambda a: a[0, 0], "pos_embedding": lambda a: a[0], "head": lambda a: a.T.copy()}
    tensors = {}
    for own, name in names.items():
        start, qkv, rest = name.partition(".to_qkv.")
        if qkv:
            which, kind = rest.split(".")
            tensors[own] = np.split(weights[f"{start}.to_qkv.{kind}"], 3)["qkv".index(which)].copy()
        else:
            tensors[own] = special.get(name, lambda a: a)(weights[name])
    return tensors


def write_image_model(folder, kind, encoder=IMAGE["i2v"]["image_encoder"]):
    """A repository of the small model: configs, index and names as diffusers and transformers write them."""
    golden, model = checkpoints.diffusers_golden(), f"small-{kind}-14B"
    transformer = IMAGE[kind]["transformer"]
    names = {"transformer": transformer["tensors"], "text_encoder": golden["text_encoder"]["tensors"]}
    names["vae"] = golden["experts"]["vae"]["tensors"]
    configs = {"transformer": transformer["config"], "text_encoder": golden["text_encoder"]["config"]}
    configs |= {"vae": golden["experts"]["vae"]["config"], "image_encoder": encoder["config"]}
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        if part == "image_encoder":
            tensors = clip_tensors(encoder["tensors"])
        else:
            weights = checkpoint.official_weights(part, model)
            tensors = {own: weights[name] for own, name in names[part].items()}
        file = "model.safetensors" if part.endswith("_encoder") else "diffusion_pytorch_model.safetensors"
        checkpoints.save_safetensors(folder / part / file, tensors)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(checkpoints.TOKENIZER)
    (folder / "model_index.json").write_text(json.dumps(IMAGE[kind]["model_index"]))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("image") / "model", "i2v")


@pytest.fixture
def image_model(written, tmp_path):
    """Its own configs, and links to the tensor files, which nobody writes into."""

    def copy(src, dst):
        (os.link if src.endswith(".safetensors") else shutil.copy)(src, dst)

    return shutil.copytree(written, tmp_path / "model", copy_function=copy)


@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
def test_a_repository_with_an_image_encoder(tmp_path, kind):
    folder = write_image_model(tmp_path / "model", kind)
    found = locate(folder)
    assert (found.layout.name, found.spec.task, found.transformer_config.model_type) == ("Diffusers", kind, kind)
    assert found.image_encoder_config == ImageEncoderConfig(**small.IMAGE_ENCODER | {"out_dim": 0})
    model = f"small-{kind}-14B"
    for path in (folder, convert(folder, tmp_path / "native"), convert(folder, tmp_path / "again", to="diffusers")):
        again = locate(path)
        want = checkpoint.official_weights("image_encoder", model)
        del want["head"]  # which transformers' class has no place for, and no token needs
        got = dict(tree_flatten(load_image_encoder(again, mx.float32).parameters()))
        assert got.keys() == want.keys()
        assert all(np.array_equal(np.array(got[n]), cases.native(n, want[n])) for n in want)
        want = checkpoint.official_weights("transformer", model)
        got = dict(tree_flatten(load_transformer(again, mx.float32).parameters()))
        assert got.keys() == want.keys()
        assert all(np.array_equal(np.array(got[n]), cases.native(n, want[n])) for n in want)
    assert describe(folder)["problems"] == []


@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
def test_its_configs_are_written_as_diffusers_writes_them(tmp_path, kind):
    folder = write_image_model(tmp_path / "model", kind)
    dst = convert(folder, tmp_path / "dst", to="diffusers")
    wanted = {
        "model_index.json": IMAGE[kind]["model_index"],
        "transformer/config.json": IMAGE[kind]["transformer"]["config"],
    }
    wanted |= {"image_encoder/config.json": IMAGE["i2v"]["image_encoder"]["config"]}
    wanted |= {"image_processor/preprocessor_config.json": IMAGE["i2v"]["image_processor"]}
    without = {"text_encoder", "tokenizer", "vae", "scheduler"}  # which the golden was made without
    for file, want in wanted.items():
        got = json.loads((dst / file).read_text())
        assert {key: got[key] for key in got.keys() - without - {"image_processor"}} == {
            key: want[key] for key in got.keys() - without - {"image_processor"}
        }
    stored = mx.load(str(dst / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert stored.keys() == IMAGE[kind]["transformer"]["tensors"].keys()


def test_its_tokens_are_the_official_ones(written):
    model = load_image_encoder(locate(written), mx.float32)
    square = stretched_frame(Image.fromarray(small.picture()), 224, 224)[0]
    got, want = np.array(model(mx.array(square)))[:, ::8, ::16], cases.golden("runs21")["image_tokens"]
    assert cases.relative_error(got, want) < 1e-5


@pytest.mark.parametrize("names", ["i2v", "with_projection"])
def test_a_single_file_of_either_class(tmp_path, names):
    """What ComfyUI calls clip_vision_h has the names of the class with a projection."""
    src = checkpoint.write_official(tmp_path / "src", "small-i2v-14B")
    golden = IMAGE[names]["image_encoder"] if names == "i2v" else IMAGE[names]
    tensors = clip_tensors(golden["tensors"]) | {"vision_model.embeddings.position_ids": np.arange(257)[None]}
    checkpoints.save_safetensors(tmp_path / "clip_vision_h.safetensors", tensors)
    found = locate(src, image_encoder=tmp_path / "clip_vision_h.safetensors")
    assert found.image_encoder.identity.model == "CLIP image encoder of an unreleased size"
    want = dict(tree_flatten(load_image_encoder(locate(src), mx.float32).parameters()))
    got = dict(tree_flatten(load_image_encoder(found, mx.float32).parameters()))
    assert want.keys() - got.keys() == (set() if names == "with_projection" else {"head"})
    assert all(mx.array_equal(got[name], want[name]) for name in got)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"image_dim": None}, "added_kv_proj_dim is 96 with an image_dim of None"),
        ("transformer/config.json", {"added_kv_proj_dim": 48}, "added_kv_proj_dim is 48"),
        ("transformer/config.json", {"image_dim": 640}, "image_dim is 640, but the tensors"),
        ("transformer/config.json", {"pos_embed_seq_len": 514}, "image_positions is 514, but the tensors"),
        ("image_encoder/config.json", {"hidden_act": None}, "a CLIPVisionModel with the activation"),
        ("image_encoder/config.json", {"architectures": ["CLIPModel"]}, "is a CLIPModel with"),
        ("image_encoder/config.json", {"hidden_size": 640}, "dim is 640, but the tensors"),
        ("image_encoder/config.json", {"num_hidden_layers": 3}, "num_layers is 3, but the tensors"),
        ("model_index.json", {"image_encoder": [None, None]}, "the image encoder makes none"),
    ],
)
def test_image_encoders_that_do_not_fit(image_model, file, changes, message):
    checkpoints.edit_json(image_model / file, **changes)
    with pytest.raises(CheckpointError) as error:
        locate(image_model)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.layers.1.self_attn.k_proj.bias"), "transformer.1.attn lacks the bias of k"),
        (lambda t: t.pop("pre_layrnorm.bias"), "1 missing (pre_norm.bias)"),
        (lambda t: t.update({"encoder.layers.1.x": np.zeros(3, np.float32)}), "1 unexpected"),
        (lambda t: t.update({"encoder.layers.0.self_attn.v_proj.weight": np.zeros((3, 4), np.float32)}), "not alike"),
    ],
)
def test_image_encoders_with_other_tensors(image_model, change, message):
    tensors = clip_tensors(IMAGE["i2v"]["image_encoder"]["tensors"])
    change(tensors)
    file = image_model / "image_encoder" / "model.safetensors"
    file.unlink()
    checkpoints.save_safetensors(file, tensors)
    with pytest.raises(CheckpointError) as error:
        locate(image_model)
    assert message in str(error.value)
