"""`mlx-wan generate`: what each flag becomes, and every way a request can be wrong."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import checkpoint
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_wan
from mlx_wan import backend
from mlx_wan.cli import generate, request
from mlx_wan.cli.main import main
from mlx_wan.memory.plan import Dimensions, Setting, plans
from mlx_wan.video import read_metadata, read_video
from mlx_wan.weights.locate import locate
from mlx_wan.zoo import NEGATIVE_PROMPT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A small model in the official layout; sampled like TI2V-5B, because nothing in it says otherwise."""
    return checkpoint.write_official(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def experts(tmp_path_factory) -> Path:
    """One of two experts for text to video, sampled like T2V-A14B."""
    return checkpoint.write_official(tmp_path_factory.mktemp("experts") / "model", "small-t2v-A14B")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (320, 200), (200, 0, 0)).save(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture
def requests(model, folder, monkeypatch, capsys):
    """Runs a command line up to where weights would be loaded; returns exit code, options, path and stderr."""

    monkeypatch.setattr(backend, "usable_memory", lambda: 2**60)  # the defaults are those of TI2V-5B

    def request(line: str, prompt: str = "a red circle", ckpt_dir: Path = model):
        made = []

        def make(args, checkpoint, options, path, pipelines):
            made.append((options, path))
            request.low_memory = args.low_memory
            return {"load": 1.0, "denoise": 2.0}

        monkeypatch.setattr(generate, "_make", make)
        code = main(["generate", "--prompt", prompt, "--ckpt_dir", str(ckpt_dir), *line.split()])
        options, path = made[0] if made else (None, None)
        return code, options, path, capsys.readouterr().err

    return request


# --- flags -> options ----------------------------------------------------------------------------------------


def test_the_models_own_values_are_the_defaults(requests):
    code, options, path, _ = requests("")
    seed = options.pop("seed")
    assert code == 0
    assert 0 <= seed < 2**32
    assert options == {
        "image": None,
        "negative_prompt": NEGATIVE_PROMPT,
        "width": 1280,
        "height": 704,
        "num_frames": 121,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "shift": 5.0,
        "scheduler": "unipc",
    }
    assert re.fullmatch(r"custom_1280x704_a_red_circle_\d{8}_\d{6}\.mp4", path.name)


OFFICIAL = (
    "--task ti2v-5B --size 96*64 --frame_num 9 --save_file out.mp4 --base_seed 7 --sample_solver dpm++ "
    "--sample_steps 6 --sample_shift 3 --sample_guide_scale 4.5 --n_prompt blurry"
)
SHORT = (
    "--size 96x64 --num_frames 9 --output out.mp4 --seed 7 --scheduler dpm++ --steps 6 --shift 3 --guidance 4.5 "
    "--negative_prompt blurry"
)


@pytest.mark.parametrize("line", [OFFICIAL, OFFICIAL.replace("_", "-"), f"-- {OFFICIAL}", SHORT])
def test_official_and_short_names_mean_the_same(model, folder, monkeypatch, line):
    made = []
    monkeypatch.setattr(generate, "_make", lambda *given: made.append(given[2:4]) or {})
    words = line.split()
    start, words = words[: words[0] == "--"], words[words[0] == "--" :]
    assert main(["generate", *start, "--prompt", "a_b-c", "--ckpt-dir", str(model), *words]) == 0
    ((options, path),) = made
    assert path == Path("out.mp4")
    assert options == {
        "image": None,
        "negative_prompt": "blurry",
        "width": 96,
        "height": 64,
        "num_frames": 9,
        "num_inference_steps": 6,
        "guidance_scale": 4.5,
        "shift": 3.0,
        "scheduler": "dpm++",
        "seed": 7,
    }


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("--offload_model True", "--offload_model"),
        ("--offload-model false --t5_cpu", "--offload_model, --t5_cpu"),
        ("--convert_model_dtype", "--convert_model_dtype"),
    ],
)
def test_pointless_flags_are_accepted_and_say_so_in_one_line(requests, line, names):
    code, options, _, err = requests(f"--size 1280*704 {line}")
    assert code == 0
    assert options
    assert err == f"note: {names}: no effect here, because CPU and GPU share their memory\n"


