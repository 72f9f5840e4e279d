"""Judges clips of the little world without a network: finds the background, the objects, and what each one does.

`observe` looks at frames alone; `judge` compares what it saw with a scene. Pixels are explained as a mixture of
the background and one palette colour; an object's shape is the template that overlaps best when laid over it with
its own centre and area; its motion follows from the track of its centre and area.
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_wan.training.scenes import signed_distance
from mlx_wan.training.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene, SceneObject

ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS}
_REPORTED = (*ATTRIBUTES, "size", "iou", "pieces")
NONE = "none"  # what cannot be told, or is nothing that the world knows

# Areas and lengths in shares of the frame: its area, its shorter side.
LEAST_AREA = 0.001  # an object's solid part, on average over the frames
LEAST_SHARE = 0.05  # of everything that is not background
LEAST_IOU = 0.6  # below it an outline is no shape
STILL = 0.08  # a centre that stays within it stands still
GROWN = 1.8  # ratio of the areas at the two ends
JUMP = 0.35  # the largest step between frames, as a share of the whole way, that is still a movement
VISIBLE = 0.9  # share of the frames an object must be in to have a motion
SPLIT_RADIUS = 0.13  # between small and large


@dataclass(frozen=True)
class Seen:
    """An object found in a clip. track: x, y (fractions of width and height) and area (pixels) in each frame, NaN
    where it is missing."""

    colour: str
    shape: str
    motion: str
    size: str
    iou: float
    pieces: int
    track: np.ndarray  # (T, 3)


def observe(frames: np.ndarray) -> tuple[str, list[Seen]]:
    """What a clip shows: the nearest background's name, and its objects, largest first.

    frames: uint8 (T, H, W, 3).
    """
    pixels = frames.astype(np.float32)
    back = _background(pixels)
    masks = _segment(pixels, back)
    return _nearest(back, BACKGROUNDS), [_look_at(colour, mask) for colour, mask in masks]


def judge(frames: np.ndarray, scene: Scene) -> dict[str, Any]:
    """Compare a clip with the scene it should show.

    frames: uint8 (T, H, W, 3). Returns booleans: "colour", "shape", "motion" (each for every object of the scene),
    "count" (as many objects as in the scene, each in one piece), "background", "all" (colour, shape, motion and
    count); and "details" with what was expected and seen. Objects are matched so that most attributes agree.
    """
    background, seen = observe(frames)
    best = _match(scene.objects, seen)
    pairs = list(zip(scene.objects, best, strict=True))
    verdict: dict[str, Any] = {
        name: all(s is not None and getattr(s, name) == getattr(o, name) for o, s in pairs) for name in ATTRIBUTES
    }
    verdict["count"] = len(seen) == len(scene.objects) and all(s.pieces == 1 for s in seen)
    verdict["background"] = background == scene.background
    verdict["all"] = all(verdict[name] for name in (*ATTRIBUTES, "count"))
    verdict["details"] = {
        "background": background,
        "expected": [{name: getattr(o, name) for name in (*ATTRIBUTES, "size")} for o in scene.objects],
        "seen": [{name: getattr(s, name) for name in _REPORTED} if s else None for s in best],
        "found": len(seen),
    }
    return verdict


def _match(objects: tuple[SceneObject, ...], seen: list[Seen]) -> list[Seen | None]:
    """For each object of the scene the one seen that is meant, or None."""
    padded = [*seen, *[None] * (len(objects) - len(seen))]

    def agreement(choice: tuple[Seen | None, ...]) -> int:
        pairs = [(o, s) for o, s in zip(objects, choice, strict=True) if s is not None]
        return sum((o.colour == s.colour) + (o.shape == s.shape) + (o.motion == s.motion) for o, s in pairs)

    return list(max(permutations(padded, len(objects)), key=agreement))


# ---- pixels ------------------------------------------------------------------------------------------------


def _background(pixels: np.ndarray) -> np.ndarray:
    """The background's colour (3,): the median of the frame's border over the clip."""
    border = np.ones(pixels.shape[1:3], bool)
    border[3:-3, 3:-3] = False
    return np.median(pixels[:, border].reshape(-1, 3), axis=0)


def _nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(rgb - np.array(palette[name]))))


def _segment(pixels: np.ndarray, back: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Objects by colour: (colour's name, mask (T, H, W) bool), largest first. pixels: (T, H, W, 3)."""
    names = [n for n, rgb in COLOURS.items() if np.linalg.norm(rgb - back) > 60]  # others would be invisible
    towards = np.array([COLOURS[n] for n in names], np.float32) - back
    label, solid = _explain(pixels - back, towards)
    core = _erode(solid)
    counts = np.array([(core & (label == i)).sum() for i in range(len(names))], float)
    least = max(LEAST_AREA * label.size, LEAST_SHARE * counts.sum())
    found = [int(i) for i in np.argsort(-counts) if counts[i] >= least]
    found = _without_fringes(found, label, solid)
    if not found:
        return []
    label, solid = _explain(pixels - back, towards[found])  # what other colours held goes to the nearest of these
    return [(names[each], solid & (label == i)) for i, each in enumerate(found)]


