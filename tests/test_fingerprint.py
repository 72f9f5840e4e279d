import shutil

import numpy as np
import pytest

from mlx_wan import fingerprint
from mlx_wan.errors import WanError
from mlx_wan.fingerprint import file_fingerprint, model_fingerprint
from mlx_wan.weights.checkpoint import EMBEDDED
from mlx_wan.weights.locate import locate


def test_a_model_is_told_from_one_with_another_bit(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "copy")
    original = model_fingerprint(locate("tiny"))
    assert len(original) == fingerprint.DIGITS
    assert model_fingerprint(locate(tmp_path / "copy")) == original
    file = tmp_path / "copy" / "vae.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert model_fingerprint(locate(tmp_path / "copy")) != original


def test_large_files_are_sampled_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 10)
    data = np.random.default_rng(0).bytes(10_000)
    prints = set()
    for place in (None, 0, 9_999):
        changed = bytearray(data)
        if place is not None:
            changed[place] ^= 1
        (tmp_path / "file").write_bytes(changed)
        prints.add(file_fingerprint(tmp_path / "file"))
    (tmp_path / "file").write_bytes(data + b"x")
    prints.add(file_fingerprint(tmp_path / "file"))
    assert len(prints) == 4


def test_what_is_not_there_has_no_fingerprint(tmp_path):
    with pytest.raises(WanError, match=f"{tmp_path / 'absent'}: cannot be read: No such file"):
        file_fingerprint(tmp_path / "absent")
    with pytest.raises(WanError, match=f"{tmp_path}: has no files"):
        file_fingerprint(tmp_path)
