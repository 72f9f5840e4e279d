"""How a kernel that works on rows of tokens is started on CUDA, and what such kernels have in common."""

import math

import mlx.core as mx

from .layers import cuda_kernel

Arrays = tuple[mx.array, ...]

# A table's row is that of a token by its place in its sample.
HEADER = """
template <typename T, int N>
struct alignas(sizeof(T) * N) RowPack { T at[N]; };

template <int N, typename T>
__device__ inline void load_row(const T* from, float* to) {
  RowPack<T, N> pack = *reinterpret_cast<const RowPack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; i++) to[i] = static_cast<float>(pack.at[i]);
}

template <int N, typename T>
__device__ inline void store_row(T* to, const float* from) {
  RowPack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; i++) pack.at[i] = static_cast<T>(from[i]);
  *reinterpret_cast<RowPack<T, N>*>(to) = pack;
}

template <int THREADS>
__device__ inline float block_sum(float value, float* partial) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) value += partial[i];
  return value;
}

__device__ inline long long table_row(int sample, int place, int length, int samples, int groups) {
  return (samples == 1 ? 0 : (long long)sample) * groups + (long long)place * groups / length;
}
"""


# Of a row in registers, whose sum is `total`: takes the mean off, and leaves one over the deviation in `scale`.
CENTRED = """
  const float mean = block_sum<THREADS>(total, sums) / WIDTH;
  total = 0;
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    if (4 * (part * THREADS + threadIdx.x) < WIDTH) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        row[part][i] -= mean;
        total += row[part][i] * row[part][i];
      }
    }
  }
  const float scale = rsqrtf(block_sum<THREADS>(total, squares) / WIDTH + EPS);
"""

FLAT_THREADS, FLAT_VALUES = 256, 8  # of a block, and of a thread, where rows do not matter


def each_vector(vector: int, statements: str) -> str:
    """Text that does something for each of a thread's places `c` in a row, `vector` values wide, number `part`."""
    return f"""
#pragma unroll
  for (int part = 0; part < PARTS; part++) {{
    const int c = {vector} * (part * THREADS + threadIdx.x);
    if (c < WIDTH) {{
      {statements}
    }}
  }}
"""


def threads_of(width: int, vector: int) -> tuple[int, int]:
    """Threads for a row of `width` values, `vector` at a time, and how many times each has its turn."""
    vectors = width // vector
    turns = math.ceil(vectors / 512)
    return 32 * math.ceil(vectors / turns / 32), turns


def launch(
    name: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    source: str,
    eps: float,
    vector: int,
    blocks: int,
    **constants: int,
) -> Arrays:
    """Runs a kernel of so many blocks of threads, of rows as wide as those of its first input (B, L, C).

    outputs: shape and type by name.
    """
    width = next(iter(inputs.values())).shape[-1]
    threads, parts = threads_of(width, vector)
    # The kernel's text says all that its name does not: MLX tells kernels apart by both.
    source = f"  constexpr float EPS = {eps!r}f;\n{source}"
    kernel = cuda_kernel(name, tuple(inputs), tuple(outputs), source, HEADER)
    template = {"WIDTH": width, "THREADS": threads, "PARTS": parts, **constants}
    return tuple(
        kernel(
            inputs=list(inputs.values()),
            template=list(template.items()),
            grid=(blocks * threads, 1, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[shape for shape, _ in outputs.values()],
            output_dtypes=[dtype for _, dtype in outputs.values()],
        )
    )


def launch_flat(name: str, inputs: dict[str, mx.array], output: str, source: str) -> mx.array:
    """Runs a kernel on arrays of one shape, value by value; what it makes is like the first of them."""
    x = next(iter(inputs.values()))
    (made,) = cuda_kernel(name, tuple(inputs), (output,), source, HEADER)(
        inputs=[array.reshape(-1, x.shape[-1]) for array in inputs.values()],
        template=[("THREADS", FLAT_THREADS)],
        grid=(math.ceil(x.size / (FLAT_THREADS * FLAT_VALUES)) * FLAT_THREADS, 1, 1),
        threadgroup=(FLAT_THREADS, 1, 1),
        output_shapes=[(x.size // x.shape[-1], x.shape[-1])],
        output_dtypes=[x.dtype],
    )
    return made.reshape(x.shape)
