"""Muon that orthogonalises all matrices of one shape together.

The update is that of `mlx.optimizers.Muon` (Jordan et al., https://kellerjordan.github.io/posts/muon/). There each
matrix has five iterations of three small products of its own; a transformer has dozens of equal matrices, and a GPU
takes the products of all of them in the time of one.
"""

from collections import defaultdict
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

# Coefficients of the quintic iteration, from Jordan's post.
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315


def orthogonalised(matrices: mx.array, steps: int) -> mx.array:
    """Matrices (n, rows, columns), rows ≤ columns, with their singular values brought near one (0.7 to 1.2)."""
    x = matrices / (mx.sqrt(mx.square(matrices).sum(axis=(1, 2), keepdims=True)) + 1e-7)
    for _ in range(steps):
        gram = x @ x.swapaxes(1, 2)
        x = _LINEAR * x + (_CUBIC * gram + _QUINTIC * (gram @ gram)) @ x
    return x


class BatchedMuon(optim.Muon):
    """`mlx.optimizers.Muon` with the same arguments, state and results up to rounding; arrays of two or more axes."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """The direction before it is orthogonalised; `apply_gradients` does the rest."""
        if self.weight_decay != 0:
            gradient = gradient + self.weight_decay * parameter
        momentum = self.momentum
        state["v"] = momentum * state["v"] + (1 - momentum) * gradient
        return (1 - momentum) * gradient + momentum * state["v"] if self.nesterov else state["v"]

    def apply_gradients(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        directions, weights = _flat(super().apply_gradients(gradients, parameters)), dict(_flat(parameters))
        alike: dict[tuple[int, ...], list[tuple[str, mx.array]]] = defaultdict(list)
        for name, direction in directions:
            matrix = direction.reshape(direction.shape[0], -1)
            alike[tuple(sorted(matrix.shape))].append((name, matrix))
        moved = {}
        for members in alike.values():
            wide = [m if m.shape[0] <= m.shape[1] else m.T for _, m in members]
            for (name, matrix), result in zip(members, orthogonalised(mx.stack(wide), self.ns_steps), strict=True):
                rows, columns = matrix.shape
                rate = self.learning_rate.astype(matrix.dtype) * max(1, _last_ratio(weights[name])) ** 0.5
                step = rate * (result if rows <= columns else result.T)
                moved[name] = weights[name] - step.reshape(weights[name].shape)
        return tree_unflatten([(name, moved[name]) for name, _ in directions])  # type: ignore[return-value]


def _flat(tree: dict[str, Any]) -> list[tuple[str, mx.array]]:
    return tree_flatten(tree)  # type: ignore[return-value]


def _last_ratio(weight: mx.array) -> float:
    return weight.shape[-2] / weight.shape[-1]
