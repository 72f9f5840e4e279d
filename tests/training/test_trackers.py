"""Trackers: TensorBoard's event files byte by byte, and the CSV."""

import csv
import struct

import pytest

from mlx_wan.errors import WanError
from mlx_wan.training.trackers import _checksum, trackers


def records(data):
    """The messages of a record file, each length and checksum looked at."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert data[8:12] == _checksum(data[:8])
        message, check = data[12 : 12 + length], data[12 + length : 16 + length]
        assert check == _checksum(message)
        yield message
        data = data[16 + length :]


def fields(message):
    """(number, value) of a protocol buffer's fields."""
    while message:
        key, message = message[0], message[1:]
        kind = key & 7
        if kind == 0:
            value = shift = 0
            while True:
                byte, message = message[0], message[1:]
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
        elif kind == 2:
            length, message = message[0], message[1:]
            if length > 127:
                length, message = (length & 127) | message[0] << 7, message[1:]
            value, message = message[:length], message[length:]
        else:
            size = {1: 8, 5: 4}[kind]
            value, message = struct.unpack({1: "<d", 5: "<f"}[kind], message[:size])[0], message[size:]
        yield key >> 3, value


def test_the_checksum_is_crc32c_as_rfc_3720_has_it():
    masked = struct.unpack("<I", _checksum(bytes(32)))[0]
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated << 15 | rotated >> 17) & 0xFFFFFFFF == 0x8A9136AA


def test_event_files_hold_every_number(tmp_path):
    (write,) = trackers(["tensorboard"], tmp_path)
    write({"step": 3, "loss": 0.5, "learning_rate": 1e-3})
    write({"step": 70_000, **{f"val_loss_{i}": float(i) for i in range(9)}})
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    first, *rows = [dict(fields(message)) for message in records(path.read_bytes())]
    assert first[3] == b"brain.Event:2"
    assert [row[2] for row in rows] == [3, 70_000]
    values = [[dict(fields(v)) for n, v in fields(row[5]) if n == 1] for row in rows]
    assert [(v[1].decode(), v[2]) for v in values[0]] == [("loss", 0.5), ("learning_rate", pytest.approx(1e-3))]
    assert [v[2] for v in values[1]] == list(range(9))


def test_the_csv_has_a_line_a_number_and_one_head(tmp_path):
    for step in (1, 2):  # a run that goes on makes new trackers
        (write,) = trackers(["csv"], tmp_path)
        write({"step": step, "loss": 0.25, "val": 2.0})
    rows = list(csv.reader((tmp_path / "log.csv").open()))
    assert rows == [
        ["step", "name", "value"],
        *([str(s), n, v] for s in (1, 2) for n, v in (("loss", "0.25"), ("val", "2.0"))),
    ]


@pytest.mark.parametrize("name", ["csv", "tensorboard"])
def test_a_full_disk_is_one_line(tmp_path, name):
    (tmp_path / "log.csv").mkdir()
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(WanError, match="cannot be written"):
        trackers([name], tmp_path)[0]({"step": 1, "loss": 0.0})
