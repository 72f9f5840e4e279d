"""Data as people have it: every layout, every way to cut clips, and everything that can be wrong with a file."""

import json
from pathlib import Path

import av
import clips
import numpy as np
import pytest

from mlx_wan.errors import UserError
from mlx_wan.training.buckets import Bucket
from mlx_wan.training.dataset import Clip, Sampling, Source, find_sources, plan_clips, read_clip, resample

SAMPLING = Sampling(num_frames=(5,), width=32, height=32, steps=(16, 16), fps=12)


def captions(data, split="train"):
    sources, skipped = find_sources(data, split)
    assert not skipped
    return {source.path.name: (source.kind, source.caption) for source in sources}


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_a_folder_with_captions_beside_the_clips(tmp_path):
    clips.write_folder(tmp_path / "d" / "sub", 2)
    clips.write_image(tmp_path / "d" / "Photo.JPG")
    (tmp_path / "d" / "Photo.txt").write_text("a photo")
    (tmp_path / "d" / ".cache").mkdir()
    clips.write_video(tmp_path / "d" / ".cache" / "hidden.mp4")
    assert captions(tmp_path / "d") == {
        "Photo.JPG": ("image", "a photo"),
        "clip0.mp4": ("video", "a bar number 0 moves right"),
        "clip1.mp4": ("video", "a bar number 1 moves right"),
    }
    assert captions(tmp_path / "d", "valid") == {}


@pytest.mark.parametrize("name", ["a.txt", "train.jsonl", "train.csv"])
def test_a_mark_of_utf8_and_odd_line_ends_are_no_part_of_captions(tmp_path, name):
    clips.write_video(tmp_path / "a.mp4")
    caption = "one\u2028line" if name == "train.jsonl" else "one line"
    texts = {"a.txt": caption + "\r\n", "train.csv": f"video,caption\r\na.mp4,{caption}\r\n"}
    row = json.dumps({"video": "a.mp4", "caption": caption}, ensure_ascii=False) + "\r\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + texts.get(name, row).encode())
    assert captions(tmp_path) == {"a.mp4": ("video", caption)}


def test_folders_for_training_and_validation(tmp_path):
    clips.write_folder(tmp_path / "one" / "train", 2)
    clips.write_folder(tmp_path / "one" / "valid", 1)
    clips.write_folder(tmp_path / "two", 2)
    clips.write_folder(tmp_path / "two" / "valid", 1)
    for data in (tmp_path / "one", tmp_path / "two"):
        assert len(captions(data)) == 2
        assert len(captions(data, "valid")) == 1


def test_json_lines_and_csv(tmp_path):
    clips.write_folder(tmp_path / "media", 2)
    clips.write_image(tmp_path / "p.png")
    rows = [
        {"video": "media/clip0.mp4", "caption": "zero"},
        {"video": str(tmp_path / "media" / "clip1.mp4"), "prompt": "one"},
        {"image": "p.png", "caption": "a picture, two"},
    ]
    want = {"clip0.mp4": ("video", "zero"), "clip1.mp4": ("video", "one"), "p.png": ("image", "a picture, two")}
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert captions(tmp_path) == want
    assert captions(tmp_path / "train.jsonl") == want
    assert captions(tmp_path / "train.jsonl", "valid") == {}
    (tmp_path / "valid.csv").write_text('video,image,caption\nmedia/clip1.mp4,,one\n,p.png,"a picture, two"\n')
    assert captions(tmp_path, "valid") == {"clip1.mp4": ("video", "one"), "p.png": want["p.png"]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", '{"video": "a.mp4"}', "line 1: must have exactly one of caption and prompt"),
        ("t.jsonl", '{"video": "a.mp4", "caption": "x", "prompt": "y"}', "exactly one of caption and prompt"),
        ("t.jsonl", '{"video": "a.mp4", "caption": 3}', "exactly one of caption and prompt, a text"),
        ("t.jsonl", '\n{"video": "a.mp4", "caption": "x", "fps": 8}', "line 2: unknown key 'fps'; known are video"),
        ("t.jsonl", "{", "line 1 is not JSON"),
        ("t.jsonl", "[1]", "line 1 is no row of keys and values"),
        ("t.csv", "video,caption\na.mp4,x,y\n", "line 2 has another number of columns"),
        ("t.csv", "video,caption\na.mp4\n", "line 2 has another number of columns"),
        ("t.csv", "path,caption\na.mp4,x\n", "unknown key 'path'"),
        ("t.parquet", "", "a table of clips is a .jsonl or a .csv file"),
    ],
)
def test_a_table_with_mistakes_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name) as caught:
        find_sources(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_there_and_two_at_once_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder or file"):
        find_sources(tmp_path / "none")
    (tmp_path / "train.csv").write_text("video,caption\n")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"has both train.jsonl and train.csv"):
        find_sources(tmp_path)


