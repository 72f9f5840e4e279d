"""ComfyUI's files, GGUF transformers and parts given one by one."""

import json
import re
import shutil
from pathlib import Path

import cases
import checkpoint as checkpoint_files
import mlx.core as mx
import numpy as np
import pytest
import small
from mlx.utils import tree_flatten

import mlx_wan
from mlx_wan.cli.main import main
from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.memory.plan import Dimensions, Setting, plans
from mlx_wan.models.packed import PackedLinear
from mlx_wan.text import Tokenizer, clean_prompt
from mlx_wan.weights import fit
from mlx_wan.weights.convert import convert
from mlx_wan.weights.files import read_tensors
from mlx_wan.weights.gguf import SHAPE_KEY
from mlx_wan.weights.inspect import describe
from mlx_wan.weights.layouts import MLX_VIDEO_TEXT_ENCODER, MLX_VIDEO_TRANSFORMER, MLX_VIDEO_VAE
from mlx_wan.weights.load import load_text_encoder, load_transformer, load_vae, locate
from mlx_wan.weights.quantize import Quantization
from mlx_wan.weights.save import array_tensor, write_safetensors
from mlx_wan.weights.spiece import tokenizer_json
from mlx_wan.weights.tensors import FLOAT8, TensorInfo

from . import checkpoints
from .test_gguf import gguf, string, text
from .test_inspect import sparse

SPIECE = (Path(__file__).parent / "fixtures" / "spiece.model").read_bytes()
ROUND = 0.04  # of a weight to 8 bits with three bits of mantissa


def nearest_e4m3(array: np.ndarray) -> np.ndarray:
    """The bytes whose values are nearest."""
    values = FLOAT8["float8_e4m3"][:127]
    middle = (values[1:] + values[:-1]) / 2
    return (np.searchsorted(middle, np.abs(array)) + 128 * (array < 0)).astype(np.uint8)


def float8(name: str, data: np.ndarray) -> TensorInfo:
    return TensorInfo(name, data.shape, "float8_e4m3", data.nbytes, Path(), lambda: mx.array(data))


def write_float8(path: Path, weights: dict[str, np.ndarray], scaled: str, prefix: str, marker: str | None) -> None:
    """As ComfyUI stores a model: matrices in 8 bits with a scale each, the rest in float16."""
    infos = []
    for name, array in weights.items():
        if array.ndim == 2 and name.endswith("weight") and "embedding" not in name:
            scale = np.float32(np.abs(array).max() / 448)
            infos.append(float8(prefix + name, nearest_e4m3(array / scale)))
            layer = prefix + name.removesuffix(".weight")
            infos.append(array_tensor(f"{layer}.{scaled}", mx.array(scale)))
            if scaled == "weight_scale":
                note = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
                infos.append(array_tensor(f"{layer}.comfy_quant", mx.array(note)))
                infos.append(array_tensor(f"{layer}.input_scale", mx.array(np.float32(1))))
        else:
            infos.append(array_tensor(prefix + name, mx.array(array).astype(mx.float16)))
    if marker:
        infos.append(float8(prefix + marker, np.zeros((2,), np.uint8)))
    write_raw(path, infos)


def write_raw(path: Path, infos: list[TensorInfo]) -> None:
    """`write_safetensors` for 8-bit floats too, which the package itself never writes."""
    header, body = {}, b""
    for info in infos:
        data = np.array(info.load()).tobytes()
        code = {"float8_e4m3": "F8_E4M3", "float16": "F16", "float32": "F32", "uint8": "U8"}[info.dtype]
        header[info.name] = {"dtype": code, "shape": info.shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)


def hugging_face(with_tokenizer: bool = True) -> dict[str, np.ndarray]:
    weights, names = checkpoints.official("text_encoder"), checkpoints.diffusers_golden()["text_encoder"]["tensors"]
    found = {own: weights[name] for own, name in names.items()}
    return found | ({"spiece_model": np.frombuffer(SPIECE, np.uint8)} if with_tokenizer else {})


def write_plain(path: Path, weights: dict[str, np.ndarray], prefix: str = "") -> Path:
    write_safetensors(path, [array_tensor(prefix + name, mx.array(array)) for name, array in weights.items()], {})
    return path


