"""Hub ids: what is downloaded, what is not, and what happens when a connection breaks; against a server of our own."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cases
import checkpoint
import pytest

from mlx_wan.video import read_video
from mlx_wan.weights.checkpoint import DIFFUSERS, OFFICIAL, layout_for
from mlx_wan.weights.hub import needed
from weights import hub_server

SHARD = "diffusion_pytorch_model-00002-of-00002.safetensors"
VAE = "Wan2.2_VAE.pth"
PIECES = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1000\n"  # 10 MB are more than any file


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """An official repository with files beside it that no model needs."""
    folder = checkpoint.write_official(tmp_path_factory.mktemp("hub") / "repository")
    for name in ("README.md", "assets/demo.mp4", "extra.safetensors", "Wan2.2_VAE.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed" * 1000)
    return folder


@pytest.fixture
def hub(repository):
    with hub_server.Hub({"Wan-AI/Small": repository}) as server:
        yield server


def environment(hub, cache: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), **quiet, **more}


def locate(hub, cache: Path, hub_id: str = "Wan-AI/Small", **more: str) -> tuple[int, str]:
    """Exit code and last line of a process that looks for a model."""
    code = PIECES + (
        "import sys; from mlx_wan.errors import WanError; from mlx_wan.weights.locate import locate\n"
        f"try: print(locate({hub_id!r}).folder)\n"
        "except WanError as error: print(error); sys.exit(error.exit_code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(hub, cache, **more), capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.strip()


def names(folder: str) -> set[str]:
    root = Path(folder)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def same(folder: str, repository: Path) -> bool:
    return all((Path(folder) / name).read_bytes() == (repository / name).read_bytes() for name in names(folder))


def test_what_is_needed_is_downloaded_once_and_found_offline(hub, repository, tmp_path):
    code, folder = locate(hub, tmp_path)
    assert code == 0, folder
    layout = {file for names in OFFICIAL.files.values() for file in names[:1]} - {"diffusion_pytorch_model.safetensors"}
    shards = {SHARD, SHARD.replace("00002-of", "00001-of"), "diffusion_pytorch_model.safetensors.index.json"}
    assert names(folder) == layout | shards | {"config.json"}
    assert same(folder, repository)
    asked = list(hub.gets)
    assert len({name for name, _ in asked}) == len(asked)
    assert locate(hub, tmp_path) == (0, folder)
    assert hub.gets == asked  # nothing again
    hub.server.shutdown()
    hub.server.server_close()
    assert locate(hub, tmp_path) == (0, folder)
    assert locate(hub, tmp_path, HF_HUB_OFFLINE="1") == (0, folder)


def test_a_connection_that_breaks_goes_on_where_it_stopped(hub, repository, tmp_path):
    size = (repository / SHARD).stat().st_size
    hub.cut[SHARD] = [size // 3, size // 3]
    code, folder = locate(hub, tmp_path)
    assert (code, same(folder, repository)) == (0, True), folder
    starts = [start for name, start in hub.gets if name == SHARD]
    assert len(starts) == 3
    assert starts[0] == 0
    assert 0 < starts[1] < starts[2]


def test_a_killed_download_goes_on_in_another_process(hub, repository, tmp_path):
    size = (repository / SHARD).stat().st_size
    hub.cut[SHARD] = [size // 2, *[0] * 40]  # then nothing more comes, and it tries again and again
    code = f"{PIECES}from mlx_wan.weights.locate import locate; locate('Wan-AI/Small')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(hub, tmp_path), stderr=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + 60
    while [name for name, _ in hub.gets].count(SHARD) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    (partial,) = (tmp_path / "hub").rglob("*.incomplete")
    before = partial.stat().st_size
    assert size // 3 < before < size
    hub.cut.clear()
    hub.gets.clear()
    code, folder = locate(hub, tmp_path)
    assert (code, same(folder, repository)) == (0, True), folder
    assert [start for name, start in hub.gets if name == SHARD] == [before]
    assert not list((tmp_path / "hub").rglob("*.incomplete"))


def test_a_file_that_arrives_damaged_is_noticed_and_can_be_had_again(hub, repository, tmp_path):
    hub.wrong.add(VAE)
    code, message = locate(hub, tmp_path)
    assert code == 1
    assert message == (
        f"Wan-AI/Small: {VAE} arrived damaged: its SHA-256 is not the one that the Hub names; it was removed: "
        "start again"
    )
    hub.wrong.clear()
    code, folder = locate(hub, tmp_path)
    assert (code, same(folder, repository)) == (0, True), folder


def test_the_part_of_before_may_be_damaged_too(hub, repository, tmp_path):
    blobs = tmp_path / "hub" / "models--Wan-AI--Small" / "blobs"
    blobs.mkdir(parents=True)
    digest = next(entry["sha256"] for entry in hub_server.entries(repository) if entry["name"] == VAE)
    (blobs / f"{digest}.incomplete").write_bytes(b"something else")
    code, folder = locate(hub, tmp_path)
    assert (code, same(folder, repository)) == (0, True), folder
    assert [start for name, start in hub.gets if name == VAE] == [14, 0]


def test_a_small_file_that_arrives_damaged_is_noticed(hub, tmp_path):
    hub.wrong.add("google/umt5-xxl/tokenizer.json")
    code, message = locate(hub, tmp_path)
    assert code == 1
    assert "tokenizer.json" in message
    assert "damaged: its " in message
    hub.wrong.clear()
    assert locate(hub, tmp_path)[0] == 0


def test_two_processes_at_once_share_a_download(hub, repository, tmp_path):
    code = f"{PIECES}from mlx_wan.weights.locate import locate; locate('Wan-AI/Small')"
    line = [sys.executable, "-c", code]
    processes = [subprocess.Popen(line, env=environment(hub, tmp_path), stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0], [process.communicate() for process in processes]
    assert [name for name, _ in hub.gets].count(SHARD) == 1
    folder = locate(hub, tmp_path)[1]
    assert same(folder, repository)


def test_another_model_is_refused_before_it_is_downloaded(repository, tmp_path):
    other = tmp_path / "s2v"
    other.mkdir()
    config = json.loads((repository / "config.json").read_text()) | {"model_type": "s2v"}
    (other / "config.json").write_text(json.dumps(config))
    (other / "diffusion_pytorch_model.safetensors").write_bytes(bytes(5000))
    (other / "README.md").write_text("hello")
    loose = tmp_path / "loose"
    loose.mkdir()
    (loose / "wan_high_noise.gguf").write_bytes(bytes(5000))
    with hub_server.Hub({"Wan-AI/S2V": other, "somebody/GGUF": loose}) as hub:
        code, message = locate(hub, tmp_path / "cache", "Wan-AI/S2V")
        assert code == 1
        assert "is a Wan model of the type s2v, which is not supported" in message
        assert [name for name, _ in hub.gets] == ["config.json"]
        code, message = locate(hub, tmp_path / "cache", "somebody/GGUF")
        assert code == 1
        assert message.startswith("somebody/GGUF: holds no model in a layout that loads as a whole; give its files")
        assert message.endswith("--transformer somebody/GGUF/wan_high_noise.gguf")


def test_no_such_repository_and_no_connection_are_one_line(hub, tmp_path):
    code, message = locate(hub, tmp_path, "nobody/none")
    assert code == 2
    assert message.startswith("nobody/none: not here, and the Hugging Face Hub did not provide it (404")
    assert "\n" not in message
    code, message = locate(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert code == 2
    assert message.startswith("Wan-AI/Small: not here, and")
    assert "\n" not in message


def test_half_a_model_offline_says_what_is_missing(hub, tmp_path):
    code, folder = locate(hub, tmp_path)
    (Path(folder) / VAE).unlink()
    code, message = locate(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert code == 1
    assert "missing: Wan2.2_VAE.pth" in message


def test_too_little_room_is_said_before(hub, tmp_path):
    code = (
        "import shutil, collections; shutil.disk_usage = lambda path: collections.namedtuple('U', 'free')(1000)\n"
        "from mlx_wan.weights.locate import locate; locate('Wan-AI/Small')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(hub, tmp_path), capture_output=True, text=True, timeout=60
    )
    assert "GB are to be downloaded, and " in done.stderr.splitlines()[-1]
    assert not [name for name, _ in hub.gets if name == SHARD]


def test_a_video_of_a_hub_id(hub, tmp_path):
    line = [
        "--size",
        "64*32",
        "--frame_num",
        "5",
        "--steps",
        "1",
        "--ckpt_dir",
        "Wan-AI/Small",
        "-o",
        "a.mp4",
        "--progress",
        "json",
    ]
    command = [sys.executable, "-m", "mlx_wan.cli.main", "generate", "--prompt", "a cat", *line]
    run = subprocess.run(command, env=environment(hub, tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(json.loads(line) for line in run.stderr.splitlines())
    frames, _ = read_video(tmp_path / "a.mp4")
    assert frames.shape == (5, 32, 64, 3)
    again = subprocess.run(
        [*command[:4], "--from", "a.mp4", "-o", "b.mp4"],
        env=environment(hub, tmp_path, HF_HUB_OFFLINE="1"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_of_a_diffusers_repository_each_file_once(tmp_path):
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / "transformer").mkdir()
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}))
    files = ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"]
    files += [index, "transformer/x-1.safetensors", "transformer/x-2.safetensors", "transformer/x-3.safetensors"]
    names = ["model_index.json", *files, "vae/diffusion_pytorch_model.bin", "README.md"]
    assert layout_for(names, {}) is DIFFUSERS
    assert set(needed(DIFFUSERS, names, tmp_path)) == set(files) - {"transformer/x-3.safetensors"}


# --- single files ---


@pytest.fixture
def loose(repository, tmp_path):
    """Repositories of LoRAs and of single files."""
    loras, one, parts = (tmp_path / name for name in ("loras", "one", "parts"))
    (loras / "sub").mkdir(parents=True)
    for folder in (loras, one, parts):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text("hello")
    (loras / ".gitattributes").write_text("*.safetensors filter=lfs")
    for name in ("diffusers", "kohya"):
        shutil.copy(cases.GOLDEN / "lora" / f"{name}.safetensors", loras / "sub")
    shutil.copytree(cases.GOLDEN / "lora" / "peft", loras / "peft")
    shutil.copy(cases.GOLDEN / "lora" / "kohya.safetensors", one / "style.safetensors")
    shutil.copy(repository / VAE, parts / "vae.pth")
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"):
        shutil.copy(repository / name, parts)
    with hub_server.Hub({"me/loras": loras, "me/one": one, "me/parts": parts}) as server:
        yield server


def found(hub, cache: Path, call: str, wheres: list[str], **more: str) -> list[str]:
    """What one process makes of each: a path in the repository, or an error with its exit code."""
    code = PIECES + (
        "import json; from mlx_wan.errors import WanError; from mlx_wan.lora.load import lora_file\n"
        "from mlx_wan.weights.hub import local_file; out = []\n"
        f"for where in {wheres!r}:\n"
        f"    try: out.append(str({call}(where)).split('/snapshots/')[-1].split('/', 1)[-1])\n"
        "    except WanError as error: out.append(f'{error.exit_code} {error}')\n"
        "print(json.dumps(out))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(hub, cache, **more), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_lora_of_the_hub_is_one_file_and_found_offline(loose, tmp_path):
    wheres = ["me/loras/sub/kohya.safetensors", "me/one", "me/loras/peft", "me/one/style.safetensors", "me/one"]
    names = ["sub/kohya.safetensors", "style.safetensors", "peft/adapter_model.safetensors", *["style.safetensors"] * 2]
    cache = tmp_path / "cache"
    loose.cut["style.safetensors"] = [3000]  # goes on where it stopped
    assert found(loose, cache, "lora_file", wheres) == names
    assert [start > 0 for name, start in loose.gets if name == "style.safetensors"] == [False, True]
    asked = {".gitattributes", *names[:3], "peft/adapter_config.json"}
    assert {name for name, _ in loose.gets} == asked
    assert len(loose.gets) == len(asked) + 1
    several, lacking, outside, here = found(
        loose, cache, "lora_file", ["me/loras/sub", "me/one/other.safetensors", "me/one/../x", "me/x.safetensors"]
    )
    assert several == (
        "2 me/loras: say which file, as me/loras/FILE: it has sub/diffusers.safetensors, sub/kohya.safetensors"
    )
    assert lacking == "2 me/one: has no other.safetensors, but style.safetensors"
    assert outside.startswith("2 me/one: has no ../x, but")
    assert here == "2 me/x.safetensors: no such LoRA file"  # as a file's name is: the Hub is not asked
    *again, absent = found(
        loose, cache, "lora_file", [*wheres, "me/loras/sub/diffusers.safetensors"], HF_HUB_OFFLINE="1"
    )
    assert again == names
    assert absent.startswith("2 me/loras/sub/diffusers.safetensors: is not in the cache, and the Hugging Face Hub")


def test_a_video_of_parts_and_a_lora_of_the_hub(loose, repository, tmp_path):
    line = ["--size", "64*32", "--frame_num", "5", "--steps", "1", "--lora", "me/one", "0.5", "-o", "a.mp4"]
    parts = ["--text_encoder", "me/parts/models_t5_umt5-xxl-enc-bf16.pth", "--tokenizer", "me/parts"]
    parts += ["--vae", "me/parts/vae.pth"]
    command = [sys.executable, "-m", "mlx_wan.cli.main", "generate"]
    model = ["--ckpt_dir", str(repository)]
    run = subprocess.run(
        [*command, "--prompt", "a cat", *line, *parts, *model],
        env=environment(loose, tmp_path / "cache"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    again = subprocess.run(
        [*command, "--from", "a.mp4", "-o", "b.mp4", *model, *parts],
        env=environment(loose, tmp_path / "cache", HF_HUB_OFFLINE="1"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
