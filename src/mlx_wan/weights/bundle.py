"""ComfyUI's checkpoints: a model's parts in one file, told apart by what their names begin with."""

from collections.abc import Mapping

from mlx_wan.errors import CheckpointError
from mlx_wan.weights import spiece
from mlx_wan.weights.tensors import TensorInfo

TEXT = "text_encoders."
# Starts of names, a line a part; what follows is the part's own name (comfy/supported_models.py).
STARTS = (
    ("model.diffusion_model.",),
    (f"{TEXT}umt5xxl.transformer.",),
    ("vae.", "first_stage_model."),
)
UNUSED = (f"{TEXT}umt5xxl.logit_scale", f"{TEXT}logit_scale")  # CLIP's, which UMT5 has no use for


def sections(tensors: Mapping[str, TensorInfo]) -> list[Mapping[str, TensorInfo]]:
    """The parts in a file, each with names of its own; of any other file its tensors as they are.

    Raises:
        CheckpointError: the file has several parts and a tensor of none.
    """
    found: list[dict[str, TensorInfo]] = [{} for _ in STARTS]
    rest = []
    for name, info in tensors.items():
        for place, starts in enumerate(STARTS):
            start = next((start for start in starts if name.startswith(start)), None)
            if start is not None:
                found[place][name.removeprefix(start)] = info
                break
        else:
            rest.append(name)
    if sum(map(bool, found)) < 2:
        return [tensors]
    for name in rest:
        if name == TEXT + spiece.TENSOR:
            found[1][spiece.TENSOR] = tensors[name]
        elif name not in UNUSED:
            raise CheckpointError(f"{tensors[name].file}: has {name}, which is of no part of a Wan model")
    return [section for section in found if section]
