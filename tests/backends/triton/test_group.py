"""The kernels of a group of weights, each in every form of a slice's sum."""

import pytest
import torch

from tests.comparison import assert_matches
from wn_kernels.backends import reference
from wn_kernels.backends.triton import group
from wn_kernels.call import Member, kept_shape

MEMBERS = [((70, 33), 0), ((3, 5000), 0), ((5, 40, 9), 1), ((2, 6, 50), 2), ((6, 7), None)]


def in_one_arena(tensors):
    """The tensors as parts of one piece of memory, and that piece: a launch checker follows no
    address, but an offset from one of a kernel's arguments."""
    sizes = [-(-t.nbytes // 16) * 16 for t in tensors]
    arena = torch.zeros(sum(sizes) + 16, dtype=torch.int8, device=tensors[0].device)
    parts, at = [], -arena.data_ptr() % 16
    for t, size in zip(tensors, sizes, strict=True):
        parts.append(arena[at : at + t.nbytes].view(t.dtype).view(t.shape).copy_(t))
        at += size
    return parts, arena


def split(parts, count):
    return [parts[i : i + count] for i in range(0, len(parts), count)]


@pytest.mark.sanitize
def test_against_float64(device):
    count = len(MEMBERS)
    v, g, dw = (
        [torch.randn(shape) for shape, _ in MEMBERS],
        [torch.rand(kept_shape(*member)) + 0.5 for member in MEMBERS],
        [torch.randn(shape) for shape, _ in MEMBERS],
    )
    new = [torch.full_like(t, torch.nan) for t in (*g, *v, *g, *v)]  # n, W, dg, dV
    parts, arena = in_one_arena([t.to(device) for t in (*v, *g, *dw, *new)])
    vs, gs, dws, ns, ws, dgs, dvs = split(parts, count)
    members = tuple(Member(dim, 0.0, torch.float32) for _, dim in MEMBERS)
    target = group.target_of(arena)
    forward = group._remembered(target, (*vs, *gs), members)
    backward = group._remembered_backward(target, (*dws, *vs, *gs), members)
    assert not forward.alone
    (table,) = forward.tables
    assert {row.kind.FORM for row in table.rows} == {"held", "walked"}
    table.launch((vs, gs, ns, ws), arena)
    (table,) = backward.tables
    table.launch((dws, vs, gs, ns, dgs, dvs), arena)
    for i, (shape, dim) in enumerate(MEMBERS):
        wide = [t.double().requires_grad_() for t in (v[i], g[i])]
        expected = reference.weight_norm(*wide, dim, 0.0)
        dv, dg = torch.autograd.grad(expected, wide, dw[i].double())
        length, terms = v[i].numel(), dw[i].norm().item()
        scale = (reference.slice_scale(*wide, dim, 0.0) * dw[i].double()).norm().item()
        assert_matches(ws[i], expected, torch.float32, length, what=f"w {shape}")
        assert_matches(dvs[i], dv, torch.float32, length, roundings=3, scale=scale)
        assert_matches(dgs[i], dg, torch.float32, length, terms=terms)
