"""Headers of .safetensors files and sharded sets, sound and damaged."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.weights.files import read_metadata, read_tensors


def write(path: Path, header: dict | bytes, data: bytes = b"", claimed: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if claimed is None else claimed).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ALL_DTYPES = ["bool_", *(f"{s}int{n}" for s in ("", "u") for n in (8, 16, 32, 64)), "float16", "bfloat16", "float32"]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_reads_what_mlx_writes(tmp_path, dtype):
    want = mx.array([[0, 1, 2], [3, 4, 5]]).astype(getattr(mx, dtype))
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"x": want, "y": mx.array(1.5)}, {"note": "hello"})
    tensors = read_tensors(tmp_path / "a.safetensors")
    info = tensors["x"]
    assert (info.shape, info.nbytes, info.dtype) == ((2, 3), want.nbytes, dtype.rstrip("_"))
    assert info.load().dtype == want.dtype
    assert mx.array_equal(info.load(), want)
    assert tensors["y"].load().item() == 1.5
    assert read_metadata(tmp_path / "a.safetensors")["note"] == "hello"


def test_float64_is_loaded_as_float32(tmp_path):
    data = bytes.fromhex("000000000000f83f")  # 1.5
    path = write(tmp_path / "a.safetensors", {"x": entry("F64", [1], 0, 8)}, data)
    info = read_tensors(path)["x"]
    assert (info.dtype, info.nbytes) == ("float64", 8)
    assert (info.load().dtype, info.load().item()) == (mx.float32, 1.5)


@pytest.mark.parametrize(
    ("dtype", "raw", "values"),
    [
        ("F8_E5M2", b"\x40\xb4", [2.0, -0.25]),
        ("F8_E4M3", b"\x40\xc4", [2.0, -3.0]),
        ("F8_E8M0", b"\x7f\x82", [1.0, 8.0]),
    ],
)
def test_float8_becomes_float32(tmp_path, dtype, raw, values):
    path = write(tmp_path / "a.safetensors", {"x": entry(dtype, [2], 0, 2)}, raw)
    info = read_tensors(path)["x"]
    assert (info.dtype, info.stored, info.nbytes) == ("float32", dtype.lower().replace("f8", "float8"), 2)
    assert info.load().tolist() == values


def test_ten_gigabytes_take_no_time_and_no_memory(tmp_path):
    # 1000 bfloat16 tensors of 5 MB in two sparse files; only the headers take space on disk.
    size, count = 10_485_760, 500
    index = {}
    for shard in ("a", "b"):
        header = {f"{shard}{i}": entry("BF16", [size // 2], i * size, (i + 1) * size) for i in range(count)}
        path = write(tmp_path / f"{shard}.safetensors", header)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + size * count)
        index |= dict.fromkeys(header, path.name)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    seconds, grown, total = measure(tmp_path / "m.safetensors.index.json")
    assert total == 2 * size * count
    assert seconds < 1
    assert grown < 50_000  # kB on Linux


def measure(path: Path) -> list[float]:
    """Seconds, growth of the peak memory and bytes described, of one reading in a process of its own."""
    code = f"""
import resource, time
from mlx_wan.weights.files import read_tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
total = sum(info.nbytes for info in read_tensors({str(path)!r}).values())
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, total)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


GOOD = {"x": entry("F32", [2], 0, 8), "y": entry("F32", [1], 8, 12)}


@pytest.mark.parametrize(
    ("header", "data", "claimed", "message"),
    [
        (GOOD, b"\0" * 11, None, "truncated: .* bytes instead of"),
        (GOOD, b"\0" * 13, None, "longer than its header says"),
        (GOOD, b"\0" * 12, 10_000, "truncated or not a safetensors file"),
        (GOOD, b"\0" * 12, 1 << 60, "truncated or not a safetensors file"),
        (b"not json", b"", None, "damaged safetensors header"),
        (b"[" * 100_000, b"", None, "damaged safetensors header"),
        (b"[1]", b"", None, "damaged safetensors header"),
        ({"x": {"dtype": "F32"}}, b"", None, "damaged header entry of tensor x"),
        ({"x": entry("F32", [-1], 0, 4)}, b"\0" * 4, None, "damaged header entry of tensor x"),
        ({"x": entry("F32", [2], 0, 4)}, b"\0" * 4, None, "cannot take 4 bytes"),
        ({"x": entry("Q9", [2], 0, 4)}, b"\0" * 4, None, "unknown type Q9"),
        ({"x": entry("F32", [1], 4, 8)}, b"\0" * 8, None, "gap or overlap"),
        ({"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 0, 4)}, b"\0" * 4, None, "gap or overlap"),
    ],
)
def test_damaged_files(tmp_path, header, data, claimed, message):
    path = write(tmp_path / "bad.safetensors", header, data, claimed)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: .*" + message):
        read_tensors(path)


@pytest.mark.parametrize("size", [0, 3, 8])
def test_files_too_short_for_a_header(tmp_path, size):
    (tmp_path / "bad.safetensors").write_bytes(b"\x10" * size)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_tensors(tmp_path / "bad.safetensors")


def shards(folder: Path) -> Path:
    mx.save_safetensors(str(folder / "m-1.safetensors"), {"a": mx.zeros(1), "b": mx.ones(2)})
    mx.save_safetensors(str(folder / "m-2.safetensors"), {"c": mx.zeros(3)})
    index = folder / "m.safetensors.index.json"
    weight_map = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards(tmp_path):
    tensors = read_tensors(shards(tmp_path))
    assert {name: info.shape for name, info in tensors.items()} == {"a": (1,), "b": (2,), "c": (3,)}
    assert tensors["c"].file == tmp_path / "m-2.safetensors"
    assert tensors["b"].load().tolist() == [1, 1]


def test_missing_shard(tmp_path):
    index = shards(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing m-2\.safetensors, listed in m\.safetensors\.index\.json"):
        read_tensors(index)


def test_shard_that_disagrees_with_the_index(tmp_path):
    index = shards(tmp_path)
    mx.save_safetensors(str(tmp_path / "m-2.safetensors"), {"d": mx.zeros(3)})
    with pytest.raises(CheckpointError, match=r"m-2\.safetensors: .* lists other tensors, c is one of 2"):
        read_tensors(index)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_bad_index(tmp_path, content):
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(CheckpointError, match=r"not an index of shards|outside its folder"):
        read_tensors(index)


def test_what_is_not_a_tensor_file_is_the_users_error(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match="not a tensor file"):
        read_tensors(tmp_path / "a.txt")
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_what_git_leaves_without_lfs_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match=f"{name}: is a Git LFS pointer, .* `git lfs pull`"):
        read_tensors(tmp_path / name)
