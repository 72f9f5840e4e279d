import io
import os
import signal
import subprocess
import sys
import textwrap

import av
import numpy as np
import pytest
from PIL import Image

from mlx_wan.errors import UserError, WanError
from mlx_wan.video import VideoWriter, check_writable, read_image, read_metadata, read_video

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255), (128, 128, 128)]


def colour_bars(frames: int = 5, height: int = 32, bar: int = 32) -> np.ndarray:
    row = np.repeat(np.array(COLOURS, np.uint8), bar, axis=0)  # (7 * bar, 3)
    return np.broadcast_to(row, (frames, height, *row.shape)).copy()


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_frames_and_facts_come_back(tmp_path, suffix):
    path, video = tmp_path / f"bars{suffix}", colour_bars()
    with VideoWriter(path, 12, metadata={"prompt": 'a "red" café, 猫', "seed": 7}) as writer:
        writer.write(video[:1])
        writer.write(video[1:])
    frames, fps = read_video(path)
    assert fps == 12
    assert frames.shape == video.shape
    assert frames.dtype == np.uint8
    centres = np.s_[:, 16, 16::32]
    assert np.abs(frames[centres].astype(int) - video[centres]).max() <= 3
    assert read_metadata(path) == {"prompt": 'a "red" café, 猫', "seed": 7}
    assert os.listdir(tmp_path) == [path.name]


def test_motion_keeps_its_order_and_its_detail(tmp_path):
    y, x = np.mgrid[:64, :64]
    smooth = [128 + 100 * np.sin((x + 3 * t) / 9) * np.cos(y / 11) for t in range(25)]
    video = np.repeat(np.stack(smooth)[..., None], 3, axis=-1).astype(np.uint8)
    with VideoWriter(tmp_path / "wave.mp4", 24) as writer:
        writer.write(video)
    frames, _ = read_video(tmp_path / "wave.mp4")
    error = np.mean((frames.astype(float) - video) ** 2, axis=(1, 2, 3))
    assert (10 * np.log10(255**2 / error) > 42).all()


def test_the_same_frames_make_the_same_file(tmp_path):
    rng = np.random.default_rng(2)
    still = rng.standard_normal((1, 6, 6, 3)).repeat(16, 1).repeat(16, 2) * 60 + 128
    frames = np.clip(still + rng.normal(0, 8, (9, 96, 96, 3)), 0, 255).astype(np.uint8)
    made = set()
    for i in range(8):
        with VideoWriter(tmp_path / "clip.mp4", 24) as writer:
            for start in range(0, 9, 4):
                writer.write(frames[start : start + 4])
        made.add((tmp_path / "clip.mp4").read_bytes())
        _ = [np.full(1000 * n + 7, 255 - i, np.uint8) for n in range(1, 300)]  # other numbers in freed memory
    assert len(made) == 1


def test_players_can_start_early_and_know_the_colours(tmp_path):
    with VideoWriter(tmp_path / "bars.mp4", 24000 / 1001) as writer:
        writer.write(colour_bars())
    data = (tmp_path / "bars.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / "bars.mp4")) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (stream.average_rate.numerator, stream.average_rate.denominator) == (24000, 1001)
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range) == (1, 1, 1, 1)


def test_a_file_without_our_facts_has_none(tmp_path):
    with VideoWriter(tmp_path / "bars.mp4", 12) as writer:
        writer.write(colour_bars())
    assert read_metadata(tmp_path / "bars.mp4") is None


def test_an_error_while_writing_leaves_nothing_and_keeps_what_was_there(tmp_path):
    path = tmp_path / "bars.mp4"
    path.write_bytes(b"an earlier video")

    def interrupted():
        with VideoWriter(path, 12) as writer:
            writer.write(colour_bars())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["bars.mp4"]
    assert path.read_bytes() == b"an earlier video"


def test_a_video_without_frames_is_an_error_and_no_file(tmp_path):
    with pytest.raises(WanError, match="no frames"), VideoWriter(tmp_path / "empty.mp4", 12):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    writer = VideoWriter(tmp_path / "bars.mkv", 12)
    writer._temporary.symlink_to("/dev/full")
    with pytest.raises(WanError, match=r"bars\.mkv: writing the video failed: No space left"), writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (9, 256, 256, 3), dtype=np.uint8))
    assert os.listdir(tmp_path) == []


