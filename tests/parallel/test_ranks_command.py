"""`generate` as several processes: one video, one voice, and a reason when there is none."""

import json
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import checkpoint
import numpy as np
import pytest
import ranks
import small
from PIL import Image, ImageSequence

import mlx_wan
from mlx_wan.cli.main import main
from mlx_wan.outputs import read_settings
from mlx_wan.video import VideoWriter, read_video

SIZE = "--size 96*64 --frame_num 9 --sample_solver euler"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.write_official(tmp_path_factory.mktemp("small") / "model")


def line(folder, path, flags, prompt="two cats"):
    words = f"{SIZE} --ckpt_dir {folder} --save_file {path} {flags}".split()
    return ["-m", "mlx_wan.cli.main", "generate", "--prompt", prompt, *words]


def test_two_processes_write_one_video(folder, tmp_path):
    path, alone = tmp_path / "two.mp4", tmp_path / "one.mp4"
    flags = "--sample_steps 2 --ulysses_size 2 --dit_fsdp --t5_fsdp"
    # Each draws a seed: the first one's counts. A folder that the second machine has not got does not matter there.
    elsewhere = {1: line(folder, tmp_path / "missing" / "x.mp4", flags)}
    results = ranks.finish(ranks.start(tmp_path, 2, line(folder, path, flags), elsewhere))
    assert [code for code, *_ in results] == [0, 0], results
    (_, out, _), (_, silent, errors) = results
    assert out.startswith(f"{path}\nseed ")
    assert silent == ""
    assert all(text.startswith("hint:") for text in errors.splitlines())
    # A value in a million that is rounded the other way makes H.264 decide otherwise: so both are compared with the
    # frames before encoding, from which another seed's are 1.4 times as far as the code is: random weights make noise,
    # which codes badly.
    options = {"width": 96, "height": 64, "num_frames": 9, "num_inference_steps": 2, "scheduler": "euler"}
    pipe = mlx_wan.WanPipeline.from_pretrained(folder)
    exact, other = (pipe("two cats", **options, seed=int(out.split()[2]) + i).frames.astype(int) for i in range(2))
    with VideoWriter(alone, 24) as writer:
        writer.write(exact.astype(np.uint8))
    (together, rate), (single, rate_alone) = read_video(path), read_video(alone)
    assert (together.shape, rate) == (single.shape, rate_alone)
    coded = np.abs(single - exact).mean()
    assert np.abs(together - exact).mean() < 1.05 * coded
    assert np.abs(together - other).mean() > 1.3 * coded


def test_a_killed_rank_leaves_no_file(folder, tmp_path):
    path = tmp_path / "two.mp4"
    processes = ranks.start(tmp_path, 2, line(folder, path, "--sample_steps 1000 --cfg_parallel"))
    shown = ""
    while "denoise" not in shown:
        shown += (character := processes[0].stderr.read(1))
        assert character, shown
    processes[1].kill()
    start = time.monotonic()
    (code, out, errors), _ = ranks.finish(processes, timeout=30)
    assert time.monotonic() - start < 30
    assert (code, out) == (1, "")
    assert any(text.startswith("error: rank 1 (") and " died;" in text for text in errors.splitlines()), errors
    assert not [file for file in tmp_path.iterdir() if not file.name.startswith("hosts-")]


def test_another_model_is_named(folder, tmp_path):
    other = checkpoint.write_official(tmp_path / "other")
    file = other / "diffusion_pytorch_model-00001-of-00002.safetensors"
    raw = bytearray(file.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little") + 2] ^= 1  # one bit of the first value: the same shapes, another model
    file.write_bytes(raw)
    path = tmp_path / "two.mp4"
    arguments = [line(model, path, "--ulysses_size 2") for model in (folder, other)]
    results = ranks.finish(ranks.start(tmp_path, 2, arguments[0], {1: arguments[1]}))
    for code, _, errors in results:
        assert code == 2
        assert any(text.startswith("error: rank 1 (") for text in errors.splitlines()), errors
        assert "was given another model than rank 0" in errors
    assert not path.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ulysses_size 2", "--ulysses_size 2 is for 2 processes (mlx.launch -n 2) and there is 1"),
        ("--cfg_parallel", "--ulysses_size 1 --cfg_parallel is for 2 processes (mlx.launch -n 2) and there is 1"),
        ("--ulysses_size 0", "--ulysses_size 0: must be at least 1"),
    ],
)
def test_one_process_cannot_share(folder, tmp_path, capsys, flags, message):
    assert main(line(folder, tmp_path / "x.mp4", flags)[2:]) == 2
    assert message in capsys.readouterr().err


