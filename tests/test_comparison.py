"""The suite's own comparison: it rejects zeros, and nothing in the suite goes around it."""

import ast
from pathlib import Path

import pytest
import torch

from tests.comparison import (
    FLOATS,
    AcceptsZeros,
    Case,
    assert_matches,
    assert_same_bits,
)

TESTS = Path(__file__).parent

# Comparisons of values that would not look whether zeros pass.
FORBIDDEN = {"allclose", "assert_close", "assert_allclose", "isclose", "approx", "assertEqual"}


@pytest.mark.parametrize("dtype", FLOATS)
def test_rejects_what_is_wrong(dtype):
    case = Case(8, 40, 30, 0, dtype)
    case.check_forward(case.y.to(dtype))
    for wrong in (torch.zeros_like(case.y), case.y * 1.2, case.y.roll(1, 0), case.y * float("nan")):
        with pytest.raises(AssertionError):
            case.check_forward(wrong.to(dtype))
    grads = [grad.to(dtype) for grad in case.grads]
    case.check_backward(grads)
    for i in range(4):
        broken = [torch.zeros_like(g) if i == j else g for j, g in enumerate(grads)]
        with pytest.raises(AssertionError):
            case.check_backward(broken)


def test_refuses_to_compare_with_what_zeros_would_match():
    tiny = torch.full((4,), 1e-9, dtype=torch.float64)
    with pytest.raises(AcceptsZeros):
        assert_matches(tiny, tiny, torch.float32, 4, terms=1.0)
    with pytest.raises(AcceptsZeros):
        assert_matches(0 * tiny, 0 * tiny, torch.float32, 4)
    with pytest.raises(AcceptsZeros):
        assert_same_bits(0 * tiny, 0 * tiny)


def test_every_comparison_goes_through_the_helper():
    offenders = []
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", None))
            if isinstance(node, (ast.Attribute, ast.Name)) and name in FORBIDDEN:
                offenders.append(f"{path.name}:{node.lineno} {name}")
            if name == "equal" and path.name != "comparison.py":
                offenders.append(f"{path.name}:{node.lineno} {name}")
    assert not offenders