@pytest.fixture
def comfy(tmp_path):
    """ComfyUI's folders, and beside them the config.json that a transformer of no released size needs."""
    folder = tmp_path / "ComfyUI"
    for name in ("diffusion_models", "text_encoders", "vae", "loras"):
        (folder / name).mkdir(parents=True)
    write_float8(
        folder / "diffusion_models" / "wan2.2_ti2v_fp8_scaled.safetensors",
        checkpoints.official("transformer"),
        "scale_weight",
        "model.diffusion_model.",
        "scaled_fp8",
    )
    write_plain(folder / "text_encoders" / "umt5_xxl_fp16.safetensors", hugging_face())
    write_plain(folder / "vae" / "wan2.2_vae.safetensors", checkpoints.official("vae"))
    shutil.copy(cases.GOLDEN / "lora" / "kohya.safetensors", folder / "loras")
    (folder / "config.json").write_text(json.dumps({"num_heads": 3}))
    return folder


def parameters(module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def test_a_comfyui_folder(comfy):
    checkpoint = locate(comfy)
    assert checkpoint.layout.name == "single files"
    got, want = parameters(load_transformer(checkpoint, mx.float32)), checkpoints.native("transformer")
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert cases.relative_error(np.array(got[name]), np.array(array)) < ROUND
    for part, load in (("text_encoder", lambda c: load_text_encoder(c, mx.float32)), ("vae", load_vae)):
        got = parameters(load(checkpoint))
        assert all(mx.array_equal(got[name], array) for name, array in checkpoints.native(part).items())


def test_it_makes_a_video(comfy):
    pipe = mlx_wan.WanPipeline.from_pretrained(comfy)
    out = pipe("a red circle", width=64, height=32, num_frames=5, num_inference_steps=2, seed=0)
    assert out.frames is not None
    assert out.frames.shape == (5, 32, 64, 3)


@pytest.mark.parametrize(("scaled", "marker"), [("scale_weight", "scaled_fp8"), ("weight_scale", None)])
def test_both_kinds_of_scales(tmp_path, scaled, marker):
    weights = checkpoints.official("transformer")
    write_float8(tmp_path / "a.safetensors", weights, scaled, "", marker)
    tensors = read_tensors(tmp_path / "a.safetensors")
    assert tensors.keys() == weights.keys()
    info = tensors["blocks.0.ffn.0.weight"]
    assert (info.dtype, info.packed, info.nbytes) == ("float32", "float8_e4m3 scaled", 160 * 96 + 4)
    scale = np.float32(np.abs(weights[info.name]).max() / 448)
    want = FLOAT8["float8_e4m3"][nearest_e4m3(weights[info.name] / scale)] * scale
    assert np.array_equal(np.array(info.load()), want)


def test_every_8_bit_float():
    for name, values in FLOAT8.items():
        want = cases.golden("comfy")[name]
        assert np.array_equal(np.isnan(values), np.isnan(want))
        assert np.array_equal(values[~np.isnan(want)], want[~np.isnan(want)])


def test_converted_packed_matrices_are_bfloat16(comfy, tmp_path):
    dst = convert(comfy, tmp_path / "dst")
    stored = read_tensors(dst / "transformer.safetensors")
    assert stored["blocks.0.ffn.0.weight"].dtype == "bfloat16"
    assert stored["blocks.0.modulation"].dtype == "float32"
    assert Tokenizer(dst / "tokenizer.json").vocab_size == 338


def write_gguf_transformer(path: Path, pack: str = "Q8_0") -> Path:
    """The small transformer as GGUF: matrices in blocks where rows allow it, the rest float32."""
    records, keys, values = [], b"", b""
    count = 0
    for name, array in checkpoints.official("transformer").items():
        kind, data = 0, array.astype("<f4").tobytes()
        if pack == "Q8_0" and array.ndim == 2:
            blocks = array.reshape(-1, 32)
            scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
            quants = np.round(blocks / scale.astype(np.float32)).clip(-127, 127).astype(np.int8)
            kind, data = 8, np.concatenate([scale.view(np.uint8), quants.view(np.uint8)], axis=1).tobytes()
        shape = array.shape
        if array.ndim == 5:
            keys += text(SHAPE_KEY + name) + np.array([9, 5], "<u4").tobytes()
            keys += np.array([5], "<u8").tobytes() + np.array(shape, "<i4").tobytes()
            count, shape = count + 1, (shape[0], array[0].size)
        values += b"\0" * (-len(values) % 32)
        records.append((name, shape, kind, len(values)))
        values += data
    path.write_bytes(gguf(records, keys, count, values=values))
    return path


def test_a_gguf_transformer_in_place_of_the_folders(tmp_path):
    folder = checkpoints.write_official(tmp_path / "model")
    for file in folder.glob("diffusion_pytorch_model*"):
        file.unlink()
    checkpoint = locate(folder, transformer=write_gguf_transformer(tmp_path / "wan.gguf"))
    got = parameters(load_transformer(checkpoint, mx.float32))
    for name, array in checkpoints.native("transformer").items():
        assert cases.relative_error(np.array(got[name]), np.array(array)) < 0.01
    assert checkpoint.transformer.tensors["blocks.0.ffn.0.weight"].packed == "Q8_0"


def test_all_parts_one_by_one(tmp_path):
    files = {
        "transformer": write_plain(tmp_path / "t.safetensors", checkpoints.official("transformer"), "diffusion_model."),
        "text_encoder": write_plain(tmp_path / "e.safetensors", hugging_face(with_tokenizer=False)),
        "vae": write_plain(tmp_path / "v.safetensors", checkpoints.official("vae")),
    }
    with pytest.raises(CheckpointError, match="lacks num_heads, which the tensors do not tell"):
        locate(**files)
    (tmp_path / "config.json").write_text('{"num_heads": 3}')
    with pytest.raises(CheckpointError, match="there is no tokenizer"):
        locate(**files)
    tokenizer = tmp_path / "mine.json"
    tokenizer.write_bytes(tokenizer_json(SPIECE))
    checkpoint = locate(**files, tokenizer=tokenizer)
    assert checkpoint.tokenizer == tokenizer
    assert checkpoint.transformer_config.num_heads == 3


def test_a_text_encoder_of_gguf_brings_its_tokenizer(comfy):
    file = Path(__file__).parent / "fixtures" / "umt5.gguf"
    checkpoint = locate(comfy, text_encoder=file)
    assert checkpoint.tokenizer_json() == tokenizer_json(SPIECE)
    got = parameters(load_text_encoder(checkpoint, mx.float32))
    for name, array in checkpoints.native("text_encoder").items():
        assert cases.relative_error(np.array(got[name]), np.array(array)) < 0.12  # four bits
    assert str(describe(file)["use"]).endswith(f"--text_encoder {file}")


def test_large_packed_tensors_are_unpacked_by_rows(comfy, monkeypatch):
    checkpoint = locate(comfy, text_encoder=Path(__file__).parent / "fixtures" / "umt5.gguf")
    whole = parameters(load_text_encoder(checkpoint, mx.bfloat16))
    monkeypatch.setattr(fit, "PIECE", 1000)
    pieces = parameters(load_text_encoder(checkpoint, mx.bfloat16))
    assert all(mx.array_equal(pieces[name], array) for name, array in whole.items())


def in_one_file(path: Path, change: dict[str, np.ndarray] | None = None) -> Path:
    """As ComfyUI's node that saves a checkpoint names the parts."""
    text = hugging_face(with_tokenizer=False)
    return write_plain(
        path,
        {f"model.diffusion_model.{name}": array for name, array in checkpoints.official("transformer").items()}
        | {f"text_encoders.umt5xxl.transformer.{name}": array for name, array in text.items()}
        | {"text_encoders.umt5xxl.logit_scale": np.zeros(1, np.float32)}
        | {"text_encoders.spiece_model": np.frombuffer(SPIECE, np.uint8)}
        | {f"vae.{name}": array for name, array in checkpoints.official("vae").items()}
        | (change or {}),
    )


def test_a_model_in_one_file(tmp_path):
    file = in_one_file(tmp_path / "all.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3}))
    for where in (file, tmp_path):
        checkpoint = locate(where)
        assert checkpoint.tokenizer_json() == tokenizer_json(SPIECE)
        for part, load in (("transformer", load_transformer), ("text_encoder", load_text_encoder)):
            got = parameters(load(checkpoint, mx.float32))
            assert all(mx.array_equal(got[name], array) for name, array in checkpoints.native(part).items())
        got = parameters(load_vae(checkpoint))
        assert all(mx.array_equal(got[name], array) for name, array in checkpoints.native("vae").items())
    found = describe(file)
    assert set(found["components"]) == {"transformer", "text_encoder", "vae"}
    assert found["use"] == f"mlx-wan generate --ckpt_dir {file}"
    other = write_plain(tmp_path / "vae.safetensors", checkpoints.official("vae"), "model.")  # as WanVideoWrapper's
    assert locate(file, vae=other).vae.path == other
    assert locate(transformer=file, text_encoder=file, vae=other).text_encoder.path == file


def test_a_model_in_one_file_with_something_else(tmp_path):
    file = in_one_file(tmp_path / "all.safetensors", {"control.weight": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match=r"all\.safetensors: has control\.weight, which is of no part"):
        locate(file)


def test_other_models_beside_it_are_passed_over(comfy):
    (comfy / "flux-Q4_0.gguf").write_bytes(gguf(metadata=string("general.architecture", "flux"), keys=1))
    (comfy / "vae" / "half.safetensors").write_bytes(b"\0" * 20)
    assert locate(comfy).vae.path == comfy / "vae" / "wan2.2_vae.safetensors"
    (comfy / "vae" / "wan2.2_vae.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no VAE; .* --vae FILE \(passed over: .*'flux'.*half\.safetensors: .*\)$"
    ):
        locate(comfy)


def test_what_is_ambiguous_or_missing(comfy, tmp_path):
    vae = comfy / "vae" / "wan2.2_vae.safetensors"
    shutil.copy(vae, comfy / "vae" / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"several files with a VAE \(vae/other\.safetensors, .*with --vae"):
        locate(comfy)
    assert locate(comfy, vae=vae).vae.path == vae
    for file in (comfy / "vae").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="has no VAE; say which with --vae FILE"):
        locate(comfy)
    with pytest.raises(UserError, match="no such file"):
        locate(comfy, vae=tmp_path / "none")
    with pytest.raises(UserError, match="no checkpoint folder, and no text_encoder and no vae"):
        locate(transformer=next((comfy / "diffusion_models").iterdir()))
    lora = comfy / "loras" / "kohya.safetensors"
    with pytest.raises(CheckpointError, match=r"is LoRA for .*, not the VAE of a Wan model; it goes to --lora$"):
        locate(comfy, vae=lora)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [i for i in t if i.name != "a.weight"], "a.scale_weight is a scale without its weight"),
        (
            lambda t: [*t[:1], array_tensor("a.scale_weight", mx.ones(3))],
            "does not fit a.weight .*, which has 1 or 2 scales",
        ),
        (lambda t: [array_tensor("a.weight", mx.ones((2, 2))), *t[1:]], "has a scale but is float32, which nothing"),
        (
            lambda t: [*t, array_tensor("a.comfy_quant", mx.array(list(b'{"format": "nvfp4"}'), mx.uint8))],
            "a.weight says nvfp4, but is stored as float8_e4m3",
        ),
        (lambda t: [*t, array_tensor("a.comfy_quant", mx.array([1], mx.uint8))], "is not the description of a format"),
    ],
)
def test_scales_that_do_not_fit(tmp_path, change, message):
    tensors = [float8("a.weight", np.zeros((2, 2), np.uint8)), array_tensor("a.scale_weight", mx.array(2.0))]
    write_raw(tmp_path / "a.safetensors", change(tensors))
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path / "a.safetensors")


