"""What each rank of test_guard.py does: exchanges numbers for ever, until rank 1 of three meets its fate.

guarded.py FATE UNFINISHED, one of FATES or disagree, and a file that must not stay.
"""

import os
import signal
import sys
import time

import mlx_wan  # noqa: F401  before mlx.core

import mlx.core as mx  # isort: skip

from mlx_wan.errors import WanError
from mlx_wan.parallel.guard import Guard, check_agreement
from mlx_wan.parallel.pulse import PULSE, STEADY
from mlx_wan.parallel.team import Team

FATES = {
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(1000),
    "fail": lambda: fail("a\nbad  file"),
    "finish": lambda: None,
}


def fail(why: str) -> None:
    raise WanError(why)


def main(fate: str, unfinished: str) -> None:
    mx.set_default_device(mx.cpu)
    world = mx.distributed.init(strict=True, backend="ring")
    team = Team(world)
    PULSE.patience = STEADY
    with Guard(world, silence=3) as guard:
        if world.rank() == 0:
            open(unfinished, "w").close()
            guard.on_stop(lambda: os.remove(unfinished))
        if fate == "disagree":
            check_agreement(world, {"seed": "7", "prompt": "a cat"}, guard.hosts)
            prompt = "a dog" if world.rank() == 1 else "a cat"
            check_agreement(world, {"seed": "7", "prompt": prompt}, guard.hosts)
        for i in range(10 if fate == "finish" else 1_000_000):
            if i == 5 and world.rank() == 1:
                FATES[fate]()
            mx.eval(team.all_gather(mx.ones(1000) * i))
            time.sleep(0.01)
        if fate == "finish":  # the last ones are not waited for by rank 1, which has nothing more to do
            last = [team.all_gather(mx.full(2**20, i)) for i in range(4)]
            if world.rank() != 1:
                time.sleep(0.5)
                assert [each.sum().item() for each in last] == [3 * 2**20 * i for i in range(4)]


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except WanError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
