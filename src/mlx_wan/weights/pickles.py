"""Reads `.pth` files without PyTorch, and without running anything that is in them.

A `.pth` file is a zip archive, uncompressed, of a pickle (`data.pkl`) and the raw bytes of each storage
(`data/0`, `data/1`, ...). A pickle is a program: it may name any function and have it called. Here every name
it asks for is looked up in one short table whose entries build inert descriptions of tensors; any other name
ends the reading with an error that tells it. Values stay in the file and are mapped when they are asked for.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.weights.tensors import DTYPES, LFS_HINT, LFS_POINTER, TensorInfo, mapped_tensor

STORAGE_DTYPES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
}
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # pickled 0x1950a86a20f9469cfc6c: torch before 1.6
MAX_PICKLE_BYTES = 256 << 20  # a state dict of 100,000 tensors takes about 15 MB
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field


class _Storage(NamedTuple):
    key: str
    dtype: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageType(NamedTuple):
    dtype: str


class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
        # rest: requires_grad, backward_hooks and, for views with a sign or conjugate bit, metadata.
        if not isinstance(storage, _Storage) or (len(rest) > 2 and rest[2]):
            raise CheckpointError("holds a conjugate or negated view, which is not supported")
        shape, strides = tuple(shape), tuple(strides)
        sizes = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in sizes):
            raise CheckpointError(f"holds a tensor with an impossible shape {shape} or strides {strides}")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= storage.numel:
            raise CheckpointError(f"holds a tensor {shape} larger than its storage of {storage.numel}")
        return _Tensor(storage, offset, shape, strides)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, tensor: Any, *rest: Any) -> Any:
        return tensor


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles dicts of tensors and nothing else.

    The pickle cannot alter what `find_class` hands out either (its BUILD opcode sets attributes): a C type,
    named tuples and objects with empty slots have none to set.
    """

    ALLOWED: ClassVar = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
        ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    }

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
            return _StorageType(STORAGE_DTYPES[name])
        if (module, name) not in self.ALLOWED:
            raise CheckpointError(f"refused: its pickle asks for {module}.{name}, which is not part of a tensor")
        return self.ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), str(), int(numel)) if numel >= 0:
                return _Storage(key, dtype, numel)
        raise CheckpointError(f"refused: its pickle refers to {pid!r:.80}, which is not a tensor's storage")


def read_pth(path: str | Path) -> dict[str, TensorInfo]:
    """The tensors of a `.pth` file that holds one flat state dict, in file order.

    Raises:
        UserError: no such file.
        CheckpointError: not a torch zip file, cut off, compressed, big-endian, or with anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open("rb") as file, _open_zip(path, file) as archive:
            root, content = _unpickle(archive)
            return {name: _info(path, file, archive, root, name, t) for name, t in content.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError, struct.error) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); download it again") from error


def _open_zip(path: Path, file: io.BufferedReader) -> zipfile.ZipFile:
    start = file.read(max(len(LEGACY_MAGIC), len(LFS_POINTER)))
    if start.startswith(LFS_POINTER):
        raise CheckpointError(LFS_HINT)
    if start.startswith(LEGACY_MAGIC):
        raise CheckpointError("is in the format of torch before 1.6; save it again with a newer torch")
    if start[:4] != b"PK\x03\x04":
        raise CheckpointError("is not a torch zip file")
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"is cut off: its {size:,} bytes end before the zip directory; download it again"
        ) from error


def _unpickle(archive: zipfile.ZipFile) -> tuple[str, dict[str, _Tensor]]:
    """Folder inside the archive, and the state dict."""
    pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise CheckpointError("is a zip file but not one of torch's: it has no data.pkl")
    root = pickles[0].split("/")[0]
    order = f"{root}/byteorder"
    if order in archive.namelist() and archive.read(_stored(archive, order)).strip() != b"little":
        raise CheckpointError("was saved on a big-endian machine, which is not supported")
    entry = _stored(archive, pickles[0])
    if entry.file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"has a data.pkl of {entry.file_size:,} bytes, far more than tensors need")
    try:
        content = _TensorUnpickler(io.BytesIO(archive.read(entry))).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"has a damaged data.pkl ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}, not a dict of tensors")
    for name, value in dict.items(content):  # not content.items: a pickle can give an instance its own
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise CheckpointError(f"holds a {type(value).__name__} under {name!r}, not only tensors")
    return root, dict(dict.items(content))


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise CheckpointError(f"has a compressed or encrypted part ({name}), which torch does not write")
    return entry


def _info(
    path: Path, file: io.BufferedReader, archive: zipfile.ZipFile, root: str, name: str, tensor: _Tensor
) -> TensorInfo:
    storage = tensor.storage
    itemsize = DTYPES[storage.dtype][0]
    try:
        entry = _stored(archive, f"{root}/data/{storage.key}")
    except KeyError:
        raise CheckpointError(f"lacks the storage {storage.key!r} of tensor {name}") from None
    if entry.file_size != storage.numel * itemsize:
        raise CheckpointError(f"has {entry.file_size} bytes instead of {storage.numel * itemsize} for tensor {name}")
    start = _data_start(file, entry)
    if start + entry.file_size > path.stat().st_size:
        raise CheckpointError(f"is cut off within tensor {name}; download it again")
    return mapped_tensor(name, tensor.shape, storage.dtype, path, start + tensor.offset * itemsize, tensor.strides)


def _data_start(file: io.BufferedReader, entry: zipfile.ZipInfo) -> int:
    # The local header may be longer than the directory says: torch pads it so that tensors start at 64 bytes.
    file.seek(entry.header_offset)
    signature, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise CheckpointError(f"has no entry where its directory says {entry.filename} is")
    return entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
