"""Draws whole batches of scenes with MLX: shapes are signed distances, motions are functions of time.

    scenes, params, captions = sample_batch(np.random.default_rng(0), 64)
    video = render(mx.array(params))          # (64, 25, 128, 128, 3) in [-1, 1]

Inigo Quilez's "2D distance functions" explains such distances; these are written for shapes centred at the origin.
"""

import math
import random

import mlx.core as mx
import numpy as np

from mlx_wan.training.captions import caption
from mlx_wan.training.world import (
    BACKGROUNDS,
    CLIP_FRAMES,
    COLOURS,
    SHAPES,
    TWO_OBJECTS,
    Scene,
    SceneObject,
    sample_scene,
)

MAX_OBJECTS = 2
EDGE = 1.5  # width in pixels of the ramp from shape to background

# Columns of an object's parameters. Each object's row repeats the background's colour.
_COLUMNS = (
    "visible", "red", "green", "blue", "shape", "x", "y", "dx", "dy", "orbit", "phase", "turns", "bounce", "arcs",
    "radius", "growth", "back_red", "back_green", "back_blue",
)  # fmt: skip
NUM_PARAMS = len(_COLUMNS)
_AT = {name: i for i, name in enumerate(_COLUMNS)}


def encode_scenes(scenes: list[Scene]) -> np.ndarray:
    """Scenes to parameters, float32 (B, MAX_OBJECTS, NUM_PARAMS); a missing second object is invisible."""
    rows = [_scene_rows(scene) for scene in scenes]
    return np.array(rows, dtype=np.float32).reshape(len(scenes), MAX_OBJECTS, NUM_PARAMS)


def _scene_rows(scene: Scene) -> list[tuple[float, ...]]:
    back = _signed_rgb(BACKGROUNDS[scene.background])
    rows = [_object_row(each) + back for each in scene.objects]
    absent = (0.0,) * (_AT["radius"]) + (0.1, 0.0)
    return rows + [absent + back] * (MAX_OBJECTS - len(rows))


def _object_row(each: SceneObject) -> tuple[float, ...]:
    steps = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
    step = steps.get(each.motion, (0.0, 0.0))
    orbit = each.amount if each.motion == "orbit" else 0.0
    bounce = each.amount if each.motion == "bounce" else 0.0
    growth = each.amount - 1.0 if each.motion in ("grow", "shrink") else 0.0
    return (
        1.0, *_signed_rgb(COLOURS[each.colour]), float(SHAPES.index(each.shape)),
        each.x, each.y, step[0] * each.amount, step[1] * each.amount,
        orbit, each.phase, 2 * math.pi * each.cycles, bounce, math.pi * each.cycles, each.radius, growth,
    )  # fmt: skip


