"""Linear layers whose matrix is packed, and how they multiply with it."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .layers import target, traced_for

# Up to this many rows the matrix is multiplied as it is packed; above, it is unpacked once a call.
# CPU: measured, docs/benchmarks.md. CUDA: measured at 16 rows (packed is twice as fast) and at 512 (unpacked is 1.8
# times), not between. Metal: not measured.
FEW_ROWS = {"CPU": 4, "CUDA": 128, "Metal": 512}
MAX_ROWS = 32768  # of one product with a packed matrix, or an unpacked one: beyond, MLX has returned wrong values


def multiply(x: mx.array, matrix: mx.array, bias: mx.array | None = None) -> mx.array:
    """x (..., in) @ matrix (in, out) + bias (out,), for any number of rows."""
    return in_pieces(lambda rows: rows @ matrix if bias is None else mx.addmm(bias, rows, matrix), x)


def in_pieces(product: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """`product` of the rows of x (..., in), at most MAX_ROWS at a time."""
    rows = x.reshape(-1, x.shape[-1])
    pieces = [product(rows[i : i + MAX_ROWS]) for i in range(0, rows.shape[0], MAX_ROWS)]
    return (pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)).reshape(*x.shape[:-1], -1)


class PackedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear`, with its parameters and its values, that is fast for many rows too."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., in) -> (..., out), in x's dtype or the bias's, whichever is larger."""
        few, bias = x.size // x.shape[-1] <= FEW_ROWS[target()], self.get("bias")
        if not few and bias is not None and bias.dtype == x.dtype:
            return multiply(x, self.unpacked(x.dtype).T, bias)
        y = (in_pieces(self._packed, x) if few else multiply(x, self.unpacked(x.dtype).T)).astype(x.dtype)
        return y if bias is None else y + bias

    def _packed(self, rows: mx.array) -> mx.array:
        matrix = self.weight, self.scales, self.get("biases")
        return mx.quantized_matmul(rows, *matrix, True, self.group_size, self.bits, self.mode)

    def unpacked(self, dtype: mx.Dtype) -> mx.array:
        """The matrix (out, in) in `dtype`."""
        if traced_for() in ("CUDA", "Metal"):  # one kernel there, and many operations where the trace is made
            rows, columns = self.weight.shape[0], self.weight.shape[1] * 32 // self.bits
            values = self.weight.view(dtype)[..., None]
            return mx.broadcast_to(values, (rows, values.shape[1], columns // values.shape[1])).reshape(rows, columns)
        matrix = self.weight, self.scales, self.get("biases")
        return mx.dequantize(*matrix, self.group_size, self.bits, self.mode, dtype=dtype)
