"""Where a run's numbers go besides log.jsonl: a CSV file, TensorBoard's event files. No account, no package."""

import csv
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from mlx_wan.errors import WanError

Tracker = Callable[[dict[str, float]], None]


def trackers(names: Iterable[str], folder: Path) -> list[Tracker]:
    """A tracker for each name, "csv" or "tensorboard", that writes into the folder of the run."""
    return [_TRACKERS[name](folder) for name in names]


class CSV:
    """`log.csv`: a line a number (step, name, value), which spreadsheets and pandas pivot."""

    def __init__(self, folder: Path):
        self.path = folder / "log.csv"

    def __call__(self, row: dict[str, float]) -> None:
        try:
            new = not self.path.exists()
            with self.path.open("a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", "name", "value"])
                writer.writerows([row["step"], name, value] for name, value in row.items() if name != "step")
        except OSError as error:
            raise WanError(f"{self.path}: cannot be written ({error.strerror})") from None


class TensorBoard:
    """`tensorboard/events.out.tfevents.*`: scalars, as `tensorboard --logdir RUN` reads them.

    The format is a row of records, each a length, a message in protocol buffers' encoding, and checksums of both.
    A run that goes on writes a new file; where two files hold a step, TensorBoard shows the later one.
    """

    def __init__(self, folder: Path):
        self.path = folder / "tensorboard" / f"events.out.tfevents.{time.time_ns() // 1000}.mlx-wan"

    def __call__(self, row: dict[str, float]) -> None:
        step = int(row["step"])
        values = b"".join(
            _bytes(1, _bytes(1, name.encode()) + _key(2, 5) + struct.pack("<f", value))
            for name, value in row.items()
            if name != "step"
        )
        now = _key(1, 1) + struct.pack("<d", time.time())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if file.tell() == 0:
                    file.write(_record(now + _bytes(3, b"brain.Event:2")))
                file.write(_record(now + _key(2, 0) + _varint(step) + _bytes(5, values)))
        except OSError as error:
            raise WanError(f"{self.path}: cannot be written ({error.strerror})") from None


_TRACKERS: dict[str, Callable[[Path], Tracker]] = {"csv": CSV, "tensorboard": TensorBoard}


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _bytes(number: int, value: bytes) -> bytes:
    return _key(number, 2) + _varint(len(value)) + value


def _record(message: bytes) -> bytes:
    length = struct.pack("<Q", len(message))
    return length + _checksum(length) + message + _checksum(message)


def _checksum(data: bytes) -> bytes:
    """The "masked" CRC-32C of TensorFlow's record files."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_table() -> list[int]:
    table = []
    for entry in range(256):
        for _ in range(8):
            entry = entry >> 1 ^ (0x82F63B78 if entry & 1 else 0)  # Castagnoli's polynomial, bits reversed
        table.append(entry)
    return table


_CRC = _crc_table()
