"""Small pieces that more than one model is made of."""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_wan.backend import device_name

_GELU_SLOPE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def quick_tanh(x: mx.array) -> mx.array:
    """tanh by multiplication and division alone, good to 2e-7, for float32.

    MLX's CPU backend computes tanh one value at a time, which makes a GELU about four times slower. Lambert's
    continued fraction is exact enough up to |x| = 2.3; tanh 2a = 2 tanh a / (1 + tanh² a) takes it, twice, to where
    tanh is 1.
    """
    a = mx.clip(x, -9.02, 9.02) * 0.25
    s = a * a
    t = a * (135135 + s * (17325 + s * (378 + s))) / (135135 + s * (62370 + s * (3150 + s * 28)))
    for _ in range(2):
        t = 2 * t / (1 + t * t)
    return t


def _plain_gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + quick_tanh(_GELU_SLOPE * x * (1 + _GELU_CUBIC * x * x)))


_cpu_gelu = mx.custom_function(_plain_gelu)


@_cpu_gelu.vjp
def _cpu_gelu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    square = x * x
    t = quick_tanh(_GELU_SLOPE * x * (1 + _GELU_CUBIC * square))
    inner = _GELU_SLOPE * (1 + 3 * _GELU_CUBIC * square)
    return cotangent * 0.5 * (1 + t + x * (1 - t * t) * inner)


def _plain_silu(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + quick_tanh(0.5 * x))


_cpu_silu = mx.custom_function(_plain_silu)


@_cpu_silu.vjp
def _cpu_silu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    sigmoid = 0.5 * (1 + quick_tanh(0.5 * x))
    return cotangent * sigmoid * (1 + x * (1 - sigmoid))


# Of 2^x between ±1/2, by Chebyshev's points; the highest first.
_EXP2 = (1.5461445e-4, 1.3400428e-3, 9.6180567e-3, 5.5503272e-2, 0.24022651, 0.69314721, 1.0)


def quick_exp(x: mx.array) -> mx.array:
    """exp of x up to 0 by multiplication and shifts alone, as good as MLX's, for float32.

    MLX's CPU backend computes exp one value at a time too, which makes a softmax twice as slow.
    """
    y = mx.maximum(x * math.log2(math.e), -126)
    whole = mx.round(y)
    rest, power = y - whole, mx.array(_EXP2[0])
    for coefficient in _EXP2[1:]:
        power = power * rest + coefficient
    return power * mx.left_shift(whole.astype(mx.int32) + 127, mx.array(23)).view(mx.float32)


def _plain_softmax(x: mx.array) -> mx.array:
    x = quick_exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


_cpu_softmax = mx.custom_function(_plain_softmax)


@_cpu_softmax.vjp
def _cpu_softmax_vjp(x: mx.array, cotangent: mx.array, weights: mx.array) -> mx.array:
    return weights * (cotangent - (cotangent * weights).sum(axis=-1, keepdims=True))


def _plain_copy(x: mx.array) -> mx.array:
    return x * 1


# Operations whose graphs mx.export_function cannot write, and the same in one that it can.
_USUAL: dict[str, Callable] = {
    "gelu": _cpu_gelu,
    "silu": _cpu_silu,
    "softmax": _cpu_softmax,
    "copy": mx.contiguous,
}
_TRACEABLE: dict[str, Callable] = {
    "gelu": _plain_gelu,
    "silu": _plain_silu,
    "softmax": _plain_softmax,
    "copy": _plain_copy,
}
_forms = dict(_USUAL)
_traced_for: str | None = None


@contextlib.contextmanager
def traceable(device: str) -> Iterator[None]:
    """Inside, `mx.export_function` can trace the models as they run on `device` ("CPU", "Metal" or "CUDA").

    Memory is the same. So are values, but for those of kernels of our own, which an operation of the same size stands
    for; and there are no gradients of our own.
    """
    global _traced_for
    _forms.update(_TRACEABLE)
    _traced_for = device
    try:
        yield
    finally:
        _forms.update(_USUAL)
        _traced_for = None


def traced_for() -> str | None:
    """The device that a graph is being traced for; None while things are computed."""
    return _traced_for


def stand_in(shape: tuple[int, ...], dtype: mx.Dtype, *inputs: mx.array) -> mx.array:
    """For tracing: an array that one operation makes when all inputs are there. Its values mean nothing."""
    nothing = sum((x.reshape(-1)[:1].astype(mx.int32) for x in inputs), mx.zeros((1,), mx.int32))
    return mx.zeros((1,), dtype)[mx.broadcast_to(nothing, shape)]


@lru_cache
def cuda_kernel(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str = ""
) -> Callable[..., list[mx.array]]:
    """`mx.fast.cuda_kernel`; while a graph is traced, what stands for it."""
    made: list[Any] = []

    def call(**given: Any) -> list[mx.array]:
        if is_traced():
            results = zip(given["output_shapes"], given["output_dtypes"], strict=True)
            return [stand_in(shape, dtype, *given["inputs"]) for shape, dtype in results]
        if not made:
            made.append(mx.fast.cuda_kernel(name, list(inputs), list(outputs), source, header))
        return made[0](**given)

    return call