def test_a_kill_in_the_middle_never_shows_a_half_video_under_the_real_name(tmp_path):
    code = """
        import os, signal, sys
        import numpy as np
        from mlx_wan.video import VideoWriter
        with VideoWriter(sys.argv[1], 12) as writer:
            writer.write(np.zeros((40, 64, 64, 3), np.uint8))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "killed.mp4"
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], timeout=60)
    assert result.returncode == -signal.SIGKILL
    assert not path.exists()


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (np.zeros((1, 16, 17, 3), np.uint8), UserError, "17x16 has an odd side"),
        (np.zeros((1, 16, 16, 3), np.float32), ValueError, "uint8"),
        (np.zeros((16, 16, 3), np.uint8), ValueError, r"\(t, H, W, 3\)"),
    ],
)
def test_wrong_frames_are_refused(tmp_path, frames, error, message):
    with pytest.raises(error, match=message), VideoWriter(tmp_path / "bad.mp4", 12) as writer:
        writer.write(frames)
    assert os.listdir(tmp_path) == []


def test_a_piece_of_another_size_is_refused(tmp_path):
    with VideoWriter(tmp_path / "good.mp4", 12) as writer:
        writer.write(np.zeros((1, 16, 16, 3), np.uint8))
        with pytest.raises(ValueError, match="a piece"):
            writer.write(np.zeros((1, 16, 32, 3), np.uint8))
    assert len(read_video(tmp_path / "good.mp4")[0]) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("video.avi", r"ends in \.mp4"),
        ("video", r"ends in \.mp4"),
        ("no/such/video.mp4", "does not exist"),
        ("file.txt/video.mp4", "does not exist"),
        ("folder.mp4", "is a folder"),
        ("x" * 300 + ".mp4", "cannot write there"),
    ],
)
def test_unwritable_places_are_found_out_before_the_work(tmp_path, name, message):
    (tmp_path / "file.txt").touch()
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match=message):
        check_writable(tmp_path / name)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's, and read-only even for root")
def test_a_read_only_folder_is_found_out_before_the_work():
    with pytest.raises(UserError, match=r"/proc/video\.mp4: cannot write there"):
        check_writable("/proc/video.mp4")


def test_checking_a_place_leaves_no_trace(tmp_path):
    check_writable(tmp_path / "video.mp4")
    assert os.listdir(tmp_path) == []


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video at all")
    for name in ("absent.mp4", "text.mp4"):
        for read in (read_video, read_metadata):
            with pytest.raises(UserError, match=f"{name}: cannot be read as a video"):
                read(tmp_path / name)


# --- pictures ------------------------------------------------------------------------------------------------


def jpeg(image: Image.Image, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", **options)
    return data.getvalue()


def test_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: show turned a quarter clockwise
    sideways = Image.new("RGB", (32, 16), (200, 0, 0))
    sideways.paste((0, 0, 200), (0, 0, 16, 16))  # blue on the left, which is shown on top
    (tmp_path / "photo.jpg").write_bytes(jpeg(sideways, exif=exif, quality=95))
    upright = read_image(tmp_path / "photo.jpg")
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4))[2] > 150
    assert upright.getpixel((8, 28))[0] > 150


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "tiff" if mode == "CMYK" else "png"
    Image.new(mode, (8, 8)).save(tmp_path / f"picture.{suffix}")
    assert read_image(tmp_path / f"picture.{suffix}").mode == "RGB"


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pictures_without_a_known_range_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8)).save(tmp_path / "deep.tiff")
    with pytest.raises(UserError, match=r"deep\.tiff: has 32 bits a pixel"):
        read_image(tmp_path / "deep.tiff")


def test_missing_wrong_and_cut_pictures_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = jpeg(Image.fromarray(noise))
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(noise).save(tmp_path / "whole.png")
    png = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    (tmp_path / "bad.png").write_bytes(png[:60] + bytes(40) + png[100:])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    expected = {
        "absent.jpg": "no such picture",
        "text.jpg": "is not a picture",
        "empty.jpg": "is not a picture",
        "cut.jpg": "damaged or cut short",
        "cut.png": "damaged or cut short",
        "bad.png": "damaged or cut short",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=f"{name}: .*{message}"):
            read_image(tmp_path / name)
