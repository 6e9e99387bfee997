"""The kernels of a group of weights, each in every form of a slice's sum."""

import pytest
import torch

from tests.comparison import assert_matches
from wn_kernels.backends import reference
from wn_kernels.backends.triton import group, uploads
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
@pytest.mark.parametrize("norms", [("l2",), ("l1", "linf", "l2")])
def test_against_float64(norms, device):
    """The weights take the norms in turn. In either form, a slice has ties."""
    count = len(MEMBERS)
    v, g, dw = (
        [torch.randn(shape).clamp(-1.5, 1.5) for shape, _ in MEMBERS],
        [torch.rand(kept_shape(*member)) + 0.5 for member in MEMBERS],
        [torch.randn(shape) for shape, _ in MEMBERS],
    )
    new = [torch.full_like(t, torch.nan) for t in (*g, *v, *g, *v)]  # n, W, dg, dV
    parts, arena = in_one_arena([t.to(device) for t in (*v, *g, *dw, *new)])
    vs, gs, dws, ns, ws, dgs, dvs = split(parts, count)
    members = tuple(
        Member(dim, 0.0, torch.float32, norms[i % len(norms)]) for i, (_, dim) in enumerate(MEMBERS)
    )
    target = group.target_of(arena)
    forward = group._remembered(target, (*vs, *gs), members)
    backward = group._remembered_backward(target, (*dws, *vs, *gs), members)
    assert not forward.alone
    (table,) = forward.tables
    assert {row.kind.FORM for row in table.rows} == {"held", "walked"}
    table.launch((vs, gs, ns, ws), arena)
    (table,) = backward.tables
    table.launch((dws, vs, gs, ns, dgs, dvs), arena)
    for i, (shape, _) in enumerate(MEMBERS):
        options = members[i].dim, 0.0, members[i].norm
        wide = [t.double().requires_grad_() for t in (v[i], g[i])]
        expected = reference.weight_norm(*wide, *options)
        dv, dg = torch.autograd.grad(expected, wide, dw[i].double())
        length, terms = v[i].numel(), dw[i].norm().item()
        scale = (reference.slice_scale(*wide, *options) * dw[i].double()).norm().item()
        assert_matches(ws[i], expected, torch.float32, length, what=f"w {shape}")
        assert_matches(dvs[i], dv, torch.float32, length, roundings=3, scale=scale)
        assert_matches(dgs[i], dg, torch.float32, length, terms=terms)


class OnGPU:
    """A tensor of a GPU that is not there: an address, and copies that keep the host's memory."""

    device = torch.device("cpu")

    def __init__(self, address):
        self.address = address

    def get_device(self):
        return 0

    def data_ptr(self):
        return self.address


def test_what_captured_launches_read(monkeypatch):
    """A CUDA graph copies from pinned memory at every replay. No other launch may write there, and
    a capture allocates none, however many captures follow launches outside of one."""
    captures, pins, launched = [False], [], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures[0])
    monkeypatch.setattr(uploads, "_stream", lambda _: 7 + captures[0])
    monkeypatch.setattr(uploads.native, "helpers", lambda: None)
    monkeypatch.setattr(uploads, "_captured", [])

    def pin_memory(t):
        pins.append(captures[0])
        return t.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    shapes = [((70, 33), 0), ((6, 7), None)]
    members = tuple(Member(dim, 0.0, torch.float32) for _, dim in shapes)
    v, g = [torch.ones(s) for s, _ in shapes], [torch.ones(kept_shape(*s)) for s in shapes]
    (table,) = group._prepare(group.target_of(v[0]), *v, *g, members).tables
    table.launchers = [lambda *tensors: launched.append(tensors)] * 2
    calls = 3 * uploads.RESERVE
    for i in range(calls):
        captures[0] = i % 40 > 1  # a capture follows two launches outside of one
        first = 2**40 + 4096 * i
        lists = [[OnGPU(first + 512 * (2 * k + j) + i % 3) for j in range(2)] for k in range(4)]
        table.launch(lists)
        if i % 40 == 1:
            assert len(table.uploads._reserve) == uploads.RESERVE
    assert len(launched) == calls
    assert not any(pins)
    for i, (_, places, numbers) in enumerate(launched):
        found = (places + numbers.data_ptr()).tolist()
        first = 2**40 + 4096 * i + i % 3
        order = table._members
        assert found == [first + 512 * (2 * k + j) for j in order for k in range(4)]
        assert numbers.tolist() == table.numbers.tolist()
    kept = {t.data_ptr() for t in uploads._captured}
    for i, (_, places, numbers) in enumerate(launched):
        if i % 40 > 1:
            assert {places.data_ptr(), numbers.data_ptr()} <= kept
