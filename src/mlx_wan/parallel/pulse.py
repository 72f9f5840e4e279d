"""How far this process has come in a run of several, for `guard` to tell the others.

All ranks begin the same exchanges in the same order. One that lives, and has begun fewer than others for long, hangs:
it sleeps, waits for a disk that is gone, or computes for ever.
"""

import contextlib
import math
import time
from collections.abc import Iterator

PATIENCE = 600.0  # seconds a rank may be behind where nothing is known of how long its work takes
STEADY = -1.0  # patience in the middle of equal steps: as long as a rank may be silent


class Pulse:
    """Attributes:
    count: exchanges begun.
    longest: seconds of the longest way from one to the next, but for those that `taking` was said of.
    patience: seconds for which this rank may be behind others; STEADY in the middle of equal steps.
    """

    def __init__(self) -> None:
        self.count, self.longest, self.patience = 0, 0.0, PATIENCE
        self._last: float | None = None

    def beat(self) -> None:
        """An exchange begins."""
        now = time.monotonic()
        if self._last is not None:
            self.longest = max(self.longest, now - self._last)
        self._last = now
        self.count += 1

    @contextlib.contextmanager
    def taking(self, seconds: float = math.inf) -> Iterator[None]:
        """Around work that other ranks do not have, or are done with sooner: downloads, weights from a slower disk."""
        before, self.patience = self.patience, seconds
        try:
            yield
        finally:
            self.patience, self._last = before, None


PULSE = Pulse()  # one, as the group of all ranks is one
