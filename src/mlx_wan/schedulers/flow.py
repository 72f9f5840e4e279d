"""What the samplers share: flow matching's noise levels and the checks on what a caller may ask for.

A latent at noise level sigma in [0, 1] is x = (1 - sigma) * clean + sigma * noise, and the model
predicts the velocity noise - clean. So clean = x - sigma * velocity at every level.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_wan.errors import UserError

TRAIN_TIMESTEPS = 1000  # the model is told sigma as a timestep in [0, 1000]


class Scheduler(Protocol):
    """One sampling run's noise levels, and the step from each to the next.

    timesteps: (n,) what the model is told at each step; integers for UniPC and DPM++, as official.
    sigmas: (n + 1,) float32, decreasing, the last one 0.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray

    def init(self) -> Any:
        """State before the first step: a tree of arrays, numbers and None, as every state."""
        ...

    def step(self, velocity: mx.array, latents: mx.array, state: Any) -> tuple[mx.array, Any]:
        """Latents at the next noise level and the state to hand to the next call.

        velocity and latents have one shape, any; what comes back is float32. Nothing is changed in
        place and nothing is evaluated. ValueError after the last step.
        """
        ...


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Move levels in [0, 1] towards the noisy end (Stable Diffusion 3, arXiv:2403.03206)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def with_zero(sigmas: np.ndarray) -> np.ndarray:
    """Append the clean end, in the float32 that the official samplers keep their levels in.

    UserError when rounding makes two levels equal, as an absurdly large shift does.
    """
    levels = np.append(sigmas, 0).astype(np.float32)
    if not np.all(np.diff(levels) < 0):
        raise UserError("this shift leaves neighbouring steps at the same noise level; give a smaller one")
    return levels


def listed(timesteps: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Noise levels and timesteps of a run through timesteps that are given: sigma = t / 1000.

    UserError unless they fall, from at most 1000 to above 0.
    """
    given = [*timesteps]
    real = all(isinstance(t, numbers.Real) and not isinstance(t, bool) and math.isfinite(t) for t in given)
    if not given or not real or given[0] > TRAIN_TIMESTEPS or given[-1] <= 0 or not np.all(np.diff(given) < 0):
        words = ", ".join(map(str, given))
        raise UserError(f"timesteps are {words or 'none'}; give numbers that fall, from at most 1000 to above 0")
    levels = np.array(given, np.float64)
    return with_zero(levels / TRAIN_TIMESTEPS), levels.astype(np.float32)


def log_snr(sigma: np.float32) -> float:
    """lambda = log(alpha / sigma) with alpha = 1 - sigma: -inf for pure noise, +inf for clean."""
    with np.errstate(divide="ignore"):
        return float(np.log1p(-np.float64(sigma)) - np.log(np.float64(sigma)))


def check(num_inference_steps: int, shift: float) -> None:
    """UserError unless 1 <= num_inference_steps <= 1000 (a whole number) and 0 < shift < inf."""
    whole = isinstance(num_inference_steps, numbers.Integral) and not isinstance(num_inference_steps, bool)
    if not whole or not 1 <= num_inference_steps <= TRAIN_TIMESTEPS:
        raise UserError(
            f"number of inference steps is {num_inference_steps!r}; give a whole number from 1 to {TRAIN_TIMESTEPS}"
        )
    if not (isinstance(shift, numbers.Real) and math.isfinite(shift) and shift > 0):
        raise UserError(f"shift is {shift!r}; give a number above 0 (Wan2.2 TI2V uses 5)")


def check_not_finished(index: int, sigmas: np.ndarray) -> None:
    """ValueError when all steps of a run are taken already."""
    if index >= len(sigmas) - 1:
        raise ValueError(f"all {len(sigmas) - 1} steps of this run are taken; start again from init()")
