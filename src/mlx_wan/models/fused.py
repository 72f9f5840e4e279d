"""What a transformer block does between its matrices, each as one pass over the tokens.

A token's row is read once and written once. On CUDA that takes kernels of our own, since MLX's norms and its fused
element-wise operations are separate passes; elsewhere, and while a graph is traced for `memory`, the same is written
in plain MLX. Both compute in float32. `fused_gradients` has the way back.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx

from . import fused_gradients, layers
from .layers import is_traced, target
from .row_kernels import CENTRED, Arrays, launch, launch_flat

# --- plain MLX ---------------------------------------------------------------------------------------------------


def _grouped(x: mx.array, table: mx.array) -> mx.array:
    """x (B, L, C) as (B, G, L / G, C), for a table (B or 1, G, C) of which neighbouring tokens share rows."""
    return x.reshape(x.shape[0], table.shape[1], -1, x.shape[-1])


def _plain_norm(eps: float, dtype: mx.Dtype, x: mx.array, gain: mx.array, shift: mx.array) -> Arrays:
    if gain.shape[:2] == (1, 1):
        return (mx.fast.layer_norm(x, gain.reshape(-1), shift.reshape(-1), eps).astype(dtype),)
    x = mx.fast.layer_norm(x, None, None, eps)
    return ((_grouped(x, gain) * gain[:, :, None] + shift[:, :, None]).reshape(x.shape).astype(dtype),)


def _plain_add(x: mx.array, y: mx.array, *gate: mx.array) -> Arrays:
    y = y.astype(mx.float32)
    for table in gate:
        y = (_grouped(y, table) * table[:, :, None]).reshape(x.shape)
    return (x + y,)


def _plain_add_norm(eps: float, dtype: mx.Dtype, x: mx.array, y: mx.array, *tables: mx.array) -> Arrays:
    *gate, gain, shift = tables
    (x,) = _plain_add(x, y, *gate)
    return x, *_plain_norm(eps, dtype, x, gain, shift)


def rotate(x: mx.array, cos: mx.array, sin: mx.array, num_heads: int) -> mx.array:
    """Rotates neighbouring pairs of x (B, L, num_heads * head_dim) by the tables of `rope_table`."""
    pairs = x.reshape(*x.shape[:2], num_heads, -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return mx.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def _plain_rms(eps: float, dtype: mx.Dtype, num_heads: int, x: mx.array, weight: mx.array, *rope: mx.array) -> Arrays:
    x = mx.fast.rms_norm(x.astype(mx.float32), weight, eps)
    return ((rotate(x, rope[0], rope[1], num_heads) if rope else x).astype(dtype),)


def _plain_gelu(x: mx.array) -> Arrays:
    return (layers.GELU()(x),)


# --- CUDA --------------------------------------------------------------------------------------------------------

# One block of threads works on one token. `place` is the token's own in its sample.
_ROW_SOURCE = """
  __shared__ float sums[THREADS / 32], squares[THREADS / 32];
  const int length = x_shape[1], sample = blockIdx.x / length, place = blockIdx.x % length;
  const long long start = (long long)blockIdx.x * WIDTH;
  float row[PARTS][4];
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    const int c = 4 * (part * THREADS + threadIdx.x);
    if (c < WIDTH) {
      load_row<4>(x + start + c, row[part]);
      //ADD
    } else {
      row[part][0] = row[part][1] = row[part][2] = row[part][3] = 0;
    }
  }
  //NORM
"""

_ADD_SOURCE = """
      float other[4];
      load_row<4>(y + start + c, other);
      //GATE
#pragma unroll
      for (int i = 0; i < 4; i++) row[part][i] += other[i];
      store_row<4>(sum + start + c, row[part]);
"""

_GATE_SOURCE = """
      float gates[4];
      load_row<4>(gate + table_row(sample, place, length, gate_shape[0], gate_shape[1]) * WIDTH + c, gates);
#pragma unroll
      for (int i = 0; i < 4; i++) other[i] *= gates[i];
"""

_NORM_SOURCE = """
  float total = 0;
#pragma unroll
  for (int part = 0; part < PARTS; part++) total += row[part][0] + row[part][1] + row[part][2] + row[part][3];
