"""Starts the ranks of a run on this machine, over MLX's ring backend on loopback."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parent


def start(folder: Path, count: int, arguments: list[str], each: dict[int, list[str]] | None = None, **options):
    """Popen of `python arguments...` for each rank; `each` replaces the arguments of some."""
    with ExitStack() as held:  # all at once: so that they are different ones
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for holder in sockets:
            holder.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{holder.getsockname()[1]}"] for holder in sockets]
    file = folder / f"hosts-{hosts[0][0].rpartition(':')[2]}.json"
    file.write_text(json.dumps(hosts))
    environment = {**os.environ, "MLX_HOSTFILE": str(file), "OPENBLAS_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *((each or {}).get(rank, arguments))],
            env={**environment, "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each; those that take longer are killed."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
