"""Every kind of file: what goes in comes back, what cannot be written is said before, and nothing half is left."""

import os
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_video import colour_bars

from mlx_wan import outputs
from mlx_wan.errors import UserError, WanError
from mlx_wan.formats import CODECS, FORMATS, VIDEOS, output_path, settings_path, sibling
from mlx_wan.outputs import Behind, check_output, open_output, read_settings, save_settings
from mlx_wan.video import has_encoder, read_video

FACTS = {"prompt": 'a "red" café, 猫', "seed": 7, "more": {"deep": [1, 2.5]}}
VIDEO_CASES = [(suffix, codec) for suffix, form in VIDEOS.items() for codec in form.codecs]


def moving(frames: int = 5) -> np.ndarray:
    """Bars that move, so that no frame is as another."""
    return np.stack([np.roll(colour_bars(1)[0], 8 * i, axis=1) for i in range(frames)])


def write(path: Path, video: np.ndarray, codec: str | None = None, fps: float = 12) -> None:
    with open_output(path, fps, codec, FACTS) as writer:
        writer.write(video[:1])
        writer.write(video[1:])


@pytest.mark.parametrize(("suffix", "codec"), VIDEO_CASES)
def test_videos_of_every_codec_come_back(tmp_path, suffix, codec):
    path, video = tmp_path / f"bars{suffix}", moving()
    write(path, video, codec)
    frames, fps = read_video(path)
    assert (frames.shape, fps) == (video.shape, 12)
    difference = np.abs(frames.astype(int) - video)
    assert difference.max() == 0 if codec == "lossless" else difference.mean() < 8
    with av.open(str(path)) as container:
        name = container.streams.video[0].codec_context.name
    assert {"h264": "h264", "lossless": "h264", "hevc": "hevc", "prores": "prores"}.get(codec, "vp9") in name
    assert read_settings(path) == FACTS
    assert os.listdir(tmp_path) == [path.name]


def test_players_find_hevc_under_the_tag_they_know(tmp_path):
    write(tmp_path / "a.mp4", moving(), "hevc")
    assert b"hvc1" in (tmp_path / "a.mp4").read_bytes()


@pytest.mark.parametrize(("name", "codec"), [("a.gif", None), ("a.webp", None), ("b.webp", "lossless")])
def test_animations(tmp_path, name, codec):
    video = moving(25)
    write(tmp_path / name, video, codec)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 25
        shown, length = [], 0
        for i in range(25):
            image.seek(i)
            shown.append(np.asarray(image.convert("RGB")))
            length += image.info["duration"]
    assert length == pytest.approx(25 / 12 * 1000, abs=5)
    difference = np.abs(np.stack(shown).astype(int) - video)
    assert difference.max() == 0 if codec == "lossless" else difference.mean() < 8
    assert read_settings(tmp_path / name) == FACTS
    assert os.listdir(tmp_path) == [name]


def test_a_folder_of_frames_holds_the_very_pixels(tmp_path):
    video = moving()
    write(output_path(f"{tmp_path}/frames/"), video)
    assert os.listdir(tmp_path) == ["frames"]
    names = sorted(os.listdir(tmp_path / "frames"))
    assert names == ["0001.png", "0002.png", "0003.png", "0004.png", "0005.png"]
    back = np.stack([np.asarray(Image.open(tmp_path / "frames" / name)) for name in names])
    assert (back == video).all()
    assert read_settings(tmp_path / "frames") == FACTS
    assert read_settings(tmp_path / "frames" / "0004.png") == FACTS


def test_a_pattern_and_a_single_picture(tmp_path):
    write(tmp_path / "shot_%02d.png", moving(3))
    assert sorted(os.listdir(tmp_path)) == ["shot_01.png", "shot_02.png", "shot_03.png"]
    write(tmp_path / "one.png", moving(1))
    assert (np.asarray(Image.open(tmp_path / "one.png")) == moving(1)[0]).all()


