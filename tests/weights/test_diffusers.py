"""Diffusers repositories: read, refused where they are of another model, and written again."""

import json
import shutil

import cases
import checkpoint
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_wan.errors import CheckpointError
from mlx_wan.weights.convert import convert
from mlx_wan.weights.inspect import describe
from mlx_wan.weights.load import load_transformer, load_vae, locate
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
        ("transformer/config.json", {"image_dim": 1280}, "image_dim is 1280, in the models that run it is None"),
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
