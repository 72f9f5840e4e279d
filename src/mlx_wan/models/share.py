"""What of a call a process works on, unless it works alone: which tokens of a transformer, which rows of a VAE."""

import mlx.core as mx


class Share:
    """All tokens of a call, which is what a process works on alone. `parallel.tokens` has the share of one of many."""

    def take(self, x: mx.array) -> mx.array:
        """This process's tokens (B, own, ...) of all tokens (B, L, ...)."""
        return x

    def gather(self, *arrays: mx.array) -> tuple[mx.array, ...]:
        """Everybody's tokens (B, L, C) from arrays (B, own, C) of this process's; in one order, whichever it is."""
        return arrays

    def join(self, x: mx.array) -> mx.array:
        """The way back from `take`: (B, own, C) to all tokens (B, L, C) in their own order."""
        return x


ALL = Share()


def everything(grid: tuple[int, int, int]) -> Share:
    """The share of a process that works alone on a (t, h, w) grid of tokens."""
    return ALL


class Rows:
    """Which rows of each frame (B, T, H, W, C) a process works on in a VAE; `parallel.rows` has one's of many."""

    def take(self, x: mx.array) -> mx.array:
        """This process's rows of whole frames."""
        raise NotImplementedError

    def border(self, x: mx.array) -> mx.array:
        """This process's rows with the one above and the one below, zeros beyond the frame."""
        raise NotImplementedError

    def gather(self, x: mx.array) -> mx.array:
        """Whole frames, from this process's rows of them."""
        raise NotImplementedError
