"""Several processes make the video that one makes: same latents, fewer weights in each."""

import json
import math
import os
from pathlib import Path

import checkpoint
import mlx.core as mx
import numpy as np
import one_rank
import pytest
import ranks

import mlx_wan
from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.models.transformer import FLOAT32_PARAMETERS
from mlx_wan.parallel.plan import ALONE
from mlx_wan.parallel.spread import Spread
from mlx_wan.parallel.team import Team
from mlx_wan.parallel.tokens import TokenShare
from mlx_wan.weights.tensors import TensorInfo, mapped_tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.write_official(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def alone(folder):
    """What one process makes, without and with a picture."""
    pipe = mlx_wan.WanPipeline.from_pretrained(folder)
    runs = {way: np.array(one_rank.run(pipe, way)) for way in ("tokens", "image", "cache")}
    frames = {f"decoded {shape}": np.array(one_rank.decoded(ALONE, shape)) for shape in one_rank.DECODED}
    frames |= {f"encoded {channels}": np.array(one_rank.encoded(ALONE, channels)) for channels in one_rank.ENCODED}
    return runs | frames | {"timesteps": np.array(one_rank.velocity(pipe))}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_together_make_what_one_makes(size, folder, alone, tmp_path):
    # 6 tokens a frame: 4 ranks have 1, 2, 1 and 2 of them
    processes = ranks.start(tmp_path, size, [str(ranks.HERE / "one_rank.py"), str(folder), str(tmp_path / "out")])
    results = ranks.finish(processes)
    assert [code for code, *_ in results] == [0] * size, results
    first = mx.load(str(tmp_path / "out-0.safetensors"))
    few = f"decoded {one_rank.DECODED[-1]}"  # the first rank decodes that alone
    assert set(first) == {*one_rank.ways(size), "timesteps", *(name for name in alone if "coded" in name)}
    for way, latents in first.items():
        expected = alone.get(way, alone["tokens"])
        assert np.linalg.norm(np.array(latents) - expected) < 1e-5 * np.linalg.norm(expected), way
    for rank in range(1, size):
        for way, latents in mx.load(str(tmp_path / f"out-{rank}.safetensors")).items():
            assert mx.array_equal(latents, mx.zeros((1,)) if way == few else first[way]), (rank, way)
    held = [json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in range(size)]
    whole, spread = (np.array([h[way] for h in held]) for way in ("tokens", "weights"))
    assert (spread.sum(axis=0) >= whole[0]).all()  # nothing got lost
    assert (spread[:, 1] < 1.05 / size * whole[0, 1]).all()  # of this small transformer much is outside of blocks


@pytest.mark.parametrize("size", [2, 3, 4, 16])
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_what_a_rank_holds_of_the_5b(size, part):
    names = json.loads((checkpoint.GOLDEN / "names.json").read_text())["ti2v-5B"][part]
    tensors = []
    for name, shape in names.items():
        wide = part == "transformer" and any(fragment in name for fragment in FLOAT32_PARAMETERS)
        nbytes = math.prod(shape) * (4 if wide else 2)
        tensors.append(TensorInfo(name, tuple(shape), "", nbytes, Path(), lambda: mx.array(0)))
    spread = Spread(Team(None, range(size)))
    total = sum(info.nbytes for info in tensors)
    held = [sum(spread.nbytes(info, rank) for info in tensors) / total for rank in range(size)]
    assert sum(held) >= 1
    assert max(held) < 1 / size + 0.035
    assert max(held) <= 0.55


def test_rows_are_read_from_the_file_alone(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    array.tofile(tmp_path / "x")
    info = mapped_tensor("x", (6, 4), "float32", tmp_path / "x", 0)
    turned = mapped_tensor("x", (4, 6), "float32", tmp_path / "x", 0, strides=(1, 4))
    assert np.array_equal(info.rows(2, 5), array[2:5])
    assert np.array_equal(turned.rows(1, 3), array.T[1:3])
    os.truncate(tmp_path / "x", 3 * 16)  # what is not asked for need not be there
    assert np.array_equal(info.rows(0, 3), array[:3])
    with pytest.raises(CheckpointError):
        info.load()


def test_more_ranks_than_tokens_of_a_frame():
    with pytest.raises(UserError, match="a frame of this size has 3 tokens, too few for 4 ranks"):
        TokenShare(Team(None, range(4)), (2, 1, 3))


def test_shares_of_a_frame_differ_by_one_token_at_most():
    x = mx.arange(2 * 3 * 7).reshape(1, 42, 1)  # 6 frames of 7 tokens
    parts = []
    for rank in range(4):
        team = Team(None, range(4))
        team.rank = rank
        parts.append(TokenShare(team, (6, 1, 7)).take(x).reshape(6, -1))
    assert [part.shape[1] for part in parts] == [1, 2, 2, 2]
    assert mx.array_equal(mx.concatenate(parts, axis=1).reshape(1, 42, 1), x)
