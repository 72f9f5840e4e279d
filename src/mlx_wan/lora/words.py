"""A pipeline's adapters in the words of diffusers."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from mlx_wan.errors import UserError
from mlx_wan.lora.fuse import QUANTIZED, Adapters, expert_part, merge
from mlx_wan.lora.load import read_lora, transformer_shapes
from mlx_wan.models.transformer import WanTransformer
from mlx_wan.parallel.plan import Parallel
from mlx_wan.weights.checkpoint import Checkpoint


class AdapterWords:
    """What a pipeline has for its adapters; the pipeline brings the transformers they are put beside."""

    checkpoint: Checkpoint
    parallel: Parallel
    _adapters: Adapters
    _transformers: dict[str, WanTransformer]

    def _release_transformers(self) -> None:
        raise NotImplementedError

    def load_lora_weights(
        self, path: str | Path, adapter_name: str | None = None, scale: float = 1.0, expert: str | None = None
    ) -> str:
        """Puts a LoRA beside the transformer's weights, together with those that are there already.

        Args:
            path: the file, of any dialect (docs/checkpoints.md), the folder PEFT or diffusers wrote, or on the Hub
                "OWNER/NAME" or "OWNER/NAME/FILE".
            adapter_name: what `set_adapters` calls it; None takes the file's name.
            scale: its strength; 1 is what it was trained for.
            expert: of a model with two, "high" or "low" for a LoRA made for one of them; None for both.

        Returns:
            Its name.

        Raises:
            UserError: no such file, not a LoRA, or a name that is taken.
            CheckpointError: the file is damaged, or made for another model.
        """
        if self.parallel.share_of_transformer < 1:
            raise UserError(
                "a LoRA cannot be added to weights that are spread (dit_fsdp); mlx-wan fuse adds it for good"
            )
        part = expert_part(self.checkpoint, expert)
        lora = read_lora(path, transformer_shapes(self.checkpoint.transformer_config))
        if lora.note:
            warnings.warn(lora.note, stacklevel=2)
        name = self._adapters.add(lora, adapter_name, scale, part)
        self._apply_adapters()
        return name

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Gives these adapters their strengths and turns the others off; no weight is read again.

        Raises UserError for an unknown name, or another number of weights than of names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        single = isinstance(adapter_weights, int | float)
        self._adapters.set(names, [adapter_weights] * len(names) if single else list(adapter_weights))
        self._apply_adapters()

    def get_active_adapters(self) -> dict[str, float]:
        """Name -> strength of the adapters that have an effect."""
        return {name: strength for name, strength in self._adapters.strengths.items() if strength}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Takes adapters away. Raises UserError for an unknown name."""
        self._adapters.remove([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))
        self._apply_adapters()

    def fuse_lora(self) -> None:
        """Adds the adapters to the weights at their present strengths: no cost per step, and no change after.

        Raises UserError if the model is quantized.
        """
        if self.checkpoint.quantization is not None:
            raise UserError(QUANTIZED)
        self._adapters.fused = True
        for transformer in self._transformers.values():
            merge(transformer)

    def unload_lora_weights(self) -> None:
        """Takes every adapter away; after `fuse_lora` the transformer is read again when it is needed."""
        if self._adapters.fused:
            self._release_transformers()
        self._adapters.clear()
        self._apply_adapters()

    def _apply_adapters(self) -> None:
        for part, transformer in self._transformers.items():
            self._adapters.update(transformer, part)
