"""Which files made a video: short hashes that tell one model, picture or LoRA from another."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_wan.errors import WanError

if TYPE_CHECKING:
    from mlx_wan.weights.checkpoint import Checkpoint

DIGITS = 16  # hexadecimal
WHOLE_BYTES = 64 * 2**20  # files up to this size are read whole
BLOCKS, BLOCK_BYTES = 256, 2**16  # what is read of larger ones, evenly spread from the first byte to the last


def file_fingerprint(path: str | Path) -> str:
    """16 hexadecimal digits of a file's size and bytes; of a file over 64 MiB, of 256 blocks of 64 KiB.

    A folder's is that of its files, by their names. Raises WanError if there are none.
    """
    path = Path(path)
    digest = hashlib.sha256()
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise WanError(f"{path}: has no files")
    for file in files:
        _add(digest, file)
    return digest.hexdigest()[:DIGITS]


def model_fingerprint(checkpoint: "Checkpoint") -> str:
    """16 hexadecimal digits of a checkpoint's config.json and of the files of its parts, as `file_fingerprint`.

    So gigabytes take a fraction of a second, and the same weights in another layout or precision are another model.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, part in sorted(checkpoint.parts.items()):
        digest.update(name.encode())
        for file in sorted({info.file for info in part.tensors.values()}):
            _add(digest, file)
    return digest.hexdigest()[:DIGITS]


def _add(digest: "hashlib._Hash", path: Path) -> None:
    try:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
                return
            for block in range(BLOCKS):
                file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    except OSError as error:
        raise WanError(f"{path}: cannot be read: {error.strerror or error}") from None
