"""`--upload-repo`: what is sent, and what is said of what cannot be; against a server of our own."""

import subprocess
import sys
from pathlib import Path

import checkpoint
import pytest

from mlx_wan.errors import UserError
from mlx_wan.weights.files import read_tensors
from mlx_wan.weights.locate import locate
from mlx_wan.weights.upload import check_upload, model_card
from weights import hub_server
from weights.test_hub import environment

CODE = "import sys; from mlx_wan.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def src(tmp_path):
    return checkpoint.write_official(tmp_path / "src")


def run(hub, tmp_path, *line, **more) -> tuple[int, str, str]:
    # Xet has a protocol of its own, which the server does not speak.
    variables = environment(hub, tmp_path / "cache", **{"HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"} | more)
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, line)], env=variables, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_what_is_sent_comes_back(src, tmp_path):
    with hub_server.Hub({}, tmp_path / "home") as hub:
        code, out, err = run(hub, tmp_path, "convert", src, tmp_path / "dst", "--upload-repo", "me/wan-small")
        assert code == 0, err
        assert out.splitlines()[-1] == f"{hub.address}/me/wan-small"
        assert hub.made["me/wan-small"]["visibility"] == "private"
        sent = {path.relative_to(tmp_path / "dst") for path in (tmp_path / "dst").rglob("*") if path.is_file()}
        home = tmp_path / "home" / "me" / "wan-small"
        assert {path.relative_to(home) for path in home.rglob("*") if path.is_file()} == sent
        assert all((home / name).read_bytes() == (tmp_path / "dst" / name).read_bytes() for name in sent)
        assert Path("README.md") in sent
    found = locate(home)
    assert found.layout.name == "native"
    assert read_tensors(found.vae.path).keys() == read_tensors(tmp_path / "dst" / "vae.safetensors").keys()


@pytest.mark.parametrize(
    ("home", "more", "message", "written"),
    [
        (True, {"HF_TOKEN": ""}, "nobody is logged in; run `hf auth login`", False),
        (False, {}, "is written, but the Hugging Face Hub did not take it (", True),
    ],
)
def test_what_cannot_be_sent(src, tmp_path, home, more, message, written):
    with hub_server.Hub({}, tmp_path / "home" if home else None) as hub:
        code, _, err = run(hub, tmp_path, "convert", src, tmp_path / "dst", "--upload-repo", "me/wan-small", **more)
    assert code == 2
    assert message in err
    assert err.strip().count("\n") == 0
    assert (tmp_path / "dst" / "config.json").exists() == written


def test_names_that_no_repository_has():
    with pytest.raises(UserError, match="must be OWNER/NAME"):
        check_upload("wan-8bit")


def test_the_card_names_where_it_came_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = model_card("me/wan-8bit", "Wan-AI/Wan2.2-TI2V-5B", "ti2v")
    assert "base_model: Wan-AI/Wan2.2-TI2V-5B\n---" in card
    assert "# wan-8bit" in card
    assert "--ckpt_dir me/wan-8bit" in card
    local = model_card("me/x", "/models/Wan2.2", "i2v")
    assert "base_model" not in local
    assert "/models" not in local
    assert "pipeline_tag: image-to-video" in local
