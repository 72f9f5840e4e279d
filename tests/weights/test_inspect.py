"""What `describe` says of files and folders, small ones and ones of the released sizes."""

import json
import re
import time

import cases
import checkpoint
import mlx.core as mx
import pytest

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.weights import inspect as inspecting
from mlx_wan.weights.convert import convert
from mlx_wan.weights.identify import identify
from mlx_wan.weights.inspect import describe
from mlx_wan.weights.layouts import WAN22_MLX

from . import checkpoints
from .test_convert import square  # noqa: F401
from .test_files import entry, write

RELEASED = {
    "transformer": "Wan2.2 TI2V-5B",
    "text_encoder": "UMT5-XXL encoder",
    "vae": "Wan2.2 VAE",
}


def shapes(part: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in cases.official_names("ti2v-5B", part).items()}


def transformer(dim: int, ffn_dim: int, layers: int, in_dim: int, out_dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer of another size, made from the 5B's."""
    sizes = {3072: dim, 14336: ffn_dim, 6 * 3072: 6 * dim, 4 * 48: 4 * out_dim}
    block = {n: s for n, s in shapes("transformer").items() if n.startswith("blocks.0.")}
    rest = {n: s for n, s in shapes("transformer").items() if not n.startswith("blocks.")}
    blocks = {n.replace("blocks.0.", f"blocks.{i}."): s for i in range(layers) for n, s in block.items()}
    resized = {name: tuple(sizes.get(n, n) for n in shape) for name, shape in (rest | blocks).items()}
    return resized | {"patch_embedding.weight": (dim, in_dim, 1, 2, 2)}


@pytest.mark.parametrize("part", RELEASED)
def test_knows_the_released_parts(part):
    identity = identify(shapes(part))
    assert (identity.component, identity.model, identity.runs) == (part, RELEASED[part], True)


@pytest.mark.parametrize("rename", [WAN22_MLX.from_official, "model.diffusion_model.{}".format])
def test_knows_them_in_other_dialects(rename):
    assert identify({rename(n): s for n, s in shapes("transformer").items()}).model == RELEASED["transformer"]


def test_knows_them_channels_last():
    turned = {n: (s[0], *s[2:], s[1]) if len(s) > 3 else s for n, s in shapes("transformer").items()}
    assert identify(turned).model == RELEASED["transformer"]


@pytest.mark.parametrize(
    ("sizes", "model", "models"),
    [
        ((5120, 13824, 40, 16, 16), "Wan2.2 T2V-A14B (one expert) or Wan2.1 T2V-14B", ("t2v-A14B", "t2v-14B")),
        ((5120, 13824, 40, 36, 16), "Wan2.2 I2V-A14B (one expert)", ("i2v-A14B",)),
        ((1536, 8960, 30, 16, 16), "Wan2.1 T2V-1.3B", ("t2v-1.3B",)),
        ((1536, 8960, 30, 36, 16), "image-to-video transformer of an unreleased size", ()),
        ((128, 256, 2, 16, 16), "Wan transformer of an unreleased size", ()),
    ],
)
def test_knows_other_transformers(sizes, model, models):
    identity = identify(transformer(*sizes))
    assert (identity.component, identity.model, identity.models) == ("transformer", model, models)
    assert identity.runs


@pytest.mark.parametrize(
    ("extra", "model"), [({}, "Wan2.1 I2V-14B"), ({"img_emb.emb_pos": (1, 514, 1280)}, "Wan2.1 FLF2V-14B")]
)
def test_knows_the_wan21_models_that_take_image_tokens(extra, model):
    shapes = {n: tuple(s) for n, s in cases.official_names("i2v-14B", "transformer").items()}
    assert identify(shapes | extra).model == model


@pytest.mark.parametrize("name", ["{}", "visual.{}"])
def test_knows_the_image_encoder(name):
    shapes = {name.format(n): tuple(s) for n, s in cases.official_names("i2v-14B", "image_encoder").items()}
    identity = identify(shapes | {"textual.norm.weight": (4,)} if "visual" in name else shapes)
    assert (identity.component, identity.model) == ("image_encoder", "CLIP ViT-H/14 image encoder")


def test_knows_the_wan21_vae():
    identity = identify({n: tuple(s) for n, s in cases.official_names("t2v-A14B", "vae").items()})
    assert (identity.component, identity.model, identity.family) == ("vae", "Wan2.1 VAE", "Wan2.1")


@pytest.mark.parametrize(
    ("name", "component", "model"),
    [
        ("casual_audio_encoder.weights", "transformer", "Wan2.2 S2V-14B"),
        ("pose_patch_embedding.weight", "transformer", "Wan2.2 Animate-14B"),
        ("diffusion_model.blocks.0.cross_attn.q.lora_down.weight", "lora", "LoRA"),
        ("lora_unet_blocks_0_ffn_0.alpha", "lora", "LoRA"),
        ("conv.weight", "unknown", "unknown"),
    ],
)
def test_knows_by_single_names(name, component, model):
    identity = identify({name: (4, 4)})
    assert (identity.component, identity.model, identity.runs) == (component, model, False)


def test_knows_what_a_lora_was_made_for():
    def lora(dim: int, ffn_dim: int, layers: int) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for i in range(layers):
            shapes |= {
                f"lora_unet_blocks_{i}_self_attn_q.lora_down.weight": (16, dim),
                f"lora_unet_blocks_{i}_self_attn_q.lora_up.weight": (dim, 16),
                f"lora_unet_blocks_{i}_ffn_0.lora_up.weight": (ffn_dim, 16),
            }
        return shapes

    assert identify(lora(3072, 14336, 30)).model == "LoRA for Wan2.2 TI2V-5B"
    assert identify(lora(5120, 13824, 40)).model.startswith("LoRA for Wan2.2 T2V-A14B")
    unknown = "LoRA for a transformer of an unreleased size (dim 8, ffn_dim 9, num_layers 2)"
    assert identify(lora(8, 9, 2)).model == unknown


def sparse(path, tensors: dict[str, tuple[int, ...]], code: str = "F32", size: int = 4) -> None:
    """A .safetensors file whose values are a hole."""
    header, position = {}, 0
    for name, shape in tensors.items():
        count = size
        for n in shape:
            count *= n
        header[name] = entry(code, list(shape), position, position + count)
        position += count
    write(path, header)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + position)


