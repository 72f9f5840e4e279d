"""Weights spread over a team: each rank keeps some rows of every matrix; a block is whole only while it computes."""

from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_wan.parallel.team import Team
from mlx_wan.weights.tensors import TensorInfo

EMBEDDING = "token_embedding.weight"  # the text encoder's largest matrix


class Spread:
    """How one model's weights are spread over `team`: the matrices of its blocks, and a table of tokens.

    `read` each tensor, fill the model with what it returns, then `wrap` the model.
    """

    def __init__(self, team: Team):
        self.team = team

    def is_spread(self, info: TensorInfo) -> bool:
        """Whether ranks keep a share of this tensor, or all of it. Vectors and what is outside blocks are small."""
        inside = info.name.startswith("blocks.") or info.name == EMBEDDING
        return inside and len(info.shape) == 2 and info.shape[0] >= self.team.size

    def nbytes(self, info: TensorInfo, rank: int) -> int:
        """Memory of what `rank` keeps of a tensor."""
        if not self.is_spread(info):
            return info.nbytes
        return info.nbytes // info.shape[0] * self.team.counts(info.shape[0])[rank]

    def read(self, info: TensorInfo) -> mx.array:
        """This rank's rows of a tensor, of which the file's other rows are not read; all of a small one."""
        if not self.is_spread(info):
            return info.load()
        start, stop = self.team.bounds(info.shape[0])[self.team.rank :][:2]
        return info.rows(start, stop)

    def wrap(self, model: nn.Module, tensors: list[TensorInfo]) -> None:
        """Makes a model that holds what `read` returned compute, in place. Every rank must call it the same way."""
        rows = {info.name: info.shape[0] for info in tensors if self.is_spread(info)}
        blocks = cast(Any, model).blocks
        for i, block in enumerate(blocks):
            prefix = f"blocks.{i}."
            own = {name.removeprefix(prefix): n for name, n in rows.items() if name.startswith(prefix)}
            blocks[i] = GatheredBlock(block, own, self.team)
        if EMBEDDING in rows:
            table = cast(Any, model).token_embedding
            cast(Any, model).token_embedding = SpreadEmbedding(table.weight, rows[EMBEDDING], self.team)


class GatheredBlock(nn.Module):
    """A block that holds some rows of its matrices, and fetches the others for the time of a call.

    Args:
        block: filled with this rank's rows.
        rows: parameter -> how many rows it has in all ranks together.
    """

    def __init__(self, block: nn.Module, rows: Mapping[str, int], team: Team):
        super().__init__()
        self.block = block
        self._rows, self._team = dict(rows), team

    def __call__(self, *args: Any) -> mx.array:
        parameters: dict[str, mx.array] = dict(tree_flatten(self.block.parameters()))
        held = {name: parameters[name] for name in self._rows}
        whole = {}
        for name, array in held.items():
            whole[name] = self._team.gather_rows(array, self._team.counts(self._rows[name]))
        self.block.update(cast(Any, tree_unflatten(list(whole.items()))))
        try:
            out = self.block(*args)
            mx.eval(out)  # before the whole matrices leave: the result would hold on to them
        finally:
            self.block.update(cast(Any, tree_unflatten(list(held.items()))))
        return out


class SpreadEmbedding(nn.Module):
    """A table of which each rank has some rows: a token's row is the sum of what all have of it, zeros but for one."""

    def __init__(self, weight: mx.array, rows: int, team: Team):
        super().__init__()
        self.weight = weight
        self._start, self._stop = team.bounds(rows)[team.rank :][:2]
        self._team = team

    def __call__(self, ids: mx.array) -> mx.array:
        mine = (ids >= self._start) & (ids < self._stop)
        vectors = self.weight[mx.where(mine, ids - self._start, 0)]
        return self._team.all_sum(mx.where(mine[..., None], vectors, 0).astype(self.weight.dtype))
