"""What of a transformer is trained: adapters beside its matrices, or its own weights; and how adapters are kept."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.lora.layers import PREFIX, DoRA, LoRALinear, LowRank, add_lora, linear_layers, lora_tensors
from mlx_wan.lora.save import save_lora
from mlx_wan.models.transformer import WanTransformer
from mlx_wan.training.options import FinetuneRecipe
from mlx_wan.weights.save import replacing
from mlx_wan.weights.whole import flat

ADAPTERS, CONFIG = "adapters.safetensors", "adapter_config.json"
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def make_trainable(transformer: WanTransformer, recipe: FinetuneRecipe) -> None:
    """Freezes `transformer` and thaws, or adds, what the recipe trains. Adapters are float32.

    UserError if a target names no matrix, num_layers is too large, or a quantized model shall be trained itself.
    """
    blocks = len(transformer.blocks)
    if recipe.num_layers > blocks:
        raise UserError(f"num_layers is {recipe.num_layers}; the model has {blocks}")
    first = 0 if recipe.num_layers == -1 else blocks - recipe.num_layers
    if recipe.fine_tune_type == "full":
        if any(isinstance(layer, nn.QuantizedLinear) for layer in transformer.modules()):
            raise UserError("a quantized model cannot be trained itself; use fine_tune_type lora, or the original")
        _train_itself(transformer, first)
        return
    names = list(linear_layers(transformer))
    for target in recipe.targets:
        if not any(_ends(name, target) for name in names):
            known = ", ".join(sorted({_BLOCK.sub("", name) for name in names}))
            raise UserError(f"targets: no matrix is called {target!r}; there are {known}")
    transformer.freeze()
    dora = recipe.fine_tune_type == "dora"
    add_lora(transformer, lambda name: _wanted(name, recipe.targets, first), recipe.rank, recipe.alpha, dora=dora)


def _train_itself(transformer: WanTransformer, first: int) -> None:
    if first == 0:
        return
    transformer.freeze()
    for block in transformer.blocks[first:]:
        block.unfreeze()


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _wanted(name: str, targets: tuple[str, ...], first: int) -> bool:
    block = _BLOCK.match(name)
    return (block is None or int(block[1]) >= first) and any(_ends(name, target) for target in targets)


def trainable_size(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(array.size for array in flat(module.trainable_parameters()).values())


def frozen(model: nn.Module) -> dict[str, mx.array]:
    """The arrays of a model that are not trained."""
    trained = flat(model.trainable_parameters()).keys()
    return {name: array for name, array in flat(model.parameters()).items() if name not in trained}


# --- files -----------------------------------------------------------------------------------------------------------


def adapters_name(expert: str | None) -> str:
    """The file of a run's adapters; of one of two experts it says which, as ai-toolkit's files do."""
    return ADAPTERS if expert is None else f"adapters_{expert}_noise.safetensors"


def adapters_of_expert(file: str, expert: str | None) -> Path:
    """The file for `expert` of two that lie beside each other, of which one is given: names as `adapters_name`'s.

    UserError if the name says of neither that it is it.
    """
    if expert is None:
        return Path(file)
    path = Path(file)
    name = re.sub("(high|low)(?=_noise)", expert, path.name)
    if f"{expert}_noise" not in name:
        raise UserError(f"{file}: give a file whose name has high_noise or low_noise; the other stands beside it")
    return path.with_name(name)


def save_adapters(
    folder: Path, transformer: WanTransformer, recipe: FinetuneRecipe, step: int, expert: str | None
) -> None:
    """The adapters, the same under the step's number, and adapter_config.json; keeps the newest `keep`."""
    metadata = {"step": str(step), "model": str(recipe.model)}
    name = adapters_name(expert)
    save_lora(folder / f"{step:07d}_{name}", transformer, metadata=metadata)
    save_lora(folder / name, transformer, metadata=metadata)
    config = {**asdict(recipe), "alpha": recipe.rank if recipe.alpha is None else recipe.alpha}
    with replacing(folder / CONFIG) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")
    numbered = sorted(folder.glob(f"{'[0-9]' * 7}_{name}"))
    older = [path for path in numbered if int(path.name[:7]) < step]
    for path in older[: len(older) - (recipe.keep - 1)]:
        path.unlink(missing_ok=True)


def load_adapters(path: Path, transformer: WanTransformer) -> None:
    """Gives the adapters of `transformer` the values of a file that `save_adapters` wrote for the same ones.

    UserError if there is no such file, CheckpointError if it is damaged or holds other adapters.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such adapter file")
    try:
        found: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from None
    want = lora_tensors(transformer)
    wrong = [name for name in want.keys() | found.keys() if _shape(want.get(name)) != _shape(found.get(name))]
    if wrong:
        raise CheckpointError(
            f"{path}: does not fit: {len(wrong)} tensors differ from what rank, alpha, targets and num_layers ask for "
            f"({sorted(wrong)[0]})"
        )
    for name, adapter in adapters_of(transformer).items():
        adapter.lora_a = found[f"{PREFIX}{name}.lora_A.weight"].astype(mx.float32)
        adapter.lora_b = found[f"{PREFIX}{name}.lora_B.weight"].astype(mx.float32)
        if isinstance(adapter, DoRA):
            adapter.magnitude = found[f"{PREFIX}{name}.dora_scale"].astype(mx.float32)


def _shape(array: mx.array | None) -> tuple[int, ...] | None:
    return None if array is None else tuple(array.shape)


def adapters_of(transformer: WanTransformer) -> dict[str, LowRank]:
    """Official name of a matrix -> the adapter beside it that is trained."""
    found = {}
    for name, module in transformer.named_modules():
        if isinstance(module, LoRALinear) and isinstance(adapter := module.adapters.get("default"), LowRank):
            found[name] = adapter
    return found
