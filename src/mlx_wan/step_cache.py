"""Steps that do not ask the transformer, while its velocity is not expected to have changed much.

Such a step goes on along the line through the last two velocities that were computed, as TaylorSeer (Liu et al. 2025,
arXiv:2503.06923) does inside of blocks. When to skip is decided as in TeaCache (Liu et al. 2024, arXiv:2411.19108) and
MagCache (Ma et al. 2025, arXiv:2506.09045): an estimate of the change since the transformer was last asked grows step
by step, and below a threshold nobody asks. Their estimates come from tables that somebody fitted for a model, its steps
and its shift. Here each run measures its own: how fast the velocity changed, for each unit of noise level, between the
last two steps that were computed. So it is there for every model, each expert of two, and every LoRA.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_wan.errors import UserError

MOST_SKIPPED = 2  # in a row
UNKNOWN = float("inf")  # a rate of change before there are two velocities to compare


class Kept(NamedTuple):
    """What a run remembers: arrays alone, so that it can be saved as they are.

    velocity: (B, t, h, w, C) of the last step that was computed, guidance applied. slope: its change for each unit of
    noise level, 0 where that is unknown. facts: float32 (5,): its noise level; the slope's norm over its own; steps
    skipped since; the scale of its guidance; its expert's number.
    """

    velocity: mx.array
    slope: mx.array
    facts: mx.array

    @property
    def skipped(self) -> int:
        """Steps in a row, up to the last, that did not ask."""
        return int(self.numbers[2])

    @property
    def numbers(self) -> list[float]:
        """The facts."""
        return np.array(self.facts).tolist()


def _alone(decision: bool) -> bool:
    return decision


@dataclass(frozen=True)
class StepCache:
    """How much may be reused.

    threshold: relative change of the velocity below which it is not computed again, between 0 and 1. agree: what all
    processes of a run make of this one's decision.
    """

    threshold: float
    agree: Callable[[bool], bool] = _alone

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise UserError(f"cache is {self.threshold}; give a relative change between 0 and 1, such as 0.1")

    def reuses(self, kept: Kept, sigma: float, guidance_scale: float, number: int) -> bool:
        """Whether a step at noise level `sigma` does without. Every process must ask at the same steps."""
        level, rate, skipped, *how = kept.numbers
        if skipped >= MOST_SKIPPED or rate == UNKNOWN or how != _as_kept(guidance_scale, number):
            return False
        return self.agree(rate * (level - sigma) < self.threshold)


def reused(kept: Kept, sigma: float) -> tuple[mx.array, Kept]:
    """The velocity of a step at `sigma` that does without, and what is kept after it."""
    velocity = kept.velocity + (sigma - kept.facts[0]) * kept.slope
    return velocity, kept._replace(facts=kept.facts + mx.array([0, 0, 1, 0, 0]))


def computed(
    kept: Kept | None, velocity: mx.array, sigma: float, guidance_scale: float, number: int, given: int = 0
) -> Kept:
    """After a step whose velocity was computed. given: the first latent frames, which do not count."""
    rate, slope = mx.array(UNKNOWN), mx.zeros_like(velocity)
    how = _as_kept(guidance_scale, number)
    if kept is not None and kept.numbers[3:] == how:
        slope = (velocity - kept.velocity) / (sigma - kept.facts[0])
        rate = (_norm(slope[:, given:]) / _norm(velocity[:, given:])).max()  # of the sample that changes most
    facts = mx.stack([mx.array(sigma), rate, *map(mx.array, (0.0, *how))]).astype(mx.float32)
    return Kept(velocity, slope, facts)


def nothing_kept(shape: tuple[int, ...]) -> Kept:
    """Arrays of the shapes and types that a run on latents of `shape` keeps; their values mean nothing."""
    return Kept(mx.zeros(shape), mx.zeros(shape), mx.zeros(5))


def _as_kept(guidance_scale: float, number: int) -> list[float]:
    """In float32, as the facts are."""
    return [float(np.float32(guidance_scale)), float(number)]


def _norm(x: mx.array) -> mx.array:
    """Of each sample, float32."""
    return mx.sqrt(mx.square(x.astype(mx.float32)).sum(axis=tuple(range(1, x.ndim))))
