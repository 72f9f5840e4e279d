"""Buckets: clips of one length and size, which can share a batch."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

MAX_ASPECT = 2.4  # the widest shape that gets a bucket of its own, just beyond cinema's 2.39


class Bucket(NamedTuple):
    """frames: 4n + 1; width, height: multiples of the model's stride times patch."""

    frames: int
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


def bucket_sizes(width: int, height: int, steps: tuple[int, int]) -> list[tuple[int, int]]:
    """(width, height) of every shape up to MAX_ASPECT whose area is at most width·height, as large as `steps` allow."""
    step_w, step_h = steps
    area = width * height
    sizes = []
    for w in range(step_w, area // step_h + 1, step_w):
        h = area // w // step_h * step_h
        if h and max(w / h, h / w) <= MAX_ASPECT:
            sizes.append((w, h))
    # The size asked for is always there, however narrow it is.
    return sorted({*sizes, (width, height)})


def nearest_size(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of `sizes` whose aspect ratio is nearest to that of a width×height picture; of equals the largest."""
    ratio = width / height
    return min(sizes, key=lambda size: (abs(math.log(ratio * size[1] / size[0])), -size[0] * size[1]))


def longest(available: int, lengths: Sequence[int]) -> int | None:
    """The largest of `lengths` that `available` frames fill, None if none does."""
    return max((length for length in lengths if length <= available), default=None)


@lru_cache(maxsize=4)
def batches(buckets: tuple[Bucket, ...], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch: lists of `size` indices into `buckets`, every index in one, all of one bucket each.

    The order follows from seed and epoch alone. A bucket that `size` does not divide fills its last batch with clips
    it has shown already, so that every step has the same size.
    """
    rng = np.random.default_rng([seed, epoch])
    made = []
    for bucket in sorted(set(buckets)):
        members = rng.permutation([i for i, other in enumerate(buckets) if other == bucket])
        filled = np.resize(members, -(-len(members) // size) * size)
        made += filled.reshape(-1, size).tolist()
    return [made[i] for i in rng.permutation(len(made))]


def batch_at(buckets: tuple[Bucket, ...], size: int, seed: int, index: int) -> list[int]:
    """Batch number `index` of training, counted through all epochs."""
    count = len(batches(buckets, size, seed, 0))
    return batches(buckets, size, seed, index // count)[index % count]