def test_two_experts_are_told_apart_by_flags_or_by_names_that_say_so(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    weights = {part: checkpoint_files.official_weights(part, "small-i2v-A14B") for part in ("transformer", "vae")}
    low = checkpoint_files.official_weights("transformer_2", "small-i2v-A14B")
    high_file = write_plain(folder / "b_first.safetensors", weights["transformer"], "model.diffusion_model.")
    low_file = write_plain(folder / "a_second.safetensors", low)
    write_plain(folder / "vae.safetensors", weights["vae"])
    write_plain(folder / "umt5.safetensors", hugging_face())
    (folder / "config.json").write_text(json.dumps({"num_heads": small.T2V["num_heads"]}))
    with pytest.raises(CheckpointError, match=r"several files with a transformer .* --transformer_2 FILE"):
        locate(folder)
    for high, low_name in (
        ("HighNoise/wan-HighNoise-Q8_0", "LowNoise/wan-LowNoise-Q8_0"),
        ("b_high_noise", "a_low_noise"),
    ):
        for name, file in ((high, high_file), (low_name, low_file)):
            (folder / name).parent.mkdir(exist_ok=True)
            file.rename(folder / f"{name}.safetensors")
        high_file, low_file = (folder / f"{name}.safetensors" for name in (high, low_name))
        found = locate(folder)
        assert (found.transformer.path, found.transformer_2.path) == (high_file, low_file)
    odd = low_file.rename(folder / "a_low_noise_high_noise.safetensors")
    with pytest.raises(CheckpointError, match=r"several files with a transformer .* --transformer_2 FILE"):
        locate(folder)
    low_file = odd.rename(low_file)
    checkpoint = locate(folder, transformer=high_file, transformer_2=low_file)
    assert (checkpoint.kind, checkpoint.transformer_config.model_type) == ("i2v-A14B", "i2v")
    assert checkpoint.spec.boundary == 0.9
    for part, want in (("transformer", weights["transformer"]), ("transformer_2", low)):
        got = parameters(load_transformer(checkpoint, mx.float32, part))
        assert all(np.array_equal(np.array(got[name]), cases.native(name, array)) for name, array in want.items())


MLX_VIDEO = {
    "transformer": ("model", MLX_VIDEO_TRANSFORMER),
    "text_encoder": ("t5_encoder", MLX_VIDEO_TEXT_ENCODER),
    "vae": ("vae", MLX_VIDEO_VAE),
}


def mlx_video(part):
    """A part as its convert.py writes it: convolutions channels last, norms flat, the patch embedding a matrix."""
    weights, (_, dialect) = {}, MLX_VIDEO[part]
    for name, array in checkpoints.official(part).items():
        flat = array.reshape(len(array), -1) if name == "patch_embedding.weight" else None
        weights[dialect.from_official(name)] = cases.native(name, array) if flat is None else flat
    return weights


def test_mlx_videos_conversion(tmp_path):
    folder = tmp_path / "mlx-video"
    folder.mkdir()
    for part, (stem, _) in MLX_VIDEO.items():
        weights = mlx_video(part)
        assert len(weights) == len(checkpoints.official(part))
        write_plain(folder / f"{stem}.safetensors", weights)
    config = {"model_type": "ti2v", "dim": 96, "num_heads": 3, "vae_z_dim": 48, "sample_guide_scale": 5.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="give one with --tokenizer"):
        locate(folder)
    checkpoint = locate(folder, tokenizer=cases.GOLDEN / "tokenizer.json")
    for part, load in (
        ("transformer", lambda c: load_transformer(c, mx.float32)),
        ("text_encoder", lambda c: load_text_encoder(c, mx.float32)),
        ("vae", load_vae),
    ):
        got = parameters(load(checkpoint))
        assert all(mx.array_equal(got[name], array) for name, array in checkpoints.native(part).items())


@pytest.fixture
def packed_mlx_video(tmp_path):
    """As its convert.py writes it with --quantize: the transformer's attention and feed-forward, by mx.quantize."""
    folder = tmp_path / "mlx-video"
    folder.mkdir()
    for part, (stem, _) in MLX_VIDEO.items():
        weights = {name: mx.array(array) for name, array in mlx_video(part).items()}
        if part == "transformer":
            for name in [
                n for n in weights if re.search(r"\.(self_attn|cross_attn)\.[qkvo]\.weight|ffn\.fc[12]\.weight", n)
            ]:
                stem_name = name.removesuffix(".weight")
                packed = mx.quantize(weights[name].astype(mx.bfloat16), 32, 4)
                weights |= {f"{stem_name}.{k}": a for k, a in zip(("weight", "scales", "biases"), packed, strict=True)}
        mx.save_safetensors(str(folder / f"{stem}.safetensors"), weights)
    config = {"model_type": "ti2v", "dim": 96, "num_heads": 3, "quantization": {"group_size": 32, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(cases.GOLDEN / "tokenizer.json", folder / "tokenizer.json")
    return folder


def test_mlx_videos_packed_conversion_stays_packed(packed_mlx_video):
    checkpoint = locate(packed_mlx_video)
    assert checkpoint.quantization == Quantization(4, 32)
    assert (checkpoint.packing("transformer"), checkpoint.packing("text_encoder")) == (Quantization(4, 32), None)
    transformer, text_encoder = load_transformer(checkpoint, mx.float32), load_text_encoder(checkpoint, mx.float32)
    stored = mx.load(str(packed_mlx_video / "model.safetensors"))
    layer = transformer.blocks[1].ffn[2]
    assert isinstance(layer, PackedLinear)
    assert mx.array_equal(layer.weight, stored["blocks.1.ffn.fc2.weight"])
    assert not any(isinstance(layer, PackedLinear) for layer in text_encoder.modules())
    want = checkpoints.native("transformer")["blocks.1.ffn.2.weight"]
    got = mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 4)
    assert 0.01 < cases.relative_error(np.array(got), np.array(want)) < 0.2
    model = Dimensions.of_checkpoint(checkpoint)
    assert (model.quantization, model.text_quantization) == (Quantization(4, 32), None)
    text = next(
        stage for stage in plans(model, Setting(64, 32, 5, mx.float32), "CPU")[1].stages if stage.name == "text"
    )
    assert text.weights == sum(array.nbytes for array in parameters(text_encoder).values())


def test_it_makes_a_video_too(packed_mlx_video):
    out = mlx_wan.WanPipeline.from_pretrained(packed_mlx_video)(
        "a red circle", width=64, height=32, num_frames=5, num_inference_steps=2, seed=0, output_type="latent"
    )
    assert mx.isfinite(out.latents).all().item()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, "has packed matrices, and .*config.json does not say how many bits they have"),
        ({"group_size": 32, "bits": 3}, "quantization .* is not supported"),
        ({"group_size": 64, "bits": 4}, "cannot be quantized as its config.json says"),
        ({"group_size": 32, "bits": 8}, "does not fit the transformer: .* misshapen"),
    ],
)
def test_packed_matrices_that_are_not_what_is_said(packed_mlx_video, said, message):
    checkpoints.edit_json(packed_mlx_video / "config.json", quantization=said)
    with pytest.raises(CheckpointError, match=message):
        locate(packed_mlx_video)


