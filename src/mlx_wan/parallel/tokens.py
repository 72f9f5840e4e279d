"""Sequence parallelism: the tokens of a transformer call, split over a team.

Every rank has the same part of each latent frame. So a timestep for each frame needs no cutting, whatever the number of
ranks, and where the number does not divide a frame's tokens, shares differ by one token a frame. Queries stay; keys
and values are gathered, since MLX has no all-to-all (0.32.4), which would move each rank's share of the heads alone.
"""

from itertools import accumulate

import mlx.core as mx

from mlx_wan.errors import UserError
from mlx_wan.models.share import Share
from mlx_wan.parallel.team import Team


class TokenShare(Share):
    """One rank's tokens of a (t, h, w) grid.

    Raises UserError if a frame has fewer tokens than the team has ranks.
    """

    def __init__(self, team: Team, grid: tuple[int, int, int]):
        self._team, self._frames, self._frame = team, grid[0], grid[1] * grid[2]
        if self._frame < team.size:
            raise UserError(
                f"a frame of this size has {self._frame} tokens, too few for {team.size} ranks: "
                "use fewer (--ulysses_size) or a larger --size"
            )
        bounds = team.bounds(self._frame)
        self._start, self._stop = bounds[team.rank : team.rank + 2]
        self._counts = [self._frames * count for count in team.counts(self._frame)]

    def take(self, x: mx.array) -> mx.array:
        frames = x.reshape(x.shape[0], self._frames, self._frame, *x.shape[2:])
        return frames[:, :, self._start : self._stop].reshape(x.shape[0], -1, *x.shape[2:])

    def gather(self, *arrays: mx.array) -> tuple[mx.array, ...]:
        return tuple(self._rank_by_rank(array) for array in arrays)

    def join(self, x: mx.array) -> mx.array:
        parts = mx.split(self._rank_by_rank(x), list(accumulate(self._counts))[:-1], axis=1)
        frames = [part.reshape(part.shape[0], self._frames, -1, part.shape[-1]) for part in parts]
        return mx.concatenate(frames, axis=2).reshape(x.shape[0], -1, x.shape[-1])

    def _rank_by_rank(self, x: mx.array) -> mx.array:
        """(B, L, C): everybody's tokens (B, own, C), those of each rank together."""
        if x.shape[0] == 1:
            return self._team.gather_rows(x[0], self._counts)[None]
        return self._team.gather_rows(x.swapaxes(0, 1), self._counts).swapaxes(0, 1)
