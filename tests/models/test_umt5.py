import cases
import mlx.core as mx
import numpy as np
import pytest
import small
from mlx.utils import tree_flatten

from mlx_wan.models.umt5 import TextEncoderConfig, UMT5Encoder, relative_buckets


@pytest.fixture(scope="module")
def model():
    return cases.load_small("text_encoder")


def test_official_code_agrees():
    errors = {label: cases.relative_error(got, want) for label, got, want in cases.text_encoder()}
    assert len(errors) == len(small.PROMPTS)
    assert max(errors.values()) < 1e-5, errors


def test_every_distance_falls_into_the_official_bucket():
    buckets, want = relative_buckets(512, 32), cases.golden("text_encoder")["buckets"]
    for i in (0, 200, 511):  # row i holds the distances -i .. 511 - i
        assert np.array_equal(buckets[i], want[511 - i : 1023 - i])


def test_released_model_has_the_official_names_and_shapes():
    parameters = tree_flatten(UMT5Encoder(TextEncoderConfig()).parameters())
    want = {name: tuple(shape) for name, shape in cases.official_names("ti2v-5B", "text_encoder").items()}
    assert {name: p.shape for name, p in parameters} == want


def test_padding_changes_nothing(model):
    """What stands in masked places, and how many there are, leaves the text's embeddings alone."""
    ids = np.random.RandomState(0).randint(4, 640, (1, 30))
    want = np.array(model(mx.array(ids[:, :12])))
    for length in (12, 20, 30):
        mask = (np.arange(length) < 12).astype(np.int32)[None]
        got = np.array(model(mx.array(ids[:, :length]), mx.array(mask)))[:, :12]
        assert cases.relative_error(got, want) < 1e-6


def test_rows_of_a_batch_do_not_mix(model):
    ids = mx.array(np.random.RandomState(1).randint(4, 640, (3, 16)))
    mask = mx.array(np.arange(16)[None] < np.array([[16], [5], [9]]))
    both = np.array(model(ids, mask))
    for i in range(3):
        assert cases.relative_error(both[i : i + 1], np.array(model(ids[i : i + 1], mask[i : i + 1]))) < 1e-6


def test_a_row_of_padding_alone_stays_finite(model):
    assert np.isfinite(np.array(model(mx.zeros((1, 8), mx.int32), mx.zeros((1, 8), mx.int32)))).all()


def test_half_precision(model):
    rounded = UMT5Encoder(model.config)
    rounded.load_weights([(name, p.astype(mx.bfloat16)) for name, p in tree_flatten(model.parameters())])
    ids = mx.array(np.random.RandomState(2).randint(4, 640, (1, 24)))
    got, want = rounded(ids), model(ids)
    assert got.dtype == mx.bfloat16
    assert 1e-4 < cases.relative_error(np.array(got.astype(mx.float32)), np.array(want)) < 3e-2
