"""`mlx-wan scenes`: the pictures show the clips whose captions are printed."""

import numpy as np
import pytest
from PIL import Image

from mlx_wan.cli.main import main
from mlx_wan.training.world import BACKGROUNDS, CLIP_FRAMES
from mlx_wan.video import read_video


def test_contact_sheet_has_a_row_for_each_caption(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main(["scenes", str(out), "--count", "3", "--size", "32", "--held-out"]) == 0
    captions = capsys.readouterr().out.splitlines()
    sheet = np.asarray(Image.open(out))
    assert len(captions) == 3
    assert sheet.shape == (3 * 36, 6 * 36, 3)
    for row, caption in enumerate(captions):
        frame = sheet[row * 36 + 4 : row * 36 + 36, 4:36]
        background = tuple(frame[0, 0].tolist())  # objects keep away from the corner
        names = [name for name, rgb in BACKGROUNDS.items() if rgb == background]
        assert names, caption
        assert not any(f"{other} background" in caption for other in BACKGROUNDS if other not in names)
        assert (frame != frame[0, 0]).any(), "an object is seen"


def test_video_holds_the_clips_one_after_another(tmp_path, capsys):
    out = tmp_path / "clips.mp4"
    assert main(["scenes", str(out), "--count", "2", "--size", "32"]) == 0
    frames, fps = read_video(out)
    assert (frames.shape, fps) == ((2 * CLIP_FRAMES, 32, 32, 3), 12)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_seed_decides_the_clips(tmp_path, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["scenes", str(tmp_path / "a.png"), "--count", "2", "--size", "16", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.gif"], "the name must end in .png"),
        (["nothing/a.png"], "the folder nothing does not exist"),
        (["a.png", "--count", "0"], "--count is 0"),
        (["a.png", "--size", "33"], "--size is 33"),
        (["a.png", "--seed", "-1"], "--seed -1"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["scenes", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
