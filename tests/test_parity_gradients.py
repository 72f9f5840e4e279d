"""What training follows: gradients of each network against torch's."""

import cases
import numpy as np
import pytest


@pytest.mark.parametrize("case", list(cases.LOSSES))
def test_gradients(case):
    """1e-5 over all parameters and inputs; 1e-4 for each alone, since some are small differences of large numbers."""
    pairs = list(cases.gradients(case))
    assert len(pairs) > 30
    got, want = (np.concatenate([pair[i] for pair in pairs]) for i in (1, 2))
    assert cases.relative_error(got, want) < 1e-5
    errors = {label: cases.relative_error(a, b) for label, a, b in pairs}
    assert max(errors.values()) < 1e-4, errors
