"""Text embeddings on disk: a prompt that was encoded before needs no text encoder, which is larger than the rest.

A file is named by a hash of the prompt's tokens and of all that their embedding depends on, so a file that is there is
right: the encoder's files by place, size and time, its packing, the type and device of the computation, MLX's version.
"""

import hashlib
import json
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_wan import backend
from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.weights.checkpoint import Checkpoint
from mlx_wan.weights.files import read_tensors
from mlx_wan.weights.save import array_tensor, write_safetensors

NAME = "embedding"


class TextCache:
    """Embeddings (n, text_dim) of one checkpoint's text encoder in `folder`, which is made if needed.

    UserError if it cannot be.
    """

    def __init__(self, folder: str | Path, checkpoint: Checkpoint, dtype: mx.Dtype):
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot hold text embeddings: {error.strerror or error}") from error
        self.width = checkpoint.text_encoder_config.dim
        self._encoder = json.dumps(
            {
                "files": [
                    [str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns]
                    for file in sorted({info.file for info in checkpoint.text_encoder.tensors.values()})
                ],
                "quantization": str(checkpoint.quantization),
                "dtype": str(dtype),
                "device": backend.device_name(),
                "mlx": metadata.version("mlx"),
            }
        )

    def path(self, ids: np.ndarray) -> Path:
        """The file of tokens (1, n)."""
        key = hashlib.sha256(self._encoder.encode() + ids.astype("<i8").tobytes()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def get(self, ids: np.ndarray) -> mx.array | None:
        """The embedding of tokens (1, n); None if there is none, or none that is whole."""
        path = self.path(ids)
        if not path.is_file():
            return None
        try:
            info = read_tensors(path).get(NAME)
            if info is None or info.shape != (ids.shape[1], self.width):
                return None
            return info.load()
        except CheckpointError:
            return None  # damaged: made again, and written over

    def put(self, ids: np.ndarray, embedding: mx.array) -> None:
        """Keeps an embedding; WanError if it cannot be written."""
        write_safetensors(self.path(ids), [array_tensor(NAME, embedding)], {"format": "mlx"})
