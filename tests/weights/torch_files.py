"""Writes .pth files byte by byte, honest and hostile ones, without PyTorch."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np


def storage(key: str = "0", numel: int = 2) -> tuple:
    return ("storage", Name("torch", "FloatStorage"), key, "cpu", numel)


class Name:
    """Pickles as a bare reference to module.name, whether or not that exists here."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """Pickles as function(*args), then, if given, as a change of the result's state."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


class Pid:
    def __init__(self, pid):
        self.pid = pid


def dump(value) -> bytes:
    """A pickle that refers to names and storages as torch's do."""

    class Pickler(pickle._Pickler):  # the Python one: it lets us write any global
        def persistent_id(self, obj):
            return obj.pid if isinstance(obj, Pid) else None

        def save(self, obj, save_persistent_id=True):
            if isinstance(obj, Name):
                self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
            elif isinstance(obj, Call):
                self.save(obj.function)
                self.save(obj.args)
                self.write(pickle.REDUCE)
                if obj.state is not None:
                    self.save(obj.state)
                    self.write(pickle.BUILD)
            else:
                super().save(obj, save_persistent_id)

    file = io.BytesIO()
    Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def tensor(*, numel=2, key="0", offset=0, shape=(2,), strides=(1,)) -> Call:
    rebuild = Name("torch._utils", "_rebuild_tensor_v2")
    hooks = Call(Name("collections", "OrderedDict"))
    return Call(rebuild, Pid(storage(key, numel)), offset, shape, strides, False, hooks)


def write_pth(path: Path, value, *, compress=False, order=b"little", data=b"\x00\x00\x80\x3f\x00\x00\x00\x40") -> Path:
    how = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("archive/data.pkl", value if isinstance(value, bytes) else dump(value))
        archive.writestr("archive/byteorder", order)
        archive.writestr("archive/data/0", data)
    return path


def save_pth(path: Path, weights: dict[str, np.ndarray]) -> Path:
    """A state dict of float32 arrays, one storage each."""
    tensors, storages = {}, {}
    for i, (name, array) in enumerate(weights.items()):
        strides = tuple(step // 4 for step in array.astype("<f4").strides)
        tensors[name] = tensor(key=str(i), numel=array.size, shape=array.shape, strides=strides)
        storages[f"archive/data/{i}"] = array.astype("<f4").tobytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", dump(tensors))
        for name, data in storages.items():
            archive.writestr(name, data)
    return path
