"""What MLX is told about memory: how much it may hold, keep for later, and have wired."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_wan import backend
from mlx_wan.memory.plan import Plan


@dataclass(frozen=True)
class Limits:
    """Bytes; None leaves MLX's own.

    memory: beyond it MLX waits for work that it has handed out, before it hands out more (mx.set_memory_limit).
    cache: of freed buffers that it keeps for arrays to come (mx.set_cache_limit).
    wired: of buffers that stay resident, so that macOS does not page them out between steps (mx.set_wired_limit).
    """

    memory: int | None = None
    cache: int | None = None
    wired: int | None = None


def limits_for(device: str, info: Mapping[str, Any], usable: int, plan: Plan | None = None) -> Limits:
    """The limits of a run, or of a process whose runs are not known yet.

    Metal: MLX's own memory limit is half as much again as what the system recommends, which swaps, and so is its cache.
    Here the first is what a run may use, less what MLX goes beyond it where the plan is tight. The second is as much as
    any stage works with, for more is never asked for twice; the rest of the machine has a use for it. Wired is what the
    system recommends, which is the most that MLX takes (older than macOS 15 it does nothing).

    Args:
        device: "CPU", "Metal" or "CUDA".
        info: of the device, as mx.device_info() has it.
        usable: bytes that a run may hold, `backend.usable_memory()`.
    """
    if device == "CUDA":
        return Limits(memory=plan.limit if plan is not None and plan.limit else None)
    if device != "Metal":
        return Limits()
    recommended = int(info.get("max_recommended_working_set_size", usable))
    cache = usable // 4 if plan is None else max(stage.work for stage in plan.stages)
    memory = min(usable, plan.limit) if plan is not None and plan.limit > 0 else usable
    return Limits(memory, min(cache, usable), min(usable, recommended))


def limit_memory(plan: Plan | None = None) -> Limits:
    """Sets this machine's limits, and returns them. A memory limit that is lower already stays."""
    device = backend.device_name()
    limits = limits_for(device, mx.device_info(), backend.usable_memory(), plan)
    if limits.memory is not None and limits.memory < mx.get_memory_limit():
        mx.set_memory_limit(limits.memory)
    if limits.cache is not None:
        mx.set_cache_limit(limits.cache)
    if limits.wired is not None:
        mx.set_wired_limit(limits.wired)
    return limits