# --- inspect -------------------------------------------------------------------------------------------------


def test_inspect_says_what_each_file_is_and_how_to_use_it(comfy, tmp_path, capsys):
    found = describe(comfy)
    assert (found["layout"], found["use"]) == ("single files", f"mlx-wan generate --ckpt_dir {comfy}")
    assert found["components"]["transformer"]["dtypes"].keys() == {"float8_e4m3 scaled", "float16"}
    assert found["components"]["lora"]["model"].startswith("LoRA for a transformer of an unreleased size")
    for folder, flag in (("diffusion_models", "transformer"), ("text_encoders", "text_encoder"), ("vae", "vae")):
        (file,) = (comfy / folder).iterdir()
        assert describe(file)["use"] == f"mlx-wan generate --ckpt_dir DIR --{flag} {file}"
    lora = comfy / "loras" / "kohya.safetensors"
    assert describe(lora)["use"] == f"mlx-wan generate --lora {lora} [STRENGTH]"
    gguf_file = write_gguf_transformer(tmp_path / "wan.gguf")
    assert main(["inspect", str(gguf_file)]) == 0
    said = capsys.readouterr().out
    assert "Q8_0" in said
    assert f"to use it     mlx-wan generate --ckpt_dir DIR --transformer {gguf_file}" in said
    write_plain(tmp_path / "old.safetensors", {"encoder.downsamples.0.residual.0.gamma": np.ones((4, 1, 1, 1))})
    assert describe(tmp_path / "old.safetensors")["use"] is None