# --- what is left out, with its reason -------------------------------------------------------------------------------


def test_what_cannot_be_used_is_named_and_left_out(tmp_path):
    data = clips.write_folder(tmp_path, 2)
    clips.write_video(data / "no_caption.mp4")
    for name, text in {"empty": b" \n", "latin": "caf\xe9".encode("latin-1")}.items():
        clips.write_video(data / f"{name}.mp4")
        (data / f"{name}.txt").write_bytes(text)
    for name in ("text", "short", "cut", "silent", "picture"):
        (data / f"{name}.txt").write_text("a caption")
    (data / "text.mp4").write_text("not a video")
    clips.write_video(data / "short.mp4", frames=4)
    whole = clips.write_video(data / "cut.mp4", frames=40).read_bytes()
    (data / "cut.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    (data / "picture.png").write_bytes(b"\x89PNG\r\n")
    with av.open(str(data / "silent.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux([*stream.encode(frame), *stream.encode()])
    sources, skipped = find_sources(data)
    planned, more = plan_clips(sources, SAMPLING)
    assert {clip.source.path.name for clip in planned} == {"clip0.mp4", "clip1.mp4"}
    reasons = {one.path.name: str(one) for one in [*skipped, *more]}
    want = {
        "no_caption.mp4": "has no caption: no_caption.txt is missing",
        "empty.mp4": "its caption empty.txt is empty",
        "latin.mp4": "its caption latin.txt is not UTF-8 text",
        "text.mp4": "cannot be read as a video",
        "short.mp4": "is too short: 4 frames at 12 fps, and num_frames is 5",
        "cut.mp4": "is cut short",
        "silent.mp4": "has no video in it",
        "picture.png": "not a picture that can be read",
    }
    assert reasons.keys() == want.keys()
    for name, reason in want.items():
        assert reason in reasons[name]
        assert reasons[name].startswith(str(data / name))
        assert "\n" not in reasons[name]


def test_a_row_whose_file_is_missing_is_left_out(tmp_path):
    clips.write_video(tmp_path / "a.mp4")
    (tmp_path / "train.csv").write_text("video,prompt\nb.mp4,x\na.mp4,y\n")
    sources, skipped = find_sources(tmp_path)
    assert [source.path.name for source in sources] == ["a.mp4"]
    assert [str(one) for one in skipped] == [f"{tmp_path / 'b.mp4'}: no such file (line 2 of train.csv)"]


def test_damage_inside_a_video_shows_when_it_is_decoded(tmp_path):
    path = clips.write_video(tmp_path / "a.mp4", frames=30, height=64, width=64)
    (clip,), _ = plan_clips([Source(path, "video", "x")], Sampling((29,), 64, 64, (16, 16), 12))
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle:] = bytes(len(data) - middle)
    path.write_bytes(data)
    with pytest.raises(UserError, match="decoded"):
        read_clip(clip)


# --- clips -----------------------------------------------------------------------------------------------------------


def cut(tmp_path, available, **changes):
    path = clips.write_video(tmp_path / "v.mp4", frames=available)
    planned, skipped = plan_clips([Source(path, "video", "x")], Sampling(**{**vars(SAMPLING), **changes}))
    assert not skipped
    return [clip.frames for clip in planned]


def test_windows_of_each_kind(tmp_path):
    assert cut(tmp_path, 30) == [(0, 1, 2, 3, 4)]
    assert [f[0] for f in cut(tmp_path, 30, frames="uniform", windows=3)] == [0, 12, 25]
    assert [f[0] for f in cut(tmp_path, 6, frames="uniform", windows=4)] == [0, 1]
    assert [f[0] for f in cut(tmp_path, 30, frames="slide")] == [0, 5, 10, 15, 20, 25]
    assert [f[0] for f in cut(tmp_path, 12, frames="slide", stride=3)] == [0, 3, 6]
    assert [len(f) for f in cut(tmp_path, 12, num_frames=(5, 9, 17))] == [9]


@pytest.mark.parametrize(
    ("source", "target", "want"),
    [(12, 12, list(range(24))), (24, 12, list(range(0, 24, 2))), (12, 24, None), (30, 24, None), (23.976, 24, None)],
)
def test_resampling_keeps_time(source, target, want):
    times = np.arange(24) / source
    index = resample(times, target)
    if want is not None:
        assert index.tolist() == want
    shown = np.arange(len(index)) / target
    assert np.abs(times[index] - shown).max() <= 0.5 / source + 1e-9
    assert times[-1] - shown[-1] < 1 / target
    assert (np.diff(index) >= 0).all()


def test_times_rounded_to_milliseconds_repeat_no_frame():
    times = np.round(np.arange(50) / 24, 3)
    assert resample(times, 24).tolist() == list(range(50))
    assert resample(np.array([0.0]), 24).tolist() == [0]


def test_a_video_with_uneven_times_is_read_as_it_plays(tmp_path):
    path = clips.write_uneven(tmp_path / "u.mkv", [0, 100, 200, 620, 700, 800, 900])
    (clip,), _ = plan_clips([Source(path, "video", "x")], Sampling((9,), 32, 32, (16, 16), 10))
    assert clip.frames == (0, 1, 2, 2, 2, 3, 3, 4, 5)
    levels = (read_clip(clip)[0].mean(axis=(1, 2, 3)) + 1) * 127.5
    np.testing.assert_allclose(levels, [20 + 12 * i for i in clip.frames], atol=4)


def test_pixels_are_those_of_the_frames_scaled_and_cropped(tmp_path):
    path = clips.write_video(tmp_path / "v.mp4", frames=12, height=32, width=64)
    sampling = Sampling((5,), 32, 32, (16, 16), 12, frames="slide", stride=3, aspect_buckets=False)
    planned, _ = plan_clips([Source(path, "video", "x")], sampling)
    got = read_clip(planned[1])
    assert got.shape == (1, 5, 32, 32, 3)
    assert got.dtype == np.float32
    want = clips.pixels(0, 12, 32, 64)[3:8, :, 16:48] / 127.5 - 1
    assert np.abs(got[0] - want).mean() < 0.03


def test_shapes_go_into_the_nearest_bucket_and_pictures_are_one_frame(tmp_path):
    sources = [
        Source(clips.write_video(tmp_path / "wide.mp4", height=32, width=64), "video", "x"),
        Source(clips.write_video(tmp_path / "tall.mp4", height=64, width=32), "video", "x"),
        Source(clips.write_image(tmp_path / "p.png", 40, 44), "image", "x"),
    ]
    planned, _ = plan_clips(sources, Sampling((5,), 64, 64, (16, 16), 12))
    assert [clip.bucket for clip in planned] == [Bucket(5, 80, 48), Bucket(5, 48, 80), Bucket(1, 64, 64)]
    for clip in planned:
        frames, width, height = clip.bucket
        assert read_clip(clip).shape == (1, frames, height, width, 3)


def test_a_phones_rotation_is_followed(tmp_path):
    path = clips.write_video(tmp_path / "v.mp4", height=32, width=64)
    with av.open(str(path)) as source, av.open(str(tmp_path / "r.mp4"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        copy.set_display_rotation(90)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    (clip,), _ = plan_clips([Source(tmp_path / "r.mp4", "video", "x")], Sampling((5,), 64, 64, (16, 16), 12))
    assert clip.bucket == Bucket(5, 48, 80)


def test_flips_only_when_asked(tmp_path):
    source = Source(clips.write_image(tmp_path / "p.png", seed=1), "image", "x")
    assert len(plan_clips([source], SAMPLING)[0]) == 1
    plain, mirrored = plan_clips([source], Sampling(**{**vars(SAMPLING), "flip": True}))[0]
    np.testing.assert_array_equal(read_clip(mirrored), read_clip(plain)[:, :, :, ::-1])
    assert not np.array_equal(read_clip(mirrored), read_clip(plain))
    assert mirrored.name.endswith("p.png mirrored")


def test_names_tell_the_window():
    clip = Clip(Source(Path("a.mp4"), "video", "x"), Bucket(2, 16, 16), (3, 5))
    assert clip.name == "a.mp4 frames 3-5"