"""
_NORM_SOURCE += CENTRED
_NORM_SOURCE += """
  const long long table = table_row(sample, place, length, gain_shape[0], gain_shape[1]) * WIDTH;
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    const int c = 4 * (part * THREADS + threadIdx.x);
    if (c < WIDTH) {
      float gains[4], shifts[4];
      load_row<4>(gain + table + c, gains);
      load_row<4>(shift + table + c, shifts);
#pragma unroll
      for (int i = 0; i < 4; i++) row[part][i] = row[part][i] * scale * gains[i] + shifts[i];
      store_row<4>(normed + start + c, row[part]);
    }
  }
"""

_RMS_SOURCE = """
  __shared__ float squares[THREADS / 32];
  const int length = x_shape[1], place = blockIdx.x % length;
  const long long start = (long long)blockIdx.x * WIDTH;
  float row[PARTS][8];
  float total = 0;
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    const int c = 8 * (part * THREADS + threadIdx.x);
    if (c < WIDTH) {
      load_row<8>(x + start + c, row[part]);
#pragma unroll
      for (int i = 0; i < 8; i++) total += row[part][i] * row[part][i];
    }
  }
  const float scale = rsqrtf(block_sum<THREADS>(total, squares) / WIDTH + EPS);
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    const int c = 8 * (part * THREADS + threadIdx.x);
    if (c < WIDTH) {
      float weights[8];
      load_row<8>(weight + c, weights);
#pragma unroll
      for (int i = 0; i < 8; i++) row[part][i] *= scale * weights[i];
      //ROPE
      store_row<8>(normed + start + c, row[part]);
    }
  }
"""

_ROPE_SOURCE = """
      float turn[4], side[4];
      const long long angle = (long long)place * (HEAD / 2) + (c % HEAD) / 2;
      load_row<4>(cos + angle, turn);
      load_row<4>(sin + angle, side);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float even = row[part][2 * i], odd = row[part][2 * i + 1];
        row[part][2 * i] = even * turn[i] - odd * side[i];
        row[part][2 * i + 1] = even * side[i] + odd * turn[i];
      }
"""

_GELU_SOURCE = """
  const long long c = 8 * ((long long)blockIdx.x * THREADS + threadIdx.x);
  if (c < (long long)x_shape[0] * x_shape[1]) {
    float row[8];
    load_row<8>(x + c, row);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float inner = 1.5957691216057308f * row[i] * (1.0f + 0.044715f * row[i] * row[i]);
      row[i] = __fdividef(row[i], 1.0f + __expf(-inner));
    }
    store_row<8>(y + c, row);
  }
