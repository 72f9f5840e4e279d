"""The renderer draws what the scene says, where and when it says it."""

import random

import mlx.core as mx
import numpy as np
import pytest

from mlx_wan.training.scenes import NUM_PARAMS, encode_scenes, render, sample_batch, signed_distance
from mlx_wan.training.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MOTIONS,
    REACH,
    SHAPES,
    SIZES,
    TRIPLES,
    Scene,
    SceneObject,
    is_held_out,
    is_held_out_triple,
    sample_scene,
)


def one(
    motion="still", *, shape="circle", colour="red", x=0.5, y=0.5, radius=0.15, background="black", **rest
) -> Scene:
    return Scene(background, (SceneObject(colour, shape, "large", motion, x, y, radius, **rest),))


def frames_of(*scenes: Scene, **options) -> np.ndarray:
    return np.array(render(mx.array(encode_scenes(list(scenes))), **options))


def centre_of_light(video: np.ndarray) -> np.ndarray:
    """(T, 2) x and y in pixels of what differs from the black background."""
    light = (video + 1).sum(-1)
    rows, columns = np.mgrid[: video.shape[1], : video.shape[2]] + 0.5
    total = light.sum((1, 2))
    return np.stack([(light * columns).sum((1, 2)) / total, (light * rows).sum((1, 2)) / total], axis=-1)


def area(video: np.ndarray) -> np.ndarray:
    return (video[..., 0] > 0).sum((1, 2))


def test_shape_type_and_range():
    video = render(mx.array(sample_batch(np.random.default_rng(0), 3)[1]), 5, 32, 48, mx.bfloat16)
    assert video.shape == (3, 5, 32, 48, 3)
    assert video.dtype == mx.bfloat16
    video = video.astype(mx.float32)
    assert video.min() >= -1
    assert video.max() <= 1
    assert video.max() > video.min()


def test_inside_has_the_object_colour_and_outside_the_background():
    video = frames_of(one(colour="cyan", background="beige"), num_frames=1)
    rgb = np.round((video[0, 0] + 1) * 127.5)
    assert tuple(rgb[64, 64]) == COLOURS["cyan"]
    assert tuple(rgb[2, 2]) == BACKGROUNDS["beige"]


@pytest.mark.parametrize(
    ("motion", "last"),
    [("left", (0.1, 0.5)), ("right", (0.9, 0.5)), ("up", (0.5, 0.1)), ("down", (0.5, 0.9)), ("still", (0.5, 0.5))],
)
def test_moves_go_the_whole_way(motion, last):
    video = frames_of(one(motion, radius=0.08, amount=0.4 if motion != "still" else 0.0))[0]
    path = centre_of_light(video) / 128
    np.testing.assert_allclose(path[0], (0.5, 0.5), atol=2e-3)
    np.testing.assert_allclose(path[-1], last, atol=2e-3)
    np.testing.assert_allclose(path[12], (np.array(last) + 0.5) / 2, atol=2e-3)


def test_orbit_is_a_clockwise_circle():
    path = centre_of_light(frames_of(one("orbit", radius=0.08, amount=0.25, cycles=1.0))[0]) / 128 - 0.5
    np.testing.assert_allclose(np.hypot(*path.T), 0.25, atol=2e-3)
    np.testing.assert_allclose(
        path[[0, 6, 12, 18, 24]], [(0.25, 0), (0, 0.25), (-0.25, 0), (0, -0.25), (0.25, 0)], atol=3e-3
    )


def test_bounce_falls_on_the_floor_and_rises_again():
    path = centre_of_light(frames_of(one("bounce", radius=0.08, y=0.8, amount=0.4, cycles=2.0))[0]) / 128
    np.testing.assert_allclose(path[:, 0], 0.5, atol=2e-3)
    np.testing.assert_allclose(path[[0, 6, 12, 18, 24], 1], [0.4, 0.8, 0.4, 0.8, 0.4], atol=3e-3)


@pytest.mark.parametrize(("motion", "ratio"), [("grow", 2.0), ("shrink", 0.5)])
def test_growing_and_shrinking_change_the_radius(motion, ratio):
    areas = area(frames_of(one(motion, radius=0.15, amount=ratio))[0])
    assert areas[-1] / areas[0] == pytest.approx(ratio**2, rel=0.04)


