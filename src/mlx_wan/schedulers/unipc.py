"""UniPC of order 2 with B(h) = e^h - 1 ("bh2"), data prediction (Zhao et al. 2023, arXiv:2302.04867).

Each step first corrects the latents it is given (UniC), now that the model has been asked there, and
then predicts the next ones (UniP). Follows the official Wan2.2 sampler (wan/utils/fm_solvers_unipc.py)
as WanTI2V drives it: lower order at the first and the last step, corrector from the second step on.
"""

import math
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_wan.schedulers.flow import TRAIN_TIMESTEPS, check, check_not_finished, log_snr, shifted, with_zero

ORDER = 2
# The official class keeps its training levels in float32 and begins at the first of them, 1 - 1/1000.
SIGMA_MAX = float(np.float32(1 - 1 / TRAIN_TIMESTEPS))


class UniPCState(NamedTuple):
    index: int  # steps taken
    latents: mx.array | None  # corrected latents of the step before
    clean: tuple[mx.array, ...]  # clean predictions of the steps before, the newest last, at most two


class UniPC:
    """Second order predictor and corrector; `timesteps` are 1000 * sigma cut to int64, as official."""

    def __init__(self, num_inference_steps: int, shift: float = 5.0):
        check(num_inference_steps, shift)
        sigmas = shifted(np.linspace(SIGMA_MAX, 0, num_inference_steps + 1)[:-1], float(shift))
        self.sigmas = with_zero(sigmas)
        self.timesteps = (sigmas * TRAIN_TIMESTEPS).astype(np.int64)

    def init(self) -> UniPCState:
        return UniPCState(0, None, ())

    def step(self, velocity: mx.array, latents: mx.array, state: UniPCState) -> tuple[mx.array, UniPCState]:
        """Correct `latents`, then predict the next ones. See `flow.Scheduler.step`."""
        i = state.index
        check_not_finished(i, self.sigmas)
        x = latents.astype(mx.float32)
        m = x - float(self.sigmas[i]) * velocity.astype(mx.float32)
        if state.latents is not None:
            x = self._correct(i, m, state.latents, state.clean)
        clean = (*state.clean, m)[-ORDER:]
        return self._predict(i, x, clean), UniPCState(i + 1, x, clean)

    def _order(self, i: int) -> int:
        """Order of the step from level i: never more than the predictions known or the steps left."""
        return min(ORDER, i + 1, len(self.sigmas) - 1 - i)

    def _predict(self, i: int, x: mx.array, clean: tuple[mx.array, ...]) -> mx.array:
        """UniP: from level i to i + 1. At order 2 the paper's solution rho is taken as 1/2."""
        base, scale = self._first_order(i, x, clean[-1])
        if self._order(i) == 1:
            return base
        return base - (scale / 2 / self._ratio(i)) * (clean[-2] - clean[-1])

    def _correct(self, i: int, m: mx.array, x: mx.array, clean: tuple[mx.array, ...]) -> mx.array:
        """UniC: the step from x at level i - 1 to i again, with m, the model's answer at level i."""
        base, scale = self._first_order(i - 1, x, clean[-1])
        change = m - clean[-1]
        if self._order(i - 1) == 1:
            return base - (scale / 2) * change
        r = self._ratio(i - 1)
        rho_past, rho_here = corrector_weights(r, log_snr(self.sigmas[i]) - log_snr(self.sigmas[i - 1]))
        past = clean[-2] - clean[-1]
        return base - (scale * rho_past / r) * past - (scale * rho_here) * change

    def _first_order(self, i: int, x: mx.array, m: mx.array) -> tuple[mx.array, float]:
        """The exponential Euler step i -> i + 1, and alpha' * B(h) that scales every higher order term."""
        sigma, after = self.sigmas[i], self.sigmas[i + 1]
        scale = (1 - float(after)) * math.expm1(log_snr(sigma) - log_snr(after))
        return (float(after) / float(sigma)) * x - scale * m, scale

    def _ratio(self, i: int) -> float:
        """r = (lambda before - lambda) / h, the step before measured in this one; negative."""
        before, here, after = (log_snr(s) for s in self.sigmas[i - 1 : i + 2])
        return (before - here) / (after - here)


def corrector_weights(r: float, h: float) -> tuple[float, float]:
    """UniC's weights for a step h before which the one at ratio r lies: [[1, 1], [r, 1]] rho = b.

    b_k = k! z phi_{k+1}(z) / B(z) at z = -h, with phi_1(z) = (e^z - 1) / z, phi_{k+1} = (phi_k - 1/k!) / z
    and B(z) = e^z - 1.
    """
    b = math.expm1(-h)
    z_phi_2 = b / -h - 1
    z_phi_3 = z_phi_2 / -h - 1 / 2
    b_1, b_2 = z_phi_2 / b, 2 * z_phi_3 / b
    rho_past = (b_1 - b_2) / (1 - r)
    return rho_past, b_1 - rho_past
