"""The optimizer's state shared out over the processes of a run: each keeps that of its share of the weights.

A process changes its share by gradients that are the same everywhere, then all hand each other what they changed
(stage one of ZeRO, Rajbhandari et al., arXiv:1910.02054). Shares are of whole parameters, since Muon and Adafactor keep
state by matrix.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
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

    def exchange(self, model: nn.Module) -> None:
        """Gives a model all weights, each as it is in the process that keeps it; bit for bit.

        One round after the other, with a parameter of each process, computed before the next begins: what it replaces
        leaves memory then, and all exchange in one order.
        """
        sent = self._sent()
        for each in self.rounds:
            now = flat(model.trainable_parameters())
            longest = max(now[name].size for name in each if name)
            name = each[self.world.rank()] if self.world.rank() < len(each) else ""
            given = now[name].reshape(-1) if name else mx.zeros((0,), mx.float32)
            given = mx.pad(given, (0, longest - given.size))
            mx.eval(given)
            everybodys = mx.distributed.all_gather(given, group=self.world)
            parts = everybodys.reshape(-1, longest)
            theirs = [
                (other, mx.contiguous(part[: now[other].size]).reshape(now[other].shape))  # a view would hold them all
                for other, part in zip(each, parts, strict=False)
                if other and other != name
            ]
            mx.eval(theirs, everybodys)
            sent.append((given, everybodys))
            model.load_weights(theirs, strict=False)

    def _sent(self) -> deque:
        """Holds what may still be on its way: MLX's ring sends after a collective is computed, from memory that would
        be used for something else. What is as many collectives old as there are processes has arrived."""
        return deque(maxlen=2 * self.world.size())

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
        sent = self._sent()
        for name, like in sorted(outline.items()):
            if name in common:
                yield name, here[name]
                continue
            mine = here[name] if name in here else mx.zeros(like.shape, like.dtype)
            # As whole numbers: a sum with zeros then leaves every bit as it is.
            bits = mx.contiguous(mine.view(mx.uint32))
            mx.eval(bits)
            whole = mx.distributed.all_sum(bits, group=self.world)
            mx.eval(whole)  # one after the other: in one order everywhere, and gone where nobody needs it
            sent.append((bits, whole))
            if self.world.rank() == 0:
                yield name, whole.view(like.dtype)
