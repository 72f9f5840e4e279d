# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4", "numpy"]
# ///
"""Writes the small .pth files under tests/weights/fixtures, and what PyTorch itself reads from them.

    uv run parity/make_pth_fixtures.py

tensors.pth covers the kinds of tensors a checkpoint can hold: every dtype, transposed, expanded and offset views,
two names over one storage, parameters, scalars and empty tensors. expected.json lists each tensor's dtype, shape
and values (exact: every value is a small integer or a power of two). evil.pth runs a command when an ordinary
unpickler reads it; nested.pth, legacy.pth and qint.pth are honest files of kinds that are refused.
"""

import json
import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "weights" / "fixtures"


class Evil:
    """Pickles to a call of os.system, whose trace a test can look for."""

    def __reduce__(self) -> tuple:
        return (os.system, ("touch evil-was-here",))


def tensors() -> OrderedDict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32) / 4 - 3
    grid = base.reshape(2, 3, 4)
    half = base.to(torch.float16)
    weights = OrderedDict(
        {
            "float32": grid.clone(),
            "float16": half.reshape(4, 6),
            "bfloat16": base.to(torch.bfloat16).reshape(2, 12),
            "float64": base.to(torch.float64),
            "int64": torch.arange(-3, 3),
            "int32": torch.arange(5, dtype=torch.int32),
            "int16": torch.arange(5, dtype=torch.int16),
            "int8": torch.arange(-2, 3, dtype=torch.int8),
            "uint8": torch.arange(250, 256, dtype=torch.uint8),
            "bool": torch.tensor([[True, False], [False, True]]),
            "scalar": torch.tensor(0.5),
            "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(torch.full((3,), 2.0)),
            "view.transposed": grid.permute(2, 0, 1),
            "view.offset": grid[1, 1:, ::2],
            "view.expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
            "view.bfloat16": base.to(torch.bfloat16).reshape(4, 6).t()[1:3],
            "shared.whole": half,
            "shared.row": half.reshape(4, 6)[2],
        }
    )
    return weights


def expected(weights: OrderedDict[str, torch.Tensor]) -> dict[str, dict]:
    return {
        name: {
            "dtype": str(t.dtype).removeprefix("torch."),
            "shape": list(t.shape),
            "values": t.detach().to(torch.float64).flatten().tolist(),
        }
        for name, t in weights.items()
    }


def main() -> None:
    FIXTURES.mkdir(parents=True, exist_ok=True)
    weights = tensors()
    torch.save(weights, FIXTURES / "tensors.pth")
    read_back = torch.load(FIXTURES / "tensors.pth", weights_only=True)
    (FIXTURES / "expected.json").write_text(json.dumps(expected(read_back)) + "\n")
    torch.save({"weight": torch.ones(2), "payload": Evil()}, FIXTURES / "evil.pth")
    torch.save({"state_dict": {"weight": torch.ones(2)}, "step": 3}, FIXTURES / "nested.pth")
    torch.save({"weight": torch.ones(2)}, FIXTURES / "legacy.pth", _use_new_zipfile_serialization=False)
    quantized = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    torch.save({"weight": quantized}, FIXTURES / "qint.pth")
    for file in sorted(FIXTURES.iterdir()):
        kind = "zip" if zipfile.is_zipfile(file) else "plain"
        print(f"{file.name:16} {file.stat().st_size:6} bytes  {kind}")


if __name__ == "__main__":
    main()
