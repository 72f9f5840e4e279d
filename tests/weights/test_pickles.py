"""The .pth reader against files that PyTorch wrote (parity/make_pth_fixtures.py) and against hostile ones."""

import json
import pickle
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.weights.pickles import OrderedDict, read_pth

from .torch_files import Call, Name, dump, tensor, write_pth

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())


@pytest.fixture
def pth(tmp_path):
    return lambda value, **options: write_pth(tmp_path / "file.pth", value, **options)


@pytest.mark.parametrize("name", EXPECTED)
def test_reads_what_torch_reads(name):
    info, want = read_pth(FIXTURES / "tensors.pth")[name], EXPECTED[name]
    assert (info.dtype, list(info.shape)) == (want["dtype"], want["shape"])
    assert info.nbytes == np.prod(want["shape"]) * mx_size(want["dtype"])
    array = info.load()
    assert str(array.dtype) == f"mlx.core.{want['dtype'].replace('float64', 'float32')}"
    assert array.shape == tuple(want["shape"])
    assert array.astype(mx.float32).flatten().tolist() == want["values"]


def mx_size(dtype: str) -> int:
    return {"float64": 8, "bool": 1}.get(dtype) or getattr(mx, dtype).size


def test_keeps_the_order_of_the_file():
    assert list(read_pth(FIXTURES / "tensors.pth")) == list(EXPECTED)


def test_own_writer_makes_readable_files(pth):
    array = read_pth(pth({"weight": tensor()}))["weight"].load()
    assert array.tolist() == [1.0, 2.0]


def test_refuses_to_run_a_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"evil\.pth: refused: its pickle asks for (posix|nt)\.system"):
        read_pth(FIXTURES / "evil.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.storage", "UntypedStorage"),
        ("collections", "Counter"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ],
)
def test_names_what_was_asked_for(pth, module, name):
    with pytest.raises(CheckpointError, match=f"asks for {module}.{name}, which is not part of a tensor"):
        read_pth(pth({"weight": Call(Name(module, name), "1")}))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("nested.pth", "holds a dict under 'state_dict', not only tensors"),
        ("legacy.pth", "format of torch before 1.6"),
        ("qint.pth", "asks for torch"),
        ("expected.json", "not a torch zip file"),
    ],
)
def test_refuses_other_files(file, message):
    with pytest.raises(CheckpointError, match=message):
        read_pth(FIXTURES / file)


def test_a_missing_file_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_pth(tmp_path / "none.pth")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, kept):
    whole = (FIXTURES / "tensors.pth").read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match=r"cut\.pth: is (cut off|not a torch zip)"):
        read_pth(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compress": True}, "compressed or encrypted part"),
        ({"order": b"big"}, "big-endian"),
        ({"data": b"\x00" * 7}, "7 bytes instead of 8 for tensor weight"),
    ],
)
def test_refuses_odd_archives(pth, options, message):
    with pytest.raises(CheckpointError, match=message):
        read_pth(pth({"weight": tensor()}, **options))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"key": "7"}, "lacks|no item"),
        ({"shape": (3,)}, "larger than its storage"),
        ({"offset": 1}, "larger than its storage"),
        ({"strides": (2,)}, "larger than its storage"),
        ({"strides": (-1,)}, "impossible"),
        ({"shape": (1, 2)}, "impossible"),
        ({"numel": -1}, "not a tensor's storage"),
    ],
)
def test_tensors_cannot_leave_their_storage(pth, broken, message):
    with pytest.raises(CheckpointError, match=message):
        read_pth(pth({"weight": tensor(**broken)}))


@pytest.mark.parametrize("cut", [0, 1, 20, -1])
def test_damaged_pickle(pth, cut):
    with pytest.raises(CheckpointError, match=r"damaged data\.pkl|not a dict"):
        read_pth(pth(dump({"weight": tensor()})[:cut]))


@pytest.mark.parametrize(
    "target",
    [Name("torch._utils", "_rebuild_tensor_v2"), Name("torch", "FloatStorage"), Name("collections", "OrderedDict")],
)
@pytest.mark.parametrize("state", [{"trace": 1}, (None, {"trace": 1})])
def test_a_pickle_cannot_change_what_it_is_given(pth, target, state):
    build = dump({"weight": tensor()})[:-1] + dump(target)[2:-1] + dump(state)[2:-1] + pickle.BUILD + b"."
    with pytest.raises(CheckpointError, match=r"damaged data\.pkl"):
        read_pth(pth(build))
    assert not hasattr(OrderedDict, "trace")


def test_a_dict_that_brings_its_own_items_is_still_read(pth):
    ordered = Call(Name("collections", "OrderedDict"), [["weight", tensor()]], state={"items": 1, "keys": 2})
    assert list(read_pth(pth(ordered))) == ["weight"]
