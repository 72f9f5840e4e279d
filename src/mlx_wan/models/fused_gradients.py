"""The gradients of `fused`'s passes on CUDA, each as one pass over the tokens too.

In plain MLX the gradient of a norm or a GELU is a dozen passes, of which training a small model takes most of its time.
Here a block of threads goes through a few neighbouring tokens: what belongs to a token is written at once, what is
summed over tokens (of gains, shifts and gates) is added up in registers and written once a block; MLX adds the rest.
"""

import math

import mlx.core as mx

from .row_kernels import CENTRED, Arrays, each_vector, launch, launch_flat

MOST_ROWS = 32  # tokens that a block goes through

# d_normed is the error of the norm's result, d_sum of what is added up before it, `sum` what was added up.
_ROWS_SOURCE = """
  __shared__ float sums[THREADS / 32], squares[THREADS / 32];
  const int length = sum_shape[1];
  const long long first = (long long)blockIdx.x * ROWS;
  const int sample = first / length, place = first % length;
  //TABLES
  for (int step = 0; step < ROWS; step++) {
    const long long start = (first + step) * WIDTH;
    float error[PARTS][4];
    //NORM
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const int c = 4 * (part * THREADS + threadIdx.x);
      if (c < WIDTH) {
        //ADD
        store_row<4>(d_x + start + c, error[part]);
        //GATE
      }
    }
  }
  //SUMS
"""

_NORM_TABLES = """
  const long long gain_row = table_row(sample, place, length, gain_shape[0], gain_shape[1]) * WIDTH;
  float gains[PARTS][4], gain_sum[PARTS][4] = {}, shift_sum[PARTS][4] = {};
""" + each_vector(4, "load_row<4>(gain + gain_row + c, gains[part]);")

_GATE_TABLES = """
  const long long gate_row = table_row(sample, place, length, gate_shape[0], gate_shape[1]) * WIDTH;
  float gates[PARTS][4], gate_sum[PARTS][4] = {};
""" + each_vector(4, "load_row<4>(gate + gate_row + c, gates[part]);")

# With x the normalised row and e its error times the gain, of the row before: (e - mean e - x mean(e x)) / deviation.
_NORM_SOURCE = """
    float row[PARTS][4];
    float total = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const int c = 4 * (part * THREADS + threadIdx.x);
      if (c < WIDTH) {
        load_row<4>(sum + start + c, row[part]);
        load_row<4>(d_normed + start + c, error[part]);
        total += row[part][0] + row[part][1] + row[part][2] + row[part][3];
      }
    }
"""
_NORM_SOURCE += CENTRED
_NORM_SOURCE += """
    float plain = 0, along = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      if (4 * (part * THREADS + threadIdx.x) < WIDTH) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          row[part][i] *= scale;
          gain_sum[part][i] += error[part][i] * row[part][i];
          shift_sum[part][i] += error[part][i];
          error[part][i] *= gains[part][i];
          plain += error[part][i];
          along += error[part][i] * row[part][i];
        }
      }
    }
    plain = block_sum<THREADS>(plain, sums) / WIDTH;
    along = block_sum<THREADS>(along, squares) / WIDTH;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
#pragma unroll
      for (int i = 0; i < 4; i++) error[part][i] = scale * (error[part][i] - plain - row[part][i] * along);
    }
"""

_ADD_AFTER_NORM = """
        float straight[4];
        load_row<4>(d_sum + start + c, straight);
#pragma unroll
        for (int i = 0; i < 4; i++) error[part][i] += straight[i];
"""

_ADD_ALONE = """
        load_row<4>(d_sum + start + c, error[part]);
"""

_OTHER_SOURCE = """
        store_row<4>(d_y + start + c, error[part]);
"""

_GATE_SOURCE = """
        float other[4];
        load_row<4>(y + start + c, other);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          gate_sum[part][i] += error[part][i] * other[i];
          error[part][i] *= gates[part][i];
        }
        store_row<4>(d_y + start + c, error[part]);
"""

