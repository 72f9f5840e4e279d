"""Sampling of models distilled to a few steps by distribution matching (DMD2, Yin et al. 2024, arXiv:2405.14867).

Such a model predicts the clean latents at once, at each of the few levels it was trained for. Between two of them
there is no path to follow: its prediction gets new noise of the next level. FastVideo samples its FastWan models so
(`DmdDenoisingStage`, timesteps 1000, 757, 522).
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_wan.schedulers.euler import Euler, EulerState
from mlx_wan.schedulers.flow import check_not_finished


class DMD(Euler):
    """Predict, noise again, predict, ...; levels as Euler's.

    The noise before a step depends on the seed and the step alone, so that a run can be taken up anywhere and is the
    same on every rank. It is another than the noise that `seed` starts a run with.
    """

    def __init__(
        self, num_inference_steps: int, shift: float = 5.0, timesteps: Sequence[float] | None = None, seed: int = 0
    ):
        super().__init__(num_inference_steps, shift, timesteps)
        self.seed = seed

    def noise(self, step: int, shape: tuple[int, ...]) -> mx.array:
        """Gaussian noise that the prediction of `step` gets, float32."""
        keys = mx.random.split(mx.random.key(self.seed), len(self.timesteps))
        return mx.random.normal(shape, key=keys[step])

    def step(self, velocity: mx.array, latents: mx.array, state: EulerState) -> tuple[mx.array, EulerState]:
        """x' = (1 - sigma') (x - sigma * velocity) + sigma' * noise. See `flow.Scheduler.step`."""
        i = state.index
        check_not_finished(i, self.sigmas)
        sigma, after = float(self.sigmas[i]), float(self.sigmas[i + 1])
        clean = latents.astype(mx.float32) - sigma * velocity.astype(mx.float32)
        if after:
            clean = (1 - after) * clean + after * self.noise(i, clean.shape)
        return clean, EulerState(i + 1)