def target() -> str:
    """The device that a graph is being traced for, else the one that computes."""
    return _traced_for or device_name()


@lru_cache
def _beside() -> mx.Stream:
    return mx.new_stream(mx.gpu)


def upload_stream() -> mx.Stream:
    """Where to put the first operation on an array of the host's, for the device to fetch it beside other work."""
    return _beside() if device_name() == "CUDA" else mx.default_stream(mx.default_device())


def is_traced() -> bool:
    """Whether a graph is being traced that must be written in MLX's own operations."""
    return _traced_for is not None


def copied(x: mx.array) -> mx.array:
    """`x` in a buffer of its own: a view would hold the whole array it is cut from."""
    return cast(mx.array, _forms["copy"](x))


LARGE = 1 << 24  # bytes of a result from which on its part of a computation is worth a wait


class Pace:
    """Lets MLX work ahead by one part of a computation, and no more: memory is handed out before the work is done.

    Called with what each part ends in; what it returns is to be used in its place. Without it a GPU has the arrays of
    many parts at once; waiting for each part instead leaves the GPU idle in between.
    """

    def __init__(self) -> None:
        self._last: mx.array | None = None

    def __call__(self, x: mx.array, *others: mx.array) -> mx.array:
        if is_traced():
            x = mx.depends([x], [x if self._last is None else self._last, *others])[0]
        else:
            mx.async_eval(x, *others)
            if self._last is not None:
                mx.eval(self._last)
        self._last = x
        return x

    def within(self, x: mx.array, *others: mx.array) -> mx.array:
        """The same where x is large; small parts go on with the next."""
        return self(x, *others) if x.nbytes >= LARGE else x


def _on_cpu(x: mx.array) -> bool:
    return x.dtype == mx.float32 and mx.default_device() == mx.cpu


class GELU(nn.Module):
    """The tanh form of the Gaussian error linear unit, torch's GELU(approximate="tanh")."""

    def __call__(self, x: mx.array) -> mx.array:
        return cast(mx.array, _forms["gelu"](x)) if _on_cpu(x) else nn.gelu_approx(x)


class SiLU(nn.Module):
    """x · sigmoid(x)."""

    def __call__(self, x: mx.array) -> mx.array:
        return cast(mx.array, _forms["silu"](x)) if _on_cpu(x) else nn.silu(x)


def run_layers(layers: list[nn.Module], x: mx.array) -> mx.array:
    """Applies `layers` in turn.

    The official checkpoints number the members of a torch Sequential, parameterless ones included. A plain
    list of modules gives MLX parameters the same names ("ffn.2.weight"), which `nn.Sequential` does not.
    """
    for layer in layers:
        x = layer(x)
    return x


FEW_SCORES = 1 << 18  # which a core's cache holds, in several arrays: up to there `quick_exp` pays
PIECE_BYTES = 1 << 26  # of scores in memory at a time, when attention is differentiated in pieces