def _signed_rgb(rgb: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(v / 127.5 - 1.0 for v in rgb)


def sample_batch(
    rng: np.random.Generator, n: int, held_out: bool | None = False, two_objects: float = TWO_OBJECTS
) -> tuple[list[Scene], np.ndarray, list[str]]:
    """Draw n scenes: (scenes, their parameters (n, 2, NUM_PARAMS) float32, a caption for each).

    held_out: as `sample_scene` has it. two_objects: the chance that a scene has two, not one.
    """
    draw = random.Random(int(rng.integers(2**63)))  # scalar draws cost a tenth of the NumPy generator's
    scenes = [sample_scene(draw, held_out, 2 if draw.random() < two_objects else 1) for _ in range(n)]
    return scenes, encode_scenes(scenes), [caption(scene, draw) for scene in scenes]


def crop(params: np.ndarray, rng: np.random.Generator, part: float) -> np.ndarray:
    """Parameters of square windows, `part` of the frame wide, cut out of the scenes (B, 2, NUM_PARAMS).

    Three in four windows are laid about a place on the first object's way, the others anywhere. Rendering the result
    at `part` of the size shows the same pixels that the window of the whole frame shows.
    """
    out, count = params.copy(), len(params)
    near = rng.random(count) < 0.75
    for axis in "xy":
        centre = params[:, 0, _AT[axis]] + params[:, 0, _AT["d" + axis]] * rng.random(count) / 2
        about = centre - part / 2 + rng.uniform(-0.3, 0.3, count) * part
        corner = np.where(near, about, rng.uniform(-0.1, 1.1 - part, count))
        out[:, :, _AT[axis]] = (params[:, :, _AT[axis]] - corner[:, None]) / part
        out[:, :, _AT["d" + axis]] /= part
    for length in ("orbit", "bounce", "radius"):
        out[:, :, _AT[length]] /= part
    return out


def render(
    params: mx.array,
    num_frames: int = CLIP_FRAMES,
    height: int = 128,
    width: int = 128,
    dtype: mx.Dtype = mx.float32,
) -> mx.array:
    """Draw clips.

    params: (B, MAX_OBJECTS, NUM_PARAMS) of encode_scenes. Returns (B, num_frames, height, width, 3) in [-1, 1].
    Time does not stretch: fewer frames than CLIP_FRAMES show the beginning of the clip. A pure function of its
    arrays, so `mx.compile(render)` works and fuses it.
    """
    time = mx.arange(num_frames, dtype=mx.float32) / (CLIP_FRAMES - 1)
    back = params[:, 0, _AT["back_red"] :][:, None, None, None, :]  # (B, 1, 1, 1, 3)
    video = back
    for i in range(MAX_OBJECTS):
        row = params[:, i]
        x, y, radius = _path(row, time)  # (B, T) each
        alpha = _coverage(row[:, _AT["shape"]], x, y, radius, height, width)
        alpha = (alpha * row[:, 0][:, None, None, None])[..., None]  # (B, T, H, W, 1)
        colour = row[:, _AT["red"] : _AT["shape"]][:, None, None, None, :]
        video = video + alpha * (colour - video)
    return video.astype(dtype)


def _path(row: mx.array, time: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Centre x, y and radius, (B, T) in fractions of the frame, of objects (B, NUM_PARAMS) at times (T,) in [0, 1]."""
    at = {name: row[:, i, None] for name, i in _AT.items()}
    angle = at["phase"] + at["turns"] * time
    x = at["x"] + at["dx"] * time + at["orbit"] * mx.cos(angle)
    y = at["y"] + at["dy"] * time + at["orbit"] * mx.sin(angle)
    y = y - at["bounce"] * mx.abs(mx.cos(at["arcs"] * time))  # starts at the top of an arc
    return x, y, at["radius"] * (1.0 + at["growth"] * time)


def _coverage(shape: mx.array, x: mx.array, y: mx.array, radius: mx.array, height: int, width: int) -> mx.array:
    """How much of each pixel a shape covers, (B, T, H, W) in [0, 1]. shape: (B,) index; x, y, radius: (B, T)."""
    side = float(min(height, width))
    rows = mx.arange(height, dtype=mx.float32)[:, None] + 0.5
    columns = mx.arange(width, dtype=mx.float32)[None, :] + 0.5
    scale = (radius * side)[..., None, None]  # pixels
    px = (columns - (x * width)[..., None, None]) / scale
    py = (rows - (y * height)[..., None, None]) / scale
    kind = shape[:, None, None, None]
    distance = signed_distance(SHAPES[0], px, py)
    for index, name in enumerate(SHAPES[1:], start=1):
        distance = mx.where(kind == index, signed_distance(name, px, py), distance)
    return mx.clip(0.5 - distance * scale / EDGE, 0.0, 1.0)


def signed_distance(shape: str, x: mx.array, y: mx.array) -> mx.array:
    """Distance to the outline of the shape of radius 1 at the origin, negative inside; y points down."""
    if shape == "circle":
        return mx.sqrt(x * x + y * y) - 1.0
    if shape == "ring":
        return mx.abs(mx.sqrt(x * x + y * y) - 0.8) - 0.25
    if shape == "square":
        return _box(x, y, 0.88, 0.88)
    if shape == "cross":
        return mx.minimum(_box(x, y, 1.05, 0.34), _box(x, y, 0.34, 1.05))
    if shape == "triangle":
        return _triangle(x, y, 1.25)
    if shape == "star":
        return _star(x, y, 1.25, 0.56)
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")


def _box(x: mx.array, y: mx.array, half_width: float, half_height: float) -> mx.array:
    dx, dy = mx.abs(x) - half_width, mx.abs(y) - half_height
    outside = mx.sqrt(mx.square(mx.maximum(dx, 0.0)) + mx.square(mx.maximum(dy, 0.0)))
    return outside + mx.minimum(mx.maximum(dx, dy), 0.0)


def _triangle(x: mx.array, y: mx.array, circumradius: float) -> mx.array:
    """Equilateral, pointing up, its centroid at the origin. The distance is a bound outside the corners."""
    inradius = circumradius / 2
    slanted = (math.sqrt(3) / 2) * mx.abs(x) - 0.5 * y
    return mx.maximum(slanted, y) - inradius


def _star(x: mx.array, y: mx.array, outer: float, inner: float) -> mx.array:
    """Five points, one up: fold the plane onto one half of a point, whose edge is a segment outer-inner."""
    fifth = 2 * math.pi / 5
    angle = mx.arctan2(x, -y)  # 0 at the top point
    angle = mx.abs(angle - fifth * mx.round(angle / fifth))  # [0, pi / 5]
    r = mx.sqrt(x * x + y * y)
    qx, qy = r * mx.sin(angle), r * mx.cos(angle)  # the point's tip is (0, outer)
    vx, vy = inner * math.sin(fifth / 2), inner * math.cos(fifth / 2)  # the valley between two points
    ex, ey = vx, vy - outer  # tip to valley
    wx, wy = qx, qy - outer
    h = mx.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0.0, 1.0)
    distance = mx.sqrt(mx.square(wx - h * ex) + mx.square(wy - h * ey))
    return distance * mx.sign(wy * ex - wx * ey)
