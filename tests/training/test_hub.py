"""Data sets as the Hub has them: metadata tables, parquet, WebDataset, and a download from a local server."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import ClassVar

import clips
import pyarrow
import pyarrow.parquet
import pytest
import toy_model

from mlx_wan.errors import UserError
from mlx_wan.training.dataset import find_sources, plan_clips
from mlx_wan.training.hub import open_data
from mlx_wan.training.options import FinetuneRecipe
from mlx_wan.training.plan import make_plan, sampling


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def opened(folder, cache, split="train"):
    sources, skipped = find_sources(open_data(str(folder), cache), split)
    return [(s.kind, s.path.suffix, s.caption) for s in sources], skipped


@pytest.fixture
def video(tmp_path):
    return clips.write_video(tmp_path / "source.mp4").read_bytes()


@pytest.fixture
def picture(tmp_path):
    return clips.write_image(tmp_path / "source.png").read_bytes()


def test_metadata_beside_the_files(tmp_path):
    for split, name in (("train", "metadata.jsonl"), ("validation", "metadata.csv")):
        folder = tmp_path / "data" / split
        clips.write_folder(folder / "videos", 1)
        clips.write_image(folder / "b.png")
        rows = [{"file_name": "videos/clip0.mp4", "text": "one", "fps": "3"}, {"file_name": "b.png", "text": "two"}]
        if name.endswith(".csv"):
            lines = ["file_name,text,fps", *(f"{r['file_name']},{r['text']},{r.get('fps', 1)}" for r in rows)]
            (folder / name).write_text("\n".join(lines) + "\n")
        else:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("train", "valid"):
        found, skipped = opened(tmp_path / "data", tmp_path / "cache", split)
        assert found == [("video", ".mp4", "one"), ("image", ".png", "two")]
        assert not skipped
    assert not (tmp_path / "cache").exists()
    table = tmp_path / "data" / "train" / "metadata.jsonl"
    table.write_text('{"file_name": "a.xyz", "text": "one"}\n')
    with pytest.raises(UserError, match=r"metadata.jsonl: line 1: a.xyz is neither a video nor a picture"):
        opened(tmp_path / "data", tmp_path / "cache")


def test_parquet(tmp_path, video, picture):
    rows = [
        {"video": {"bytes": video, "path": None}, "prompt": "moves", "id": 1},
        {"video": {"bytes": picture, "path": "x/y.png"}, "prompt": "rests", "id": 2},
        {"video": {"bytes": video, "path": "../../z.mp4"}, "prompt": None, "id": 3},
    ]
    write_parquet(tmp_path / "data" / "data" / "train-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "data" / "data" / "validation-00000-of-00001.parquet", rows[:1])
    found, skipped = opened(tmp_path / "data", tmp_path / "cache")
    assert found == [("video", ".mp4", "moves"), ("image", ".png", "rests")]
    assert "has no caption" in str(skipped[0])
    assert opened(tmp_path / "data", tmp_path / "cache", "valid")[0] == found[:1]
    inside = sorted(path for path in tmp_path.rglob("*.mp4") if path.name != "source.mp4")
    assert all(tmp_path / "cache" in path.parents for path in inside)
    times = [path.stat().st_mtime_ns for path in inside]
    opened(tmp_path / "data", tmp_path / "cache")
    assert [path.stat().st_mtime_ns for path in inside] == times  # once
    assert open_data(str(tmp_path / "data"), tmp_path / "cache").parent == tmp_path / "cache"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"video": b"", "image": b"", "text": "a"}], "exactly one column for the video or picture"),
        ([{"video": b"", "words": "a"}], "exactly one column for the caption"),
        ([{"video": {"path": "a.mp4"}, "text": "a"}], "holds no videos or pictures themselves"),
    ],
)
def test_parquet_that_does_not_say_what_is_what(tmp_path, rows, message):
    write_parquet(tmp_path / "data" / "a.parquet", rows)
    with pytest.raises(UserError, match=message):
        open_data(str(tmp_path / "data"), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_webdataset(tmp_path, video, picture):
    facts = json.dumps({"text": "said in json", "width": 3}).encode()
    members = [("a/0.mp4", video), ("a/0.txt", b"moves"), ("a/1.json", facts), ("a/1.png", picture)]
    write_tar(tmp_path / "data" / "000.tar", [*members, ("../2.mp4", video), ("3.txt", b"of nothing")])
    found, skipped = opened(tmp_path / "data", tmp_path / "cache")
    assert found == [("video", ".mp4", "moves"), ("image", ".png", "said in json")]
    assert len(skipped) == 1
    assert not (tmp_path / "2.mp4").exists()


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_a_damaged_archive_is_an_error_of_one_line(tmp_path, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(b"no archive at all" * 100)
    with pytest.raises(UserError, match=rf"{name}: cannot be read as") as caught:
        open_data(str(tmp_path / "data"), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_without_pyarrow(tmp_path, monkeypatch):
    write_parquet(tmp_path / "data" / "a.parquet", [{"video": b"", "text": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'mlx-wan\[parquet\]'"):
        open_data(str(tmp_path / "data"), tmp_path / "cache")


def test_training_takes_it(tmp_path, video):
    model = toy_model.write_model(tmp_path / "toy")
    write_parquet(tmp_path / "data" / "a.parquet", [{"video": video, "text": f"clip {i}"} for i in range(3)])
    recipe = FinetuneRecipe(model=str(model), data=str(tmp_path / "data"), adapter_path=str(tmp_path / "run"))
    plan = make_plan(recipe)
    assert [clip.source.caption for clip in plan.clips] == ["clip 0", "clip 1", "clip 2"][: len(plan.clips)]
    assert plan.clips
    assert plan_clips([clip.source for clip in plan.clips], sampling(plan.recipe, plan.checkpoint))[0] == plan.clips


# --- the Hub ---------------------------------------------------------------------------------------------------------

COMMIT = "0" * 39 + "1"
SCRIPT = """
import sys
from pathlib import Path
from typing import ClassVar
from mlx_wan.training.dataset import find_sources
from mlx_wan.training.hub import default_cache, open_data
found = find_sources(open_data(sys.argv[1], default_cache(sys.argv[1])))[0]
print([(source.path.suffix, source.caption) for source in found], default_cache(sys.argv[1]).name)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download of a data set asks for."""

    files: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path, base = self.path.split("?")[0], "/datasets/Some/clips/resolve/"
        if path.startswith("/api/datasets/Some/clips"):
            if "/tree/" in path:
                facts = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()]
            else:
                siblings = [{"rfilename": name} for name in self.files]
                facts = {"id": "Some/clips", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.answer(json.dumps(facts).encode(), body)
        elif path.startswith(base) and (name := path.removeprefix(base).partition("/")[2]) in self.files:
            self.answer(self.files[name], body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def answer(self, content, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path, video):
    Hub.files = {"clips/a.mp4": video, "clips/a.txt": b"from the Hub", "README.md": b"not wanted"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()


def load(name, environment):
    command = [sys.executable, "-c", SCRIPT, name]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_a_data_set_of_the_hub(hub, tmp_path):
    done = load("Some/clips", hub)
    assert done.stdout == "[('.mp4', 'from the Hub')] Some--clips\n", done.stderr
    assert not list(Path(hub["HF_HOME"]).rglob("README.md"))


def test_a_data_set_that_is_not_there(hub):
    done = load("Some/nothing", hub)
    last = done.stderr.strip().splitlines()[-1]
    assert "Some/nothing: no such folder or file, nor a data set that the Hub gives" in last
