"""Runs the text of a CUDA kernel on the CPU: what CI can know of kernels without a GPU.

A C++ compiler takes the kernel as it is, with the little of CUDA that ours use put before it: each thread of a block is
a thread, blocks come one after the other; kernels whose threads need nothing of each other, but for a group that shares
a pixel, run as one thread with groups of one. Speed, and what MLX itself puts around the text, stay unknown.
"""

import ctypes
import math
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

COMPILER = shutil.which("g++") or shutil.which("clang++")

_CUDA = """
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#define __device__
#define __shared__ static
struct Place { unsigned x; };
static thread_local Place threadIdx, blockIdx, blockDim;
struct uint4 { uint32_t x, y, z, w; };
struct float4 { float x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
namespace cg {
struct Alone {
  unsigned thread_rank() { return 0; }
  float shfl_xor(float x, int) { return x; }
};
inline int this_thread_block() { return 0; }
template <int N> Alone tiled_partition(int) { static_assert(N == 1); return {}; }
}
static std::barrier<>* together;
static float lanes[1024];
inline void __syncthreads() { together->arrive_and_wait(); }
inline float __shfl_xor_sync(unsigned, float value, int step) {
  lanes[threadIdx.x] = value;
  __syncthreads();
  float other = lanes[threadIdx.x ^ step];
  __syncthreads();
  return other;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return std::exp(x); }
struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  bfloat16(float x) {
    uint32_t all;
    std::memcpy(&all, &x, 4);
    bits = (all + 0x7fff + ((all >> 16) & 1)) >> 16;
  }
  operator float() const {
    uint32_t all = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &all, 4);
    return x;
  }
};
"""
_INTS = ctypes.POINTER(ctypes.c_int)
_TYPES = {mx.float32: "float", mx.bfloat16: "bfloat16", mx.int8: "signed char"}


def _compile(*arguments: str | Path) -> None:
    command = [COMPILER, "-std=c++20", "-fPIC", "-pthread", "-w", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]


@cache
def _header() -> tempfile.TemporaryDirectory:
    """Where `cuda.h` lies, translated already: reading the standard library again takes most of a compilation."""
    folder = tempfile.TemporaryDirectory()
    header = Path(folder.name, "cuda.h")
    header.write_text(_CUDA)
    _compile("-x", "c++-header", header, "-o", f"{header}.gch")
    return folder


@cache
def _built(text: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(text)
        _compile("-include", Path(_header().name, "cuda.h"), "-shared", "-o", library, source)
        return ctypes.CDLL(str(library))


def _bytes_of(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def cuda_kernel(name, input_names, output_names, source, header="", alone=False):
    """In the place of `mx.fast.cuda_kernel`; alone: threads need nothing of each other."""

    def call(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        values, (size, threads) = dict(template), (grid[0], threadgroup[0])
        if alone and "LANES" in values:
            size //= values["LANES"]
            values |= {"CHUNKS": values["LANES"] * values["CHUNKS"], "LANES": 1}
        constants = "".join(
            f"using {key} = {_TYPES[value]};\n" if isinstance(value, mx.Dtype) else f"constexpr int {key} = {value};\n"
            for key, value in values.items()
        )
        parameters = [f"const {_TYPES[a.dtype]}* {n}" for n, a in zip(input_names, inputs, strict=True)]
        parameters += [f"{_TYPES[d]}* {n}" for n, d in zip(output_names, output_dtypes, strict=True)]
        names = (*input_names, *output_names)
        shapes = "".join(f"static const int* {n}_shape;\n" for n in input_names)
        each = (
            f"        blockDim.x = {threads};\n        threadIdx.x = i;\n        blockIdx.x = block;\n"
            f"        kernel({', '.join(names)});\n"
        )
        run = (
            f"    for (int i = 0; i < threads; i++) {{\n{each}    }}\n"
            if alone
            else "    std::vector<std::thread> running;\n"
            f"    for (int i = 0; i < threads; i++)\n      running.emplace_back([=] {{\n{each}      }});\n"
            "    for (auto& one : running) one.join();\n"
        )
        text = (
            f"{header}{constants}{shapes}static void kernel({', '.join(parameters)}) {{\n{source}\n}}\n"
            f'extern "C" void start({", ".join(parameters)}, const int** shapes, int blocks, int threads) {{\n'
            + "".join(f"  {n}_shape = shapes[{i}];\n" for i, n in enumerate(input_names))
            + "  std::barrier<> all(threads);\n  together = &all;\n"
            f"  for (int block = 0; block < blocks; block++) {{\n{run}  }}\n}}\n"
        )
        buffers = [np.ascontiguousarray(_bytes_of(a)) for a in inputs]
        for shape, dtype in zip(output_shapes, output_dtypes, strict=True):
            buffers.append(np.zeros(shape, np.uint16 if dtype == mx.bfloat16 else np.float32))
        sides = [(ctypes.c_int * a.ndim)(*a.shape) for a in inputs]
        pointers = (ctypes.POINTER(ctypes.c_int) * len(sides))(*(ctypes.cast(a, _INTS) for a in sides))
        arguments = (b.ctypes.data_as(ctypes.c_void_p) for b in buffers)
        _built(text).start(*arguments, pointers, math.ceil(size / threads), threads)
        made = buffers[len(inputs) :]
        return [
            mx.array(b).view(mx.bfloat16) if d == mx.bfloat16 else mx.array(b)
            for b, d in zip(made, output_dtypes, strict=True)
        ]

    return call