@pytest.fixture
def big(tmp_path):
    """A folder like the official 5B repository: 20 GB and 11 GB of holes."""
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    sparse(tmp_path / "diffusion_pytorch_model.safetensors", shapes("transformer"))
    sparse(tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors", shapes("text_encoder"), "BF16", 2)
    sparse(tmp_path / "Wan2.2_VAE.safetensors", shapes("vae"))
    return tmp_path


def test_a_whole_5b_folder_in_under_a_second(big):
    start = time.perf_counter()
    found = describe(big)
    assert time.perf_counter() - start < 1
    assert (found["model"], found["layout"], found["quantization"]) == ("Wan2.2 TI2V-5B", "official", None)
    assert {name: part["model"] for name, part in found["components"].items()} == RELEASED
    assert [part["tensors"] for part in found["components"].values()] == [825, 242, 196]
    part = found["components"]["transformer"]
    assert part["parameters"] == 4_999_787_712
    assert part["bytes"] == 4 * part["parameters"] == part["dtypes"]["float32"]
    assert len([block for block in part["blocks"] if block.startswith("blocks.")]) == 30
    assert part["blocks"]["blocks.29"]["tensors"] == 27
    assert sum(block["bytes"] for block in part["blocks"].values()) == part["bytes"]
    assert found["total"]["tensors"] == len(found["tensors"]) == 825 + 242 + 196
    assert json.loads(json.dumps(found)) == found


def test_two_experts_are_the_a14b(tmp_path):
    for name in ("high_noise_model", "low_noise_model"):
        (tmp_path / name).mkdir()
        sparse(tmp_path / name / "m.safetensors", transformer(5120, 13824, 40, 16, 16))
    assert describe(tmp_path)["model"] == "Wan2.2 T2V-A14B"


def test_the_experts_of_a_folder_are_two_components(tmp_path):
    src = checkpoint.write_official(tmp_path / "experts", "small-t2v-A14B")
    for folder in (src, convert(src, tmp_path / "native")):
        found = describe(folder)
        assert list(found["components"]) == ["transformer", "transformer_2", "text_encoder", "vae"]
        assert found["components"]["transformer_2"]["tensors"] == 69


def test_a_single_file(tmp_path):
    folder = checkpoints.write_official(tmp_path / "model")
    found = describe(folder / "Wan2.2_VAE.pth")
    assert list(found["components"]) == ["vae"]
    assert found["model"] == "Wan2.2-type VAE of an unreleased size"
    first = found["tensors"][0]
    assert first.keys() == {"name", "shape", "dtype", "bytes", "file", "component"}
    assert (first["file"], first["dtype"]) == ("Wan2.2_VAE.pth", "float32")
    blocks = found["components"]["vae"]["blocks"]
    assert {"encoder.downsamples.3", "encoder.middle.1", "decoder.head", "conv2"} <= blocks.keys()


@pytest.mark.parametrize(
    ("write_folder", "layout"),
    [(checkpoints.write_official, "official"), (checkpoints.write_wan22_mlx, "Wan2.2-mlx")],
)
def test_folders(tmp_path, write_folder, layout):
    found = describe(write_folder(tmp_path / "model"))
    assert found["layout"] == layout
    assert list(found["components"]) == list(checkpoints.PARTS)
    assert found["problems"] == []


def test_shards_count_once_and_missing_ones_are_a_problem(tmp_path):
    folder = checkpoints.write_official(tmp_path / "model", shards=3)
    whole = describe(folder)
    assert whole["components"]["transformer"]["tensors"] == 69
    lost = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    lost.unlink()
    found = describe(folder)
    assert len(found["problems"]) == 1
    assert lost.name in found["problems"][0]
    assert found["components"].keys() >= {"text_encoder", "vae"}


def test_damaged_files_of_a_folder_are_problems_and_single_ones_errors(tmp_path):
    folder = checkpoints.write_official(tmp_path / "model")
    vae = folder / "Wan2.2_VAE.pth"
    vae.write_bytes(vae.read_bytes()[:-9])
    assert re.search(r"Wan2\.2_VAE\.pth: is cut off", describe(folder)["problems"][0])
    with pytest.raises(CheckpointError, match="is cut off"):
        describe(vae)


def test_quantization_is_told_by_folder_and_by_file(square, tmp_path):  # noqa: F811
    convert(square, tmp_path / "q", bits=4, group_size=32)
    want = {"bits": 4, "group_size": 32, "mode": "affine"}
    plain = describe(square)
    assert plain["quantization"] is None
    for path in (tmp_path / "q", tmp_path / "q" / "transformer.safetensors"):
        found = describe(path)
        assert found["quantization"] == want
        assert found["components"]["transformer"]["parameters"] == plain["components"]["transformer"]["parameters"]
        assert found["components"]["transformer"]["bytes"] < plain["components"]["transformer"]["bytes"]
    assert describe(tmp_path / "q")["model"] == "mine"


def test_packed_matrices_of_other_programs(tmp_path):
    weights = {"a.weight": mx.zeros((4, 8), mx.uint32), "a.scales": mx.zeros((4, 1)), "a.biases": mx.zeros((4, 1))}
    mx.save_safetensors(str(tmp_path / "m.safetensors"), weights)
    assert describe(tmp_path / "m.safetensors")["quantization"] == {}


def test_the_embedded_model_is_known_by_its_shapes(square, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(inspecting, "EMBEDDED", square)
    assert describe("tiny")["path"] == str(square)
    assert describe(square / "vae.safetensors")["model"] == "VAE of the embedded model (tiny)"


def test_nothing_to_describe(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        describe(tmp_path / "none")
    with pytest.raises(UserError, match="no tensor files in this folder"):
        describe(tmp_path)
