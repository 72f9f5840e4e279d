"""GGUF files: the gguf package's own file and numbers, and everything that can be wrong with a header."""

import struct
from pathlib import Path

import cases
import mlx.core as mx
import numpy as np
import pytest

from mlx_wan.errors import CheckpointError
from mlx_wan.weights import spiece
from mlx_wan.weights.files import read_tensors
from mlx_wan.weights.gguf import CHUNK_BLOCKS, PACKED, read_gguf
from mlx_wan.weights.identify import identify
from mlx_wan.weights.layouts import official_names

from . import checkpoints

FILE = Path(__file__).parent / "fixtures" / "wan.gguf"
SUPPORTED = [packing.name for packing in PACKED.values() if packing.unpack]


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_numbers_of_the_gguf_package(name):
    info = read_tensors(FILE)[f"{name}.weight"]
    assert (info.shape, info.dtype, info.packed) == ((3, 512), "float32", name)
    assert np.array_equal(np.array(info.load()), cases.golden("gguf")[name])


def test_plain_types_and_shapes():
    tensors = read_gguf(FILE)
    plain = cases.golden("gguf")["plain"]
    assert tensors["patch_embedding.weight"].shape == (4, 8, 1, 2, 2)
    assert np.array_equal(np.array(tensors["patch_embedding.weight"].load()).reshape(4, 32), plain)
    assert np.array_equal(np.array(tensors["half"].load()), plain.astype(np.float16))
    brain = tensors["brain"].load()
    assert brain.dtype == mx.bfloat16
    assert np.array_equal(np.array(brain.astype(mx.float32)), cases.golden("gguf")["brain"])


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors=(), metadata=b"", keys=0, version=3, count=None, values=b"") -> bytes:
    records = b"".join(
        text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
        for name, shape, kind, offset in tensors
    )
    count = len(tensors) if count is None else count
    header = b"GGUF" + struct.pack("<IQQ", version, count, keys) + metadata + records
    return header + b"\0" * (-len(header) % 32) + values


def string(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", 8) + text(value)


def test_many_blocks(tmp_path):
    blocks = CHUNK_BLOCKS + 5
    data = np.random.default_rng(0).integers(0, 256, (blocks, 34), np.uint8)
    data[:, :2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    (tmp_path / "a.gguf").write_bytes(gguf([("x", (blocks, 32), 8, 0)], values=data.tobytes()))
    got = np.array(read_gguf(tmp_path / "a.gguf")["x"].load())
    assert np.array_equal(got, data[:, 2:].view(np.int8) * np.float32(0.5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"GGUF\3\0", "is cut off in its header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (gguf(version=1), "is GGUF of version 1"),
        (gguf(count=2**40), "claims 1,099,511,627,776 tensors"),
        (gguf(keys=1, metadata=string("general.architecture", "llama")), "architecture 'llama', not 'wan'"),
        (gguf(keys=1, metadata=text("x") + struct.pack("<IIQ", 9, 4, 2**62)), "values of an array"),
        (gguf(keys=1, metadata=text("x") + struct.pack("<IIQ", 9, 9, 1)), "metadata of the unknown type 9"),
        (gguf(keys=1, metadata=text("x") + struct.pack("<I", 77)), "metadata of the unknown type 77"),
        (gguf(keys=1, metadata=struct.pack("<Q", 2**63)), "is cut off in its header"),
        (gguf(keys=1, metadata=struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1)), "cannot be read"),
        (gguf(keys=1, metadata=string("general.alignment", "x")), "has the alignment 'x'"),
        (gguf([("a", (4,), 0, 0), ("a", (4,), 0, 0)], values=b"\0" * 16), "holds the tensor a twice"),
        (gguf([("a", (4,), 0, 0)], values=b"\0" * 15), "is cut off within tensor a"),
        (gguf([("a", (4,), 0, 2**63)], values=b"\0" * 16), "is cut off within tensor a"),
        (gguf([("a", (2**40,), 0, 0)]), "impossible shape"),
        (gguf([("a", (33,), 8, 0)], values=b"\0" * 99), r"in blocks of 32, which do not divide it"),
        (gguf([("a", (4,), 99, 0)]), "of the unknown type 99"),
        (gguf([("a", (1,) * 9, 0, 0)]), "of 9 dimensions"),
    ],
)
def test_damaged_headers(tmp_path, content, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_gguf(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_shape_that_is_not_the_tensors(tmp_path):
    key = text("comfy.gguf.orig_shape.a") + struct.pack("<IIQii", 9, 5, 2, 3, 3)
    (tmp_path / "a.gguf").write_bytes(gguf([("a", (4,), 0, 0)], key, 1, values=b"\0" * 16))
    with pytest.raises(CheckpointError, match=r"says that a \(4,\) has the shape \(3, 3\)"):
        read_gguf(tmp_path / "a.gguf")


def test_formats_that_are_only_described(tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf([("a", (256,), 21, 0)], values=b"\0" * 110))
    info = read_gguf(tmp_path / "a.gguf")["a"]
    assert (info.packed, info.nbytes) == ("IQ3_S", 110)
    with pytest.raises(CheckpointError, match="tensor a is IQ3_S, which is not supported"):
        info.load()


# --- text encoders ---

UMT5 = FILE.with_name("umt5.gguf")


def test_a_text_encoder_under_the_names_of_the_gguf_package():
    tensors = read_gguf(UMT5)
    found = {official: tensors[name] for name, official in official_names(tensors).items() if name != spiece.TENSOR}
    want = checkpoints.official("text_encoder")
    assert found.keys() == want.keys()
    for name, array in want.items():
        assert found[name].shape == array.shape
        assert cases.relative_error(np.array(found[name].load()), array) < (0.12 if found[name].packed else 1e-3)
    assert identify({name: info.shape for name, info in tensors.items()}).component == "text_encoder"


def test_its_tokenizer_is_sentencepiece_s():
    model = spiece.tokenizer_json(bytes(np.array(read_gguf(UMT5)[spiece.TENSOR].load())))
    assert model == spiece.tokenizer_json(FILE.with_name("spiece.model").read_bytes())


@pytest.mark.parametrize("damage", [b"", string("tokenizer.ggml.scores", "x")])
def test_a_damaged_tokenizer(tmp_path, damage):
    tokens = text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 1) + text("a")
    header = string("general.architecture", "t5encoder") + tokens + damage
    (tmp_path / "a.gguf").write_bytes(gguf(metadata=header, keys=2 + bool(damage)))
    with pytest.raises(CheckpointError, match="has a damaged tokenizer"):
        read_gguf(tmp_path / "a.gguf")


def test_rows_of_packed_tensors(tmp_path):
    info = read_tensors(FILE)["Q4_K.weight"]
    assert np.array_equal(np.array(info.rows(1, 3)), np.array(info.load())[1:3])
    data = np.random.default_rng(0).integers(0, 100, (3, 18), np.uint8)
    (tmp_path / "a.gguf").write_bytes(gguf([("x", (6, 16), 2, 0)], values=data.tobytes()))  # blocks over two rows
    info = read_gguf(tmp_path / "a.gguf")["x"]
    assert np.array_equal(np.array(info.rows(1, 3)), np.array(info.load())[1:3])