_RMS_SOURCE = """
  __shared__ float sums[THREADS / 32], squares[THREADS / 32];
  const int length = x_shape[1];
  float weights[PARTS][8], weight_sum[PARTS][8] = {};
"""
_RMS_SOURCE += each_vector(8, "load_row<8>(weight + c, weights[part]);")
_RMS_SOURCE += """
  for (int step = 0; step < ROWS; step++) {
    const long long token = (long long)blockIdx.x * ROWS + step;
    const long long start = token * WIDTH;
    float row[PARTS][8], error[PARTS][8];
    float total = 0, along = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const int c = 8 * (part * THREADS + threadIdx.x);
      if (c < WIDTH) {
        load_row<8>(x + start + c, row[part]);
        load_row<8>(d_normed + start + c, error[part]);
        //ROPE
#pragma unroll
        for (int i = 0; i < 8; i++) {
          total += row[part][i] * row[part][i];
          along += error[part][i] * weights[part][i] * row[part][i];
        }
      }
    }
    const float scale = rsqrtf(block_sum<THREADS>(total, sums) / WIDTH + EPS);
    along = block_sum<THREADS>(along, squares) / WIDTH * scale * scale;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const int c = 8 * (part * THREADS + threadIdx.x);
      if (c < WIDTH) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          weight_sum[part][i] += error[part][i] * row[part][i] * scale;
          error[part][i] = scale * (error[part][i] * weights[part][i] - row[part][i] * along);
        }
        store_row<8>(d_x + start + c, error[part]);
      }
    }
  }
"""
_RMS_SOURCE += each_vector(8, "store_row<8>(d_weight + (long long)blockIdx.x * WIDTH + c, weight_sum[part]);")

_ROPE_SOURCE = """
        float turn[4], side[4];
        const long long angle = token % length * (HEAD / 2) + (c % HEAD) / 2;
        load_row<4>(cos + angle, turn);
        load_row<4>(sin + angle, side);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float even_error = error[part][2 * i], odd_error = error[part][2 * i + 1];
          error[part][2 * i] = even_error * turn[i] + odd_error * side[i];
          error[part][2 * i + 1] = odd_error * turn[i] - even_error * side[i];
        }
"""

_GELU_SOURCE = """
  const long long c = 8 * ((long long)blockIdx.x * THREADS + threadIdx.x);
  if (c < (long long)x_shape[0] * x_shape[1]) {
    float row[8], error[8];
    load_row<8>(x + c, row);
    load_row<8>(d_y + c, error);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float square = 0.044715f * row[i] * row[i];
      const float share = __fdividef(1.0f, 1.0f + __expf(-1.5957691216057308f * row[i] * (1.0f + square)));
      error[i] *= share * (1.0f + (1.0f - share) * 1.5957691216057308f * row[i] * (1.0f + 3.0f * square));
    }
    store_row<8>(d_x + c, error);
  }
"""


