"""Buckets: which shapes there are, which one a clip gets, and the order of batches."""

import numpy as np
import pytest

from mlx_wan.training.buckets import MAX_ASPECT, Bucket, batch_at, batches, bucket_sizes, longest, nearest_size


@pytest.mark.parametrize(
    ("width", "height", "steps"), [(1280, 704, (32, 32)), (96, 96, (32, 32)), (832, 480, (16, 16))]
)
def test_sizes_are_on_the_grid_within_the_area_and_as_large_as_that_allows(width, height, steps):
    sizes = bucket_sizes(width, height, steps)
    assert (width, height) in sizes
    assert len(sizes) > 2
    for w, h in sizes:
        assert (w % steps[0], h % steps[1]) == (0, 0)
        assert max(w / h, h / w) <= MAX_ASPECT
        assert w * h <= width * height < w * (h + steps[1])


def test_an_unusual_size_that_was_asked_for_stays():
    assert bucket_sizes(32, 320, (32, 32)) == [(32, 320), (96, 96), (128, 64)]


def test_the_nearest_shape_wins():
    sizes = [(64, 128), (96, 96), (128, 64)]
    assert nearest_size(1920, 1080, sizes) == (128, 64)
    assert nearest_size(1080, 1920, sizes) == (64, 128)
    assert nearest_size(100, 110, sizes) == (96, 96)
    assert nearest_size(10, 10, [(96, 96), (32, 32)]) == (96, 96)


def test_a_clip_gets_the_longest_length_it_fills():
    assert [longest(n, (17, 5)) for n in (4, 5, 16, 17, 99)] == [None, 5, 5, 17, 17]


BUCKETS = tuple([Bucket(5, 32, 32)] * 5 + [Bucket(9, 32, 32)] * 3 + [Bucket(1, 64, 32)])


def test_an_epoch_shows_every_clip_and_mixes_no_buckets():
    for epoch in range(3):
        made = batches(BUCKETS, 2, 7, epoch)
        assert len(made) == 3 + 2 + 1
        assert {i for batch in made for i in batch} == set(range(9))
        for batch in made:
            assert len(batch) == 2
            assert len({BUCKETS[i] for i in batch}) == 1
    assert batches(BUCKETS, 2, 7, 0) != batches(BUCKETS, 2, 7, 1)
    assert batches(BUCKETS, 2, 7, 0) != batches(BUCKETS, 2, 8, 0)


def test_batches_are_counted_through_the_epochs():
    straight = [batch for epoch in range(3) for batch in batches(BUCKETS, 2, 7, epoch)]
    assert [batch_at(BUCKETS, 2, 7, i) for i in range(18)] == straight
    counts = np.bincount(np.concatenate([batch_at(BUCKETS, 1, 0, i) for i in range(9 * 4)]))
    assert counts.tolist() == [4] * 9