# --- the tokenizer in the text encoder's file ------------------------------------------------------------------


def test_ids_are_sentencepieces():
    tokenizer = Tokenizer(tokenizer_json(SPIECE), 1000)
    for i, prompt in enumerate(small.PROMPTS):
        ids, mask = tokenizer(clean_prompt(prompt))
        assert ids[0, : mask.sum() - 1].tolist() == cases.golden("comfy")[f"ids/{i}"].tolist()


@pytest.mark.parametrize("model", [b"", b"\xff" * 30, SPIECE[:1000], SPIECE[:-3], b"\x0a\x02\x0a\x05"])
def test_damaged_tokenizers(model):
    with pytest.raises(CheckpointError, match="holds a"):
        tokenizer_json(model)


# --- other models ----------------------------------------------------------------------------------------------


@pytest.fixture
def experts(tmp_path):
    """The parts of a small model of two experts, as single files, and the config.json that unreleased sizes need."""
    files = {"text_encoder": write_plain(tmp_path / "t5.safetensors", hugging_face())}
    for part in ("transformer", "transformer_2", "vae"):
        weights = checkpoint_files.official_weights(part, "small-t2v-A14B")
        prefix = "model.diffusion_model." if part.startswith("transformer") else ""
        files[part] = write_plain(tmp_path / f"my {part}.safetensors", weights, prefix)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3}))
    return files


