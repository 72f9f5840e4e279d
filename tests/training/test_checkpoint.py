"""States on disk: whole or not there, damage noticed, the rest kept."""

import json
import os
import struct
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_wan.errors import CheckpointError, WanError
from mlx_wan.training.checkpoint import damaged_states, load_state, newest_state, save_state, step_of
from mlx_wan.weights import whole


def tree(value=1.0):
    return {
        "model": {"layers": [{"weight": mx.full((3, 4), value)}, {}, {"bias": mx.arange(4) * value}, {}]},
        "step": mx.array(7, dtype=mx.uint64),
        "half": mx.full((5,), value, dtype=mx.bfloat16),
    }


def flat(state):
    return {name: (str(a.dtype), np.array(a.astype(mx.float32)).tolist()) for name, a in tree_flatten(state)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_in_the_tree_it_had(tmp_path):
    path = save_state(tmp_path / "new", 12, tree(2.5), keep=2)
    step, state = load_state(path, tree())
    assert (step, step_of(path), flat(state)) == (12, 12, flat(tree(2.5)))
    assert state["model"]["layers"][1] == state["model"]["layers"][3] == {}, "layers without weights keep their place"
    assert not damaged_states(tmp_path / "new")


def test_only_the_newest_are_kept_and_other_files_stay(tmp_path):
    (tmp_path / "state-old.safetensors").write_text("someone's")
    for step in (1, 2, 3, 4):
        save_state(tmp_path, step, tree(step), keep=2)
    assert names(tmp_path) == ["state-00000003.safetensors", "state-00000004.safetensors", "state-old.safetensors"]
    assert newest_state(tmp_path) == tmp_path / "state-00000004.safetensors"


@pytest.mark.parametrize("damage", ["cut short", "empty", "header", "longer", "one bit"])
def test_a_damaged_state_is_passed_over(tmp_path, damage):
    old, new = (save_state(tmp_path, step, tree(step), keep=5) for step in (1, 2))
    data = bytearray(new.read_bytes())
    if damage == "cut short":
        data = data[:-1]
    elif damage == "empty":
        data = b""
    elif damage == "header":
        data[:8] = struct.pack("<Q", 2**62)
    elif damage == "longer":
        data += b"\0"
    else:
        data[-2] ^= 1
    new.write_bytes(data)
    assert newest_state(tmp_path) == old
    assert damaged_states(tmp_path) == [new]
    with pytest.raises(CheckpointError, match=r"00000002\.safetensors is damaged"):
        load_state(new, tree())
    # The next save of that step replaces it, and one that prunes spares what it wrote.
    save_state(tmp_path, 1, tree(9), keep=1)
    assert newest_state(tmp_path) == old
    save_state(tmp_path, 2, tree(2), keep=1)
    assert (newest_state(tmp_path), damaged_states(tmp_path)) == (new, [])


def test_states_from_before_there_was_a_checksum_are_taken(tmp_path):
    path = tmp_path / "state-00000005.safetensors"
    mx.save_safetensors(str(path), dict(tree_flatten(tree())), metadata={"step": "5"})
    assert newest_state(tmp_path) == path
    assert load_state(path, tree())[0] == 5


def test_a_state_of_another_configuration_is_refused(tmp_path):
    path = save_state(tmp_path, 1, tree(), keep=1)
    other = tree()
    other["model"]["layers"][0]["weight"] = mx.zeros((3, 5))
    other["more"] = mx.zeros((1,))
    with pytest.raises(CheckpointError, match=r"2 arrays differ, model.layers.0.weight, more among them"):
        load_state(path, other)
    with pytest.raises(CheckpointError, match="1 arrays differ, half"):
        load_state(path, {**tree(), "half": mx.zeros((5,))})


def test_a_full_disk_is_one_error_and_keeps_the_state_of_before(tmp_path):
    script = """
import resource, sys
from pathlib import Path
import mlx_wan, mlx.core as mx
from mlx_wan.errors import WanError
from mlx_wan.training.checkpoint import save_state
folder = Path(sys.argv[1])
save_state(folder, 1, {"a": mx.zeros((10,))}, keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow larger
try:
    save_state(folder, 2, {"a": mx.zeros((100_000,))}, keep=1)
except WanError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert "state-00000002.safetensors: cannot be written" in done.stdout
    assert names(tmp_path) == ["state-00000001.safetensors"]
    assert newest_state(tmp_path) is not None


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WanError, match="cannot be written"):
        save_state(tmp_path / "file", 1, tree(), keep=1)


def test_a_save_that_is_cut_off_leaves_the_state_of_before(tmp_path, monkeypatch):
    old = save_state(tmp_path, 1, tree(), keep=1)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, 2, tree(), keep=1)
    assert names(tmp_path) == [old.name]


def test_what_a_killed_process_left_is_ignored_and_cleaned_up(tmp_path):
    old = save_state(tmp_path, 1, tree(), keep=3)
    (tmp_path / ".state-00000002.partial.safetensors").write_bytes(old.read_bytes()[:50])
    assert newest_state(tmp_path) == old
    save_state(tmp_path, 4, tree(), keep=3)
    assert names(tmp_path) == ["state-00000001.safetensors", "state-00000004.safetensors"]


def test_the_checksum_covers_names_and_values(tmp_path):
    path = save_state(tmp_path, 1, {"a": mx.zeros((2,)), "b": mx.ones((2,))}, keep=1)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["a"], header["b"] = header["b"], header["a"]  # swapped names, valid file
    raw = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(raw) == length
    path.write_bytes(data[:8] + raw + data[8 + length :])
    assert damaged_states(tmp_path) == [path]
    assert os.path.getsize(path) == len(data)
