"""Files with bytes changed, lost and added at random end in values or in one clear line, never in anything else."""

import random
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_wan.errors import CheckpointError
from mlx_wan.weights.files import read_tensors

PTH = Path(__file__).parent / "fixtures" / "tensors.pth"


def damaged(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 5, 30))):
        # Half of the damage hits the first 2.5 kB, where the headers and the pickle are.
        at = rng.randrange(len(changed) if rng.random() < 0.5 else min(len(changed), 2500))
        kind = rng.random()
        if kind < 0.6:
            changed[at] = rng.randrange(256)
        elif kind < 0.8:
            del changed[at : at + rng.randrange(1, 9)]
        else:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(changed)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_random_damage(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    if suffix == ".pth":
        data = PTH.read_bytes()
    else:
        mx.save_safetensors(str(path), {"a": mx.zeros((3, 4)), "b.c": mx.ones((5,), mx.bfloat16)}, {"x": "y"})
        data = path.read_bytes()
    rng, messages = random.Random(0), []
    for _ in range(500):
        path.write_bytes(damaged(data, rng))
        try:
            mx.eval([info.load() for info in read_tensors(path).values()])
        except CheckpointError as error:
            messages.append(str(error))
    assert all(str(path) in message for message in messages)
    assert len(messages) > 300  # the rest hit values, or bytes that nobody reads


def test_a_tensor_larger_than_any_array(tmp_path):
    header = b'{"x":{"dtype":"F32","shape":[0,1099511627776],"data_offsets":[0,0]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="tensor x has an impossible shape"):
        read_tensors(tmp_path / "a.safetensors")
