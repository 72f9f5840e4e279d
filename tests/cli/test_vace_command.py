"""`generate` with a VACE model: what its flags become, and that a video can be made again from its settings."""

from pathlib import Path

import checkpoint
import numpy as np
import pytest
import small
from PIL import Image

from mlx_wan.cli import generate
from mlx_wan.cli.main import main
from mlx_wan.outputs import open_output, read_settings
from mlx_wan.video import read_video

LINE = ["--prompt", "cats", "--seed", "3", "--steps", "2", "--codec", "lossless"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    clip, mask, references = small.vace_source()
    for name, frames in (("clip.mp4", clip), ("mask.mp4", np.repeat(mask[..., None], 3, axis=-1))):
        with open_output(Path(name), 8, "lossless") as writer:
            writer.write(frames)
    for number, picture in enumerate(references):
        Image.fromarray(picture).save(f"ref{number}.png")
    Image.fromarray(mask[4]).save("mask.png")
    checkpoint.write_official(tmp_path / "model", "small-vace-14B")
    return tmp_path


def run(*flags: str) -> int:
    return main(["generate", "--ckpt_dir", "model", *LINE, *flags])


ALL = ("--src_video", "clip.mp4", "--src_mask", "mask.mp4", "--src_ref_images", "ref0.png,ref1.png")


def test_size_length_and_speed_are_the_sources_and_settings_make_it_again(folder):
    assert run(*ALL, "--context_scale", "0.8", "-o", "a.mp4") == 0
    frames, fps = read_video("a.mp4")
    assert (frames.shape, fps) == ((9, 48, 64, 3), 8)
    facts = read_settings(Path("a.mp4"))
    assert (facts["src_video"], facts["src_mask"]) == ("clip.mp4", "mask.mp4")
    assert (facts["src_ref_images"], facts["context_scale"]) == (["ref0.png", "ref1.png"], 0.8)
    assert len(facts["fingerprints"]["src_ref_images"]) == 2
    assert main(["generate", "--from", "a.mp4", "--codec", "lossless", "-o", "again.mp4"]) == 0
    assert Path("again.mp4").read_bytes() == Path("a.mp4").read_bytes()
    assert run("--src_video", "clip.mp4", "--src_mask", "mask.png", "--frame_num", "5", "-o", "b.mp4") == 0
    frames, fps = read_video("b.mp4")
    assert frames.shape == (5, 48, 64, 3)
    assert fps == pytest.approx(8 * 5 / 9, abs=1e-2)


def test_text_alone_and_references_alone(folder):
    made = []
    for name, flags in (("a", ()), ("b", ("--src_ref_images", "ref0.png"))):
        assert run("--size", "64*48", "--frame_num", "5", *flags, "-o", f"{name}.mp4") == 0
        made.append(read_video(f"{name}.mp4"))
    assert [(frames.shape, fps) for frames, fps in made] == [((5, 48, 64, 3), 16)] * 2
    assert not np.array_equal(made[0][0], made[1][0])


def test_a_stopped_run_goes_on(folder, monkeypatch, capsys):
    from mlx_wan import sampling

    original = sampling._check

    def check(latents, step, steps):
        if step == 2:
            raise KeyboardInterrupt
        original(latents, step, steps)

    monkeypatch.setattr(sampling, "_check", check)
    assert run(*ALL, "--save_every", "1", "-o", "a.mp4") == 130
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run(*ALL, "-o", "b.mp4") == 0
    Path("ref1.png").rename("moved.png")
    Image.new("RGB", (9, 9)).save("ref1.png")
    capsys.readouterr()
    assert main(["generate", "--resume", "a.mp4.resume.safetensors"]) == 2
    assert "is of a run with another src_ref_images file" in capsys.readouterr().err
    Path("moved.png").rename("ref1.png")
    assert main(["generate", "--resume", "a.mp4.resume.safetensors"]) == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--src_mask mask.mp4", "a mask says what may change in a source video: give that too"),
        ("--src_video absent.mp4", "absent.mp4: cannot be read as a video"),
        ("--src_ref_images ref0.png,absent.png", "absent.png: no such picture file"),
        ("--src_video clip.mp4 --context_scale nan", "the scale of the control is nan"),
        ("--image ref0.png", "custom takes a source video, a mask and reference pictures, no first or last frame"),
        ("--src_video=", "--src_video is empty"),
        ("--extend 1", "custom cannot go on with a video: use a TI2V or I2V model"),
        ("--task t2v-14B", "--task t2v-14B: model holds a model of the kind vace-1.3B"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(generate, "_make", None)
    assert run(*flags.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}"), errors
    assert errors.count("\n") == 1


def test_other_models_take_no_source(folder, capsys):
    assert main(["generate", *LINE, "--src_video", "clip.mp4"]) == 2
    assert "--src_video: tiny takes none; use a VACE model" in capsys.readouterr().err


def test_the_plan_of_a_release(capsys):
    assert main(["plan", "--task", "vace-1.3B", "--size", "832*480", "--references", "2"]) in (0, 1)
    assert "vace-1.3B, 832*480, 81 frames" in capsys.readouterr().out
