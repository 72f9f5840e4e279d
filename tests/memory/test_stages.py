"""Plans against the peaks of runs, and what they say when memory is short."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import checkpoint
import mlx.core as mx
import pytest
import small
from PIL import Image

import mlx_wan
from mlx_wan.errors import UserError
from mlx_wan.memory.plan import Dimensions, Setting, choose, nearest, plans
from mlx_wan.models.transformer import rope_table
from mlx_wan.text import clean_prompt
from mlx_wan.weights.locate import locate
from mlx_wan.weights.quantize import Quantization
from mlx_wan.zoo import MODELS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import memory

STAGES = {"text": "text", "image": "image", "denoise": "denoise", "frames": "decode"}
TOLERANCE = 0.15
PROMPT = "a red circle moves"


def measured(folder, low_memory, **options):
    """Stage -> the most bytes of it, and the tokens of the longer prompt."""
    rope_table.cache_clear()  # of a larger plan, which would leave memory in the middle of the run
    mx.clear_cache()
    before = mx.get_active_memory()
    pipe = mlx_wan.WanPipeline.from_pretrained(folder, mx.float32, low_memory)
    if not low_memory:
        _ = pipe.text_encoder, pipe.transformer, pipe.vae
    mx.reset_peak_memory()
    peaks = {}
    for event in pipe.stream(PROMPT, seed=0, num_inference_steps=3, **options):
        if event.index == event.total:
            if event.stage in STAGES:
                peaks[STAGES[event.stage]] = mx.get_peak_memory() - before
            mx.reset_peak_memory()
    texts = (PROMPT, options.get("negative_prompt", pipe.spec.negative_prompt))
    return peaks, max(int(pipe.tokenizer(clean_prompt(text))[1].sum()) for text in texts)


def compare(folder, low_memory, pictures=(), **options):
    pictured = dict(zip(("image", "last_image"), pictures, strict=False))
    # How far MLX runs ahead depends on timing: a plan is for the most that happens.
    runs = [measured(folder, low_memory, **options, **pictured) for _ in range(2)]
    peaks, tokens = {stage: max(run[stage] for run, _ in runs) for stage in runs[0][0]}, runs[0][1]
    size = options["width"], options["height"], options["num_frames"]
    setting = Setting(*size, mx.float32, len(pictures), tokens)
    plan = plans(Dimensions.of_checkpoint(locate(folder)), setting, "CPU")[low_memory]
    planned = {}
    for stage in plan.stages:
        name = "image" if stage.name == "tokens" else stage.name
        planned[name] = max(planned.get(name, 0), stage.peak)
    assert planned == pytest.approx(peaks, rel=TOLERANCE)


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """400 MiB of random weights."""
    folder = tmp_path_factory.mktemp("medium")
    memory.write_model(folder)
    return folder


@pytest.mark.parametrize("low_memory", [True, False])
@pytest.mark.parametrize(("size", "frames"), [((64, 64), 5), ((160, 96), 17)])
def test_a_medium_run_holds_what_was_planned(medium, low_memory, size, frames):
    compare(medium, low_memory, width=size[0], height=size[1], num_frames=frames)


@pytest.mark.parametrize(
    ("name", "pictures"),
    [("small", 0), ("small", 1), ("small-t2v-A14B", 0), ("small-i2v-A14B", 2), ("small-i2v-14B", 1)],
)
def test_small_runs_of_every_kind_hold_what_was_planned(tmp_path, name, pictures):
    folder = checkpoint.write_official(tmp_path / "model", name)
    picture = Image.fromarray(small.picture(64, 96))
    compare(folder, True, [picture] * pictures, width=96, height=64, num_frames=9)


@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if spec.hub_id])
def test_released_models_are_planned_without_files(name):
    model = Dimensions.of_release(name)
    pictures = {"t2v": 0, "ti2v": 0, "i2v": 1, "flf2v": 2, "vace": 0}[model.spec.task]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    _, plan = plans(model, Setting(832, 480, 81, mx.bfloat16, pictures), "CPU")
    assert mx.get_peak_memory() - before < 100 * 2**20, "tables of angles at most"
    weights = {stage.name: stage.weights for stage in plan.stages}
    assert weights["text"] == pytest.approx(2 * 5.68e9, rel=0.01)  # UMT5-XXL's encoder has 5.68 billion parameters
    billions = {"ti2v-5B": 5.0, "t2v-1.3B": 1.42, "i2v-14B": 16.4, "flf2v-14B": 16.4}
    billions = (billions | {"vace-1.3B": 2.15, "vace-14B": 17.3}).get(name, 14.3)
    assert weights["denoise"] == pytest.approx(2e9 * billions, rel=0.03)


def test_a_released_models_dimensions_are_those_of_its_files():
    model = Dimensions.of_release("ti2v-5B")
    for part, dims in small.RELEASED.items():
        config = getattr(model, part)
        assert {name: getattr(config, name) for name in dims} == dims


def test_parts_stay_if_they_fit_and_leave_if_they_must():
    model, setting = Dimensions.of_checkpoint(locate("tiny")), Setting(96, 96, 25, mx.float32)
    keeping, leaving = plans(model, setting, "CPU")
    assert leaving.peak < keeping.peak
    assert choose(model, setting, "CPU", keeping.peak) == keeping
    assert choose(model, setting, "CPU", keeping.peak - 1) == leaving
    with pytest.raises(UserError, match=r"\w+ takes .* GiB of memory can be used: .* fits"):
        choose(model, setting, "CPU", leaving.peak - 1)


def test_the_nearest_setting_fits_and_the_next_does_not():
    model, setting = Dimensions.of_release("t2v-1.3B"), Setting(832, 480, 161, mx.float32, tokens=8)
    model = replace(model, quantization=Quantization(4))

    def peak(**changes):
        return plans(model, replace(setting, **changes), "CPU")[1].peak

    memory = peak(width=416, height=240, num_frames=5)
    assert peak() > memory
    said = nearest(model, setting, "CPU", memory)
    width, height, frames = map(int, re.fullmatch(r"--size (\d+)\*(\d+) --frame_num (\d+) fits", said).groups())
    assert (width, height) == (416, 240)
    assert peak(width=416, height=240, num_frames=frames) <= memory
    assert frames == 161 or peak(width=416, height=240, num_frames=frames + 4) > memory
    assert nearest(model, setting, "CPU", 2**20) is None


@pytest.mark.parametrize(
    ("name", "size", "card", "device"),
    [
        ("ti2v-5B", (1280, 704, 121), 8, "CUDA"),
        ("t2v-A14B", (832, 480, 81), 14, "CUDA"),
        ("t2v-A14B", (832, 480, 81), 14, "Metal"),
    ],
)
def test_packed_models_fit_small_cards(name, size, card, device):
    model = replace(Dimensions.of_release(name), quantization=Quantization(4))
    memory = int(0.95 * card * 2**30)  # what MLX leaves to itself
    plan = choose(model, Setting(*size, mx.bfloat16), device, memory)
    assert plan.peak <= memory
    assert plan.limit <= memory
    assert {stage.name for stage in plan.stages} == {"text", "denoise", "decode"}


def test_a_true_size_clip_is_decoded_within_6_gib_on_cuda():
    """Weights are 1.3, what layers remember 2.9, the rest is a strip's arrays; whole frames took 10.3."""
    plan = plans(Dimensions.of_release("ti2v-5B"), Setting(1280, 704, 121, mx.bfloat16), "CUDA", 80 * 2**30)[1]
    (decode,) = (stage for stage in plan.stages if stage.name == "decode")
    assert decode.peak < 6 * 2**30


def test_less_memory_is_less_run_ahead_on_cuda():
    model = replace(Dimensions.of_release("t2v-A14B"), quantization=Quantization(4))
    setting = Setting(832, 480, 81, mx.bfloat16)
    peaks = [plans(model, setting, "CUDA", gib * 2**30)[1].peak for gib in (0, 12, 70)]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[2]
