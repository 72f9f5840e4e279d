"""Ranks that exchange arrays, by the collectives that every backend of MLX has: all_gather and all_sum."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import mlx.core as mx

from mlx_wan.parallel.pulse import PULSE
from mlx_wan.parallel.world import has_nccl


@lru_cache(maxsize=1)
def _beside() -> mx.Stream | None:
    """Where NCCL works beside what is computed, one for all: ranks must meet in one order. None: the backend's own."""
    return mx.new_stream(mx.gpu) if has_nccl() else None


def exchange(collective: Callable[..., mx.array], x: mx.array, group: mx.distributed.Group | None) -> mx.array:
    """What a collective of MLX makes of `x`; it begins now, and what is computed after it may take its time."""
    PULSE.beat()
    # One graph over two streams would make MLX wait for the first on the CPU (CUDA, 0.32.4): so three graphs.
    mx.async_eval(x)
    result = collective(x, group=group, stream=_beside())
    mx.async_eval(result)
    return result


class Team:
    """Some of the ranks of a world, this process among them.

    Where the backend cannot split its group (ring, JACCL), all ranks gather and each takes its team's part: more
    traffic, the same result. All teams of a world must then gather arrays of the same shape at the same time.

    Args:
        world: the group of all ranks; None is this process alone.
        members: the ranks of this process's team, in order; None means all. Every rank makes its teams in the same
            order, and the teams made at one time have no rank in common.

    Attributes:
        size: how many are in it.
        rank: this process's place among them.
    """

    def __init__(self, world: mx.distributed.Group | None, members: Sequence[int] | None = None):
        everyone = list(range(1 if world is None else world.size()))
        self._group = world
        self._members = everyone if members is None else list(members)
        self._picks = len(self._members) < len(everyone)
        self.size = len(self._members)
        self.rank = 0 if world is None else self._members.index(world.rank())
        if world is not None and self._picks and self.size > 1:
            try:
                self._group = world.split(min(self._members))
                self._picks = False
            except RuntimeError:  # this backend has no split
                pass

    def all_gather(self, x: mx.array) -> mx.array:
        """(size, *x.shape): everybody's `x`, which has one shape in the whole team."""
        if self.size == 1:
            return x[None]
        everything = exchange(mx.distributed.all_gather, x[None], self._group)
        return everything[mx.array(self._members)] if self._picks else everything

    def all_sum(self, x: mx.array) -> mx.array:
        """The sum of everybody's `x`; of the whole world's team alone."""
        assert self.size == 1 or not self._picks
        return x if self.size == 1 else exchange(mx.distributed.all_sum, x, self._group)

    def gather_rows(self, x: mx.array, counts: Sequence[int]) -> mx.array:
        """(sum(counts), ...): everybody's `x` (counts[rank], ...), one after the other; no copy if all have as many."""
        longest = max(counts)
        padding = [(0, longest - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
        everything = self.all_gather(mx.pad(x, padding) if x.shape[0] < longest else x)
        if min(counts) == longest:
            return mx.flatten(everything, 0, 1, stream=_beside())
        return mx.concatenate([everything[i, :count] for i, count in enumerate(counts)])

    def bounds(self, total: int) -> list[int]:
        """Where the members' shares of `total` things begin, and the last one's end; they differ by one at most."""
        return [total * i // self.size for i in range(self.size + 1)]

    def counts(self, total: int) -> list[int]:
        """How many of `total` things each member has."""
        bounds = self.bounds(total)
        return [end - start for start, end in pairwise(bounds)]