def test_second_object_covers_the_first_and_a_missing_one_is_invisible():
    red, blue = one(radius=0.2).objects[0], one(colour="blue", radius=0.1).objects[0]
    both, alone = frames_of(Scene("black", (red, blue)), Scene("black", (red,)), num_frames=1)[:, 0]
    assert tuple(np.round((both[64, 64] + 1) * 127.5)) == COLOURS["blue"]
    assert tuple(np.round((both[64, 44] + 1) * 127.5)) == COLOURS["red"]
    outside_blue = np.ones((128, 128), bool)
    outside_blue[48:80, 48:80] = False
    np.testing.assert_array_equal(both[outside_blue], alone[outside_blue])


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distances(shape):
    """Negative just inside the outline, positive outside, never changing faster than 1 per unit (no torn edges),
    and the shape reaches as far as REACH says."""
    axis = np.linspace(-1.6, 1.6, 161, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    distance = np.array(signed_distance(shape, mx.array(x), mx.array(y)))
    step = axis[1] - axis[0]
    assert max(abs(np.diff(distance, axis=a)).max() for a in (0, 1)) <= step * 1.001
    inside = distance < 0
    reach = max(abs(x[inside]).max(), abs(y[inside]).max())
    assert REACH[shape] - 0.06 <= reach <= REACH[shape] + 1e-3
    assert (distance[80, 80] < 0) == (shape != "ring")
    np.testing.assert_allclose(inside, inside[:, ::-1])  # every shape is its own mirror image


def test_shapes_are_told_apart_by_area():
    scenes = [one(shape=shape, radius=0.3) for shape in SHAPES]
    masks = frames_of(*scenes, num_frames=1)[:, 0, ..., 0] > 0
    for i in range(len(SHAPES)):
        for j in range(i):
            assert (masks[i] & masks[j]).sum() / (masks[i] | masks[j]).sum() < 0.9, (SHAPES[i], SHAPES[j])


def test_fewer_frames_are_the_beginning():
    params = mx.array(sample_batch(np.random.default_rng(3), 2)[1])
    assert mx.array_equal(render(params, 9), render(params, 25)[:, :9])


def test_sampled_scenes_stay_in_the_frame_and_apart():
    rng = random.Random(1)
    scenes = [sample_scene(rng, held_out=None) for _ in range(2000)]
    for scene in scenes:
        boxes = [_box(each) for each in scene.objects]
        for low, high in boxes:
            assert low.min() >= 0.01, scene
            assert high.max() <= 0.99, scene
        if len(boxes) == 2:
            (low1, high1), (low2, high2) = boxes
            assert ((high1 < low2) | (high2 < low1)).any(), scene
    assert 0.30 < sum(len(s.objects) == 2 for s in scenes) / 2000 < 0.40


def _box(each: SceneObject) -> tuple[np.ndarray, np.ndarray]:
    """Corners of all that the object covers during the clip, from the rules of the world."""
    reach = each.radius * REACH[each.shape] * (max(1.0, each.amount) if each.size is None else 1.0)
    centre = np.array([each.x, each.y])
    low, high = centre - reach, centre + reach
    if each.motion == "orbit":
        return low - each.amount, high + each.amount
    way = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "bounce": (0, -1)}.get(each.motion, (0, 0))
    shift = np.array(way) * each.amount
    return np.minimum(low, low + shift), np.maximum(high, high + shift)


def test_every_part_of_the_world_is_drawn_and_held_out_triples_are_not():
    scenes, params, captions = sample_batch(np.random.default_rng(0), 8000)
    assert params.shape == (8000, 2, NUM_PARAMS)
    assert params.dtype == np.float32
    assert len(captions) == 8000
    assert not any(is_held_out(scene) for scene in scenes)
    seen = {(o.colour, o.shape, o.motion) for s in scenes for o in s.objects}
    assert seen == set(TRIPLES) - set(HELD_OUT)
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    assert {o.size for s in scenes for o in s.objects} == {*SIZES, None}
    assert all((o.size is None) == (o.motion in ("grow", "shrink")) for s in scenes for o in s.objects)


def test_held_out_scenes_hold_out_every_object():
    rng = random.Random(5)
    scenes = [sample_scene(rng, held_out=True) for _ in range(2000)]
    triples = {(o.colour, o.shape, o.motion) for s in scenes for o in s.objects}
    assert triples == set(HELD_OUT)


def test_held_out_rule_is_even_and_spares_the_first_example():
    assert len(HELD_OUT) == 54
    assert not is_held_out_triple("red", "circle", "right")
    for pair in ((0, 1), (0, 2), (1, 2)):
        left = [tuple(t[i] for i in pair) for t in TRIPLES if t not in HELD_OUT]
        counts = [left.count(each) for each in set(left)]
        everything = len({tuple(t[i] for i in pair) for t in TRIPLES})
        assert len(counts) == everything
        assert min(counts) >= 5
    assert {t[0] for t in HELD_OUT} == set(COLOURS)
    assert {t[2] for t in HELD_OUT} == set(MOTIONS)


def test_the_same_seed_draws_the_same_batch_and_scenes_survive_json():
    first, second = (sample_batch(np.random.default_rng(7), 50) for _ in range(2))
    assert first[0] == second[0]
    assert first[2] == second[2]
    assert first[0] != sample_batch(np.random.default_rng(8), 50)[0]
    for scene in first[0]:
        assert Scene.from_dict(scene.to_dict()) == scene


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_as_many_scenes_have_two_objects_as_are_wanted(share):
    scenes, _, _ = sample_batch(np.random.default_rng(0), 400, two_objects=share)
    assert sum(len(scene.objects) == 2 for scene in scenes) / 400 == pytest.approx(share, abs=0.08)