def test_settings_beside_the_video(tmp_path):
    save_settings(tmp_path / "a.mp4.json", FACTS)
    assert read_settings(tmp_path / "a.mp4.json") == FACTS


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "frames/", "shot_%d.png", "one.png"])
def test_an_error_while_writing_leaves_nothing(tmp_path, name):
    def interrupted():
        with open_output(output_path(f"{tmp_path}/{name}"), 12) as writer:
            writer.write(moving(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []
    with pytest.raises(WanError, match="no frames"), open_output(output_path(f"{tmp_path}/{name}"), 12):
        pass
    assert os.listdir(tmp_path) == []


def test_a_second_frame_for_one_picture_is_refused_and_nothing_left(tmp_path):
    with pytest.raises(UserError, match="holds one picture"), open_output(tmp_path / "a.png", 12) as writer:
        writer.write(moving(2))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "codec", "message"),
    [
        ("a.avi", None, r"a\.avi: a video's name ends in \.mp4"),
        ("a", None, "a: a video's name ends in"),
        ("a.mp4", "prores", r"--codec prores: does not go into \.mp4 files .*ends in \.mov or \.mkv"),
        ("a.gif", "h264", r"--codec h264: does not go into \.gif files \(these take gif\)"),
        ("a.png", None, r"holds one frame and there will be 5; .*a_%04d\.png"),
        ("a_%s.png", None, "a pattern for frames has one number"),
        ("a_%d_%d.png", None, "a pattern for frames has one number"),
        ("full/", None, r"0001\.png: frames of such names are there already"),
        ("none/at/all/", None, "does not exist"),
        ("folder.gif", None, "is a folder"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(tmp_path, name, codec, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "0001.png").touch()
    (tmp_path / "folder.gif").mkdir()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message):
        check_output(output_path(f"{tmp_path}/{name}"), codec, 5)
    assert sorted(os.listdir(tmp_path)) == before


def test_an_encoder_that_the_build_lacks_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "has_encoder", lambda name: name != "libx265" and has_encoder(name))
    with pytest.raises(UserError, match=r"no encoder for it \(libx265\); use --codec h264"):
        check_output(tmp_path / "a.mp4", "hevc")
    assert not has_encoder("no-such-encoder")
    assert all(has_encoder(codec.encoder) for codec in CODECS.values())


def test_files_without_settings_and_what_is_no_file(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "b.png").write_text("text")
    assert read_settings(tmp_path / "a.png") is None
    assert read_settings(tmp_path / "a.json") is None
    for name in ("absent.mp4", "empty", "b.png"):
        with pytest.raises(UserError, match=name):
            read_settings(tmp_path / name)


def test_names_derived_from_a_name():
    assert sibling(Path("d/out.mp4"), "seed7") == Path("d/out_seed7.mp4")
    assert sibling(output_path("d/frames/"), "seed7") == Path("d/frames_seed7/%04d.png")
    assert sibling(Path("s_%03d.png"), "seed7") == Path("seed7_s_%03d.png")
    assert settings_path(Path("d/out.mp4")) == Path("d/out.mp4.json")
    assert settings_path(output_path("d/frames/")) == Path("d/frames.json")
    assert set(FORMATS) == {".mp4", ".mov", ".mkv", ".webm", ".gif", ".webp", ".png"}


class Slow:
    """A writer that can be held up, and that fails at a piece."""

    def __init__(self, bad: int | None = None):
        self.bad, self.pieces, self.go = bad, [], threading.Event()

    def write(self, frames):
        assert self.go.wait(10)
        if len(self.pieces) == self.bad:
            raise WanError("the disk is full")
        self.pieces.append(frames)


def test_pieces_written_behind_come_in_order_and_all():
    slow = Slow()
    with Behind(slow) as behind:
        behind.write(0)  # does not wait for the writer
        assert slow.pieces == []
        slow.go.set()
        for piece in range(1, 20):
            behind.write(piece)
    assert slow.pieces == list(range(20))


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_what_goes_wrong_behind_is_raised(bad):
    slow = Slow(bad)
    slow.go.set()

    def three_pieces():
        with Behind(slow) as behind:
            for piece in range(3):
                behind.write(piece)

    with pytest.raises(WanError, match="the disk is full"):
        three_pieces()


def test_a_file_written_behind_is_whole(tmp_path):
    write(tmp_path / "plain.mp4", moving())
    with open_output(tmp_path / "behind.mp4", 12, None, FACTS) as writer, Behind(writer) as behind:
        for frame in moving():
            behind.write(frame[None])
    assert np.array_equal(read_video(tmp_path / "behind.mp4")[0], read_video(tmp_path / "plain.mp4")[0])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, WanError])
def test_nothing_is_left_of_a_file_written_behind_when_its_frames_stop(tmp_path, stop):
    before = threading.active_count()

    def stopped():
        with open_output(tmp_path / "a.mp4", 12) as writer, Behind(writer) as behind:
            behind.write(moving())
            raise stop

    with pytest.raises(stop):
        stopped()
    assert os.listdir(tmp_path) == []
    assert threading.active_count() == before
