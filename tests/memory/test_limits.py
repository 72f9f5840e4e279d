"""What MLX is told about memory, by the device's numbers; no such device is needed."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_wan import backend
from mlx_wan.memory import limits
from mlx_wan.memory.limits import Limits, limits_for
from mlx_wan.memory.plan import Plan, Stage

GIB = 2**30
# What mx.device_info() says of a Mac with 16 GiB.
M1 = {"device_name": "Apple M1", "memory_size": 16 * GIB, "max_recommended_working_set_size": 11 * GIB}
PLAN = Plan((Stage("text", 4 * GIB, GIB // 8), Stage("denoise", 3 * GIB, 2 * GIB), Stage("decode", GIB, GIB)), True)


@pytest.mark.parametrize(
    ("device", "info", "usable", "plan", "wanted"),
    [
        ("Metal", M1, 11 * GIB, PLAN, Limits(11 * GIB, 2 * GIB, 11 * GIB)),
        ("Metal", M1, 11 * GIB, None, Limits(11 * GIB, 11 * GIB // 4, 11 * GIB)),
        ("Metal", M1, 8 * GIB, None, Limits(8 * GIB, 2 * GIB, 8 * GIB)),
        ("Metal", M1, 11 * GIB, Plan(PLAN.stages, True, 9 * GIB), Limits(9 * GIB, 2 * GIB, 11 * GIB)),
        ("Metal", M1, GIB, PLAN, Limits(GIB, GIB, GIB)),
        ("Metal", M1, 12 * GIB, None, Limits(12 * GIB, 3 * GIB, 11 * GIB)),  # MLX raises for more than is recommended
        ("Metal", {}, 8 * GIB, None, Limits(8 * GIB, 2 * GIB, 8 * GIB)),
        ("CUDA", {"total_memory": 8 * GIB}, 7 * GIB, PLAN, Limits()),
        ("CUDA", {}, 7 * GIB, Plan(PLAN.stages, True, 6 * GIB), Limits(6 * GIB)),
        ("CUDA", {}, 7 * GIB, None, Limits()),
        ("CPU", {}, 7 * GIB, PLAN, Limits()),
    ],
)
def test_limits_follow_from_the_devices_numbers(device, info, usable, plan, wanted):
    assert limits_for(device, info, usable, plan) == wanted


@pytest.mark.parametrize(("now", "memory"), [(20 * GIB, [11 * GIB]), (6 * GIB, [])])
def test_they_are_set_and_a_lower_one_stays(monkeypatch, now, memory):
    said = SimpleNamespace(memory=[], cache=[], wired=[])
    monkeypatch.setattr(backend, "device_name", lambda: "Metal")
    monkeypatch.setattr(mx, "device_info", lambda: M1)
    monkeypatch.setattr(backend, "total_memory", lambda: 16 * GIB)
    monkeypatch.setattr(mx, "get_memory_limit", lambda: now)
    for name in vars(said):
        monkeypatch.setattr(mx, f"set_{name}_limit", getattr(said, name).append)
    assert limits.limit_memory(PLAN) == Limits(11 * GIB, 2 * GIB, 11 * GIB)
    assert vars(said) == {"memory": memory, "cache": [2 * GIB], "wired": [11 * GIB]}


def test_nothing_is_set_on_the_cpu(monkeypatch):
    for name in ("memory", "cache", "wired"):
        monkeypatch.setattr(mx, f"set_{name}_limit", lambda bytes_: pytest.fail("set"))
    assert limits.limit_memory(PLAN) == Limits()


def test_generate_and_bench_set_them(monkeypatch, tmp_path):
    from mlx_wan.cli.main import main

    seen = []
    monkeypatch.setattr(limits, "limit_memory", lambda plan=None: seen.append(plan))
    line = [
        "--prompt",
        "x",
        "--size",
        "32*32",
        "--frame_num",
        "5",
        "--sample_steps",
        "1",
        "-o",
        str(tmp_path / "a.mp4"),
    ]
    assert main(["generate", *line]) == 0
    assert main(["bench", "--frame_num", "1", "--repeat", "1", "--parts", "text"]) == 0
    assert [plan and plan.low_memory for plan in seen] == [False, None]
