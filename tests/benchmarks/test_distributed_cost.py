"""benchmarks/distributed_cost.py: its arithmetic, against numbers worked out by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from distributed_cost import EXCHANGES, MODELS, Machines, Model, decode_seconds, gather_seconds, step

TINY = Model("tiny", dim=4, ffn_dim=8, layers=3, grid=(2, 1, 5), decode_tflop=0, steps=1, text_len=2)


def test_operations_and_bytes_of_a_call():
    # ten tokens: six products with 4x4 matrices and two with 4x8 each; two of the text's two tokens; attention to 12
    assert TINY.flop() == 3 * (2 * 10 * (6 * 16 + 2 * 32) + 2 * 2 * 2 * 16 + 2 * 2 * 10 * 12 * 4)
    assert TINY.weights == 8 * 16 + 2 * 32
    assert MODELS[0].tokens == 27280


def test_a_gather_brings_everybody_what_it_has_not_got():
    machines = Machines(4, 1, rate=100.0, latency=2.0)
    assert gather_seconds(machines, 4, 1000) == pytest.approx(750 / 100 + 3 * 2)
    assert gather_seconds(machines, 1, 1000) == 0


def test_guidance_on_two_machines_exchanges_nothing_and_halves_the_step():
    alone, two = (step(MODELS[0], Machines(n, 10, 1e9, 1e-4), guidance=n == 2) for n in (1, 2))
    assert (two.tokens, two.weights) == (0, 0)
    assert two.seconds == pytest.approx(alone.seconds / 2)


def test_the_busiest_rank_is_waited_for():
    machines = Machines(4, 1e-12, 1e30, 0)  # five tokens a frame: one of four ranks has two
    assert step(TINY, machines).seconds == pytest.approx(2 * TINY.flop() * 2 / 5)


def test_keys_and_values_are_brought_to_everybody():
    # two machines have ten tokens each: of keys, and of values, 10 * 4 * 2 bytes of the other one's arrive
    even = Model("even", 4, 8, 3, (2, 1, 10), 0, 1, 2)
    found = step(even, Machines(2, 1, rate=8.0, latency=0.5)).tokens
    assert found == pytest.approx(2 * 3 * 2 * (80 / 8 + 0.5))


def test_rows_of_a_decoder():
    model = Model("rows", 4, 8, 3, (2, 3, 5), 12.0, 1, edges=600.0)  # six rows of latents
    assert decode_seconds(model, Machines(1, 3.0, 100.0, 1.0)) == pytest.approx(2 * 12 / 3)
    four = Machines(4, 3.0, 100.0, 1.0)  # one of four has two of the six
    assert decode_seconds(model, four) == pytest.approx(2 * (12 / 3 * 2 / 6 + 3 * 600 / 100 + 3 * EXCHANGES))
