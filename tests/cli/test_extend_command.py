"""`generate --extend` and `--extend_from`: files that are longer, settings that make them again, runs that go on."""

from pathlib import Path

import checkpoint
import numpy as np
import pytest
from PIL import Image

from mlx_wan.cli import generate
from mlx_wan.cli.main import main
from mlx_wan.errors import WanError
from mlx_wan.outputs import open_output, read_settings
from mlx_wan.video import read_video

LINE = ["--prompt", "cats", "--seed", "3", "--frame_num", "9", "--steps", "2", "--codec", "lossless"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (320, 200), (200, 0, 0)).save(tmp_path / "photo.png")
    checkpoint.write_official(tmp_path / "model")
    return tmp_path


def run(*flags: str) -> int:
    return main(["generate", "--ckpt_dir", "model", *LINE, *flags])


def test_parts_follow_each_other_and_settings_make_them_again(folder):
    assert run("--size", "64*32", "--extend", "2", "-o", "a.mp4") == 0
    frames, fps = read_video("a.mp4")
    assert (frames.shape, fps) == ((9 + 8 + 8, 32, 64, 3), 24)
    assert run("--size", "64*32", "-o", "b.mp4") == 0
    np.testing.assert_array_equal(read_video("b.mp4")[0], frames[:9])
    facts = read_settings(Path("a.mp4"))
    assert (facts["extend"], facts["overlap"]) == (2, 1)
    assert not {"extend", "overlap", "video"} & set(read_settings(Path("b.mp4")))
    assert main(["generate", "--from", "a.mp4", "--codec", "lossless", "-o", "again.mp4"]) == 0
    assert Path("again.mp4").read_bytes() == Path("a.mp4").read_bytes()


def test_a_video_goes_on_at_its_own_size_and_speed(folder, capsys):
    clip = np.random.default_rng(0).integers(0, 255, (12, 64, 96, 3), dtype=np.uint8)
    with open_output(Path("clip.mp4"), 12, "lossless") as writer:
        writer.write(clip)
    assert run("--extend_from", "clip.mp4", "--overlap", "5", "-o", "a.mp4") == 0
    assert "note: clip.mp4 has 12 frames a second and the model makes 24: speeds differ" in capsys.readouterr().err
    frames, fps = read_video("a.mp4")
    assert (frames.shape, fps) == ((12 + 4, 64, 96, 3), 12)
    np.testing.assert_array_equal(frames[:12], clip)
    assert main(["generate", "--from", "a.mp4", "--codec", "lossless", "-o", "again.mp4"]) == 0
    assert Path("again.mp4").read_bytes() == Path("a.mp4").read_bytes()
    assert run("--extend_from", "clip.mp4", "--extend", "2", "--size", "64*32", "-o", "b.mp4") == 0
    assert read_video("b.mp4")[0].shape == (12 + 8 + 8, 32, 64, 3)


def test_a_video_of_a_size_that_the_model_has_not_is_fitted(folder):
    clip = np.full((5, 50, 100, 3), 90, np.uint8)
    with open_output(Path("clip.mp4"), 24, "lossless") as writer:
        writer.write(clip)
    assert run("--extend_from", "clip.mp4", "--size", "64*32", "-o", "a.mp4") == 0
    frames, _ = read_video("a.mp4")
    assert frames.shape == (5 + 8, 32, 64, 3)
    assert (frames[:5] == 90).all()


def test_a_stopped_run_goes_on_in_the_second_part(folder, monkeypatch):
    from mlx_wan import sampling

    original, calls = sampling._check, []

    def check(latents, step, steps):
        calls.append(step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        original(latents, step, steps)

    monkeypatch.setattr(sampling, "_check", check)
    flags = ("--size", "64*32", "--extend", "2", "--image", "photo.png", "--steps", "3")
    assert run(*flags, "--save_every", "1", "-o", "a.mp4") == 130
    assert calls == [1, 2, 3, 1]
    calls.clear()
    monkeypatch.setattr(sampling, "_check", lambda *given: calls.append(given[1]) or original(*given))
    assert main(["generate", "--resume", "a.mp4.resume.safetensors"]) == 0
    assert calls == [1, 2, 3, 1, 2, 3]  # the first part is only decoded
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run(*flags, "-o", "b.mp4") == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_a_run_that_failed_in_a_later_part_goes_on_there(folder, monkeypatch):
    """Kept within the second of three parts, with the first one's latents beside it."""
    from mlx_wan import sampling

    original, calls = sampling._check, []

    def check(latents, step, steps):
        calls.append(step)
        if len(calls) == 6:
            raise WanError("latents are not finite")
        original(latents, step, steps)

    monkeypatch.setattr(sampling, "_check", check)
    flags = ("--size", "64*32", "--extend", "2", "--steps", "3", "--overlap", "5")
    assert run(*flags, "--save_every", "2", "-o", "a.mp4") == 1
    calls.clear()
    monkeypatch.setattr(sampling, "_check", lambda *given: calls.append(given[1]) or original(*given))
    assert main(["generate", "--resume", "a.mp4.resume.safetensors"]) == 0
    assert calls == [3, 1, 2, 3]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run(*flags, "-o", "b.mp4") == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--extend 0", "--extend 0: must be 1 to 1000 more parts"),
        ("--overlap 5", "--overlap: is of --extend"),
        ("--extend 1 --overlap 4", "an overlap of 4 frames: must be 4n+1, for instance 5"),
        ("--extend 1 --overlap 9", "an overlap of 9 frames: must be less than the 9 frames of a part"),
        ("--extend_from clip.mp4 --image photo.png", "--image and --extend_from: a video begins with one"),
        ("--extend_from clip.mp4 --overlap 5", "clip.mp4: has 3 frames, fewer than --overlap 5"),
        ("--extend_from absent.mp4", "absent.mp4: cannot be read as a video"),
        ("--extend_from photo.txt", "photo.txt: cannot be read as a video"),
        ("--extend 1 -o a.png --codec png", "a.png: a picture holds one frame and there will be 18"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(generate, "_make", None)
    with open_output(Path("clip.mp4"), 24) as writer:
        writer.write(np.zeros((3, 32, 64, 3), np.uint8))
    Path("photo.txt").write_text("hello")
    capsys.readouterr()
    assert run("--size", "64*32", *flags.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}"), errors
    assert errors.count("\n") == 1


def test_a_model_without_pictures_cannot(folder, capsys):
    checkpoint.write_official(folder / "t2v", "small-t2v-A14B")
    assert main(["generate", "--ckpt_dir", "t2v", *LINE, "--size", "64*32", "--extend", "1"]) == 2
    assert "cannot go on with a video: use a TI2V or I2V model" in capsys.readouterr().err


def test_the_plan_counts_the_frames_that_are_given(capsys):
    def image_stage(*flags: str) -> str:
        assert main(["plan", *flags]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("image"))

    assert image_stage("--with_image") != image_stage("--overlap", "9")
    assert main(["plan", "--overlap", "4"]) == 2