def test_a_stopped_run_of_two_goes_on(folder, tmp_path, capsys):
    """The first process keeps the run; the second needs no file of it. What comes out is the same to the byte, and all
    but the same if one process alone goes on."""
    path, whole = tmp_path / "two.mp4", tmp_path / "whole.mp4"
    kept = tmp_path / "two.mp4.resume.safetensors"
    flags = "--frame_num 5 --sample_steps 20 --seed 3 --ulysses_size 2 --codec lossless"
    processes = ranks.start(tmp_path, 2, line(folder, path, f"{flags} --save_every 1"))
    while not kept.exists():
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.01)
    processes[1].kill()
    results = ranks.finish(processes, timeout=30)
    assert [code for code, *_ in results] == [1, -9]
    assert f"{kept} has the run as it stood after step " in results[0][2]
    assert not path.exists()
    alone = tmp_path / "alone.mp4.resume.safetensors"
    shutil.copy(kept, alone)
    assert main(["generate", "--resume", str(alone)]) == 0
    assert f"{alone}: 2 processes worked on it before, and now 1: digits may differ" in capsys.readouterr().err
    again = ["-m", "mlx_wan.cli.main", "generate", "--ulysses_size", "2", "--resume"]
    elsewhere = str(tmp_path / "absent" / kept.name)
    results = ranks.finish(ranks.start(tmp_path, 2, [*again, str(kept)], {1: [*again, elsewhere]}))
    assert [code for code, *_ in results] == [0, 0], results
    assert not kept.exists()
    results = ranks.finish(ranks.start(tmp_path, 2, line(folder, whole, flags)))
    assert [code for code, *_ in results] == [0, 0], results
    assert path.read_bytes() == whole.read_bytes()
    together, single = (read_video(file)[0].astype(int) for file in (path, tmp_path / "alone.mp4"))
    assert np.abs(together - single).max() <= 2


def test_two_processes_make_a_batch_and_its_previews(folder, tmp_path):
    """Seeds, lines that one process alone finds wrong, pictures of steps: what one process makes, in the same order."""
    lines = [
        {"prompt": "two cats", "seed": [3, 4], "save_file": str(tmp_path / "a.webp")},
        {"prompt": "a dog", "save_file": str(tmp_path / "missing" / "b.webp")},  # only the first one writes
        {"prompt": "a dog", "image": str(tmp_path / "first.png"), "save_file": str(tmp_path / "c.webp")},
        {"prompt": "a dog", "seed": 5, "save_file": str(tmp_path / "d.webp")},
    ]
    small_picture, elsewhere = tmp_path / "first.png", tmp_path / "elsewhere.jsonl"
    Image.fromarray(small.picture()).save(small_picture)
    batch = tmp_path / "batch.jsonl"
    batch.write_text("\n".join(map(json.dumps, lines)))
    lines[2]["image"] = str(tmp_path / "not_there.png")  # on the second machine
    elsewhere.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "steps").mkdir()
    words = f"{SIZE} --frame_num 5 --ckpt_dir {folder} --sample_steps 2 --codec lossless --batch".split()
    start = ["-m", "mlx_wan.cli.main", "generate", *words]
    shared = ["--ulysses_size", "2", "--preview", str(tmp_path / "steps")]
    other = {1: [*start, str(elsewhere), *shared]}
    (code, out, errors), (other_code, silent, _) = ranks.finish(
        ranks.start(tmp_path, 2, [*start, str(batch), *shared], other)
    )
    assert (code, other_code, silent) == (1, 1, ""), errors
    made = ["a_seed3", "a_seed4", "d"]
    assert [text for text in out.splitlines() if text.endswith(".webp")] == [
        f"{tmp_path / name}.webp" for name in made
    ], errors
    said = [text.removeprefix(f"error: {batch} ") for text in errors.splitlines() if text.startswith("error:")]
    assert len(said) == 2, errors
    assert said[0].startswith("line 2: ")
    assert f"the folder {tmp_path / 'missing'} does not exist" in said[0]
    assert said[1].startswith(f"line 3: rank 1 ({socket.gethostname()}): ")
    assert "not_there.png" in said[1]
    pictures = {path.name for path in (tmp_path / "steps").iterdir()}
    assert pictures == {f"{name}_step_{step:04d}.png" for name in made for step in (1, 2)}
    together = [np.stack(picture_frames(tmp_path / f"{name}.webp")) for name in made]
    assert main([*start[2:], str(batch)]) == 1
    for frames, name in zip(together, made, strict=True):
        assert np.abs(frames - np.stack(picture_frames(tmp_path / f"{name}.webp"))).max() <= 2, name


