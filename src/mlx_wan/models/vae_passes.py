"""What the autoencoders do between convolutions, in one pass over memory each, on CUDA; plain MLX elsewhere.

At the decoder's full resolution a pass over the activations takes as long as a tenth of a convolution, and plain MLX
takes about nine from one convolution to the next. Each kernel is the plain function that stands before it, and
`benchmarks/vae_speed.py` compares the two. The kernels have no gradients: training takes the plain functions.
"""

from functools import lru_cache

import mlx.core as mx

from .layers import cuda_kernel, target

EPS = 1e-24  # the reference guards only against a length of 0, by max(length, 1e-12): eps must vanish beside all others
VECTOR = 16  # bytes that a thread reads at a time
THREADS = 256


def has_kernels(x: mx.array) -> bool:
    """Whether the kernels take (B, T, H, W, C) like `x` on the default device."""
    return target() == "CUDA" and x.shape[0] == 1 and x.shape[-1] * x.dtype.size % VECTOR == 0


@lru_cache
def _numbers(*values: int) -> mx.array:
    """Small whole numbers for a kernel, each one less than a side of this array, whose values are not read.

    A template would compile the kernel once for each set of them, and an array of values would have to be sent.
    """
    array = mx.zeros([1 + value for value in values], mx.int8)
    mx.eval(array)
    return array


# --- RMS norm, SiLU, and frames in front ---------------------------------------------------------------------


