"""The ATen path's look at norms."""

import math

import pytest
import torch

from wn_kernels.backends.aten_weight import FEW_NORMS, is_in_range, range_check
from wn_kernels.call import NORM_RANGE


@pytest.mark.parametrize("dtype", NORM_RANGE)
@pytest.mark.parametrize("count", [1, 3, FEW_NORMS, FEW_NORMS + 1])
def test_every_look_at_norms_agrees(dtype, count):
    least, most = (torch.tensor(bound, dtype=dtype).item() for bound in NORM_RANGE[dtype])
    inside = [least, 1.2 * least, 1e-3, 1.0, 1e3, most / 1.2, most]
    outside = [0.0, least / 1.2, 1.2 * most, math.inf, math.nan, -1.0]
    look = range_check(torch.ones(count, 1, dtype=dtype))
    for at in {0, count // 2, count - 1}:
        for expected, values in ((True, inside), (False, outside)):
            for value in values:
                n = torch.ones(count, 1, dtype=dtype)
                n[at] = value
                assert look(n) is is_in_range(n) is expected, value


def test_few_norms_are_read_without_a_reduction(monkeypatch):
    n = torch.full((4, 1), 0.5)
    look = range_check(n)
    monkeypatch.setattr("wn_kernels.backends.aten_weight.is_in_range", None)
    assert look(n)