def test_two_experts_given_one_by_one(experts, tmp_path):
    found = locate(**experts)
    assert (found.kind, found.spec.boundary, found.transformer_config.model_type) == ("t2v-A14B", 0.875, "t2v")
    for part in ("transformer", "transformer_2"):
        got = parameters(load_transformer(found, mx.float32, part))
        want = checkpoint_files.official_weights(part, "small-t2v-A14B")
        assert all(np.array_equal(np.array(got[n]), cases.native(n, want[n])) for n in want)
    with pytest.raises(CheckpointError, match=r"several files with a transformer .* say which with --transformer "):
        locate(tmp_path)
    both = {part: experts[part] for part in ("transformer", "transformer_2")}
    assert locate(tmp_path, **both).parts.keys() == experts.keys()
    alone = {part: path for part, path in experts.items() if part != "transformer_2"}
    assert locate(**alone).kind == "t2v-1.3B"  # one transformer of no released size is what its folder or flags say


def test_an_expert_is_not_taken_for_a_whole_model(experts, tmp_path):
    shapes = {n: tuple(s) for n, s in cases.official_names("t2v-A14B", "transformer").items()}
    sparse(tmp_path / "wan14b.safetensors", shapes)
    (tmp_path / "config.json").unlink()
    files = {"transformer": tmp_path / "wan14b.safetensors", "text_encoder": experts["text_encoder"]}
    message = (
        r"is Wan2\.2 T2V-A14B \(one expert\) or .*; give the low-noise expert too, with --transformer_2 .*, or say "
    )
    with pytest.raises(CheckpointError, match=message + "--task t2v-14B"):
        locate(**files, vae=experts["vae"])
    with pytest.raises(CheckpointError, match="the transformer wants text of width 4096"):  # a later check
        locate(**files, vae=experts["vae"], task="t2v-14B")
    sparse(tmp_path / "wan14b.safetensors", shapes | {"patch_embedding.weight": (5120, 36, 1, 2, 2)})
    with pytest.raises(
        CheckpointError, match=r"is Wan2\.2 I2V-A14B \(one expert\); .* with --transformer_2 \(the same file, .*\)$"
    ):
        locate(**files, vae=experts["vae"])


def test_a_folder_with_an_image_encoder(tmp_path):
    model = "small-i2v-14B"
    for part in ("transformer", "vae"):
        write_plain(tmp_path / f"{part}.safetensors", checkpoint_files.official_weights(part, model))
    write_plain(tmp_path / "t5.safetensors", hugging_face())
    write_plain(tmp_path / "clip.safetensors", checkpoint_files.clip_weights(model))
    for file in ("transformer", "vae"):  # names of no layout
        (tmp_path / f"{file}.safetensors").rename(tmp_path / f"my {file}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3}))
    found = locate(tmp_path)
    assert (found.layout.name, found.kind, found.transformer_config.model_type) == ("single files", "i2v-14B", "i2v")
    assert found.image_encoder.path.name == "clip.safetensors"
