"""The played memory of a graph against what MLX measured."""

import mlx.core as mx
import pytest

from mlx_wan.memory.liveness import evaluation_order, peak_bytes, trace
from mlx_wan.models import layers

MIB = 2**20
SQUARE = (512, 512)  # 1 MiB


def measured(function, arrays):
    mx.eval(arrays)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = function(*arrays)
    mx.eval(result)
    return mx.get_peak_memory() - before


def softmax_attention(x):
    q, k, v = (x.reshape(64, 8, 512).transpose(1, 0, 2) for _ in range(3))
    return mx.softmax(q @ k.transpose(0, 2, 1), axis=-1) @ v


@pytest.mark.parametrize(
    "function",
    [
        lambda x: mx.exp(mx.sin(x)) * 2,  # each takes over the buffer of the one before
        lambda x: x.T.reshape(-1),  # a copy
        lambda x: (x @ x.T) + mx.sin(x),
        lambda x: mx.concatenate([x, mx.cos(x)], axis=1) @ mx.concatenate([x, x], axis=1).T,
        lambda x: x.reshape(8, 64, 512).swapaxes(0, 1) @ x,
        lambda x: mx.conv2d(x.reshape(1, 64, 64, 64), mx.ones((64, 3, 3, 64)), padding=1),
        lambda x: sum(mx.sin(x * i) for i in range(1, 8)),
        softmax_attention,
        lambda x: mx.split(x, 4, axis=1)[1] * 3,
    ],
)
def test_what_is_played_is_what_mlx_measures(function):
    x = mx.random.normal(SQUARE)
    expected = measured(function, [x])
    assert peak_bytes(function, [x], "CPU") == pytest.approx(expected, rel=0.1, abs=0.02 * MIB)


def test_tracing_computes_nothing_and_finds_what_the_result_needs():
    huge = mx.zeros((1 << 20, 1 << 16))  # 256 GiB

    def function(x):
        _ = mx.exp(x)  # not needed
        return mx.sin(x) + 1, mx.cos(x)

    graph = trace(function, [huge])
    assert [operation.name for operation in evaluation_order(graph)].count("Exp") == 0
    size = huge.nbytes
    del graph
    peak = peak_bytes(function, [huge], "CPU")
    del huge  # pytest would show it, and computing it takes 256 GiB
    assert peak == pytest.approx(2 * size, abs=8)


def test_released_inputs_leave_and_others_stay():
    x = mx.zeros((1 << 20,))

    def function(x):
        for _ in range(200):
            x = x * 2
        return x

    assert peak_bytes(function, [x], "CPU") == pytest.approx(x.nbytes, abs=8)
    assert peak_bytes(function, [x], "CPU", released=1) <= 8


def chain(x):
    for _ in range(64):
        x = mx.concatenate([x[1:], x[:1]])  # of which no result takes over its input's buffer
    return x


def pacing(x):
    pace = layers.Pace()
    for _ in range(64):
        x = pace(mx.concatenate([x[1:], x[:1]]))
    return x


def test_who_waits_holds_less():
    x = mx.zeros((1 << 27,))  # read twice by an operation: four of them are more than a graph of CUDA's takes
    held = {work: round(peak_bytes(work, [x], "CUDA") / x.nbytes) for work in (chain, pacing)}
    assert held[pacing] == 3
    assert held[chain] > 8


def test_mlx_waits_where_a_limit_is_passed_and_a_graph_was_full():
    """Eight of these operations fill one, and another follows. What a wait of ours ended is not waited for."""
    x = mx.zeros((1 << 27,))
    for limit in (5, 0):
        assert peak_bytes(chain, [x], "CUDA", limit=limit * x.nbytes) / x.nbytes == pytest.approx(9, abs=0.1)
    assert peak_bytes(pacing, [x], "CUDA", limit=0) / x.nbytes == pytest.approx(3, abs=0.1)
