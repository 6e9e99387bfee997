"""Forces plans in tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from wn_kernels import plan, prepare
from wn_kernels.plan import Plan


@contextmanager
def planned(forward: str, backward: str, keeps: str = "") -> Iterator[None]:
    """Has every call of a layer computed in these variants; one that lies channels-last, which
    cannot be unfolded, forms `W` instead."""

    def choose(call, backend):
        if not call.x_shape:
            return plan.by_cost(call, backend)
        variants = forward, backward
        if call.channels_last and backend == "native":
            variants = ("materialize" if name == "unfold" else name for name in variants)
        return Plan(backend, *variants, keeps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "choose", choose)
        prepare.forget()
        yield
    prepare.forget()
