"""LoRAs beside packed matrices, which are multiplied in two ways."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_wan.lora.layers import LoRALinear, LowRank, matrix_shape
from mlx_wan.models.packed import FEW_ROWS, PackedLinear


@pytest.mark.parametrize("rows", [1, FEW_ROWS["CPU"] + 1])
def test_an_adapter_is_added_to_either_product(rows):
    base = PackedLinear.from_linear(nn.Linear(64, 32), 32, 4, mode="mxfp4")
    layer = LoRALinear(base)
    adapter = LowRank(mx.random.normal((4, 64)), mx.random.normal((32, 4)), 0.5)
    layer.adapters["one"] = adapter
    x = mx.random.normal((rows, 64))
    assert matrix_shape(base) == (32, 64)
    assert mx.allclose(layer(x), base(x) + x @ adapter.delta().T, atol=1e-4).item()