"""


def _launch(
    name: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, mx.Dtype],
    source: str,
    eps: float,
    vector: int,
    **constants: int,
) -> Arrays:
    """Runs a kernel whose first input is x (B, L, C), all of whose outputs have that shape, a block for each token."""
    x = next(iter(inputs.values()))
    made = {output: (x.shape, dtype) for output, dtype in outputs.items()}
    return launch(name, inputs, made, source, eps, vector, blocks=x.size // x.shape[-1], **constants)


def _row_source(add: bool = False, gate: bool = False, norm: bool = False) -> str:
    added = _ADD_SOURCE.replace("//GATE", _GATE_SOURCE if gate else "") if add else ""
    return _ROW_SOURCE.replace("//ADD", added).replace("//NORM", _NORM_SOURCE if norm else "")


def _cuda_norm(eps: float, dtype: mx.Dtype, x: mx.array, gain: mx.array, shift: mx.array) -> Arrays:
    inputs = {"x": x, "gain": gain, "shift": shift}
    return _launch("norm", inputs, {"normed": dtype}, _row_source(norm=True), eps, 4)


def _cuda_add(x: mx.array, y: mx.array, *gate: mx.array) -> Arrays:
    inputs = {"x": x, "y": y, **dict(zip(("gate",), gate, strict=False))}
    return _launch("add", inputs, {"sum": mx.float32}, _row_source(add=True, gate=bool(gate)), 0.0, 4)


def _cuda_add_norm(eps: float, dtype: mx.Dtype, x: mx.array, y: mx.array, *tables: mx.array) -> Arrays:
    *gate, gain, shift = tables
    inputs = {"x": x, "y": y, "gain": gain, "shift": shift, **dict(zip(("gate",), gate, strict=False))}
    source = _row_source(add=True, gate=bool(gate), norm=True)
    return _launch("add_norm", inputs, {"sum": mx.float32, "normed": dtype}, source, eps, 4)


def _cuda_rms(eps: float, dtype: mx.Dtype, num_heads: int, x: mx.array, weight: mx.array, *rope: mx.array) -> Arrays:
    inputs = {"x": x, "weight": weight, **dict(zip(("cos", "sin"), rope, strict=False))}
    source = _RMS_SOURCE.replace("//ROPE", _ROPE_SOURCE if rope else "")
    return _launch(
        "rms_rotated" if rope else "rms", inputs, {"normed": dtype}, source, eps, 8, HEAD=x.shape[-1] // num_heads
    )


def _cuda_gelu(x: mx.array) -> Arrays:
    return (launch_flat("gelu", {"x": x}, "y", _GELU_SOURCE),)


# --- either ------------------------------------------------------------------------------------------------------

KERNELS: dict[Callable[..., Arrays], Callable[..., Arrays]] = {
    _plain_norm: _cuda_norm,
    _plain_add: _cuda_add,
    _plain_add_norm: _cuda_add_norm,
    _plain_rms: _cuda_rms,
    _plain_gelu: _cuda_gelu,
}


# (*fixed, primals, cotangents, outputs) -> gradients of the primals.
GRADIENTS: dict[Callable[..., Arrays], Callable[..., Arrays]] = {
    _plain_norm: fused_gradients.norm,
    _plain_add: fused_gradients.add,
    _plain_add_norm: fused_gradients.add_norm,
    _plain_rms: fused_gradients.rms,
    _plain_gelu: fused_gradients.gelu,
}


@lru_cache
def differentiable(
    kernel: Callable[..., Arrays], gradient: Callable[..., Arrays], *fixed: Any
) -> Callable[..., Arrays]:
    """kernel(*fixed, *arrays), whose gradient is gradient(*fixed, arrays, cotangents, results)."""

    @mx.custom_function
    def run(*arrays: mx.array) -> Arrays:
        return kernel(*fixed, *arrays)

    @run.vjp
    def run_vjp(primals: Arrays | mx.array, cotangents: Arrays, outputs: Arrays) -> Arrays:
        # MLX hands a single argument over as itself.
        arrays = (primals,) if isinstance(primals, mx.array) else tuple(primals)
        return gradient(*fixed, arrays, tuple(cotangents), tuple(outputs))

    return cast(Callable[..., Arrays], run)


def _run(plain: Callable[..., Arrays], fixed: tuple[Any, ...], *arrays: mx.array) -> Arrays:
    """In one pass if this backend has a kernel, which wants rows of whole vectors."""
    if target() != "CUDA" or arrays[0].shape[-1] % 8:
        return plain(*fixed, *arrays)
    if is_traced():
        return KERNELS[plain](*fixed, *arrays)
    return differentiable(KERNELS[plain], GRADIENTS[plain], *fixed)(*arrays)


def norm(x: mx.array, gain: mx.array, shift: mx.array, eps: float, dtype: mx.Dtype) -> mx.array:
    """Layer norm of x (B, L, C) float32, times gain, plus shift, in `dtype`.

    gain, shift: (B or 1, G, C) float32, shared by groups of neighbouring tokens, where G divides L: 1 for one timestep
    a sample, t for one a latent frame, L for one a token.
    """
    return _run(_plain_norm, (eps, dtype), x, gain, shift)[0]


def add(x: mx.array, y: mx.array, gate: mx.array | None = None) -> mx.array:
    """x + y * gate, float32, for x (B, L, C) float32 and y of any type; gate shared as `norm`'s gain, or 1."""
    return _run(_plain_add, (), x, y, *(() if gate is None else (gate,)))[0]


def add_norm(
    x: mx.array, y: mx.array, gate: mx.array | None, gain: mx.array, shift: mx.array, eps: float, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """`add`, and the `norm` of what it gives; gate and gain may be shared by different groups."""
    added, normed = _run(_plain_add_norm, (eps, dtype), x, y, *(() if gate is None else (gate,)), gain, shift)
    return added, normed


def rms_norm(
    x: mx.array,
    weight: mx.array,
    eps: float,
    dtype: mx.Dtype,
    num_heads: int,
    rope: tuple[mx.array, mx.array] | None = None,
) -> mx.array:
    """RMS norm of x (B, L, C) of any type, its heads turned by the tables of `rope_table`, in `dtype`."""
    if x.shape[-1] // num_heads % 8:
        return _plain_rms(eps, dtype, num_heads, x, weight, *(rope or ()))[0]
    return _run(_plain_rms, (eps, dtype, num_heads), x, weight, *(rope or ()))[0]


class GELU(layers.GELU):
    """`layers.GELU`; of bfloat16 and float16 rounded once, as torch does, where there is a kernel."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if x.dtype == mx.float32 else _run(_plain_gelu, (), x)[0]
