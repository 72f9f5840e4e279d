"""The judge recognises true clips, also blurred, noisy and compressed ones, and is not fooled by false ones."""

import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_wan.training.judge import _pieces, judge, observe, summarise
from mlx_wan.training.scenes import encode_scenes, render
from mlx_wan.training.world import COLOURS, MOTIONS, SHAPES, Scene, SceneObject, sample_scene
from mlx_wan.video import VideoWriter, read_video


def clips_of(*scenes: Scene) -> np.ndarray:
    video = render(mx.array(encode_scenes(list(scenes))))
    return np.array(mx.round((video + 1) * 127.5).astype(mx.uint8))


@pytest.fixture(scope="module")
def truth() -> list[tuple[Scene, np.ndarray]]:
    rng = random.Random(4)
    scenes = [sample_scene(rng, held_out=None) for _ in range(40)]
    return [pair for i in range(0, 40, 8) for pair in zip(scenes[i : i + 8], clips_of(*scenes[i : i + 8]), strict=True)]


@pytest.fixture(scope="module")
def moving() -> tuple[Scene, np.ndarray]:
    scene = Scene("black", (SceneObject("red", "circle", "large", "right", 0.25, 0.5, 0.16, 0.45),))
    return scene, clips_of(scene)[0]


def blurred(frames):
    """A Gaussian of one pixel over rows and columns."""
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / 2)
    kernel /= kernel.sum()
    video = frames.astype(np.float64)  # (T, H, W, 3)
    for axis in (1, 2):
        width = [(3, 3) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(video, width, mode="edge")
        size = video.shape[axis]
        video = sum(k * np.take(padded, range(i, i + size), axis) for i, k in enumerate(kernel))
    return video


def changed(scene: Scene, **fields) -> Scene:
    return replace(scene, objects=(replace(scene.objects[0], **fields), *scene.objects[1:]))


def rates(verdicts: list[dict]) -> dict:
    return summarise(verdicts)["rates"]


def test_true_clips_pass(truth):
    verdicts = [judge(frames, scene) for scene, frames in truth]
    assert min(rates(verdicts).values()) >= 0.99, [v["details"] for v in verdicts if not v["all"]]


def test_blurred_noisy_clips_pass(truth):
    rng = np.random.default_rng(0)
    verdicts = []
    for scene, frames in truth[::3]:
        noisy = blurred(frames) + rng.normal(0, 8, frames.shape)
        verdicts.append(judge(np.clip(np.round(noisy), 0, 255).astype(np.uint8), scene))
    assert min(rates(verdicts).values()) >= 0.97, [v["details"] for v in verdicts if not v["all"]]


def test_compressed_clips_pass(truth, tmp_path):
    for scene, frames in truth[:3]:
        with VideoWriter(tmp_path / "clip.mp4", 12) as writer:
            writer.write(frames)
        verdict = judge(read_video(tmp_path / "clip.mp4")[0], scene)
        assert verdict["all"], verdict


def test_a_wrong_attribute_fails_alone(truth):
    """Each true clip, judged against its scene with one attribute changed, fails in that one."""
    others = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS}
    for i, (scene, frames) in enumerate(truth[:18]):
        name = ("colour", "shape", "motion")[i % 3]
        values = [v for v in others[name] if v not in {getattr(o, name) for o in scene.objects}]
        verdict = judge(frames, changed(scene, **{name: values[i % len(values)]}))
        passed = {n: verdict[n] for n in ("colour", "shape", "motion", "all")}
        assert passed == {n: n not in (name, "all") for n in passed}, (scene, verdict)


def test_an_empty_clip_fails(moving):
    verdict = judge(np.zeros((25, 128, 128, 3), np.uint8), moving[0])
    assert not any(verdict[name] for name in ("colour", "shape", "motion", "count", "all"))
    assert verdict["background"]


def test_noise_alone_fails(moving):
    frames = np.random.default_rng(0).integers(0, 256, (25, 128, 128, 3), dtype=np.uint8)
    verdict = judge(frames, moving[0])
    assert not verdict["all"]
    assert not verdict["shape"]


@pytest.mark.parametrize(
    ("edit", "motion"),
    [
        (lambda v: v[::-1], "left"),
        (lambda v: v.transpose(0, 2, 1, 3), "down"),
        (lambda v: v[:1].repeat(25, 0), "still"),
        (lambda v: np.concatenate([v[::2], v[-2::-2]]), "none"),  # there and back
        (lambda v: np.concatenate([v[:9], 0 * v[9:]]), "none"),  # gone after a third of the clip
        (lambda v: np.concatenate([v[:2].repeat(6, 0), v[-2:].repeat(6, 0)]), "none"),  # a jump
        (lambda v: np.random.default_rng(0).permutation(v), "none"),
    ],
)
def test_other_motions_are_seen(moving, edit, motion):
    scene, frames = moving
    (seen,) = observe(edit(frames))[1]
    assert (seen.colour, seen.shape, seen.motion) == ("red", "circle", motion)
    assert not judge(edit(frames), scene)["motion"]


def test_a_second_object_fails_the_count(moving):
    scene, frames = moving
    copy = np.maximum(frames, np.roll(frames, 50, axis=1))  # a second red circle
    stranger = np.maximum(frames, np.roll(frames, 50, axis=1)[..., ::-1])  # a blue one
    for video in (copy, stranger):
        verdict = judge(video, scene)
        assert not verdict["count"]
        assert not verdict["all"]


def test_a_missing_object_fails(moving):
    scene, frames = moving
    both = replace(scene, objects=(*scene.objects, SceneObject("cyan", "star", "small", "still", 0.5, 0.9, 0.09)))
    verdict = judge(frames, both)
    assert not any(verdict[name] for name in ("colour", "shape", "motion", "count", "all"))
    assert verdict["details"]["seen"][1] is None


def test_summary_counts_objects_and_confusions(moving):
    scene, frames = moving
    verdicts = [judge(frames, scene), judge(frames, changed(scene, motion="up"))]
    summary = summarise(verdicts)
    assert summary["rates"]["motion"] == 0.5
    assert summary["rates"]["colour"] == 1.0
    assert summary["by_value"]["motion"] == {"right": [1, 1], "up": [0, 1]}
    assert summary["confusion"]["motion"] == {"right": {"right": 1}, "up": {"right": 1}}


def test_the_largest_piece_is_taken_and_the_others_are_counted():
    """Pixels that touch at a corner are of one piece: a V of 5, and a line of 3 below it."""
    frame = np.array([[1, 0, 0, 0, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]], bool)
    largest, pieces = _pieces(np.stack([frame, frame[::-1], frame & False]))
    assert pieces == 2
    assert np.array_equal(largest[0], frame & (np.arange(5) < 3)[:, None])
    assert np.array_equal(largest[1], largest[0][::-1])
    assert not largest[2].any()