def test_with_a_picture_only_the_area_of_the_size_counts(requests):
    _, options, _, _ = requests("--image photo.png --size 96*64")
    assert (options["width"], options["height"]) == (96, 64)
    _, options, _, _ = requests("--image photo.png --size 64*96")
    assert (options["width"], options["height"]) == (96, 64)
    assert options["image"].size == (320, 200)


def test_two_random_seeds_differ(requests):
    seeds = {requests("--base_seed -1")[1]["seed"] for _ in range(3)}
    assert len(seeds) == 3


# --- the default name ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ('what/is: "this"? <a|b> \\ * \n..', "what_is_this_a_b"),
        ("../../etc/passwd", "etc_passwd"),
        ("一只猫，在跑", "一只猫_在跑"),
        ("!!!", "video"),
        ("red " * 100, "red_" * 12 + "re"),
    ],
)
def test_default_names_are_safe(requests, prompt, words):
    path = requests("--size 96*64", prompt=prompt)[2]
    assert path.parent == Path()
    assert re.fullmatch(rf"custom_96x64_{re.escape(words)}_\d{{8}}_\d{{6}}\.mp4", path.name)
    assert len(path.name.encode()) < 250


def test_default_names_never_meet_a_file_that_is_there(folder, monkeypatch):
    monkeypatch.setattr(request.time, "strftime", lambda form: "now")
    names = []
    for _ in range(3):
        path = request.free_name("a cat", "tiny", {"width": 128, "height": 64, "num_frames": 5})
        path.touch()
        names.append(path.name)
    assert names == ["tiny_128x64_a_cat_now.mp4", "tiny_128x64_a_cat_now_2.mp4", "tiny_128x64_a_cat_now_3.mp4"]


