"""Muon by the batch against MLX's own, and what it saves."""

import re
from io import StringIO

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_wan.training.muon import BatchedMuon, orthogonalised

SHAPES = {"q": (8, 8), "k": (8, 8), "up": (24, 8), "down": (8, 24), "conv": (6, 3, 3, 3, 4), "time": (4, 3, 1, 1, 4)}


def tree(seed):
    keys = mx.random.split(mx.random.key(seed), len(SHAPES))
    flat = {name: mx.random.normal(shape, key=key) for (name, shape), key in zip(SHAPES.items(), keys, strict=True)}
    return {"blocks": [{"q": flat["q"], "k": flat["k"]}, {"up": flat["up"]}], **{n: flat[n] for n in ("down", "conv")}}


def far(a, b):
    return max(float(mx.linalg.norm(x - y) / mx.linalg.norm(x)) for (_, x), (_, y) in zip(a, b, strict=True))


@pytest.mark.parametrize(("nesterov", "weight_decay"), [(True, 0.0), (False, 0.0), (True, 0.1)])
def test_it_takes_the_steps_of_mlx(nesterov, weight_decay):
    runs = []
    for kind in (optim.Muon, BatchedMuon):
        optimizer = kind(optim.cosine_decay(0.02, 10), nesterov=nesterov, weight_decay=weight_decay)
        weights = tree(0)
        optimizer.init(weights)
        for step in range(4):
            weights = optimizer.apply_gradients(tree(step + 1), weights)
        runs.append((tree_flatten(weights), tree_flatten(optimizer.state)))
    (theirs, their_state), (ours, our_state) = runs
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert far(theirs, ours) < 1e-5
    assert {name for name, _ in our_state} == {name for name, _ in their_state}
    assert far(theirs, tree_flatten(tree(0))) > 1e-2, "the weights moved"


def test_it_works_in_a_compiled_step_and_beside_adamw():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    rules = [BatchedMuon(0.02), optim.AdamW(1e-3)]
    optimizer = optim.MultiOptimizer(rules, [lambda name, weight: weight.ndim == 2])
    optimizer.init(model.trainable_parameters())
    arrays = [model.state, optimizer.state]
    apply = mx.compile(lambda grads: optimizer.update(model, grads), arrays, arrays)
    before = tree_map(lambda a: a + 0, model.parameters())
    for _ in range(2):
        apply(tree_map(mx.ones_like, model.parameters()))
        mx.eval(arrays)
    after = dict(tree_flatten(model.parameters()))
    assert all((after[name] != value).any().item() for name, value in tree_flatten(before))


def test_equal_shapes_share_their_products():
    def products(optimizer):
        weights = {str(i): mx.random.normal((8, 8)) for i in range(12)}
        optimizer.init(weights)
        graph = StringIO()
        mx.export_to_dot(graph, *[a for _, a in tree_flatten(optimizer.apply_gradients(weights, weights))])
        return len(re.findall(r'"(?:Matmul|AddMM)"', graph.getvalue()))

    assert products(BatchedMuon(0.02)) == 15
    assert products(optim.Muon(0.02)) == 12 * 15


def test_singular_values_come_near_one():
    x = mx.random.normal((3, 8, 20), key=mx.random.key(0))
    values = mx.linalg.svd(orthogonalised(x, 5), compute_uv=False, stream=mx.cpu)
    assert 0.5 < values.min().item() <= values.max().item() < 1.4
