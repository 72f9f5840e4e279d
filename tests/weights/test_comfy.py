"""ComfyUI's quantized matrices: comfy-kitchen's own bytes and numbers, and descriptions that do not fit."""

import json
from pathlib import Path

import cases
import mlx.core as mx
import numpy as np
import pytest

from mlx_wan.errors import CheckpointError
from mlx_wan.weights.files import read_metadata, read_tensors
from mlx_wan.weights.save import array_tensor, write_safetensors
from mlx_wan.weights.scaled import METADATA_KEY

FILE = Path(__file__).parent / "fixtures" / "comfy_quant.safetensors"
PREFIX = "model.diffusion_model."
PACKED = {"fp8": "float8_e4m3 scaled", "int8_rows": "int8_tensorwise", "int8_rotated": "int8_tensorwise"}
PACKED |= {"int8": "int8_tensorwise", "int4": "convrot_w4a4", "int4_narrow": "int4_tensorwise"}


@pytest.mark.parametrize("name", cases.golden("comfy_quant"))
def test_the_numbers_of_comfy_kitchen(name):
    tensors, want = read_tensors(FILE), cases.golden("comfy_quant")[name]
    info = tensors[f"{PREFIX}{name}.weight"]
    assert (info.shape, info.dtype, info.packed) == (want.shape, "float32", PACKED.get(name, name))
    got = np.array(info.load())
    if "rotated" in name or "int4" in name:  # sums in another order
        assert cases.relative_error(got, want) < 2e-7
    else:
        assert np.array_equal(got, want)


def test_nothing_else_is_left_of_a_layer():
    assert len(read_tensors(FILE)) == len(cases.golden("comfy_quant"))
    assert sum(info.nbytes for info in read_tensors(FILE).values()) < FILE.stat().st_size


def layer(tmp_path: Path, said: object, arrays: dict[str, mx.array], header: bool = False) -> Path:
    """A file of one layer "a" in these tensors."""
    infos = [array_tensor(f"{PREFIX}a.{end}", array) for end, array in arrays.items()]
    metadata = {METADATA_KEY: json.dumps({"layers": {"a": said}})} if header else {}
    if said is not None and not header:
        text = mx.array(list(json.dumps(said).encode()), mx.uint8)
        infos.append(array_tensor(f"{PREFIX}a.comfy_quant", text))
    write_safetensors(tmp_path / "a.safetensors", infos, metadata)
    return tmp_path / "a.safetensors"


NVFP4 = {
    "weight": mx.zeros((128, 32), mx.uint8),
    "weight_scale": mx.zeros((128, 4), mx.uint8),
    "weight_scale_2": mx.array(2.0),
}
INT8 = {"weight": mx.ones((2, 64), mx.int8), "weight_scale": mx.array(0.5)}


def test_scales_stored_as_bytes_and_layers_without_prefix_in_the_header(tmp_path):
    arrays = NVFP4 | {"weight": mx.full((128, 32), 0x12, mx.uint8), "weight_scale": mx.full((128, 4), 0x38, mx.uint8)}
    tensors = read_tensors(layer(tmp_path, {"format": "nvfp4"}, arrays, header=True))
    values = np.array(tensors[f"{PREFIX}a.weight"].load())
    assert np.array_equal(values, np.tile([1.0, 2.0], (128, 32)))  # 0.5 and 1, times 2
    arrays["pre_quant_scale"] = mx.arange(64).astype(mx.bfloat16)  # of the input
    smoothed = read_tensors(layer(tmp_path, {"format": "nvfp4"}, arrays))[f"{PREFIX}a.weight"].load()
    assert np.array_equal(np.array(smoothed), values * np.arange(64))


def test_integers_with_a_scale_a_row_need_no_description(tmp_path):
    arrays = {"weight": mx.array([[1, -2], [3, 4]], mx.int8), "weight_scale": mx.array([[0.5], [2.0]])}
    info = read_tensors(layer(tmp_path, None, arrays))[f"{PREFIX}a.weight"]  # as lightx2v writes them
    assert info.load().tolist() == [[0.5, -1.0], [6.0, 8.0]]


@pytest.mark.parametrize(
    ("said", "change", "message"),
    [
        ({"format": "awq_w4a16"}, {}, r"a\.weight says 'awq_w4a16', which is not supported \(float8_e4m3fn, "),
        ({"format": ["nvfp4"]}, {}, r"says \['nvfp4'\], which is not supported"),
        ({"form": "nvfp4"}, {}, r"a\.comfy_quant is not the description of a format"),
        ("nvfp4", {}, r"a\.comfy_quant is not the description of a format"),
        ({"format": "nvfp4", "convrot": True}, {}, "is nvfp4 with convrot, which is not supported"),
        ({"format": "int8_tensorwise"}, {}, "says int8_tensorwise, but is stored as uint8"),
        ({"format": "nvfp4"}, {"weight": mx.zeros((128, 4), mx.uint8)}, "has no rows of groups such as nvfp4 has"),
        ({"format": "nvfp4"}, {"pre_quant_scale": mx.ones(63)}, "pre_quant_scale .* which has 64 scales there"),
        ({"format": "nvfp4"}, {"weight_scale_2": None}, r"a\.weight lacks its weight_scale_2"),
        ({"format": "nvfp4"}, {"weight_scale": mx.zeros((128, 5), mx.uint8)}, "which has 512 scales there"),
        ({"format": "nvfp4"}, {"weight_scale": mx.zeros((128, 4))}, "float32 does not fit"),
        (None, {}, "has a scale but is uint8, which nothing explains"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path, said, change, message):
    arrays = {name: array for name, array in (NVFP4 | change).items() if array is not None}
    with pytest.raises(CheckpointError, match=message):
        read_tensors(layer(tmp_path, said, arrays))


@pytest.mark.parametrize("width", [48, 0, "16", 256])
def test_rotations_that_no_row_can_have(tmp_path, width):
    said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": width}
    with pytest.raises(CheckpointError, match="has no rows of groups such as int8_tensorwise has"):
        read_tensors(layer(tmp_path, said, INT8))


def test_a_damaged_header(tmp_path):
    infos = [array_tensor(f"a.{end}", array) for end, array in INT8.items()]
    for text in ("{", "[]", '{"layers": {"a": {}}}', '{"layers": [1]}'):
        write_safetensors(tmp_path / "a.safetensors", infos, {METADATA_KEY: text})
        assert read_metadata(tmp_path / "a.safetensors")[METADATA_KEY] == text
        with pytest.raises(CheckpointError, match="_quantization_metadata of its header is damaged"):
            read_tensors(tmp_path / "a.safetensors")
