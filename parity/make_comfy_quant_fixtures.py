# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "comfy-kitchen==0.2.40", "numpy>=2", "safetensors==0.8.0"]
# ///
"""Matrices in every format of ComfyUI that this package reads, packed and unpacked by ComfyUI's own package.

    uv run parity/make_comfy_quant_fixtures.py

Writes tests/weights/fixtures/comfy_quant.safetensors, with a layer a format, and tests/golden/comfy_quant.npz, what
comfy-kitchen makes of each in float32. Layers are described as ComfyUI's `state_dict` describes them (comfy/ops.py),
two of them in the header, as older converters do.
"""

import json
from pathlib import Path

import comfy_kitchen  # noqa: F401 (registers its operations)
import numpy as np
import torch
from comfy_kitchen.tensor import (
    TensorCoreConvRotW4A4Layout,
    TensorCoreFP8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorWiseINT8Layout,
)
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parent.parent / "tests"
# layer -> (layout, (rows, columns), what quantize is told, what the description says)
CASES = {
    "fp8": (TensorCoreFP8Layout, (3, 32), {"scale": 0.1}, {"format": "float8_e4m3fn"}),
    "mxfp8": (TensorCoreMXFP8Layout, (160, 160), {}, {"format": "mxfp8"}),
    "nvfp4": (TensorCoreNVFP4Layout, (144, 112), {}, {"format": "nvfp4"}),
    "int8": (TensorWiseINT8Layout, (5, 24), {}, {"format": "int8_tensorwise"}),
    "int8_rows": (TensorWiseINT8Layout, (5, 24), {"per_channel": True}, {"format": "int8_tensorwise"}),
    "int8_rotated": (
        TensorWiseINT8Layout,
        (5, 128),
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
    ),
    "int4": (TensorCoreConvRotW4A4Layout, (6, 512), {}, {"format": "convrot_w4a4", "convrot_groupsize": 256}),
    "int4_narrow": (
        TensorCoreConvRotW4A4Layout,
        (6, 64),
        {"convrot_groupsize": 16},
        {"format": "int4_tensorwise", "params": {"convrot_groupsize": 16}},
    ),
}
IN_HEADER = ("nvfp4", "int4")


def main():
    torch.manual_seed(0)
    tensors, arrays, header = {}, {}, {}
    for name, (layout, shape, told, said) in CASES.items():
        matrix = torch.randn(shape) * torch.logspace(-2, 1, shape[0])[:, None]
        matrix[:, : shape[1] // 2] *= 0.1  # blocks with unlike scales
        packed, params = layout.quantize(matrix, **told)
        arrays[name] = layout.dequantize(packed, params).numpy()
        error = np.linalg.norm(arrays[name] - matrix.numpy()) / np.linalg.norm(matrix.numpy())
        print(f"{name:14s} {error:.4f}")
        for end, tensor in layout.state_dict_tensors(packed, params).items():
            tensors[f"model.diffusion_model.{name}.weight{end}"] = tensor.contiguous()
        if name in IN_HEADER:
            header[f"model.diffusion_model.{name}"] = said
        else:
            text = json.dumps(said).encode()
            tensors[f"model.diffusion_model.{name}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    path = TESTS / "weights" / "fixtures" / "comfy_quant.safetensors"
    save_file(tensors, path, {"_quantization_metadata": json.dumps({"layers": header})})
    np.savez_compressed(TESTS / "golden" / "comfy_quant.npz", **arrays)
    print(path.stat().st_size, (TESTS / "golden" / "comfy_quant.npz").stat().st_size)


if __name__ == "__main__":
    main()