def _explain(delta: np.ndarray, towards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explain each pixel as background plus a share in [0, 1] of one colour.

    delta: (T, H, W, 3) pixel minus background; towards: (n, 3) colour minus background. Returns the index of the
    colour that leaves the least unexplained (T, H, W), and whether its share is over one half.
    """
    dots = delta @ towards.T  # (T, H, W, n)
    lengths = (towards**2).sum(-1)
    share = np.clip(dots / lengths, 0.0, 1.0)
    rest = share * (share * lengths - 2 * dots)  # + |delta|^2, the same for each colour
    label = rest.argmin(-1)
    return label, np.take_along_axis(share, label[..., None], -1)[..., 0] > 0.5


def _erode(mask: np.ndarray) -> np.ndarray:
    """Pixels of (T, H, W) whose four neighbours are in the mask too; outside the frame counts as in."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    up, down, left, right = padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]
    return mask & up & down & left & right


def _without_fringes(found: list[int], label: np.ndarray, solid: np.ndarray) -> list[int]:
    """Drop a colour that is only a rim or a stain of a larger one: most of it within two pixels of that one."""
    kept: list[int] = []
    for each in found:
        mask = solid & (label == each)
        rims = [~_erode(_erode(~(solid & (label == other)))) for other in kept]
        if all((mask & rim).sum() < 0.6 * mask.sum() for rim in rims):
            kept.append(each)
    return kept


def _pieces(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The largest connected piece of each frame, and how many pieces a typical frame has, not counting those
    under a quarter of the largest. mask: (T, H, W)."""
    lines = _lines(mask)
    names, before = np.arange(1, mask.sum() + 1), None
    while before is None or not np.array_equal(before, names):  # each line takes the largest number of its pixels
        before = names.copy()
        for pixels, starts, lengths in lines:
            names[pixels] = np.repeat(np.maximum.reduceat(names[pixels], starts), lengths)
    label = np.zeros(mask.shape, int)
    label[mask] = names
    largest = np.zeros_like(mask)
    counts = []
    for t, frame in enumerate(label):
        names, sizes = np.unique(frame[frame > 0], return_counts=True)
        if len(names):
            largest[t] = frame == names[sizes.argmax()]
            counts.append(int((sizes >= 0.25 * sizes.max()).sum()))
    return largest, int(np.median(counts)) if counts else 0


def _lines(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The mask's unbroken lines, across, down and along both diagonals: for each way its pixels line after line, as
    indices among the mask's; each line's start among those; its length. Nothing for an empty mask (T, H, W)."""
    frame, y, x = np.nonzero(mask)
    found = []
    for line, along in ((y, x), (x, y), (y - x, x), (y + x, x)) if len(x) else ():
        pixels = np.lexsort((along, line, frame))
        steps = [np.diff(each[pixels], prepend=-1) for each in (frame, line, along)]
        begins = (steps[0] != 0) | (steps[1] != 0) | (steps[2] != 1)
        begins[0] = True
        starts = np.flatnonzero(begins)
        found.append((pixels, starts, np.diff(starts, append=len(pixels))))
    return found


# ---- objects -----------------------------------------------------------------------------------------------


def _look_at(colour: str, mask: np.ndarray) -> Seen:
    """What the object under the mask (T, H, W) is and does."""
    mask, pieces = _pieces(mask)
    height, width = mask.shape[1:]
    track = _track(mask)
    shape, iou = _shape(mask, track)
    side = min(height, width)
    radius = float(np.sqrt(np.nanmedian(track[:, 2]) / _unit_area(shape))) / side if shape != NONE else 0.0
    size = "small" if radius < SPLIT_RADIUS else "large"
    return Seen(colour, shape, _motion(track), size, iou, pieces, track)


def _track(mask: np.ndarray) -> np.ndarray:
    """(T, 3): the centre's x and y as fractions of the frame and the area in pixels; NaN when under 16 pixels."""
    height, width = mask.shape[1:]
    area = mask.sum((1, 2)).astype(float)
    area[area < 16] = np.nan
    x = (mask.sum(1) * (np.arange(width) + 0.5)).sum(-1) / area / width
    y = (mask.sum(2) * (np.arange(height) + 0.5)).sum(-1) / area / height
    return np.stack([x, y, area], axis=-1)


def _shape(mask: np.ndarray, track: np.ndarray) -> tuple[str, float]:
    """The shape whose template, at the mask's own centre and area, overlaps it best, and its mean IoU."""
    height, width = mask.shape[1:]
    seen = np.flatnonzero(np.isfinite(track[:, 2]))
    if not len(seen):
        return NONE, 0.0
    x = mx.array((np.arange(width) + 0.5 - track[seen, 0, None] * width)[:, None, :], dtype=mx.float32)
    y = mx.array((np.arange(height) + 0.5 - track[seen, 1, None] * height)[:, :, None], dtype=mx.float32)
    scores = []
    for shape in SHAPES:
        radius = mx.array(np.sqrt(track[seen, 2] / _unit_area(shape))[:, None, None], dtype=mx.float32)
        template = np.array(signed_distance(shape, x / radius, y / radius) < 0)
        scores.append(((template & mask[seen]).sum((1, 2)) / (template | mask[seen]).sum((1, 2))).mean())
    best = int(np.argmax(scores))
    return (SHAPES[best] if scores[best] >= LEAST_IOU else NONE), float(scores[best])


@cache
def _unit_area(shape: str) -> float:
    """Area of the shape of radius 1, counted on a fine grid."""
    axis = mx.arange(-1.5, 1.5, 0.005)
    return float(np.array(signed_distance(shape, axis[None, :], axis[:, None]) < 0).sum()) * 0.005**2


# ---- motion ------------------------------------------------------------------------------------------------


def _motion(track: np.ndarray) -> str:
    """One of MOTIONS, or NONE. track: (T, 3) of _track."""
    whole, track = len(track), track[np.isfinite(track[:, 2])]
    if len(track) < max(5, VISIBLE * whole):
        return NONE
    path = track[:, :2]
    extent = path.max(0) - path.min(0)
    ratio = float(np.median(track[-4:, 2]) / np.median(track[:4, 2]))
    if max(ratio, 1 / ratio) >= GROWN:
        return NONE if extent.max() > 2 * STILL else "grow" if ratio > 1 else "shrink"
    if extent.max() < STILL:
        return "still"
    if extent.min() > 0.5 * extent.max():
        return "orbit" if _is_turn(path) else NONE
    main = int(extent.argmax())
    turns = _reversals(path[:, main], 0.25 * extent[main])
    if turns >= 2:
        return "bounce" if main == 1 else NONE
    way = path[-1, main] - path[0, main]
    if (
        np.abs(np.diff(path[:, main])).max() > JUMP * extent[main]
        or abs(way) < 0.75 * extent[main]
        or extent[1 - main] > 0.35 * extent[main]
    ):
        return NONE  # it jumps, turns back, or goes aslant
    return (("left", "right"), ("up", "down"))[main][int(way > 0)]


def _is_turn(path: np.ndarray) -> bool:
    """Whether the path (T, 2) goes at least two thirds around a centre at a roughly constant distance."""
    arm = path - (path.max(0) + path.min(0)) / 2
    distance = np.hypot(*arm.T)
    swept = np.unwrap(np.arctan2(arm[:, 1], arm[:, 0]))
    return bool(abs(swept[-1] - swept[0]) > np.radians(240) and distance.std() < 0.35 * distance.mean())


def _reversals(values: np.ndarray, least: float) -> int:
    """How often the values turn back by more than least."""
    turns, direction = 0, 0
    low = high = values[0]
    for value in values[1:]:
        low, high = min(low, value), max(high, value)
        if direction <= 0 and value - low > least:
            turns += direction < 0
            direction, high = 1, value
        elif direction >= 0 and high - value > least:
            turns += direction > 0
            direction, low = -1, value
    return turns


# ---- many clips --------------------------------------------------------------------------------------------


def summarise(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates over clips, and for each attribute rates by its value and the confusion, over objects.

    Returns {"clips", "rates": {colour, shape, motion, all, count, background}, "by_value": {attribute: {value:
    [right, of]}}, "confusion": {attribute: {expected: {seen: n}}}}.
    """
    names = ("colour", "shape", "motion", "all", "count", "background")
    rates = {name: float(np.mean([v[name] for v in verdicts])) for name in names}
    by_value: dict[str, dict[str, list[int]]] = {name: {} for name in ATTRIBUTES}
    confusion: dict[str, dict[str, dict[str, int]]] = {name: {} for name in ATTRIBUTES}
    for verdict in verdicts:
        details = verdict["details"]
        for expected, seen in zip(details["expected"], details["seen"], strict=True):
            for name in ATTRIBUTES:
                want, got = expected[name], seen[name] if seen else NONE
                score = by_value[name].setdefault(want, [0, 0])
                score[0] += want == got
                score[1] += 1
                row = confusion[name].setdefault(want, {})
                row[got] = row.get(got, 0) + 1
    return {"clips": len(verdicts), "rates": rates, "by_value": by_value, "confusion": confusion}
