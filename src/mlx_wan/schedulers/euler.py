"""Euler's method on the flow's ordinary differential equation dx/dsigma = velocity."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_wan.schedulers.flow import TRAIN_TIMESTEPS, check, check_not_finished, listed, shifted, with_zero


class EulerState(NamedTuple):
    index: int  # steps taken


class Euler:
    """First order; what diffusers' FlowMatchEulerDiscreteScheduler computes with a static shift.

    The official code has no Euler sampler for Wan, so the levels are a choice: get_sampling_sigmas, the
    grid it hands to DPM++. It begins at sigma = 1, which is what the starting noise is (UniPC's grid
    begins at 0.9998 only to keep its logarithms finite), and diffusers' own default grid applies the
    shift twice and ends above sigma_min. Timesteps are 1000 * sigma, not rounded, as diffusers has them.
    Or they are given, and the levels are theirs.
    """

    def __init__(self, num_inference_steps: int, shift: float = 5.0, timesteps: Sequence[float] | None = None):
        if timesteps is not None:
            self.sigmas, self.timesteps = listed(timesteps)
            return
        check(num_inference_steps, shift)
        # float32 before the shift, as diffusers has it
        grid = np.linspace(1, 0, num_inference_steps + 1)[:-1].astype(np.float32)
        self.sigmas = with_zero(shifted(grid, float(shift)))
        self.timesteps = self.sigmas[:-1] * np.float32(TRAIN_TIMESTEPS)

    def init(self) -> EulerState:
        return EulerState(0)

    def step(self, velocity: mx.array, latents: mx.array, state: EulerState) -> tuple[mx.array, EulerState]:
        """x' = x + (sigma' - sigma) * velocity. See `flow.Scheduler.step`."""
        i = state.index
        check_not_finished(i, self.sigmas)
        x = latents.astype(mx.float32)
        x = x + float(self.sigmas[i + 1] - self.sigmas[i]) * velocity.astype(mx.float32)
        return x, EulerState(i + 1)
