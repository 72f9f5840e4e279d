"""Meeting the other ranks."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

from mlx_wan.errors import UserError

MEETING = 30.0  # seconds in which all ranks must have come
# What launchers set for the processes they start: mlx.launch for ring, JACCL and NCCL, mpirun of two families.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
NCCL = ("NCCL_HOST_IP", "NCCL_PORT", "MLX_RANK", "MLX_WORLD_SIZE")  # what its NCCL backend is told by

# MLX waits for the other ranks for ever, and holds the interpreter while it does: no thread and no signal handler of
# this process would get its turn. So a second process waits for a sign that all have met, and ends this one without it.
_WATCH = """
import os, select, sys
pid, seconds = int(sys.argv[1]), float(sys.argv[2])
if not select.select([0], [], [], seconds)[0]:
    sys.stderr.write(f"error: not all ranks came together within {seconds:g} s: look at what the others say\\n")
    os.kill(pid, 9)
"""


def is_launched() -> bool:
    """Whether a launcher has started this process, as one of several or ready to be."""
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts and os.path.isfile(hosts) and not Path(hosts).read_text().strip():
        return False  # mlx.launch -n 1 names an empty list, which MLX itself stumbles over
    return any(name in os.environ for name in LAUNCHED)


def has_nccl() -> bool:
    """Whether MLX exchanges through NCCL in this process: by its rules, wherever it can."""
    return mx.cuda.is_available() and all(os.environ.get(name) for name in NCCL)


def meet(seconds: float = MEETING) -> mx.distributed.Group:
    """The group of all ranks; of this process alone if it is the only one. Ends the process if some do not come.

    Raises UserError if the backend refuses.
    """
    command = [sys.executable, "-I", "-S", "-c", _WATCH, str(os.getpid()), str(seconds)]
    watch = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        return mx.distributed.init(strict=is_launched())
    except RuntimeError as error:
        raise UserError(f"the processes cannot be connected: {error}") from None
    finally:
        watch.communicate()  # closes its input, which is the sign