# --- the user's mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--size 100*64", "--size 100*64: width must be a multiple of 32, height of 32; try 96*64"),
        ("--size 96*0", "--size 96*0: width must be a multiple of 32, height of 32; try 96*32"),
        ("--size big", "--size big: must be width*height in pixels, such as 1280*704"),
        ("--size -96*64", "argument --size: expected one argument"),
        ("--frame_num 10", "--frame_num 10: must be 4n+1, for instance 9"),
        ("--frame_num 0", "--frame_num 0: must be 4n+1, for instance 1"),
        ("--frame_num -3", "--frame_num -3: must be 4n+1, for instance 1"),
        ("--frame_num nine", "argument --frame_num/--num_frames: invalid int value: 'nine'"),
        ("--sample_steps 0", "--sample_steps 0: must be 1 to 1000"),
        ("--sample_shift 0", "--sample_shift 0.0: must be above 0"),
        ("--sample_guide_scale nan", "--sample_guide_scale nan: must be a number"),
        ("--fps 0", "--fps 0: must be 1 to 240"),
        ("--base_seed 99999999999999999999", "--base_seed 99999999999999999999: must be at most"),
        ("--sample_solver ddim", "argument --sample_solver/--scheduler: invalid choice: 'ddim'"),
        ("--offload_model maybe", "argument --offload_model: 'maybe' is not true or false"),
        ("--task t2v-A14B", "--task t2v-A14B: "),
        ("--task animate-14B", "--task animate-14B is not supported; use one of ti2v-5B, t2v-A14B, i2v-A14B"),
        ("--task t2v", "--task t2v is unknown; use one of ti2v-5B, t2v-A14B, i2v-A14B"),
        ("--sample_guide_scale 3,4", "guidance_scale is (3.0, 4.0); a pair (low noise, high noise) is for models of"),
        ("--sample_guide_scale 3,x", "argument --sample_guide_scale/--guidance: '3,x' is not a number, or some"),
        ("--image absent.png", "absent.png: no such picture file"),
        ("--image text.png", "text.png: is not a picture"),
        ("--image cut.png", "cut.png: the picture is damaged or cut short"),
        ("--save_file no/such/folder/out.mp4", "no/such/folder/out.mp4: the folder no/such/folder does not exist"),
        ("--save_file out.avi", "out.avi: a video's name ends in .mp4"),
        ("--save_file /proc/out.mp4", "/proc/out.mp4: "),
        ("--image=", "--image is empty; give a name"),
        ("--last_frame=", "--last_frame is empty; give a name"),
        ("--image photo.png --last_frame photo.png", "custom takes no last frame: leave it out, or use I2V-A14B"),
        ("--save_file=", "--save_file is empty; give a name"),
        ("--ckpt_dir=", "--ckpt_dir is empty; give a name"),
        ("--sample-step 4", "unknown flag --sample-step, did you mean --sample_steps?"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(requests, folder, line, message):
    whole = (folder / "photo.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("hello")
    before = sorted(os.listdir(folder))
    code, options, _, err = requests(line)
    assert code == 2
    assert options is None
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert sorted(os.listdir(folder)) == before


def test_a_missing_prompt_is_said(capsys):
    assert main(["generate"]) == 2
    assert capsys.readouterr().err.startswith("error: the following arguments are required: --prompt")


def test_a_missing_checkpoint_is_the_users_mistake(requests, folder):
    code, _, _, err = requests("", ckpt_dir=folder / "absent")
    assert code == 2
    assert err.startswith(f"error: {folder}/absent: no such folder")
    assert err.count("\n") == 1


def test_an_untrained_size_gets_a_note_not_a_refusal(requests, monkeypatch):
    from dataclasses import replace

    from mlx_wan.weights import locate as module

    original = module.locate
    trained = lambda *a, **k: replace(found := original(*a, **k), spec=replace(found.spec, sizes=((1280, 704),)))  # noqa: E731
    monkeypatch.setattr(module, "locate", trained)
    assert requests("")[3] == ""
    code, options, _, err = requests("--size 96*64")
    assert code == 0
    assert options
    assert err == "note: the model was trained for 1280*704; 96*64 may look worse\n"


# --- damaged checkpoints and too little memory ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "config.json", "transformer"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_a_failure_named_before_the_work(requests, folder, name, damage):
    broken = checkpoint.write_official(folder / "broken")
    file = next(broken.glob("diffusion*.safetensors")) if name == "transformer" else broken / name
    whole = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    code, options, _, err = requests("", ckpt_dir=broken)
    assert code == 1
    assert options is None
    assert err.startswith("error: ")
    assert file.name in err
    assert err.count("\n") == 1


SMALL_CLIP = "--size 64*32 --frame_num 5"


def planned(folder, **setting):
    """The peaks of both plans for a small clip."""
    setting = Setting(64, 32, 5, **{"dtype": mx.float32, **setting})
    return [plan.peak for plan in plans(Dimensions.of_checkpoint(locate(folder)), setting, "CPU")]


def test_what_does_not_fit_is_refused_with_what_does(requests, model, monkeypatch):
    keeping, leaving = planned(model)
    # What takes most here is decoding; fewer frames help it, but nothing is as small as 1,000 bytes.
    for memory, help in ((leaving - 1, "--frame_num 1 fits"), (1000, "no smaller setting fits either")):
        monkeypatch.setattr(backend, "usable_memory", lambda memory=memory: memory)
        code, options, _, err = requests(SMALL_CLIP)
        assert (code, options) == (2, None)
        assert err.count("\n") == 1
        assert re.search(rf"error: decode takes .* GiB of memory can be used: {help}", err)
    assert requests(f"{SMALL_CLIP} --ignore_plan")[0] == 0
    for memory, low_memory in ((leaving, True), (keeping - 1, True), (keeping, False)):
        monkeypatch.setattr(backend, "usable_memory", lambda memory=memory: memory)
        code, *_ = requests(SMALL_CLIP)
        assert (code, requests.low_memory) == (0, low_memory)


@pytest.mark.parametrize(("flag", "fits"), [("", True), ("--keep-both-experts", False)])
def test_of_two_experts_one_needs_memory_unless_both_are_kept(requests, experts, monkeypatch, flag, fits):
    one, both = planned(experts)[1], planned(experts, keep_both_experts=True)[1]
    assert one <= both
    keeping_one, keeping_both = planned(experts)[0], planned(experts, keep_both_experts=True)[0]
    assert keeping_one < keeping_both
    monkeypatch.setattr(backend, "usable_memory", lambda: keeping_one)
    assert requests(f"{SMALL_CLIP} {flag}", ckpt_dir=experts)[0] == 0
    assert requests.low_memory == (not fits)


def test_two_experts_have_guidance_each(requests, experts):
    _, options, _, _ = requests("", ckpt_dir=experts)
    expected = {"width": 1280, "height": 720, "num_frames": 81, "num_inference_steps": 40, "shift": 12.0}
    assert options.items() >= (expected | {"guidance_scale": (3.0, 4.0)}).items()
    assert requests("--sample_guide_scale 1.5,2", ckpt_dir=experts)[1]["guidance_scale"] == (1.5, 2.0)
    assert requests("--guidance 3", ckpt_dir=experts)[1]["guidance_scale"] == 3.0
    code, _, _, err = requests("--guidance 1,2,3", ckpt_dir=experts)
    assert (code, err) == (
        2,
        "error: guidance_scale is (1.0, 2.0, 3.0); a pair (low noise, high noise) is for models of two experts\n",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--task ti2v-5B", "--task ti2v-5B: {experts} holds a model of the kind t2v-A14B"),
        ("--task i2v-A14B", "--task i2v-A14B: {experts} holds a model of the kind t2v-A14B"),
        ("--last_frame photo.png", "custom takes no picture: leave the image out, or use an I2V or TI2V model"),
        ("--image photo.png", "custom takes no picture: leave the image out, or use an I2V or TI2V model"),
        ("--size 100*64", "--size 100*64: width must be a multiple of 16, height of 16; try 96*64"),
    ],
)
def test_mistakes_with_two_experts(requests, experts, line, message):
    code, options, _, err = requests(line, ckpt_dir=experts)
    assert (code, options) == (2, None)
    assert err == f"error: {message.format(experts=experts)}\n"
    assert requests("--task t2v-A14B", ckpt_dir=experts)[0] == 0


def test_a_picture_is_asked_for_where_one_is_needed(requests, folder):
    i2v = checkpoint.write_official(folder / "i2v", "small-i2v-A14B")
    code, options, _, err = requests("", ckpt_dir=i2v)
    assert (code, options, err) == (2, None, "error: custom makes a video of a picture: give an image\n")
    _, options, _, _ = requests("--image photo.png --size 832*480", ckpt_dir=i2v)  # 320x200
    assert (options["width"], options["height"], options["shift"]) == (784, 496, 5.0)


# --- whole runs ----------------------------------------------------------------------------------------------

SMALL_RUN = ("--size", "96*64", "--frame_num", "9", "--sample_steps", "2", "--prompt", "a red circle")


def door(*arguments: str, **options) -> subprocess.Popen:
    """generate.py as a user starts it."""
    line = [sys.executable, str(ROOT / "generate.py"), *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_run_writes_the_video_and_says_what_it_took(model, folder):
    run = door("--", "--task", "ti2v-5B", "--ckpt_dir", str(model), *SMALL_RUN, "--base-seed", "3")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    path, seed, seconds, memory = out.splitlines()
    assert seed == "seed 3"
    number = r"\d+\.\d s"
    assert re.fullmatch(f"load {number}, text {number}, denoise {number}, decode {number}, together {number}", seconds)
    assert re.fullmatch(r"peak memory \d\.\d\d GiB", memory)
    for stage in ("load", "text", "denoise", "decode"):
        assert stage in err
    assert "100%" in err
    assert "left" in err

    frames, fps = read_video(folder / path)
    assert frames.shape == (9, 64, 96, 3)
    assert fps == 24
    facts = read_metadata(folder / path)
    assert facts is not None
    expected = {"prompt": "a red circle", "seed": 3, "width": 96, "height": 64, "num_frames": 9, "dtype": "float32"}
    assert facts.items() >= expected.items()
    assert "image" not in facts
    assert sorted(os.listdir(folder)) == sorted(["photo.png", path])


@pytest.mark.parametrize(("task", "flags"), [("t2v-A14B", ()), ("i2v-A14B", ("--image", "photo.png"))])
def test_a_run_over_two_experts_writes_the_video(folder, capsys, task, flags):
    model = checkpoint.write_official(folder / "model", f"small-{task}")
    line = ["--task", task, "--ckpt_dir", str(model), "--size", "64*48", "--frame_num", "5", "--sample_steps", "6"]
    assert main(["generate", *line, *flags, "--prompt", "a cat", "--seed", "1", "-o", "a.mp4"]) == 0
    frames, fps = read_video("a.mp4")
    assert (frames.shape, fps) == ((5, 48, 64, 3) if task == "t2v-A14B" else (5, 32, 64, 3), 16)
    assert read_metadata("a.mp4")["guidance_scale"] == ([3.0, 4.0] if task == "t2v-A14B" else [3.5, 3.5])


def test_a_run_between_two_pictures(folder, capsys):
    model = checkpoint.write_official(folder / "model", "small-flf2v-14B")
    line = ["--task", "flf2v-14B", "--ckpt_dir", str(model), "--size", "64*48", "--frame_num", "5", "--steps", "1"]
    pictures = ["--first_frame", "photo.png", "--last_frame", "photo.png"]
    assert main(["generate", *line, *pictures, "--prompt", "a cat", "--seed", "1", "-o", "a.mp4"]) == 0
    assert read_video("a.mp4")[0].shape == (5, 32, 64, 3)
    facts = read_metadata("a.mp4")
    assert (facts["image"], facts["last_image"], facts["shift"]) == ("photo.png", "photo.png", 16.0)


def test_the_file_holds_what_the_pipeline_makes(model, folder):
    pipe = mlx_wan.WanPipeline.from_pretrained(model)
    made = pipe("a red circle", image="photo.png", width=96, height=64, num_frames=9, num_inference_steps=2, seed=3)
    line = ["--ckpt_dir", str(model), *SMALL_RUN, "--image", "photo.png", "--seed", "3", "--fps", "8", "-o", "a.mp4"]
    assert main(["generate", *line]) == 0
    frames, fps = read_video("a.mp4")
    assert fps == 8
    # Noise is the hardest thing to compress, its colours are halved in size, but its brightness tells frames apart.
    grey, expected = (video @ np.array([0.2126, 0.7152, 0.0722]) for video in (frames, made.frames))
    errors = [np.abs(grey - np.roll(expected, k, axis=0)).mean() for k in range(3)]
    assert errors[0] < 2
    assert errors[0] < 0.2 * min(errors[1:])
    assert (read_metadata("a.mp4") or {})["image"] == "photo.png"


def test_latents_that_are_not_finite_fail_in_one_line_and_leave_no_file(folder):
    broken = checkpoint.write_official(folder / "broken")
    shard = next(broken.glob("diffusion*.safetensors"))
    weights = dict(mx.load(str(shard)))
    name = next(iter(weights))
    weights[name] = weights[name] * float("nan")
    mx.eval(weights)
    mx.save_safetensors(str(shard), weights)
    run = door("--ckpt_dir", str(broken), *SMALL_RUN, cwd=folder)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: latents are not finite after step 1 of 2")
    assert "Traceback" not in err
    assert sorted(os.listdir(folder)) == ["broken", "photo.png"]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_cleanly(model, folder, sign):
    run = door("--ckpt_dir", str(model), *SMALL_RUN, "--steps", "1000", cwd=folder)
    assert run.stderr is not None
    shown = ""
    while "denoise" not in shown:
        character = run.stderr.read(1)
        assert character, shown
        shown += character
    run.send_signal(sign)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert err.splitlines()[-1] == "stopped"
    assert "Traceback" not in err
    assert out == ""
    assert os.listdir(folder) == ["photo.png"]
