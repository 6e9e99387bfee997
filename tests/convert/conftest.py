"""For tests of `frozen_weights`."""

import pytest

import wn_kernels.functional as WF
from wn_kernels import plan
from wn_kernels.modules import prepared


@pytest.fixture
def paying(monkeypatch):
    """The inputs are so small that the planner may compute without a weight."""
    monkeypatch.setattr(prepared, "_shares", lambda *_: True)


@pytest.fixture
def count(monkeypatch):
    """How often a weight is computed by itself, other than for a reference."""
    calls = []
    form = WF.weight_norm

    def counted(*arguments, **options):
        if not plan.is_forced():
            calls.append(1)
        return form(*arguments, **options)

    monkeypatch.setattr(WF, "weight_norm", counted)
    return calls
