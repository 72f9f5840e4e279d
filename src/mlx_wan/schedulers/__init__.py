"""Samplers: the noise levels of a run and the step from each to the next."""

from collections.abc import Sequence

from mlx_wan.errors import UserError
from mlx_wan.schedulers.dmd import DMD
from mlx_wan.schedulers.dpmpp import DPMpp
from mlx_wan.schedulers.euler import Euler
from mlx_wan.schedulers.flow import Scheduler
from mlx_wan.schedulers.unipc import UniPC

_CLASSES = {"unipc": UniPC, "dpm++": DPMpp, "euler": Euler, "dmd": DMD}
SCHEDULERS = tuple(_CLASSES)

__all__ = ["DMD", "SCHEDULERS", "DPMpp", "Euler", "Scheduler", "UniPC", "make_scheduler"]


def make_scheduler(
    name: str,
    num_inference_steps: int,
    shift: float,
    timesteps: Sequence[float] | None = None,
    seed: int = 0,
) -> Scheduler:
    """The sampler `name`, one of `SCHEDULERS`, for one run.

    num_inference_steps: 1 to 1000. shift: above 0; higher spends more steps on high noise. timesteps: the very ones to
    take, falling from at most 1000 to above 0, in place of both; UniPC takes none. seed: of the noise that "dmd" adds.
    UserError for anything else.
    """
    if name not in _CLASSES:
        raise UserError(f"unknown scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}")
    if name == "unipc":
        if timesteps is not None:
            # Its levels must stay off 1, where those of the models that come with a list begin.
            others = ", ".join(other for other in SCHEDULERS if other != name)
            raise UserError(f"unipc takes no list of timesteps; choose one of {others}")
        return UniPC(num_inference_steps, shift)
    more = {"seed": seed} if name == "dmd" else {}
    return _CLASSES[name](num_inference_steps, shift, timesteps, **more)
