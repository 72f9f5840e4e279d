"""Adapters in a pipeline and in a checkpoint: switched, kept over releases of the model, merged, refused."""

import shutil
import warnings

import checkpoint
import mlx.core as mx
import numpy as np
import pytest
import small
from cases import GOLDEN, relative_error
from weights.test_convert import square  # noqa: F401

import mlx_wan
from mlx_wan.cli.main import main
from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.lora.fuse import fuse
from mlx_wan.lora.layers import LoRALinear, add_lora
from mlx_wan.lora.save import save_lora
from mlx_wan.video import read_metadata
from mlx_wan.weights.convert import convert
from mlx_wan.weights.load import load_transformer, locate

LORA = GOLDEN / "lora" / "diffusers.safetensors"
OTHER = GOLDEN / "lora" / "lightx2v.safetensors"
RUN = {"width": 64, "height": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 1, "output_type": "latent"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.write_official(tmp_path_factory.mktemp("fuse") / "model")


def latents(pipe) -> np.ndarray:
    return np.array(pipe("a cat", **RUN).latents)


@pytest.fixture(scope="module")
def plain(folder):
    return latents(mlx_wan.WanPipeline.from_pretrained(folder))


@pytest.mark.parametrize("low_memory", [False, True])
def test_load_switch_and_unload(folder, plain, low_memory):
    pipe = mlx_wan.WanPipeline.from_pretrained(folder, low_memory=low_memory)
    assert pipe.load_lora_weights(LORA) == "diffusers"
    first = latents(pipe)
    assert relative_error(first, plain) > 1e-3
    pipe.load_lora_weights(OTHER, adapter_name="fast", scale=0.5)
    assert pipe.get_active_adapters() == {"diffusers": 1.0, "fast": 0.5}
    both = latents(pipe)
    assert relative_error(both, first) > 1e-3
    pipe.set_adapters("diffusers")
    assert pipe.get_active_adapters() == {"diffusers": 1.0}
    assert np.array_equal(latents(pipe), first)
    pipe.set_adapters(["diffusers", "fast"], [1.0, 0.5])
    assert np.array_equal(latents(pipe), both)
    pipe.delete_adapters("fast")
    assert np.array_equal(latents(pipe), first)
    pipe.unload_lora_weights()
    assert np.array_equal(latents(pipe), plain)
    assert not any(isinstance(module, LoRALinear) for module in pipe.transformer.modules())


@pytest.mark.parametrize("low_memory", [False, True])
def test_fused_in_the_pipeline(folder, plain, low_memory):
    pipe = mlx_wan.WanPipeline.from_pretrained(folder, low_memory=low_memory)
    pipe.load_lora_weights(LORA, scale=0.8)
    beside = latents(pipe)
    pipe.fuse_lora()
    for _ in range(2):  # with low_memory the second run reads the transformer again
        assert relative_error(latents(pipe), beside) < 1e-5
    assert not any(isinstance(module, LoRALinear) for module in pipe.transformer.modules())
    for late in (lambda: pipe.set_adapters("diffusers"), lambda: pipe.load_lora_weights(OTHER)):
        with pytest.raises(UserError, match="are fused into the weights; call unload_lora_weights"):
            late()
    pipe.unload_lora_weights()
    assert np.array_equal(latents(pipe), plain)


def test_a_fused_checkpoint(folder, tmp_path):
    out = fuse(folder, tmp_path / "fused", [(LORA, 0.8), (OTHER, -0.5)])
    pipe = mlx_wan.WanPipeline.from_pretrained(folder)
    pipe.load_lora_weights(LORA, scale=0.8)
    pipe.load_lora_weights(OTHER, scale=-0.5)
    assert relative_error(latents(mlx_wan.WanPipeline.from_pretrained(out)), latents(pipe)) < 1e-5


def test_over_a_quantized_model(square, tmp_path):  # noqa: F811
    quantized = convert(square, tmp_path / "q", bits=4, group_size=32)
    shutil.copy(GOLDEN / "tokenizer.json", quantized)
    model = load_transformer(locate(square), mx.float32)
    model.freeze()
    add_lora(model, lambda name: name.endswith(("_attn.q", "ffn.2")), rank=2)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            adapter = module.adapters["default"]
            adapter.lora_b = mx.random.normal(adapter.lora_b.shape) * 0.1
    path = save_lora(tmp_path / "a.safetensors", model)
    pipe = mlx_wan.WanPipeline.from_pretrained(quantized)
    inputs = (mx.array(small.random("q", (1, 2, 4, 4, 4))), mx.array([500.0]), mx.zeros((1, 512, 64)))
    before = np.array(pipe.transformer(*inputs))
    pipe.load_lora_weights(path)
    assert relative_error(np.array(pipe.transformer(*inputs)), before) > 1e-3
    pipe.set_adapters("a", 0.0)
    assert np.array_equal(np.array(pipe.transformer(*inputs)), before)
    with pytest.raises(UserError, match="cannot be fused into quantized weights"):
        pipe.fuse_lora()
    with pytest.raises(UserError, match="is quantized already"):
        fuse(quantized, tmp_path / "out", [(path, 1.0)])


def test_keys_of_no_use_are_said(folder, tmp_path):
    tensors = dict(mx.load(str(LORA))) | {"text_encoder.x.lora_A.weight": mx.ones((2, 2))}
    mx.save_safetensors(str(tmp_path / "a.safetensors"), tensors)
    pipe = mlx_wan.WanPipeline.from_pretrained(folder)
    # The header with alpha is gone: a scale of 1. What matters here is the warning.
    with pytest.warns(UserWarning, match="1 tensors belong to no part of this model"):
        pipe.load_lora_weights(tmp_path / "a.safetensors")


def test_made_for_another_model(tmp_path):
    pipe = mlx_wan.WanPipeline.from_pretrained("tiny")
    with pytest.raises(CheckpointError, match="it was made for a model of another size"):
        pipe.load_lora_weights(LORA)
    assert pipe.get_active_adapters() == {}


# --- the command line ----------------------------------------------------------------------------------------

QUICK = ["--size", "64*32", "--frame_num", "5", "--steps", "2", "--seed", "1"]


def generate(folder, *flags) -> int:
    return main(["generate", "--prompt", "a cat", "--ckpt_dir", str(folder), *QUICK, *map(str, flags)])


def test_generate_with_loras(folder, tmp_path, capsys):
    from mlx_wan.video import read_metadata, read_video

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(folder, "-o", tmp_path / "plain.mp4") == 0
        assert generate(folder, "--lora", LORA, "0.8", "--lora", OTHER, "-o", tmp_path / "lora.mp4") == 0
        assert generate(folder, "--lora", LORA, 0.8, "--lora", OTHER, "--fuse", "-o", tmp_path / "fused.mp4") == 0
    videos = {name: read_video(tmp_path / f"{name}.mp4")[0].astype(int) for name in ("plain", "lora", "fused")}
    assert np.abs(videos["lora"] - videos["plain"]).max() > 10
    assert np.abs(videos["lora"] - videos["fused"]).max() <= 6  # rounding, once more through the encoder
    said = read_metadata(tmp_path / "lora.mp4")
    assert said["loras"] == [
        {"file": "diffusers.safetensors", "scale": 0.8},
        {"file": "lightx2v.safetensors", "scale": 1.0},
    ]
    assert "loras" not in read_metadata(tmp_path / "plain.mp4")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--lora", "nothing.safetensors"], 2, "nothing.safetensors: no such LoRA file"),
        (["--lora", LORA, "strong"], 2, "must be PATH or PATH SCALE"),
        (["--lora", LORA, "1", "2"], 2, "must be PATH or PATH SCALE"),
        (["--lora", LORA, "nan"], 2, "must be a file and a finite strength"),
        (["--fuse"], 2, "--fuse: there is no --lora to fuse"),
    ],
)
def test_mistakes_with_loras(folder, tmp_path, monkeypatch, capsys, flags, code, message):
    monkeypatch.chdir(tmp_path)
    assert generate(folder, *flags) == code
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_lora_is_no_model(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate(LORA) == 2
    assert "is a single file (LoRA for a transformer of an unreleased size" in (said := capsys.readouterr().err)
    assert "give it to --lora" in said


def test_the_fuse_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    line = ["fuse", "--model", str(folder), "--lora", str(LORA), "0.8", "--out", str(out), "--dtype", "float16"]
    assert main(line) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(out)
    fused = load_transformer(locate(out), mx.float32)
    base = load_transformer(locate(folder), mx.float32)
    change = fused.blocks[0].self_attn.q.weight - base.blocks[0].self_attn.q.weight
    a, b = (mx.load(str(LORA))[f"transformer.blocks.0.attn1.to_q.lora_{ab}.weight"] for ab in "AB")
    assert relative_error(np.array(change), np.array(0.8 * 1.5 * b @ a)) < 1e-2  # float16
    assert main(line) == 2
    assert "is not empty" in capsys.readouterr().err


# --- two experts ---------------------------------------------------------------------------------------------

CROSSING = {**RUN, "height": 64, "num_inference_steps": 4}  # three steps of high noise, one of low


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return checkpoint.write_official(tmp_path_factory.mktemp("experts") / "model", "small-t2v-A14B")


def steps(pipe) -> list[np.ndarray]:
    after = []
    pipe("a cat", **CROSSING, callback=lambda *step: after.append(np.array(step[2])))
    return after


@pytest.mark.parametrize("both", [False, True])
def test_a_lora_acts_in_the_expert_that_it_is_for(experts, both):
    pipe = mlx_wan.WanPipeline.from_pretrained(experts, keep_both_experts=both)
    plain = steps(pipe)
    pipe.load_lora_weights(LORA, "low", expert="low")
    low = steps(pipe)
    assert [np.array_equal(a, b) for a, b in zip(low, plain, strict=True)] == [True, True, True, False]
    pipe.load_lora_weights(LORA, "high", expert="high")
    pipe.set_adapters("high")
    high = steps(pipe)
    assert not any(np.array_equal(a, b) for a, b in zip(high, plain, strict=True))
    pipe.set_adapters(["high", "low"])
    parts = steps(pipe)
    pipe.unload_lora_weights()
    assert all(np.array_equal(a, b) for a, b in zip(steps(pipe), plain, strict=True))
    pipe.load_lora_weights(LORA)
    assert relative_error(steps(pipe)[-1], parts[-1]) < 1e-6, "without a word it is for both"


def test_fused_into_one_expert(experts, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = fuse(experts, tmp_path / "out", [(LORA, 0.8, "low")])
    pipe = mlx_wan.WanPipeline.from_pretrained(experts)
    pipe.load_lora_weights(LORA, scale=0.8, expert="low")
    assert relative_error(steps(mlx_wan.WanPipeline.from_pretrained(out))[-1], steps(pipe)[-1]) < 1e-5
    pipe.fuse_lora()
    for _ in range(2):  # the experts are read again
        assert relative_error(steps(mlx_wan.WanPipeline.from_pretrained(out))[-1], steps(pipe)[-1]) < 1e-5
    got, want = (locate(place).transformer.tensors for place in (out, experts))
    name = "blocks.0.self_attn.q.weight"
    assert mx.array_equal(got[name].load(), want[name].load())


def test_experts_that_are_not_there(folder, experts):
    with pytest.raises(UserError, match="one transformer: a LoRA for the high-noise expert has no place in it"):
        mlx_wan.WanPipeline.from_pretrained(folder).load_lora_weights(LORA, expert="high")
    with pytest.raises(UserError, match="expert is 'middle'; it must be one of high, low"):
        mlx_wan.WanPipeline.from_pretrained(experts).load_lora_weights(LORA, expert="middle")


def test_the_command_line_takes_a_lora_for_each_expert(experts, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["generate", "--prompt", "a cat", "--size", "32*32", "--frame_num", "1", "--steps", "4", "-o", "a.mp4"]
    loras = ["--lora_high", str(LORA), "0.5", "--lora-low", str(LORA)]
    assert main([*line, "--ckpt_dir", str(experts), *loras]) == 0
    file = LORA.name
    want = [{"file": file, "scale": 0.5, "expert": "high"}, {"file": file, "scale": 1.0, "expert": "low"}]
    assert read_metadata(tmp_path / "a.mp4")["loras"] == want
    capsys.readouterr()
    assert main([*line, "--ckpt_dir", str(folder), *loras]) == 2
    assert "has no place in it" in capsys.readouterr().err
    assert main(["fuse", "--model", str(experts), "--out", str(tmp_path / "none")]) == 2
    assert "arguments are required: --lora" in capsys.readouterr().err
