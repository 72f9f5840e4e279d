"""Samplers: the noise levels of a run and the step from each to the next."""

from mlx_wan.errors import UserError
from mlx_wan.schedulers.dpmpp import DPMpp
from mlx_wan.schedulers.euler import Euler
from mlx_wan.schedulers.flow import Scheduler
from mlx_wan.schedulers.unipc import UniPC

_CLASSES = {"unipc": UniPC, "dpm++": DPMpp, "euler": Euler}
SCHEDULERS = tuple(_CLASSES)

__all__ = ["SCHEDULERS", "DPMpp", "Euler", "Scheduler", "UniPC", "make_scheduler"]


def make_scheduler(name: str, num_inference_steps: int, shift: float) -> Scheduler:
    """The sampler `name` ("unipc", "dpm++" or "euler") for one run.

    num_inference_steps: 1 to 1000. shift: above 0; higher spends more steps on high noise.
    UserError for anything else.
    """
    if name not in _CLASSES:
        raise UserError(f"unknown scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}")
    return _CLASSES[name](num_inference_steps, shift)