def picture_frames(path):
    with Image.open(path) as file:
        return [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(file)]


def test_the_first_process_asks_a_language_model_for_both(folder, tmp_path, monkeypatch):
    """The second has neither key nor address; both must make the video of the extended prompt."""
    asked, path = [], tmp_path / "two.webp"

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = json.dumps({"choices": [{"message": {"content": "two rich cats"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        extend = "--use_prompt_extend --prompt_extend_method openai --prompt_extend_model m"
        flags = f"--sample_steps 1 --seed 3 --ulysses_size 2 --codec lossless {extend}"
        both = line(folder, path, flags)
        bare = "import os, sys; del os.environ['OPENAI_BASE_URL']; from mlx_wan.cli.main import main; sys.exit(main())"
        results = ranks.finish(ranks.start(tmp_path, 2, both, {1: ["-c", bare, *both[2:]]}))
        server.shutdown()
    assert [code for code, *_ in results] == [0, 0], results
    assert len(asked) == 1
    facts = read_settings(path)
    assert (facts["prompt"], facts["given_prompt"]) == ("two rich cats", "two cats")


def test_two_processes_make_a_longer_video(folder, tmp_path):
    """The second needs the frames that the first has decoded: without them it would compute another part."""
    path, alone = tmp_path / "two.mp4", tmp_path / "one.mp4"
    flags = "--sample_steps 2 --seed 3 --extend 1 --overlap 5 --codec lossless"
    results = ranks.finish(ranks.start(tmp_path, 2, line(folder, path, f"{flags} --ulysses_size 2")))
    assert [code for code, *_ in results] == [0, 0], results
    assert main(line(folder, alone, flags)[2:]) == 0
    together, single = (read_video(file)[0].astype(int) for file in (path, alone))
    assert together.shape == (13, 64, 96, 3)
    assert np.abs(together - single).max() <= 2


def test_two_processes_share_the_control_of_vace(tmp_path):
    folder, clip = checkpoint.write_official(tmp_path / "vace", "small-vace-14B"), tmp_path / "clip.mp4"
    with VideoWriter(clip, 16, codec="lossless") as writer:
        writer.write(small.vace_source()[0])
    flags = f"--sample_steps 2 --seed 3 --codec lossless --src_video {clip}"
    path, alone = tmp_path / "two.mp4", tmp_path / "one.mp4"
    results = ranks.finish(ranks.start(tmp_path, 2, line(folder, path, f"{flags} --ulysses_size 2 --dit_fsdp")))
    assert [code for code, *_ in results] == [0, 0], results
    assert main(line(folder, alone, flags)[2:]) == 0
    together, single = (read_video(file)[0].astype(int) for file in (path, alone))
    assert np.abs(together - single).max() <= 2
