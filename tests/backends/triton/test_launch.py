"""Layouts, index widths and the recording of launches."""

import gc
import importlib
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tests.comparison import assert_matches
from wn_kernels.backends.triton import configs, launch, linear, slice_norms
from wn_kernels.backends.triton.launch import (
    Launcher,
    as_slices,
    forget,
    is_wide,
    recording,
    remembered,
    target_of,
)


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


@pytest.mark.current
def test_a_launch_without_the_device_is_found():
    """Such a test would fail on a machine with a GPU, and there alone."""
    with pytest.raises(AssertionError, match="a test that launches takes `device`"):
        slice_norms(torch.ones(3, 4), 0, 0.0)


@pytest.mark.sanitize
def test_wide_kernels_compute_the_same(monkeypatch, device):
    """Every kernel with 64-bit offsets, at sizes that can be checked."""
    from tests.backends.triton import test_linear, test_weight

    for name in ("launch", "one_pass", "linear_grad"):
        module = importlib.import_module(f"wn_kernels.backends.triton.{name}")
        monkeypatch.setattr(module, "is_wide", lambda *_: True)
    forget()
    for dim in (0, 1, None):
        case = test_linear.Case(9, 50, 41, dim, device=device)
        for form in test_linear.FORWARD[dim]:
            test_linear.run(case, forward=form)
        for form in test_linear.BACKWARD[dim]:
            test_linear.run(case, backward=form)
        if dim == 0:  # by programs that share r, and a backward of more rows
            test_linear.run(case, forward="one_pass", config=test_linear.SMALL._replace(splits=2))
            test_linear.run(case, backward="product", grad_config=test_linear.SMALL_TILE)
        test_weight.check(*test_weight.inputs((11, 6, 9), dim, torch.float32, device), dim)
    forget()


def test_large_tensors_are_launched_wide():
    """A weight of 2³¹ elements and more: every launch that touches it says so. The scale of the
    activations does not."""
    v = torch.empty(1 << 16, 1 << 16, dtype=torch.bfloat16, device="meta")
    x = torch.empty(4, 1 << 16, dtype=torch.bfloat16, device="meta")
    g = torch.empty(1 << 16, 1, dtype=torch.bfloat16, device="meta")
    with recording() as launches:
        linear(x, v, g, None, 0, 0.0, "one_pass")
        linear(x, v, g, None, 0, 0.0, "scaled")
    wide = {launch.kernel.__name__: launch.arguments["WIDE"] for launch in launches}
    assert wide == {"one_pass_kernel": True, "slice_sum_kernel": True, "scale_kernel": False}


class Devices:
    """Two GPUs that are not there: which one is current, and which ones were made so."""

    def __init__(self, monkeypatch):
        self.current = 0
        if torch.backends.cuda.is_built() and torch.cuda.is_available():
            torch.cuda.init()  # it reads the properties of the real ones
        for name, function in {
            "is_available": lambda: True,
            "current_device": lambda: self.current,
            "device": self.device,
            "get_device_properties": self.properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(launch, "_current_device", lambda: self.current)
        monkeypatch.setattr(configs, "_target", configs._target.__wrapped__)

    @contextmanager
    def device(self, index):
        before, self.current = self.current, index
        yield
        self.current = before

    def properties(self, index):
        return SimpleNamespace(major=(9, 8)[index], multi_processor_count=(132, 108)[index])


class Memory:
    """Where a tensor lies: its device, -1 for that of the CPU, and its address."""

    def __init__(self, index):
        self.index = index

    def get_device(self):
        return self.index

    def data_ptr(self):
        return 256


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """With tensors on `cuda:1` while `cuda:0` is current, and the other way round."""
    devices, launched = Devices(monkeypatch), []

    class Kernel:
        arg_names = ("A", "N")

        def __getitem__(self, grid):
            return lambda *tensors, **constants: launched.append(devices.current)

    for t in map(Memory, (1, 0, 1, -1)):
        Launcher(Kernel(), target_of(t), (1,), N=4, num_warps=4, num_stages=1)(t)
        assert devices.current == 0
    assert launched == [1, 0, 1, 0]


def test_configurations_of_the_call_s_device(monkeypatch):
    """Two architectures in one machine: each call gets its own, whichever comes first."""
    Devices(monkeypatch)
    assert configs.target(1) == (1, "cuda:80", 108)
    assert configs.target(0) == (0, "cuda:90", 132)
    assert configs.target(-1).architecture == "cuda:90"
    with configs.architecture("cuda:100"):
        assert configs.target(1) == (1, "cuda:100", 108)


def test_what_is_prepared_anew():
    """Once for a layout: another shape, stride, dtype, option or target counts, no element does.
    What is prepared is given tensors without memory."""
    prepared = []

    @remembered
    def find(target, x, y, option):
        assert {t.device.type for t in (x, y) if t is not None} == {"meta"}
        prepared.append((target.architecture, x.shape, x.stride(), x.dtype, y is None, option))
        return lambda: len(prepared)

    x = torch.ones(4, 6)
    variations = [
        ((x, None), 1),
        ((x, x), 1),
        ((x, None), 2),
        ((x.t(), None), 1),
        ((x[:2], None), 1),
        ((x.double(), None), 1),
        ((torch.ones(4, 12)[:, ::2], None), 1),
    ]
    for expected, (tensors, option) in enumerate(variations, 1):
        assert find(target_of(x), tensors, option)() == expected
        assert len(prepared) == expected
    for tensors, option in variations:
        find(target_of(x), tensors, option)
    find(target_of(x), (torch.zeros(4, 6), None), 1)
    assert len(prepared) == len(variations) == len(set(prepared))
    with configs.architecture("cuda:80"):
        find(target_of(x), (x, None), 1)
    assert prepared[-1][0] == "cuda:80"
    assert len(prepared) == len(variations) + 1


def test_what_is_prepared_is_bounded(monkeypatch):
    """A process that sees ever new shapes does not keep them all."""
    monkeypatch.setattr("wn_kernels.backends.triton.launch.REMEMBERED", 8)
    alive = weakref.WeakSet()

    class Prepared:
        pass

    @remembered
    def find(target, x):
        alive.add(found := Prepared())
        return found

    for n in range(100):
        t = torch.empty(n)
        assert find(target_of(t), (t,)) in alive
    gc.collect()
    assert 1 <= len(alive) <= 8


def test_an_error_is_not_remembered():
    """What cannot be prepared is refused by every call."""
    x, v, g = torch.ones(4, 6), torch.ones(5, 6), torch.ones(1, 6)
    for _ in range(2):
        with pytest.raises(ValueError, match="dim=1"):
            linear(x, v, g, None, 1, 0.0, "one_pass")
