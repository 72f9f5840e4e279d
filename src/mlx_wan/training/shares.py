"""The optimizer's state shared out over the processes of a run: each keeps that of its share of the weights.

A process changes its share by gradients that are the same everywhere, then all hand each other what they changed
(stage one of ZeRO, Rajbhandari et al., arXiv:1910.02054). Shares are of whole parameters, since Muon and Adafactor keep
state by matrix.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path, tree_unflatten

from mlx_wan.weights.whole import flat


def deal(sizes: dict[str, int], processes: int) -> list[list[str]]:
    """Rounds of names, the largest first: in each round process i gets the i-th, or none in the last one.

    Every second round is dealt backwards, so that shares are about equal.
    """
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    rounds = [names[i : i + processes] for i in range(0, len(names), processes)]
    backwards = [[*[""] * (processes - len(each)), *reversed(each)] for each in rounds]
    return [other if i % 2 else each for i, (each, other) in enumerate(zip(rounds, backwards, strict=True))]


class Shares:
    """Who keeps what of a tree of float32 weights.

    Args:
        weights: all of them, alike in every process.
        world: the processes.
    """

    def __init__(self, weights: Any, world: mx.distributed.Group):
        self.world = world
        self.rounds = deal({name: array.size for name, array in flat(weights).items()}, world.size())
        self.mine = {each[world.rank()] for each in self.rounds if world.rank() < len(each)} - {""}

    def of(self, tree: Any) -> Any:
        """The part of a tree like the weights that is this process's."""
        return tree_unflatten([(name, array) for name, array in flat(tree).items() if name in self.mine])

    def exchanged(self, weights: Any) -> Any:
        """All weights, each as it is in the process that keeps it; bit for bit.

        One round after the other, with a parameter of each process, so that little is in memory twice.
        """
        now, everybodys, before = flat(weights), {}, None
        for each in self.rounds:
            longest = max(now[name].size for name in each if name)
            name = each[self.world.rank()] if self.world.rank() < len(each) else ""
            given = now[name].reshape(-1) if name else mx.zeros((0,), mx.float32)
            given = mx.pad(given, (0, longest - given.size))
            if before is not None:
                (given,) = mx.depends([given], [before])
            before = mx.distributed.all_gather(given, group=self.world)
            for place, name in enumerate(each):
                if name:
                    start = place * longest
                    everybodys[name] = before[start : start + now[name].size].reshape(now[name].shape)
        return tree_map_with_path(lambda name, _: everybodys[name], weights)

    def joined(self, state: dict[str, Any], outline: dict[str, Any], common: Iterable[str]) -> dict[str, Any]:
        """The whole state of an optimizer, in the first process; elsewhere a tree of the same form.

        Args:
            state: this process's.
            outline: a state of all weights, whose values mean nothing.
            common: names in it of what every process has alike, such as the number of steps.
        """
        arrays = dict(self._joined(flat(state), flat(outline), set(common)))
        return tree_map_with_path(lambda name, like: arrays.get(name, like), outline)

    def _joined(
        self, here: dict[str, mx.array], outline: dict[str, mx.array], common: set[str]
    ) -> Iterator[tuple[str, mx.array]]:
        for name, like in sorted(outline.items()):
            if name in common:
                yield name, here[name]
                continue
            mine = here[name] if name in here else mx.zeros(like.shape, like.dtype)
            # As whole numbers: a sum with zeros then leaves every bit as it is.
            whole = mx.distributed.all_sum(mine.view(mx.uint32), group=self.world).view(like.dtype)
            mx.eval(whole)  # one after the other: in one order everywhere, and gone where nobody needs it
            if self.world.rank() == 0:
                yield name, whole