def norm_silu(
    x: mx.array,
    bias: mx.array | None,
    gamma: mx.array,
    before: mx.array | None,
    memory: int,
    above: mx.array | None = None,
    top: bool = True,
    bottom: bool = True,
) -> tuple[mx.array, mx.array]:
    """silu(rms_norm(x + bias) · gamma) behind `memory` frames, (B, memory + T, H, W, C), and the last of them.

    x: (B, T, H, W, C). bias, gamma: (C,). before: (B, memory, H, W, C), None for zeros.
    memory: how many; with none, the second result means nothing.
    above: of a strip, the two rows before it, (B, memory + T, 2, W, C). A strip that is not the whole frame gets them
    on top, or a row of zeros where it begins the frame, and one below where it ends it (`features.FeatureCache`).
    """
    b, t, h, w, c = x.shape
    over, under = (0, 0) if top and bottom else (1 if above is None else 2, int(bottom))
    vectors = c * x.dtype.size // VECTOR
    lanes = min(32, 1 << (vectors - 1).bit_length())
    if before is None:
        before = mx.zeros((b, memory, h, w, c), x.dtype) if memory else x
    rows = over + h + under
    padded, kept = cuda_kernel(
        "wan_norm_silu", ("x", "bias", "gamma", "before", "above", "numbers"), ("padded", "kept"), _NORM_SILU_SOURCE
    )(
        inputs=[
            x.reshape(t, h, w, c),
            mx.zeros((c,)) if bias is None else bias.astype(mx.float32),
            gamma.astype(mx.float32),
            before,
            x if above is None else above,
            _numbers(memory, over, under),
        ],
        template=[("T", x.dtype), ("LANES", lanes), ("CHUNKS", -(-vectors // lanes))],
        grid=((memory + t) * rows * w * lanes, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(b, memory + t, rows, w, c), (b, memory, h, w, c) if memory else (1,)],
        output_dtypes=[x.dtype, x.dtype],
    )
    return padded, kept


# LANES neighbouring threads share a pixel.
_NORM_SILU_SOURCE = """
constexpr int VEC = 16 / sizeof(T);
auto group = cg::tiled_partition<LANES>(cg::this_thread_block());
const unsigned memory = numbers_shape[0] - 1, over = numbers_shape[1] - 1, under = numbers_shape[2] - 1;
const unsigned frames = x_shape[0], height = x_shape[1], width = x_shape[2], C = x_shape[3];
const unsigned pixels = height * width;
const unsigned pixel = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;  // of all frames, with their borders
const unsigned frame_pixels = pixels + (over + under) * width;
const unsigned frame = pixel / frame_pixels, place = pixel % frame_pixels;
if (frame >= frames + memory) return;
T* target = padded + (size_t)pixel * C;
alignas(16) T part[CHUNKS][VEC];
if (place < over * width || place >= over * width + pixels) {
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    const unsigned at = (i * LANES + group.thread_rank()) * VEC;
    if (at < C) {
      uint4 raw = make_uint4(0, 0, 0, 0);
      if (over == 2 && place < over * width) {
        raw = *reinterpret_cast<const uint4*>(above + ((size_t)frame * over * width + place) * C + at);
      }
      *reinterpret_cast<uint4*>(target + at) = raw;
    }
  }
  return;
}
const size_t inner = place - over * width;
const bool last = frame >= frames;
T* keep = kept + ((last ? frame - frames : 0) * (size_t)pixels + inner) * C;
if (frame < memory) {
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    const unsigned at = (i * LANES + group.thread_rank()) * VEC;
    if (at < C) {
      const uint4 raw = *reinterpret_cast<const uint4*>(before + ((size_t)frame * pixels + inner) * C + at);
      *reinterpret_cast<uint4*>(target + at) = raw;
      if (last) *reinterpret_cast<uint4*>(keep + at) = raw;
    }
  }
  return;
}
const T* source = x + ((size_t)(frame - memory) * pixels + inner) * C;
float values[CHUNKS][VEC];
alignas(16) float factors[VEC];  // of neighbouring channels: their biases, then gammas
float total = 0;
#pragma unroll
for (int i = 0; i < CHUNKS; ++i) {
  const unsigned at = (i * LANES + group.thread_rank()) * VEC;
  if (at < C) {
    *reinterpret_cast<uint4*>(part[i]) = *reinterpret_cast<const uint4*>(source + at);
#pragma unroll
    for (int j = 0; j < VEC; j += 4) {
      *reinterpret_cast<float4*>(factors + j) = *reinterpret_cast<const float4*>(bias + at + j);
    }
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      values[i][j] = static_cast<float>(part[i][j]) + factors[j];
      total += values[i][j] * values[i][j];
    }
  }
}
for (int step = LANES / 2; step > 0; step /= 2) total += group.shfl_xor(total, step);
const float scale = rsqrtf(total / C + 1e-24f);
#pragma unroll
for (int i = 0; i < CHUNKS; ++i) {
  const unsigned at = (i * LANES + group.thread_rank()) * VEC;
  if (at < C) {
#pragma unroll
    for (int j = 0; j < VEC; j += 4) {
      *reinterpret_cast<float4*>(factors + j) = *reinterpret_cast<const float4*>(gamma + at + j);
    }
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const float y = values[i][j] * scale * factors[j];
      part[i][j] = static_cast<T>(__fdividef(y, 1.0f + __expf(-y)));
    }
    const uint4 raw = *reinterpret_cast<const uint4*>(part[i]);
    *reinterpret_cast<uint4*>(target + at) = raw;
    if (last) *reinterpret_cast<uint4*>(keep + at) = raw;
  }
}
"""


# --- a residual ----------------------------------------------------------------------------------------------


def add(x: mx.array, y: mx.array, bias: mx.array, above: mx.array | None = None) -> mx.array:
    """x + y + bias for x, y (1, T, H, W, C) of one type and bias (C,).

    Of strips, y may be some rows behind x: then x begins with `above`, the rows before it, and has more than y.
    """
    (out,) = cuda_kernel("wan_add", ("x", "y", "bias", "above", "numbers"), ("out",), _ADD_SOURCE)(
        inputs=[x, y, bias, x if above is None else above, _numbers(0 if above is None else above.shape[2])],
        template=[("T", x.dtype)],
        grid=(y.size * x.dtype.size // VECTOR, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[y.shape],
        output_dtypes=[x.dtype],
    )
    return out


_ADD_SOURCE = """
constexpr int VEC = 16 / sizeof(T);
const unsigned place = blockIdx.x * blockDim.x + threadIdx.x;
const unsigned before = numbers_shape[0] - 1;  // rows
const unsigned height = y_shape[2], C = y_shape[4], vectors = y_shape[3] * (C / VEC);  // of a row
const unsigned row = place / vectors, frame = row / height, line = row % height;
if (frame >= (unsigned)y_shape[1]) return;
const size_t at = (size_t)place * VEC;
const unsigned within = place % vectors * VEC, channel = within % C;
const T* source = line < before ? above + ((size_t)frame * before + line) * vectors * VEC
                                : x + ((size_t)frame * x_shape[2] + line - before) * vectors * VEC;
alignas(16) T a[VEC];
alignas(16) T b[VEC];
*reinterpret_cast<uint4*>(a) = *reinterpret_cast<const uint4*>(source + within);
*reinterpret_cast<uint4*>(b) = *reinterpret_cast<const uint4*>(y + at);
#pragma unroll
for (int j = 0; j < VEC; ++j) {
  const float sum = static_cast<float>(a[j]) + static_cast<float>(b[j]);
  a[j] = static_cast<T>(sum + static_cast<float>(bias[channel + j]));
}
*reinterpret_cast<uint4*>(out + at) = *reinterpret_cast<const uint4*>(a);
"""


# --- the shortcut around halving ------------------------------------------------------------------------------


def add_averages(y: mx.array, x: mx.array, factor_t: int, factor_s: int) -> mx.array:
    """y + average_down(x) (`vae22.average_down`) for y (1, t, h, w, C) and x (1, T, H, W, c) of one type."""
    channels = y.shape[-1]
    (out,) = cuda_kernel("wan_add_averages", ("y", "x"), ("out",), _ADD_AVERAGES_SOURCE)(
        inputs=[y, x],
        template=[
            ("T", y.dtype),
            ("GROUP", x.shape[-1] * factor_t * factor_s**2 // channels),
            ("FACTOR_T", factor_t),
            ("FACTOR_S", factor_s),
        ],
        grid=(y.size * y.dtype.size // VECTOR, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[y.shape],
        output_dtypes=[y.dtype],
    )
    return out


_ADD_AVERAGES_SOURCE = """
constexpr int VEC = 16 / sizeof(T), FOLDED = FACTOR_T * FACTOR_S * FACTOR_S;
const unsigned place = blockIdx.x * blockDim.x + threadIdx.x;
const unsigned height = y_shape[2], width = y_shape[3], C = y_shape[4], c = x_shape[4];
const unsigned channel = place % (C / VEC) * VEC;
unsigned rest = place / (C / VEC);
const unsigned column = rest % width;
rest /= width;
const unsigned row = rest % height, frame = rest / height;
if (frame >= (unsigned)y_shape[1]) return;
const int first = (int)(frame * FACTOR_T) - (int)(y_shape[1] * FACTOR_T - x_shape[1]);  // zeros complete it in front
alignas(16) T part[VEC];
*reinterpret_cast<uint4*>(part) = *reinterpret_cast<const uint4*>(y + (size_t)place * VEC);
#pragma unroll
for (int k = 0; k < VEC; ++k) {
  float total = 0;
#pragma unroll
  for (int j = 0; j < GROUP; ++j) {
    const unsigned folded = (channel + k) * GROUP + j, within = folded % FOLDED;
    const int from = first + (int)(within / (FACTOR_S * FACTOR_S));
    const unsigned below = within / FACTOR_S % FACTOR_S, beside = within % FACTOR_S;
    if (from >= 0) {
      const size_t line = (size_t)from * x_shape[2] + row * FACTOR_S + below;
      total += static_cast<float>(x[(line * x_shape[3] + column * FACTOR_S + beside) * c + folded / FOLDED]);
    }
  }
  part[k] = static_cast<T>(static_cast<float>(part[k]) + total / GROUP);
}
*reinterpret_cast<uint4*>(out + (size_t)place * VEC) = *reinterpret_cast<const uint4*>(part);
"""


# --- doubling space ------------------------------------------------------------------------------------------


def interleave(
    y: mx.array, bias: mx.array, shortcut: mx.array | None, factor_t: int, above: mx.array | None = None
) -> mx.array:
    """The four phases of `phase_weights`, (1, T, H + 1, W + 1, 4 C), as one picture (1, T, 2 H, 2 W, C) plus bias.

    shortcut: (1, t, H, W, c), whose channels, repeated, are unfolded into frames and pixels and added: see
    `autoencoder.duplicate_up`. factor_t: frames of one of its; where there are fewer, the first ones are left out.
    above: of a strip, the rows of the shortcut before its first.
    """
    _, t, h1, w1, c4 = y.shape
    c, h, w = c4 // 4, h1 - 1, w1 - 1
    repeats = 0 if shortcut is None else 4 * c * factor_t // shortcut.shape[-1]
    source = y if shortcut is None else shortcut
    numbers = _numbers(0 if above is None else above.shape[2])
    (out,) = cuda_kernel("wan_interleave", ("y", "bias", "source", "above", "numbers"), ("out",), _INTERLEAVE_SOURCE)(
        inputs=[y, bias, source, source if above is None else above, numbers],
        template=[("T", y.dtype), ("REPEATS", repeats), ("FACTOR", factor_t)],
        grid=(t * 4 * h * w * c * y.dtype.size // VECTOR, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(1, t, 2 * h, 2 * w, c)],
        output_dtypes=[y.dtype],
    )
    return out


_INTERLEAVE_SOURCE = """
constexpr int VEC = 16 / sizeof(T);
const unsigned frames = y_shape[1], height = y_shape[2] - 1, width = y_shape[3] - 1, C = y_shape[4] / 4;
const unsigned place = blockIdx.x * blockDim.x + threadIdx.x;
if (place >= frames * 4 * height * width * (C / VEC)) return;
const unsigned channel = place % (C / VEC) * VEC;
unsigned rest = place / (C / VEC);
const unsigned column = rest % (2 * width);
rest /= 2 * width;
const unsigned row = rest % (2 * height);
const unsigned frame = rest / (2 * height);
const unsigned i = row / 2, a = row % 2, j = column / 2, b = column % 2;
const size_t corner = ((size_t)frame * (height + 1) + i + a) * (width + 1) + j + b;
const T* phase = y + (corner * 4 + 2 * a + b) * C + channel;
alignas(16) T part[VEC];
*reinterpret_cast<uint4*>(part) = *reinterpret_cast<const uint4*>(phase);
constexpr bool SHORTCUT = REPEATS > 0;
const unsigned late = SHORTCUT ? frame + source_shape[1] * FACTOR - frames : 0;
const size_t from = late / FACTOR;
const unsigned sub = late % FACTOR;
const unsigned before = numbers_shape[0] - 1;  // rows
const T* line = i < before ? above + (from * before + i) * width * source_shape[4]
                           : source + (from * source_shape[2] + i - before) * width * source_shape[4];
const T* pixel = line + (size_t)j * source_shape[4];
#pragma unroll
for (int k = 0; k < VEC; ++k) {
  float value = static_cast<float>(part[k]) + static_cast<float>(bias[channel + k]);
  if (SHORTCUT) {
    const unsigned unfolded = ((channel + k) * FACTOR + sub) * 4 + 2 * a + b;
    value += static_cast<float>(pixel[unfolded / (SHORTCUT ? REPEATS : 1)]);
  }
  part[k] = static_cast<T>(value);
}
*reinterpret_cast<uint4*>(out + (size_t)place * VEC) = *reinterpret_cast<const uint4*>(part);
"""


def phase_weights(weight: mx.array) -> mx.array:
    """A 3×3 kernel (O, 3, 3, I) over doubled pixels as one (4 O, 2, 2, I) over the single ones.

    Of the three rows that a kernel meets, two are one pixel's; so for even rows the last two weights are one, for odd
    ones the first two. 16 products in place of 36.
    """
    w = weight.astype(mx.float32)
    rows = (mx.stack([w[:, 0], w[:, 1] + w[:, 2]], axis=1), mx.stack([w[:, 0] + w[:, 1], w[:, 2]], axis=1))
    phases = []
    for r in rows:
        phases.append(mx.stack([r[:, :, 0], r[:, :, 1] + r[:, :, 2]], axis=2))
        phases.append(mx.stack([r[:, :, 0] + r[:, :, 1], r[:, :, 2]], axis=2))
    return mx.concatenate(phases).astype(weight.dtype)