def rows_of_a_block(length: int, *groups: int) -> int:
    """Of how many neighbouring tokens a block adds up what they share, of tables that have so many rows a sample."""
    together = math.gcd(*(length // count for count in groups)) if groups else length
    return max(rows for rows in range(1, MOST_ROWS + 1) if together % rows == 0)


def _summed(parts: mx.array, table: mx.array) -> mx.array:
    """(B, chunks, C), sums over neighbouring tokens, added up for each row of a table (B or 1, G, C)."""
    batch, _, width = parts.shape
    rows = parts.reshape(batch, table.shape[1], -1, width).sum(axis=2)
    return rows if table.shape[0] == batch else rows.sum(axis=0, keepdims=True)


def _rows(
    eps: float,
    x: mx.array,
    d_sum: mx.array | None,
    d_normed: mx.array | None,
    y: mx.array | None,
    gate: mx.array | None,
    gain: mx.array | None,
) -> dict[str, mx.array]:
    """x: what was normalised. Of what is not None, the gradients by the names d_x, d_y, gate, gain, shift."""
    batch, length, width = x.shape
    inputs = {"sum": x, "d_sum": d_sum, "d_normed": d_normed, "gain": gain, "gate": gate}
    given = {name: array for name, array in inputs.items() if array is not None}
    given |= {} if gate is None or y is None else {"y": y}
    rows = rows_of_a_block(length, *(t.shape[1] for t in (gain, gate) if t is not None))
    tables = {} if gain is None else {"gain": gain, "shift": gain}
    tables |= {} if gate is None else {"gate": gate}
    outputs = {"d_x": (x.shape, mx.float32)} | ({} if y is None else {"d_y": (y.shape, y.dtype)})
    outputs |= {f"d_{name}": ((batch, length // rows, width), mx.float32) for name in tables}
    add = "" if d_sum is None else _ADD_ALONE if gain is None else _ADD_AFTER_NORM
    stores = "".join(f"store_row<4>(d_{n} + (long long)blockIdx.x * WIDTH + c, {n}_sum[part]);\n" for n in tables)
    loads = ("" if gain is None else _NORM_TABLES) + ("" if gate is None else _GATE_TABLES)
    source = (
        _ROWS_SOURCE.replace("//TABLES", loads)
        .replace("//NORM", "" if gain is None else _NORM_SOURCE)
        .replace("//ADD", add)
        .replace("//GATE", _GATE_SOURCE if gate is not None else "" if y is None else _OTHER_SOURCE)
        .replace("//SUMS", each_vector(4, stores) if tables else "")
    )
    name = "_".join(("rows_gradient", *given))
    made = launch(name, given, outputs, source, eps, 4, blocks=batch * length // rows, ROWS=rows)
    found = dict(zip(outputs, made, strict=True))
    for n, table in tables.items():
        found[n] = _summed(found.pop(f"d_{n}"), table)
    return found


def norm(eps: float, _: mx.Dtype, primals: Arrays, cotangents: Arrays, results: Arrays) -> Arrays:
    x, gain, _shift = primals
    found = _rows(eps, x, None, cotangents[0], None, None, gain)
    return found["d_x"], found["gain"], found["shift"]


def add(primals: Arrays, cotangents: Arrays, results: Arrays) -> Arrays:
    _x, y, *gate = primals
    if not gate:
        return cotangents[0], cotangents[0].astype(y.dtype)
    found = _rows(0.0, results[0], cotangents[0], None, y, gate[0], None)
    return found["d_x"], found["d_y"], found["gate"]


def add_norm(eps: float, _: mx.Dtype, primals: Arrays, cotangents: Arrays, results: Arrays) -> Arrays:
    _x, y, *gate, gain, _shift = primals
    d_sum, d_normed = cotangents
    found = _rows(eps, results[0], d_sum, d_normed, y, gate[0] if gate else None, gain)
    return found["d_x"], found["d_y"], *((found["gate"],) if gate else ()), found["gain"], found["shift"]


def rms(eps: float, _: mx.Dtype, num_heads: int, primals: Arrays, cotangents: Arrays, results: Arrays) -> Arrays:
    """None of the rotary tables, which nobody trains: zeros."""
    x, weight, *rope = primals
    tokens, width = x.shape[0] * x.shape[1], x.shape[2]
    rows = rows_of_a_block(tokens)
    inputs = {"x": x, "d_normed": cotangents[0], "weight": weight, **dict(zip(("cos", "sin"), rope, strict=False))}
    outputs = {"d_x": (x.shape, x.dtype), "d_weight": ((tokens // rows, width), mx.float32)}
    source = _RMS_SOURCE.replace("//ROPE", _ROPE_SOURCE if rope else "")
    name = "rms_rotated_gradient" if rope else "rms_gradient"
    constants = {"ROWS": rows, "HEAD": width // num_heads}
    d_x, d_weight = launch(name, inputs, outputs, source, eps, 8, blocks=tokens // rows, **constants)
    return d_x, d_weight.sum(axis=0).astype(weight.dtype), *(mx.zeros_like(table) for table in rope)


def gelu(primals: Arrays, cotangents: Arrays, results: Arrays) -> Arrays:
    return (launch_flat("gelu_gradient", {"x": primals[0], "d_y": cotangents[0]}, "d_x", _GELU_SOURCE),)