@lru_cache
def _attention_in_pieces(scale: float) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """Attention whose backward pass makes the scores anew, for some rows of queries at a time.

    MLX's own keeps them all: tokens² for each head and layer, float32 or not.
    """

    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)

    @attention.vjp
    def attention_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, out: mx.array) -> tuple[mx.array, ...]:
        q, k, v = primals
        rows = max(1, PIECE_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
        dq, dk, dv = [], mx.zeros(k.shape, mx.float32), mx.zeros(v.shape, mx.float32)
        for start in range(0, q.shape[2], rows):
            piece = slice(start, start + rows)
            # Not before the piece before it is done: or all would be in memory at once.
            (rows_q,) = mx.depends([q[:, :, piece]], [dk, dv])
            error, rows_out = cotangent[:, :, piece], out[:, :, piece]
            weights = mx.softmax((rows_q * scale) @ k.swapaxes(-1, -2), axis=-1, precise=True)
            dv = dv + weights.swapaxes(-1, -2) @ error
            d_scores = weights * (error @ v.swapaxes(-1, -2) - (error * rows_out).sum(axis=-1, keepdims=True))
            dq.append(scale * (d_scores @ k))
            dk = dk + scale * (d_scores.swapaxes(-1, -2) @ rows_q)
        return mx.concatenate(dq, axis=2), dk.astype(k.dtype), dv.astype(v.dtype)

    return cast(Callable[[mx.array, mx.array, mx.array], mx.array], attention)


def _is_fused_where_traced_for(q: mx.array, head_dim: int) -> bool:
    """Whether the attention being traced is one kernel there. The trace would have it as on this machine."""
    half = q.dtype in (mx.bfloat16, mx.float16)
    return traced_for() == "Metal" or (traced_for() == "CUDA" and half and head_dim <= 128 and head_dim % 8 == 0)


TILE = 128  # queries that a block of CUDA's fused backward pass takes
NEVER = -3e4  # a score that no key with it is seen at, in every dtype


def _has_fused_gradient(q: mx.array, head_dim: int) -> bool:
    """Whether MLX's own gradient is one kernel that keeps no scores: cuDNN's, on CUDA below float32 (MLX 0.32.4)."""
    half = q.dtype != mx.float32 and head_dim <= 128 and head_dim % 8 == 0
    return half and mx.default_device() == mx.gpu and mx.cuda.is_available()


def _whole_tiles(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
    """Queries, keys and values (B, L, C) filled up to the lengths at which that kernel is taken; a mask for the rest.

    On an H100, 24 heads of 128, 5,070 tokens: 4 ms with the forward pass, in pieces 62 ms (docs/benchmarks.md).
    """
    queries, keys, values = (mx.pad(a, [(0, 0), (0, -a.shape[1] % TILE), (0, 0)]) for a in (q, k, v))
    if keys.shape[1] == k.shape[1]:
        return queries, keys, values, None
    mask = mx.where(mx.arange(keys.shape[1]) < k.shape[1], 0.0, NEVER).astype(q.dtype)
    return queries, keys, values, mask[None, None, None]


def _loses_the_process(q: mx.array, k: mx.array) -> bool:
    """Whether MLX's own gradient would read beyond its arrays: on CUDA, below float32 (MLX 0.32.4).

    It takes cuDNN's backward pass if the queries are whole tiles, and fails if the keys then are not.
    """
    on_cuda = q.dtype != mx.float32 and mx.default_device() == mx.gpu and mx.cuda.is_available()
    return on_cuda and q.shape[2] % TILE == 0 and k.shape[2] % TILE != 0


# The most that one kernel may compute where the system stops a GPU that seems to hang: macOS with a display does, after
# about five seconds. 0.55 TFLOP are 0.4 s of the slowest Apple silicon (M1, some 1.5 TFLOP/s). Kernels share a command
# buffer there until they read 40 million elements together, which those of this size do alone (MLX 0.32).
KERNEL_FLOP = {"Metal": 1 << 39}


# The most bytes of all rows between two products, where a part of the rows keeps the GPU as busy as all do.
BETWEEN_BYTES = {"CUDA": 1 << 28}


def by_rows(compute: Callable[[mx.array], mx.array], x: mx.array, flop: float, between: int = 0) -> mx.array:
    """`compute` of x (B, L, C), for as many rows at a time as one kernel, and memory, may take on this device.

    compute: (B, n, C) -> (B, n, D), each row by itself. flop: of a row in its longest kernel. between: bytes of a row
    at its widest.
    """
    batch, length, _ = x.shape
    count = math.ceil(flop * batch * length / KERNEL_FLOP.get(target(), math.inf))
    count = max(count, math.ceil(between * batch * length / BETWEEN_BYTES.get(target(), math.inf)))
    if count < 2:
        return compute(x)
    rows = -(-length // min(count, length))
    return mx.concatenate([compute(x[:, start : start + rows]) for start in range(0, length, rows)], axis=1)


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    num_heads: int,
    scale: float,
    mask: mx.array | None = None,
    in_pieces: bool = False,
) -> mx.array:
    """Multi-head attention over projections whose heads lie side by side.

    Args:
        q: (B, Lq, num_heads * head_dim)
        k, v: (B, Lk, num_heads * head_dim)
        mask: additive, broadcastable to (B, num_heads, Lq, Lk), in q's dtype.
        in_pieces: for training: the backward pass takes less memory and makes the scores again. Not with a mask.

    Returns:
        (B, Lq, num_heads * head_dim) in q's dtype.
    """
    run = partial(_attend, k=k, v=v, num_heads=num_heads, scale=scale, mask=mask, in_pieces=in_pieces)
    return run(q) if mask is not None else by_rows(run, q, 4 * k.shape[1] * q.shape[2])


def _attend(
    q: mx.array, k: mx.array, v: mx.array, num_heads: int, scale: float, mask: mx.array | None, in_pieces: bool
) -> mx.array:
    """`attend` in one kernel."""
    batch, length, width = q.shape
    if _is_fused_where_traced_for(q, width // num_heads):
        return stand_in(q.shape, q.dtype, q, k, v)
    if in_pieces and _has_fused_gradient(q, width // num_heads):
        in_pieces, (q, k, v, mask) = False, _whole_tiles(q, k, v)
    q, k, v = (a.reshape(batch, a.shape[1], num_heads, -1).transpose(0, 2, 1, 3) for a in (q, k, v))
    if in_pieces or (mask is None and _loses_the_process(q, k)):
        out = _attention_in_pieces(scale)(q, k, v)
    elif mask is None and _on_cpu(q) and batch * num_heads * length * k.shape[2] <= FEW_SCORES:
        out = cast(mx.array, _forms["softmax"]((q * scale) @ k.swapaxes(-1, -2))) @ v
    else:
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    return out[:, :, :length].transpose(0, 2, 1, 3).reshape(batch, length, width)
