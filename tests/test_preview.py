import numpy as np
import pytest
from PIL import Image

import mlx_wan
from mlx_wan.cli.main import main
from mlx_wan.preview import clips_for, contact_sheet, draw_clip, fit_colours, mean_colours


@pytest.fixture(scope="module")
def pipe():
    return mlx_wan.WanPipeline.from_pretrained("tiny")


def test_colours_of_latents_are_those_of_the_decoded_video(pipe):
    colours = fit_colours(pipe.vae, clips_for(pipe.checkpoint))
    shown, true = [], []
    for prompt in ("a red circle moves right on a black background", "a blue square bounces on a white background"):
        out = pipe(prompt, num_inference_steps=8, seed=1)
        true.append(mean_colours(out.frames.astype(np.float32) / 127.5 - 1, (4, 16, 16)))
        shown.append(colours(np.array(out.latents[0])))
    shown, true = np.array(shown), np.array(true)
    residue, spread = ((shown - true) ** 2).sum(), ((true - true.mean(axis=(0, 1, 2, 3))) ** 2).sum()
    assert residue < 0.15 * spread


def test_a_sheet_is_a_row_of_frames(pipe):
    colours = fit_colours(pipe.vae, [draw_clip(np.random.default_rng(0), 5, 128, 128) for _ in range(2)])
    out = pipe("a red circle", num_inference_steps=1, seed=1, output_type="latent")
    sheet = contact_sheet(out.latents, colours)
    assert sheet.shape == (96, 5 * 96, 3)
    assert sheet.dtype == np.uint8


def test_pixels_behind_a_latent():
    clip = np.arange(5, dtype=np.float32)[:, None, None, None] * np.ones((5, 32, 16, 3), np.float32)
    assert mean_colours(clip, (4, 16, 16))[:, 0, 0, 0].tolist() == [0, 2.5]
    assert mean_colours(clip, (4, 16, 16)).shape == (2, 2, 1, 3)


def test_every_step_leaves_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps").mkdir()
    line = ["generate", "--prompt", "a red circle", "--steps", "3", "--frame_num", "5", "-o", "a.mp4", "--preview"]
    assert main([*line, "steps"]) == 0
    names = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert names == ["a_step_0001.png", "a_step_0002.png", "a_step_0003.png"]
    pictures = [np.asarray(Image.open(tmp_path / "steps" / name)).astype(int) for name in names]
    assert np.abs(pictures[0] - pictures[2]).mean() > 1
    assert main([*line, "absent"]) == 2


def test_every_part_of_a_longer_video_has_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps").mkdir()
    size = ["--size", "64*64", "--frame_num", "5", "--steps", "2", "--extend", "1"]
    assert main(["generate", "--prompt", "a red circle", *size, "-o", "a.webp", "--preview", "steps"]) == 0
    names = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert names == [f"a_part_{part:02d}_step_{step:04d}.png" for part in (1, 2) for step in (1, 2)]
