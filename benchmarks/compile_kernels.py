# /// script
# requires-python = ">=3.11"
# dependencies = ["nvidia-cuda-nvrtc"]
# ///
"""The VAE's CUDA kernels through NVIDIA's own compiler, for which no GPU is needed: whether they are CUDA at all.

    uv pip install --target nvrtc nvidia-cuda-nvrtc
    LD_LIBRARY_PATH=nvrtc/nvidia/cu13/lib uv run python benchmarks/compile_kernels.py \\
        nvrtc/nvidia/cu13/lib/libnvrtc.so.13 --include mlx /usr/local/cuda/include/cccl /usr/local/cuda/include

`mlx` is a checkout of MLX's source, whose headers its wheel compiles kernels with; the others are CUDA's. Both VAEs are
traced at their true widths, in bfloat16 and float32, and every kernel text that comes up is put together as MLX does.
"""

import argparse
import ctypes
from collections.abc import Callable
from typing import Any

import mlx_wan  # noqa: F401  first: it chooses the BLAS before mlx.core is loaded

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten, tree_unflatten

from mlx_wan.models import features, layers, vae_passes
from mlx_wan.models.features import FeatureCache
from mlx_wan.models.vae21 import VAE21Config, WanVAE21
from mlx_wan.models.vae22 import VAEConfig, WanVAE22

TYPES = {mx.float32: "float", mx.bfloat16: "__nv_bfloat16", mx.int8: "int8_t"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the VAE's CUDA kernels without a GPU.")
    parser.add_argument("nvrtc", help="libnvrtc.so")
    parser.add_argument("--include", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--arch", default="sm_90a")
    args = parser.parse_args()
    compiler = ctypes.CDLL(args.nvrtc)
    flags = ["--device-as-default-execution-space", f"--gpu-architecture={args.arch}"]
    flags += [f"--include-path={folder}" for folder in args.include]
    failed = 0
    for text, name in texts().items():
        said = compiled(compiler, text, flags)
        failed += said is not None
        print(f"{'ok' if said is None else 'FAILED'} {name}{'' if said is None else chr(10) + said[:2000]}", flush=True)
    return min(failed, 1)


def texts() -> dict[str, str]:
    """Whole source -> name of every kernel that streams of both VAEs come to."""
    found: dict[str, str] = {}
    kernel, strip = vae_passes.cuda_kernel, features.STRIP

    def noted(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str = "") -> Callable:
        def call(**given: Any) -> list[mx.array]:
            text, full = put_together(name, inputs, outputs, source, header, given)
            found[text] = full
            return kernel(name, inputs, outputs, source, header)(**given)

        return call

    try:
        vae_passes.cuda_kernel, features.STRIP = noted, 1 << 20
        for dtype in (mx.bfloat16, mx.float32):
            for made, side, channels in (
                (WanVAE22(VAEConfig(latents_mean=(0.0,) * 48, latents_std=(1.0,) * 48)), 16, 48),
                (WanVAE21(VAE21Config(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)), 8, 16),
            ):
                named: list[tuple[str, Any]] = tree_flatten(made.parameters())
                kinds = [(name, mx.zeros(a.shape, dtype if a.ndim > 1 else a.dtype)) for name, a in named]
                made.update(tree_unflatten(kinds))
                with layers.traceable("CUDA"):
                    cache = FeatureCache(streaming=True)
                    for _ in range(3):
                        made.pixels(mx.zeros((1, 1, 960 // side, 832 // side, channels)), cache)
                    cache = FeatureCache(streaming=True)
                    for frames in (1, 4):
                        made.moments(mx.zeros((1, frames, 480, 832, 3)), cache)
    finally:
        vae_passes.cuda_kernel, features.STRIP = kernel, strip
    return found


def put_together(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str, given: dict[str, Any]
) -> tuple[str, str]:
    """The source that MLX's `cuda_kernel` makes of a text, and the kernel's name."""
    constants, full = "", name
    for key, value in given["template"]:
        kind = TYPES.get(value) if isinstance(value, mx.Dtype) else None
        constants += f"using {key} = {kind};\n" if kind else f"constexpr int {key} = {value};\n"
        full += f"_{kind or value}"
    parameters = []
    for key, array in zip(inputs, given["inputs"], strict=True):
        parameters.append(f"const {TYPES[array.dtype]}* {key}")
        if f"{key}_shape" in source:
            parameters.append(f"const __grid_constant__ Shape {key}_shape")
    parameters += [f"{TYPES[dtype]}* {key}" for key, dtype in zip(outputs, given["output_dtypes"], strict=True)]
    text = (
        '#include "mlx/backend/cuda/device/utils.cuh"\n#include <cooperative_groups.h>\n'
        f"{header}\nnamespace mlx::core::cu {{\nnamespace cg = cooperative_groups;\n"
        f"__global__ void {full}({', '.join(parameters)}) {{\n{constants}{source}\n}}\n}}\n"
    )
    return text, full


def compiled(compiler: ctypes.CDLL, text: str, flags: list[str]) -> str | None:
    """What the compiler says of a text it refuses; None if it takes it."""
    program = ctypes.c_void_p()
    options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    if compiler.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None):
        return "no program can be made"
    try:
        if not compiler.nvrtcCompileProgram(program, len(flags), options):
            return None
        size = ctypes.c_size_t()
        compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        said = ctypes.create_string_buffer(size.value)
        compiler.nvrtcGetProgramLog(program, said)
        return said.value.decode()
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


if __name__ == "__main__":
    raise SystemExit(main())
