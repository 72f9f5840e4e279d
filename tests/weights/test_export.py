"""The way back: official and Diffusers layouts from any other, bit for bit."""

import checkpoint
import mlx.core as mx
import numpy as np
import pytest

from mlx_wan.cli.main import main
from mlx_wan.errors import UserError
from mlx_wan.weights.convert import convert
from mlx_wan.weights.export import write_pth
from mlx_wan.weights.files import read_tensors
from mlx_wan.weights.load import locate
from mlx_wan.weights.save import array_tensor

from . import checkpoints


@pytest.fixture
def src(tmp_path):
    return checkpoints.write_official(tmp_path / "src", shards=2)


def files(checkpoint):
    return {part: getattr(checkpoint, part).path for part in checkpoints.PARTS}


@pytest.mark.parametrize("there", ["native", "diffusers"])
def test_there_and_back_to_official(src, tmp_path, there):
    middle = convert(src, tmp_path / "middle", to=there)
    back = convert(middle, tmp_path / "back", to="official", max_shard_bytes=500_000)
    found = locate(back)
    assert found.layout.name == "official"
    assert found.transformer.path.name.endswith(".index.json")
    for part, path in files(found).items():
        stored, want = read_tensors(path), checkpoints.official(part)
        assert stored.keys() == want.keys()
        for name, info in stored.items():
            assert (info.shape, info.dtype) == (want[name].shape, "float32")
            assert np.array_equal(np.array(info.load()), want[name])


def test_bfloat16_stays_where_types_are_free(tmp_path):
    src = checkpoints.write_official(tmp_path / "src", dtype=mx.bfloat16)
    back = convert(src, tmp_path / "back", to="diffusers")
    stored = read_tensors(back / "transformer" / "diffusion_pytorch_model.safetensors")
    assert stored["blocks.0.attn1.to_q.weight"].dtype == "bfloat16"
    assert stored["blocks.0.scale_shift_table"].dtype == "float32"  # widened: the value is the same


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_pth_files(tmp_path, dtype):
    arrays = {"a.b": mx.random.normal((3, 4)).astype(dtype), "c": mx.array(2.5, dtype), "d": mx.zeros((0, 3), dtype)}
    write_pth(tmp_path / "x.pth", [array_tensor(name, array) for name, array in arrays.items()])
    stored = read_tensors(tmp_path / "x.pth")
    assert list(stored) == list(arrays)
    for name, array in arrays.items():
        got = stored[name].load()
        assert (got.dtype, got.shape) == (dtype, array.shape)
        assert mx.array_equal(got, array)


def test_mistakes(src, tmp_path, capsys):
    with pytest.raises(UserError, match="cannot write the layout 'torch'; choose one of native, official, diffusers"):
        convert(src, tmp_path / "x", to="torch")
    with pytest.raises(UserError, match="packed matrices have no place in the diffusers layout"):
        convert(src, tmp_path / "x", to="diffusers", bits=8)
    assert main(["convert", str(src), str(tmp_path / "x"), "--to", "diffusers"]) == 0
    assert (tmp_path / "x" / "model_index.json").is_file()
    assert main(["convert", str(src), str(tmp_path / "x"), "--to", "diffusers", "--overwrite"]) == 2
    assert "is not empty" in capsys.readouterr().err


MODELS = ["small-t2v-A14B", "small-i2v-A14B", "small-t2v-14B", "small-vace-14B"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("there", ["native", "diffusers"])
def test_other_models_there_and_back_to_official(tmp_path, model, there):
    src = checkpoint.write_official(tmp_path / "src", model)
    middle = convert(src, tmp_path / "middle", to=there)
    back = convert(middle, tmp_path / "back", to="official", max_shard_bytes=500_000)
    before, after = locate(src), locate(back)
    assert locate(middle).spec == before.spec
    assert (after.layout, after.spec) == (before.layout, before.spec)
    assert after.config | {"_class_name": "WanModel"} == before.config  # VACE's has a name of its own
    for part, found in after.parts.items():
        stored, want = read_tensors(found.path), checkpoint.official_weights(part, model)
        assert stored.keys() == want.keys()
        assert all(np.array_equal(np.array(info.load()), want[name]) for name, info in stored.items())


def test_an_image_encoder_keeps_its_projection_in_the_diffusers_layout(tmp_path):
    src = checkpoint.write_official(tmp_path / "src", "small-i2v-14B")
    found = locate(convert(src, tmp_path / "out", to="diffusers"))
    tensors = read_tensors(found.image_encoder.path)
    want = checkpoint.official_weights("image_encoder", "small-i2v-14B")
    assert np.array_equal(np.array(tensors["visual_projection.weight"].load()), want["head"].T)
    assert {name: info.shape for name, info in found.image_encoder.tensors.items()} == {
        name: array.shape for name, array in want.items()
    }
    assert all(np.array_equal(np.array(info.load()), want[n]) for n, info in found.image_encoder.tensors.items())


def test_an_image_encoder_needs_its_text_half_to_go_back(tmp_path):
    src = checkpoint.write_official(tmp_path / "src", "small-i2v-14B")
    native = convert(src, tmp_path / "native")
    with pytest.raises(
        UserError, match=r"image_encoder\.safetensors: has no text half, .* --image_encoder models_clip"
    ):
        convert(native, tmp_path / "out", to="official")
    assert not (tmp_path / "out").exists()
    file = next(src.glob("models_clip*"))
    out = convert(native, tmp_path / "out", to="official", files={"image_encoder": file})
    before, after = locate(src), locate(out)
    assert (after.layout, after.spec) == (before.layout, before.spec)
    for part, found in after.parts.items():
        stored, want = read_tensors(found.path), read_tensors(before.parts[part].path)
        assert stored.keys() == want.keys()
        assert all(np.array_equal(np.array(info.load()), np.array(want[n].load())) for n, info in stored.items())
