"""Random shapes, strides, dtypes and options against the definition in float64."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wn_kernels.functional as WF
from tests.comparison import DIMS, FLOATS, LAYOUTS, Case
from wn_kernels import use_backend

cases = st.builds(
    Case,
    m=st.integers(1, 40),
    k=st.integers(2, 70),
    n=st.integers(2, 70),
    dim=st.sampled_from(DIMS),
    x_dtype=st.sampled_from(FLOATS),
    v_dtype=st.sampled_from(FLOATS),
    eps=st.sampled_from([0.0, 0.0, 6.0]),
    bias=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)


def run(case):
    options = {"dim": case.dim, "eps": case.eps, "norm": case.norm}
    case.check(lambda *inputs: WF.wn_linear(*inputs, **options))


@settings(max_examples=400)
@given(case=cases)
def test_aten(case):
    with use_backend("aten"):
        run(case)


@settings(max_examples=40)
@given(case=cases)
def test_triton(case):
    pytest.importorskip("triton")
    with use_backend("triton"):
        run(case)
