"""Embeddings on disk: right or not there."""

import checkpoint
import mlx.core as mx
import numpy as np
import pytest

import mlx_wan
from mlx_wan.cli.main import main
from mlx_wan.errors import UserError
from mlx_wan.parallel.plan import Parallel

RUN = {"width": 64, "height": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint.write_official(tmp_path_factory.mktemp("cached") / "model")


@pytest.fixture
def open_pipe(model, tmp_path):
    def opened(dtype=mx.float32):
        pipe = mlx_wan.WanPipeline.from_pretrained(model, dtype, low_memory=True)
        pipe.text_cache = tmp_path / "texts"
        return pipe

    return opened


def test_a_prompt_that_comes_again_needs_no_encoder(open_pipe, monkeypatch, tmp_path):
    first = open_pipe()("a cat", **RUN).frames
    assert len(list((tmp_path / "texts").iterdir())) == 2  # the negative prompt too
    monkeypatch.setattr(Parallel, "load_text_encoder", lambda *_: pytest.fail("the encoder is loaded"))
    again = open_pipe()("a cat", **RUN).frames
    assert np.array_equal(first, again)
    with pytest.raises(pytest.fail.Exception):
        open_pipe()("a dog", **RUN)


def test_another_dtype_or_encoder_is_another_embedding(open_pipe, model, tmp_path):
    embedding = open_pipe().encode_prompt("a cat")
    half = open_pipe(mx.bfloat16).encode_prompt("a cat")
    assert (embedding.dtype, half.dtype) == (mx.float32, mx.bfloat16)
    assert open_pipe(mx.bfloat16).encode_prompt("a cat").dtype == mx.bfloat16  # now from the file
    assert len(list((tmp_path / "texts").iterdir())) == 2
    (model / "models_t5_umt5-xxl-enc-bf16.pth").touch()
    open_pipe().encode_prompt("a cat")
    assert len(list((tmp_path / "texts").iterdir())) == 3


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, None])
def test_a_damaged_file_is_made_again(open_pipe, tmp_path, content):
    embedding = open_pipe().encode_prompt("a cat")
    (file,) = (tmp_path / "texts").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] if content is None else content)
    assert mx.array_equal(open_pipe().encode_prompt("a cat"), embedding).item()
    assert file.read_bytes() == whole


def test_the_command_line_keeps_them_too(model, tmp_path, monkeypatch):
    size = ["--size", "64*32", "--frame_num", "5", "--steps", "1", "--ckpt_dir", str(model)]
    line = ["generate", "--prompt", "a cat", *size, "--text_cache", str(tmp_path / "texts"), "-o"]
    assert main([*line, str(tmp_path / "a.mp4")]) == 0
    monkeypatch.setattr(Parallel, "load_text_encoder", lambda *_: pytest.fail("the encoder is loaded"))
    assert main([*line, str(tmp_path / "b.mp4")]) == 0


def test_a_folder_that_cannot_be(open_pipe, tmp_path):
    (tmp_path / "texts").write_text("a file")
    with pytest.raises(UserError, match="texts: cannot hold text embeddings"):
        open_pipe().encode_prompt("a cat")
