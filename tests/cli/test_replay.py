"""Settings in and out of files: `info VIDEO`, `generate --from`, `--batch`, several seeds, `--progress json`."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from mlx_wan.cli import report
from mlx_wan.cli.main import main
from mlx_wan.outputs import read_settings
from mlx_wan.video import read_video
from mlx_wan.weights.checkpoint import EMBEDDED

SHORT = ["--steps", "2", "--frame_num", "5"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (320, 200), (200, 0, 0)).save(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture
def first(folder):
    """A video of the embedded model, made with flags that are not its defaults."""
    line = ["--prompt", "a red circle", "--seed", "3", "--guidance", "2", "--shift", "4", "--fps", "9", *SHORT]
    assert main(["generate", *line, "-o", "first.mp4", "--save_settings"]) == 0
    return folder / "first.mp4"


def test_info_shows_what_a_video_carries(first, capsys):
    capsys.readouterr()
    assert main(["info", "first.mp4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads((first.parent / "first.mp4.json").read_text())
    expected = {"prompt": "a red circle", "seed": 3, "guidance_scale": 2.0, "fps": 9.0, "dtype": "float32"}
    assert facts.items() >= (expected | {"model": "tiny", "ckpt_dir": "tiny", "device": "CPU"}).items()
    assert len(facts["fingerprints"]["model"]) == 16
    assert facts["mlx"]
    assert facts["mlx_wan"]
    assert main(["info", "first.mp4"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1)
    assert rows["prompt"] == "a red circle"
    assert main(["info", "photo.png"]) == 2
    assert capsys.readouterr().err == "error: photo.png: carries no settings of mlx-wan\n"


def test_a_run_of_listed_timesteps_is_repeated_and_changed(folder, capsys):
    line = ["--prompt", "a red circle", "--seed", "3", "--guidance", "1", "--frame_num", "5"]
    line += ["--sample_timesteps", "1000,757,522", "--sample_solver", "dmd"]
    assert main(["generate", *line, "-o", "listed.mp4"]) == 0
    facts = read_settings(folder / "listed.mp4")
    assert (facts["timesteps"], facts["num_inference_steps"], facts["scheduler"]) == ([1000, 757, 522], 3, "dmd")
    assert "shift" not in facts
    assert main(["generate", "--from", "listed.mp4", "-o", "again.mp4"]) == 0
    assert (folder / "again.mp4").read_bytes() == (folder / "listed.mp4").read_bytes()
    for number, change in enumerate((["--steps", "2"], ["--timesteps", "1000,500"])):
        assert main(["generate", "--from", "listed.mp4", *change, "-o", f"{number}.mp4"]) == 0
        facts = read_settings(folder / f"{number}.mp4")
        assert facts["num_inference_steps"] == 2
        assert facts.get("timesteps") == (None if number == 0 else [1000, 500])
    capsys.readouterr()


def test_a_codec_is_kept_where_the_new_file_can_have_it(folder, capsys):
    line = ["--prompt", "a red circle", "--seed", "3", *SHORT]
    assert main(["generate", *line, "--codec", "lossless", "-o", "exact.mp4"]) == 0
    assert main(["generate", "--from", "exact.mp4", "-o", "again.mp4"]) == 0
    assert (folder / "again.mp4").read_bytes() == (folder / "exact.mp4").read_bytes()
    assert main(["generate", "--from", "exact.mp4", "-o", "frames/"]) == 0
    exact, _ = read_video(folder / "exact.mp4")
    for number, frame in enumerate(exact, start=1):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "frames" / f"{number:04d}.png")), frame)
    capsys.readouterr()


def test_dials_are_kept_with_the_video(folder, capsys):
    line = ["--prompt", "a red circle", "--seed", "3", "--steps", "12", "--frame_num", "5"]
    line += ["--cache", "0.1", "--guidance_interval", "0.2", "0.9"]
    assert main(["generate", *line, "-o", "dials.mp4"]) == 0
    assert "of 12 steps did without the transformer" in capsys.readouterr().err
    facts = read_settings(folder / "dials.mp4")
    assert (facts["cache"], facts["guidance_interval"]) == (0.1, [0.2, 0.9])
    assert main(["generate", "--from", "dials.mp4", "-o", "again.mp4"]) == 0
    assert (folder / "again.mp4").read_bytes() == (folder / "dials.mp4").read_bytes()
    assert main(["generate", "--from", "dials.mp4", "--cache", "2", "-o", "other.mp4"]) == 2
    assert "cache is 2.0; give a relative change between 0 and 1" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["first.mp4", "first.mp4.json"])
def test_from_repeats_the_run_to_the_byte(first, capsys, source):
    capsys.readouterr()
    assert main(["generate", "--from", source, "-o", "again.mp4"]) == 0
    assert (first.parent / "again.mp4").read_bytes() == first.read_bytes()
    assert "note:" not in capsys.readouterr().err


def test_flags_given_have_the_last_word(first):
    assert main(["generate", "--from", "first.mp4", "--seed", "4", "--fps", "12", "-o", "other.mp4"]) == 0
    facts, before = read_settings(first.parent / "other.mp4"), read_settings(first)
    assert facts["seed"] == 4
    assert {key for key in facts if facts[key] != before[key]} == {"seed", "fps"}
    assert not np.array_equal(read_video("other.mp4")[0], read_video("first.mp4")[0])


def test_another_model_says_so(first, capsys):
    shutil.copytree(EMBEDDED, "copy")
    assert main(["generate", "--from", "first.mp4", "--ckpt_dir", "copy", "-o", "a.mp4"]) == 0
    assert "another model" not in capsys.readouterr().err
    assert (read_video("a.mp4")[0] == read_video("first.mp4")[0]).all()
    data = bytearray((first.parent / "copy" / "vae.safetensors").read_bytes())
    data[-1] ^= 1
    (first.parent / "copy" / "vae.safetensors").write_bytes(data)
    assert main(["generate", "--from", "first.mp4", "--ckpt_dir", "copy", "-o", "a.mp4"]) == 0
    assert "note: first.mp4 was made by another model (" in capsys.readouterr().err
    assert main(["generate", "--from", "a.mp4", "-o", "b.mp4"]) == 0  # finds the folder by its name
    assert (read_video("a.mp4")[0] == read_video("b.mp4")[0]).all()
    os.rename("copy", "elsewhere")
    assert main(["generate", "--from", "a.mp4", "-o", "b.mp4"]) == 2
    assert "say where it is with --ckpt_dir" in capsys.readouterr().err


def test_a_picture_is_found_again_and_the_size_kept(folder, capsys):
    line = ["--prompt", "a red circle", "--image", "photo.png", "--seed", "3", *SHORT]
    assert main(["generate", *line, "-o", "a.mp4"]) == 0
    assert main(["generate", "--from", "a.mp4", "-o", "b.mp4"]) == 0
    assert (folder / "a.mp4").read_bytes() == (folder / "b.mp4").read_bytes()
    capsys.readouterr()
    Image.new("RGB", (200, 320), (0, 200, 0)).save("photo.png")
    assert main(["generate", "--from", "a.mp4", "-o", "b.mp4"]) == 0
    assert "note: --image photo.png: is another file than a.mp4 was made with" in capsys.readouterr().err
    os.remove("photo.png")
    assert main(["generate", "--from", "a.mp4", "-o", "b.mp4"]) == 2
    assert "was made with photo.png, which is not here; say where it is with --image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ([], "x.json: carries no settings of mlx-wan; give --prompt"),
        (
            {"prompt": "a", "ckpt_dir": "tiny", "seed": "7"},
            "x.json: its seed is '7', which cannot be; give --base_seed",
        ),
        ({"prompt": 5, "ckpt_dir": "tiny"}, "x.json: its prompt is 5"),
        ({"prompt": "a", "model": "ti2v-5B"}, "x.json: was made by the model ti2v-5B; say where it is with --ckpt_dir"),
    ],
)
def test_settings_that_cannot_be_are_one_line(folder, capsys, facts, message):
    (folder / "x.json").write_text(json.dumps(facts))
    assert main(["generate", "--from", "x.json"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


# --- several videos ------------------------------------------------------------------------------------------


def test_several_seeds_make_several_videos(folder, capsys):
    assert main(["generate", "--prompt", "a red circle", *SHORT, "--seed", "1", "2", "-o", "a.webp"]) == 0
    assert sorted(path.name for path in folder.glob("*.webp")) == ["a_seed1.webp", "a_seed2.webp"]
    assert main(["generate", "--prompt", "a red circle", *SHORT, "--seed", "2", "-o", "b.webp"]) == 0
    assert (folder / "b.webp").read_bytes() == (folder / "a_seed2.webp").read_bytes()
    assert [line for line in capsys.readouterr().out.splitlines() if "seed " in line] == ["seed 1", "seed 2", "seed 2"]


def test_one_frame_is_a_picture(folder):
    assert main(["generate", "--prompt", "a red circle", "--steps", "1", "--frame_num", "1", "--seed", "1"]) == 0
    (made,) = folder.glob("tiny_*.png")
    assert read_settings(made)["num_frames"] == 1


LINES = [
    '{"prompt": "a red circle", "seed": [1, 2], "save_file": "a.mp4"}',
    '{"prompt": "a blue square", "frame_num": 10}',
    "",
    '{"promt": "a blue square"}',
    "not JSON",
    '{"prompt": "a blue square", "save-file": "frames/", "sample_steps": 1, "t5_cpu": false, "fps": null}',
    '{"prompt": "a blue square", "save_file": "a_seed2.mp4"}',
    '{"prompt": "a blue square", "steps": "four"}',
    '["a blue square"]',
]


def test_a_batch_loads_once_reports_bad_lines_and_goes_on(folder, capsys, monkeypatch):
    from mlx_wan.cli import generate

    loads, original = [], generate._load
    monkeypatch.setattr(generate, "_load", lambda *given: loads.append(1) or original(*given))
    (folder / "lines.jsonl").write_text("\n".join(LINES))
    assert main(["generate", "--batch", "lines.jsonl", *SHORT, "--seed", "5"]) == 1
    out, err = capsys.readouterr()
    errors = [line.removeprefix("error: lines.jsonl line ") for line in err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[0] for line in errors] == ["2", "4", "5", "7", "8", "9"]
    for part, line in zip(
        (
            "--frame_num 10: must be 4n+1",
            "promt is no option of a line, did you mean prompt?",
            "is not JSON",
            "a_seed2.mp4: is already the file of an earlier video",
            "invalid int value: 'four'",
            "is not a JSON object",
        ),
        errors,
        strict=True,
    ):
        assert part in line
    assert [line for line in out.splitlines() if "." in line.split()[0]] == [
        "a_seed1.mp4",
        "a_seed2.mp4",
        "frames/%04d.png",
    ]
    assert len(loads) == 1
    assert len(list((folder / "frames").iterdir())) == 5
    assert read_settings(folder / "frames")["num_inference_steps"] == 1
    assert read_settings(folder / "a_seed1.mp4")["num_inference_steps"] == 2


def test_a_run_that_fails_does_not_stop_the_others(folder, capsys, monkeypatch):
    from mlx_wan.cli import generate
    from mlx_wan.errors import WanError

    original = generate._make

    def make(args, *given):
        if args.prompt == "bad":
            raise WanError("latents are not finite")
        return original(args, *given)

    monkeypatch.setattr(generate, "_make", make)
    lines = [{"prompt": "bad", "save_file": "a.mp4"}, {"prompt": "good", "save_file": "b.mp4"}]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["generate", "--batch", "lines.jsonl", *SHORT]) == 1
    assert "error: lines.jsonl line 1: latents are not finite" in capsys.readouterr().err
    assert sorted(path.name for path in folder.glob("*.mp4")) == ["b.mp4"]


def test_a_batch_of_good_lines_is_a_success_and_an_empty_one_a_mistake(folder, capsys):
    (folder / "good.jsonl").write_text('{"prompt": "a red circle", "save_file": "a.gif"}\n')
    assert main(["generate", "--batch", "good.jsonl", *SHORT]) == 0
    (folder / "empty.jsonl").write_text("\n")
    for name in ("empty.jsonl", "absent.jsonl"):
        assert main(["generate", "--batch", name]) == 2
        assert f"error: {name}: " in capsys.readouterr().err


# --- what programs read --------------------------------------------------------------------------------------


def test_progress_json_is_one_object_a_line(folder, capsys):
    line = ["--prompt", "a red circle", *SHORT, "--seed", "1", "-o", "a.mp4", "--progress", "json"]
    assert main(["generate", *line]) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "note"
    assert kinds[-1] == "saved"
    assert [event["stage"] for event in events if event["event"] == "stage"] == ["load", "text", "denoise", "decode"]
    progress = [event for event in events if event["event"] == "progress"]
    assert [(event["step"], event["piece"]) for event in progress] == [(1, 0), (2, 0), (2, 1), (2, 2)]
    assert all(event["steps"] == event["pieces"] == 2 for event in progress)
    assert events[-1]["path"] == "a.mp4"
    assert set(events[-1]["seconds"]) == {"load", "text", "denoise", "decode"}
    assert all(a["elapsed"] <= b["elapsed"] for a, b in itertools.pairwise(events))


@pytest.mark.parametrize("flag", [["--progress", "json"], ["--progress=json"]])
def test_mistakes_too_are_json(capsys, flag):
    assert main(["generate", *flag, "--qqq"]) == 2
    event = json.loads(capsys.readouterr().err)
    assert (event["event"], event["exit_code"]) == ("error", 2)
    assert event["message"].startswith("unknown flag --qqq")
    assert main(["generate", "--qqq"]) == 2  # and the next one is not
    assert capsys.readouterr().err.startswith("error: unknown flag")


@pytest.mark.parametrize(
    ("terminal", "environment", "coloured"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals_without_no_color(monkeypatch, capsys, terminal, environment, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(report.sys.stderr, "isatty", lambda: terminal)
    report.note("hello")
    assert capsys.readouterr().err == ("\033[33mnote:\033[0m hello\n" if coloured else "note: hello\n")
