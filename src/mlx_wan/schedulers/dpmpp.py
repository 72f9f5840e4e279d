"""DPM-Solver++(2M), data prediction, midpoint (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

The official Wan2.2 script (wan/utils/fm_solvers.py) hands the solver the levels of get_sampling_sigmas:
they begin at sigma = 1 exactly, where lambda = -inf, and end at 0, where it is +inf. Both limits are
finite in the formulas: the first step is x' = sigma' * x + alpha' * clean, the second has no slope to
extrapolate with (1/r = 0), and the last lands on the clean prediction.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_wan.schedulers.flow import TRAIN_TIMESTEPS, check, check_not_finished, listed, log_snr, shifted, with_zero


class DPMppState(NamedTuple):
    index: int  # steps taken
    clean: mx.array | None  # the step before's prediction of the clean latents


class DPMpp:
    """Second order multistep; `timesteps` are 1000 * sigma cut to int64, as official, unless they are given."""

    def __init__(self, num_inference_steps: int, shift: float = 5.0, timesteps: Sequence[float] | None = None):
        if timesteps is not None:
            self.sigmas, self.timesteps = listed(timesteps)
            return
        check(num_inference_steps, shift)
        sigmas = shifted(np.linspace(1, 0, num_inference_steps + 1)[:-1], float(shift))
        self.sigmas = with_zero(sigmas)
        self.timesteps = (sigmas * TRAIN_TIMESTEPS).astype(np.int64)

    def init(self) -> DPMppState:
        return DPMppState(0, None)

    def step(self, velocity: mx.array, latents: mx.array, state: DPMppState) -> tuple[mx.array, DPMppState]:
        """x' = (sigma'/sigma) x - alpha' (e^-h - 1) (m0 + D/2). See `flow.Scheduler.step`."""
        i = state.index
        check_not_finished(i, self.sigmas)
        x = latents.astype(mx.float32)
        m0 = x - float(self.sigmas[i]) * velocity.astype(mx.float32)
        slope = self._slope_factor(i)
        data = m0 if state.clean is None or slope == 0 else m0 + (slope / 2) * (m0 - state.clean)
        return self._ratio(i) * x - self._phi(i) * data, DPMppState(i + 1, m0)

    def _ratio(self, i: int) -> float:
        return float(self.sigmas[i + 1]) / float(self.sigmas[i])

    def _phi(self, i: int) -> float:
        """alpha' (e^-h - 1), with h the step in lambda."""
        h = log_snr(self.sigmas[i + 1]) - log_snr(self.sigmas[i])
        return (1 - float(self.sigmas[i + 1])) * math.expm1(-h)

    def _slope_factor(self, i: int) -> float:
        """1/r = h / h_before, so that D = (m0 - m1)/r; 0 at the first and the last step, of first order."""
        if i == 0 or i == len(self.sigmas) - 2:
            return 0.0
        before, here, after = (log_snr(s) for s in self.sigmas[i - 1 : i + 2])
        return (after - here) / (here - before)
