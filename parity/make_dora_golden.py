# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "peft", "numpy>=2"]
# ///
"""What PEFT computes for a DoRA beside one linear layer: output, loss and gradients, into tests/golden/lora/dora.npz.

uv run parity/make_dora_golden.py
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

OUT = Path(__file__).resolve().parent.parent / "tests" / "golden" / "lora" / "dora.npz"


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(32, 12)

    def forward(self, x):
        return self.q(x)


def main():
    torch.manual_seed(0)
    model = get_peft_model(Layer(), LoraConfig(r=3, lora_alpha=6, target_modules=["q"], use_dora=True))
    layer = model.base_model.model.q
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.nn.init.normal_(b)
    with torch.no_grad():
        magnitude.mul_(1 + 0.3 * torch.rand_like(magnitude))
    x, target = torch.randn(5, 32), torch.randn(5, 12)
    output = model(x)
    loss = (output - target).square().mean()
    loss.backward()
    arrays = {
        "weight": layer.base_layer.weight, "bias": layer.base_layer.bias, "x": x, "target": target, "output": output,
        "loss": loss, "a": a, "b": b, "magnitude": magnitude, "a_grad": a.grad, "b_grad": b.grad,
        "magnitude_grad": magnitude.grad,
    }  # fmt: skip
    np.savez(OUT, **{name: array.detach().numpy() for name, array in arrays.items()})
    print(f"peft {version('peft')}, torch {version('torch')}: {OUT}")


if __name__ == "__main__":
    main()
