"""What passes beside a clip through the causal layers of an autoencoder: what they remember, and which rows are due."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .layers import Pace, copied
from .share import Rows

STRIP = 1 << 23  # bytes of one frame, before it is doubled, from which on it passes in more than one strip


class FeatureCache:
    """What the causal layers remember between pieces of one clip, and the widest between strips of one piece.

    A strip is some rows of all frames of a piece; strips pass from top to bottom. A 3×3 convolution waits for the row
    below, so its result is one row behind its input: shorter by a row at the top, longer by one at the bottom. Layers
    hand the rows that the next strip needs over to it, so nothing is computed twice and no seam is left.

    Attributes:
        frames: by the id of the layer that keeps them, and the strip.
        first: true while the piece that holds the clip's first frame passes.
        streaming: whether nobody asks for gradients: layers may then use kernels that have none, wide frames pass in
            strips, and MLX works ahead by one large result, so that it holds no more than two layers' arrays.
        strip, top, bottom: the strip's number, and whether it begins and ends at the frame's edge, as whole frames do.
        rows: which rows of each frame are worked on here, if several processes share a clip: then there are no strips.
    """

    def __init__(
        self,
        frames: dict[Any, mx.array] | None = None,
        first: bool = True,
        streaming: bool = False,
        rows: Rows | None = None,
    ) -> None:
        self.first, self.streaming, self.rows = first, streaming, rows
        self.strip, self.top, self.bottom = 0, True, True
        self.frames: dict[Any, mx.array] = frames or {}
        self._rows: dict[int, mx.array] = {}
        self._pace = Pace()

    def recall(self, layer: nn.Module) -> mx.array | None:
        """The frames `layer` kept from the piece before; None at the first."""
        return self.frames.get((id(layer), self.strip))

    def keep(self, layer: nn.Module, frames: mx.array) -> None:
        """Keeps `frames`, an array of their own, for `layer`."""
        self.frames[id(layer), self.strip] = frames

    def extend(self, layer: nn.Module, x: mx.array, memory: int) -> mx.array:
        """`x` behind the `memory` frames before it, zeros before the clip; keeps the last."""
        b, _, h, w, c = x.shape
        before = self.recall(layer)
        x = mx.concatenate([mx.zeros((b, memory, h, w, c), x.dtype) if before is None else before, x], axis=1)
        self.keep(layer, copied(x[:, -memory:]))
        return x

    def once(self, layer: nn.Module, make: Callable[[], mx.array]) -> mx.array:
        """What `make` returns, made once a stream."""
        if not self.streaming:
            return make()
        if id(layer) not in self.frames:
            self.frames[id(layer)] = make()
        return self.frames[id(layer)]

    def strip_count(self, x: mx.array, least: int) -> int:
        """In how many strips, of at least `least` rows, x (B, T, H, W, C) passes; as many for one frame as for more."""
        if not self.streaming or self.rows is not None:
            return 1
        return max(1, min(-(-x[:, :1].nbytes // STRIP), x.shape[2] // least))

    def strips(
        self, least: int, x: mx.array, beside: mx.array | None = None
    ) -> Iterator[tuple[mx.array, mx.array | None]]:
        """`x` (B, T, H, W, C), and what is `beside` it, strip by strip.

        The first is given what results are behind on the average.
        """
        number, height = self.strip_count(x, least), x.shape[2]
        edges = [0, *(height * i // number + least // 3 for i in range(1, number)), height]
        for self.strip, (start, end) in enumerate(pairwise(edges)):
            self.top, self.bottom = start == 0, end == height
            if number == 1:
                yield x, beside
            else:
                yield copied(x[:, :, start:end]), None if beside is None else copied(beside[:, :, start:end])
        self.strip, self.top, self.bottom = 0, True, True

    @property
    def whole(self) -> bool:
        """Whether frames pass whole, and in this process alone."""
        return self.top and self.bottom and self.rows is None

    def rows_above(self, layer: nn.Module) -> mx.array | None:
        """The rows `layer` kept from the strip above; None in the uppermost."""
        return self._rows.pop(id(layer), None)

    def keep_rows(self, layer: nn.Module, x: mx.array, number: int) -> None:
        """Keeps a copy of the last rows of `x` (B, T, H, W, C) for the strip below, if there is one."""
        if not self.bottom:
            self._rows[id(layer)] = copied(x[:, :, -number:])

    def border(self, layer: nn.Module, x: mx.array) -> mx.array:
        """`x` (B, T, H, W, C) with the rows above and below that a kernel of three rows needs: zeros at the edges."""
        if self.whole:
            return x
        if self.rows is not None:
            return self.rows.border(x)
        edge, above = mx.zeros_like(x[:, :, :1]), self.rows_above(layer)
        x = mx.concatenate([edge if above is None else above, x, *[edge] * self.bottom], axis=2)
        self.keep_rows(layer, x, 2)
        return x

    def late(self, layer: nn.Module, x: mx.array, rows: int) -> mx.array:
        """The rows of `x` (B, T, H, W, C) that a result belongs to which is `rows` rows behind."""
        if self.whole or self.rows is not None:
            return x
        above = self.rows_above(layer)
        self.keep_rows(layer, x, rows)
        x = x if above is None else mx.concatenate([above, x], axis=2)
        return x if self.bottom else x[:, :, :-rows]

    def settle(self, x: mx.array) -> mx.array:
        """`x`; if it is large, in a stream, it and all that is kept are begun now, and the one before it waited for."""
        return self._pace.within(x, *self.arrays(), *self._rows.values()) if self.streaming else x

    def arrays(self) -> list[mx.array]:
        """All stored frames, for mx.eval."""
        return list(self.frames.values())
