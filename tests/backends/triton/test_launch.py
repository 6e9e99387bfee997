"""Layouts, index widths and the recording of launches."""

import importlib

import pytest
import torch

from tests.comparison import assert_matches
from wn_kernels.backends.triton import linear, slice_norms
from wn_kernels.backends.triton.launch import as_slices, is_wide, recording


@pytest.mark.parametrize(
    ("shape", "dim", "n", "loops"),
    [
        ((6, 5), 0, 6, (1, 1, 5)),
        ((6, 5), 1, 5, (1, 1, 6)),
        ((6, 5), None, 1, (1, 1, 30)),
        ((6, 5, 4), 0, 6, (1, 1, 20)),
        ((6, 5, 4), 1, 5, (1, 6, 4)),
        ((6, 5, 4), 2, 4, (1, 1, 30)),
        ((6, 1, 4), 1, 1, (1, 1, 24)),
        ((2, 3, 4, 5), 1, 3, (1, 2, 20)),
        ((7,), 0, 7, (1, 1, 1)),
        ((2, 3, 4, 5, 6), 2, 4, (1, 6, 30)),
    ],
)
def test_slices_of_contiguous_tensors(shape, dim, n, loops):
    slices = as_slices([torch.empty(shape)], dim)
    assert (slices.n, slices.loops) == (n, loops)


def test_every_element_is_visited_once():
    """For any layout that has a walk, the offsets are those of the tensor's own elements."""
    base = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    views = [base, base.transpose(1, 3), base.permute(3, 0, 2, 1), base[:, :, ::2], base[:, 1:]]
    for t in views:
        for dim in (0, 1, 2, 3, None):
            slices = as_slices([t], dim)
            if slices is None:
                continue
            sizes = (slices.n, *slices.loops)
            flat = torch.as_strided(t, sizes, slices.strides[0], t.storage_offset())
            rows = t[None] if dim is None else t.movedim(dim, 0)
            assert flat.flatten(1).sort().values.tolist() == rows.flatten(1).sort().values.tolist()


def test_layouts_without_a_common_walk(device):
    """Four reduced groups that do not merge: computed on a contiguous copy."""
    v = torch.randn(3, 4, 6, 8, 10, device=device)[:, ::2, ::2, ::2, ::2]
    assert as_slices([v], 0) is None
    expected = v.double().flatten(1).norm(dim=1).view(3, 1, 1, 1, 1)
    assert_matches(slice_norms(v, 0, 0.0), expected, torch.float32, v.numel())


def test_wide():
    """64-bit offsets by the reach of the strides, not by the number of elements."""
    assert not is_wide(torch.empty(1000, 1000, device="meta"), None)
    assert is_wide(torch.empty(70_000, 40_000, device="meta"))
    far = torch.empty(1, device="meta").expand(3, 5)
    assert not is_wide(far)
    assert is_wide(torch.empty_strided((3, 5), (1 << 30, 1), device="meta"))
    assert not is_wide(torch.empty(0, 1 << 40, device="meta"))


def test_a_launch_without_the_device_is_found():
    """Such a test would fail on a machine with a GPU, and there alone."""
    with pytest.raises(AssertionError, match="a test that launches takes `device`"):
        slice_norms(torch.ones(3, 4), 0, 0.0)


@pytest.mark.sanitize
def test_wide_kernels_compute_the_same(monkeypatch, device):
    """Every kernel with 64-bit offsets, at sizes that can be checked."""
    from tests.backends.triton import test_linear, test_weight

    for name in ("launch", "linear"):
        module = importlib.import_module(f"wn_kernels.backends.triton.{name}")
        monkeypatch.setattr(module, "is_wide", lambda *_: True)
    for dim in (0, 1, None):
        case = test_linear.Case(9, 50, 41, dim, device=device)
        for form in test_linear.FORWARD[dim]:
            test_linear.run(case, forward=form)
        for form in test_linear.BACKWARD[dim]:
            test_linear.run(case, backward=form)
        test_weight.check(*test_weight.inputs((11, 6, 9), dim, torch.float32, device), dim)


def test_large_tensors_are_launched_wide():
    """A weight of 2³¹ elements and more: every launch that touches it says so."""
    v = torch.empty(1 << 16, 1 << 16, dtype=torch.bfloat16, device="meta")
    x = torch.empty(4, 1 << 16, dtype=torch.bfloat16, device="meta")
    g = torch.empty(1 << 16, 1, dtype=torch.bfloat16, device="meta")
    with recording() as launches:
        linear(x, v, g, None, 0, 0.0, "one_pass")
        linear(x, v, g, None, 0, 0.0, "scaled")
    assert len(launches) == 3
    assert all(launch.arguments["WIDE"] for launch in launches)
