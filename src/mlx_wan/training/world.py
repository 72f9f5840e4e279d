"""The little world the embedded model is trained on: what can be in a clip, and how a clip is drawn from it.

A scene is one plain background and one or two coloured shapes, each with a motion. Lengths are fractions of
the frame: x of its width, y of its height (0 is the top), radii of its shorter side. A scene describes a clip
of CLIP_FRAMES frames, about two seconds at 12 frames a second.
"""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

CLIP_FRAMES = 25
CLIP_FPS = 12

# sRGB, 0-255. Any two colours differ by more than 100 (Euclidean), and each differs from each background so.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 35, 40),
    "green": (35, 170, 60),
    "blue": (40, 80, 240),
    "yellow": (255, 235, 50),
    "orange": (250, 135, 10),
    "purple": (140, 40, 200),
    "cyan": (40, 215, 225),
    "pink": (255, 110, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (115, 115, 115),
    "navy": (15, 25, 80),
    "brown": (95, 60, 35),
    "beige": (235, 220, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
MOTIONS = ("left", "right", "up", "down", "still", "orbit", "bounce", "grow", "shrink")
SIZES = ("small", "large")

# How far a shape of radius 1 reaches from its centre; scenes.py draws them so.
REACH = {"circle": 1.0, "square": 0.88, "triangle": 1.25, "star": 1.25, "ring": 1.05, "cross": 1.05}

TWO_OBJECTS = 0.35  # share of scenes with two objects
_BACKGROUND_WEIGHTS = (35, 20, 15, 10, 10, 10)
_RADIUS = {"small": (0.090, 0.105), "large": (0.155, 0.175)}
_STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_MARGIN = 0.015  # nothing comes closer to the frame's edge or to the line between two objects


Triple = tuple[str, str, str]  # colour, shape, motion


@dataclass(frozen=True)
class SceneObject:
    """One shape and its motion.

    x, y: where its centre starts (left, right, up, down), stays (still, grow, shrink), is on the floor (bounce),
    or what it circles (orbit). radius: at the start. amount: the way it goes (left, right, up, down), the
    orbit's radius, the bounce's height, or the last radius divided by the first (grow, shrink); 0 when still.
    phase: the orbit's starting angle in radians, clockwise from 3 o'clock. cycles: turns or bounces in the clip.
    size is "small", "large", or None for what grows or shrinks.
    """

    colour: str
    shape: str
    size: str | None
    motion: str
    x: float
    y: float
    radius: float
    amount: float = 0.0
    phase: float = 0.0
    cycles: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A background's name and one or two objects; the second is drawn over the first."""

    background: str
    objects: tuple[SceneObject, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Scene":
        """The way back from to_dict."""
        return cls(data["background"], tuple(SceneObject(**each) for each in data["objects"]))


def is_held_out_triple(colour: str, shape: str, motion: str) -> bool:
    """Whether this combination is kept out of training.

    One colour of the eight for each (shape, motion), chosen by (colour + 3 shape + 5 motion) mod 8 == 2 over the
    positions in COLOURS, SHAPES and MOTIONS: 54 of 432 triples. Each (colour, motion) pair keeps at least five
    of its six shapes and each (colour, shape) pair at least seven of its nine motions.
    """
    position = list(COLOURS).index(colour) + 3 * SHAPES.index(shape) + 5 * MOTIONS.index(motion)
    return position % 8 == 2


TRIPLES = tuple((c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS)
HELD_OUT = tuple(t for t in TRIPLES if is_held_out_triple(*t))
SEEN = tuple(t for t in TRIPLES if not is_held_out_triple(*t))
_POOLS = {None: TRIPLES, True: HELD_OUT, False: SEEN}


def is_held_out(scene: Scene) -> bool:
    """Whether any of the scene's objects is a combination that training never shows."""
    return any(is_held_out_triple(o.colour, o.shape, o.motion) for o in scene.objects)


def sample_scene(rng: random.Random, held_out: bool | None = False, count: int | None = None) -> Scene:
    """Draw a scene.

    held_out: False draws only combinations for training, True only held-out ones (each object's), None any.
    count: one or two objects; None lets chance decide (TWO_OBJECTS). Two objects always differ in colour and
    keep to their own part of the frame.
    """
    pool = _POOLS[held_out]
    if count is None:
        count = 2 if rng.random() < TWO_OBJECTS else 1
    background = rng.choices(tuple(BACKGROUNDS), _BACKGROUND_WEIGHTS)[0]
    first = rng.choice(pool)
    if count == 1:
        draft = _draft(rng, first, rng.choice(SIZES), together=False)
        return Scene(background, (_place(rng, draft, (0.0, 1.0), (0.0, 1.0)),))
    second = rng.choice(pool)
    while second[0] == first[0]:
        second = rng.choice(pool)
    return Scene(background, _place_two(rng, first, second))


@dataclass(frozen=True)
class _Draft:
    """An object before it has a place. low, high: the range of its amount."""

    triple: Triple
    size: str | None
    radius: float
    ratio: float
    low: float
    high: float

    @property
    def reach(self) -> float:
        return self.radius * max(1.0, self.ratio) * REACH[self.triple[1]]

    def need(self, axis: int) -> float:
        """The least length along x (0) or y (1) that it can live in."""
        return 2 * (self.reach + _MARGIN) + self.low * self.way(axis)

    def way(self, axis: int) -> float:
        """How much of the frame along this axis each unit of amount takes."""
        motion = self.triple[2]
        if motion in _STEP:
            return float(abs(_STEP[motion][axis]))
        return {"orbit": 2.0, "bounce": float(axis)}.get(motion, 0.0)


def _draft(rng: random.Random, triple: Triple, size: str, together: bool) -> _Draft:
    """Choose radius and the range of the amount; two objects together travel less and grow less."""
    motion = triple[2]
    if motion in ("grow", "shrink"):
        radius = rng.uniform(0.075, 0.085)
        ratio = rng.uniform(2.0, 2.1) if together else rng.uniform(2.0, 2.5)
        if motion == "shrink":
            radius, ratio = radius * ratio, 1 / ratio
        return _Draft(triple, None, radius, ratio, 0.0, 0.0)
    radius = rng.uniform(*_RADIUS[size])
    low, high = {"still": (0.0, 0.0), "orbit": (0.17, 0.26), "bounce": (0.32, 0.48)}.get(motion, (0.35, 0.55))
    if together:
        low = {"still": 0.0, "orbit": 0.10}.get(motion, 0.25)
    return _Draft(triple, size, radius, 1.0, low, high)


def _place_two(
    rng: random.Random, first: tuple[str, str, str], second: tuple[str, str, str]
) -> tuple[SceneObject, ...]:
    """Give each object its own part of the frame, side by side or one above the other."""
    sizes = (rng.choice(SIZES), rng.choice(SIZES))
    for attempt in (sizes, ("small", "small")):  # two small ones always fit
        drafts = (_draft(rng, first, attempt[0], together=True), _draft(rng, second, attempt[1], together=True))
        needs = [[d.need(axis) for d in drafts] for axis in (0, 1)]
        axes = [axis for axis in (0, 1) if sum(needs[axis]) <= 1.0]
        if axes:
            break
    axis = rng.choice(axes)
    need = needs[axis]
    cut = need[0] + rng.uniform(0.3, 0.7) * (1.0 - sum(need))
    spans = [(0.0, cut), (cut, 1.0)]
    if rng.random() < 0.5:
        spans = [(1.0 - cut, 1.0), (0.0, 1.0 - cut)]
    whole = (0.0, 1.0)
    return tuple(
        _place(rng, d, span, whole) if axis == 0 else _place(rng, d, whole, span)
        for d, span in zip(drafts, spans, strict=True)
    )


def _place(rng: random.Random, draft: _Draft, x_span: tuple[float, float], y_span: tuple[float, float]) -> SceneObject:
    """Choose the amount and the position so that the whole path stays inside the given part of the frame."""
    colour, shape, motion = draft.triple
    pad = draft.reach + _MARGIN
    spans = [(x_span[0] + pad, x_span[1] - pad), (y_span[0] + pad, y_span[1] - pad)]  # where the centre may be
    rooms = [(hi - lo) / draft.way(axis) for axis, (lo, hi) in enumerate(spans) if draft.way(axis)]
    amount = rng.uniform(draft.low, max(draft.low, min([draft.high, *rooms])))
    start = []
    for axis, (lo, hi) in enumerate(spans):
        way = amount * draft.way(axis)
        corner = _between(rng, lo, hi - way, draft.way(axis) == 2.0)
        # from the path's low end to what x and y mean: the other end for left and up and for the bounce's floor
        backwards = motion == "bounce" or _STEP.get(motion, (0, 0))[axis] < 0
        start.append(corner + (way / 2 if motion == "orbit" else way if backwards else 0.0))
    phase = rng.uniform(0.0, 2 * math.pi) if motion == "orbit" else 0.0
    cycles = {"orbit": 1.0, "bounce": rng.uniform(2.0, 2.6)}.get(motion, 0.0)
    if motion in ("grow", "shrink"):
        amount = draft.ratio
    values = (start[0], start[1], draft.radius, amount, phase, cycles)
    return SceneObject(colour, shape, draft.size, motion, *(round(v, 4) for v in values))


def _between(rng: random.Random, lo: float, hi: float, central: bool) -> float:
    """A place between lo and hi; central: near their middle (an orbit is about the middle of its part)."""
    if central:
        return (lo + hi) / 2 + rng.uniform(-0.15, 0.15) * max(0.0, hi - lo)
    return rng.uniform(lo, max(lo, hi))
