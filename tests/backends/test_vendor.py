"""Convolutions that PyTorch gets wrong on some processors, on any processor: which are widened is
patched, and the dtypes of the convolutions that run are recorded."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import wn_kernels
import wn_kernels.functional as WF
from bench.measure import onednn
from tests.comparison import ConvCase, assert_matches, assert_same_bits
from wn_kernels import plan, prepare, use_backend
from wn_kernels.backends import native, vendor
from wn_kernels.call import Geometry

HALVES = (torch.bfloat16, torch.float16)
CASES = {
    "conv": ((2, 6, 4, (7, 6, 4), (1, 1, 3)), {"stride": (2, 1, 2), "padding": (0, 0, 1)}),
    "dilated": ((1, 3, 4, (7, 6, 5), (2, 1, 3)), {"dilation": (3, 1, 2), "dim": 1}),
    "grouped": ((2, 6, 6, (5, 4, 4), (2, 2, 2)), {"groups": 6, "dim": 2}),
    "transposed": ((2, 6, 4, (4, 3, 4), (2, 2, 3)), {"transposed": True, "stride": 2}),
    "whole": ((2, 6, 4, (5, 4, 4), (3, 3, 3)), {"dim": None, "padding": 1}),
}


class Convolutions(TorchDispatchMode):
    """Records the dtypes of the convolutions, forward and backward, that PyTorch runs."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if "convolution" in str(function):
            self.dtypes.append({a.dtype for a in arguments if isinstance(a, torch.Tensor)})
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def _wrong(monkeypatch):
    monkeypatch.setattr(vendor, "WRONG_IN_3D", frozenset(HALVES))


@pytest.mark.usefixtures("_wrong")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_three_dimensions_are_widened(name, backend, dtype):
    """Every product of the forward and of the backward, and what comes out is right."""
    sizes, options = CASES[name]
    case = ConvCase(*sizes, x_dtype=dtype, **options)
    with use_backend(backend), Convolutions() as ran:
        case.check(case.layer)
    assert len(ran.dtypes) >= 3
    assert all(dtypes == {torch.float32} for dtypes in ran.dtypes)


@pytest.mark.usefixtures("_wrong")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_mixed_dtypes_are_widened(backend):
    case = ConvCase(2, 6, 4, (5, 4, 4), (3, 3, 3), 0, torch.bfloat16, torch.float32)
    with use_backend(backend), Convolutions() as ran:
        case.check(case.layer)
    assert all(dtypes == {torch.float32} for dtypes in ran.dtypes)


@pytest.mark.usefixtures("_wrong")
def test_second_derivatives_are_widened():
    case = ConvCase(2, 3, 4, (4, 3, 3), (2, 2, 2), 0, torch.bfloat16)
    leaves = case.leaves()
    with Convolutions() as ran:
        y = case.layer(*leaves)
        grads = torch.autograd.grad(y, leaves, case.dy, create_graph=True)
        seconds = torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves[:3])
    assert len(ran.dtypes) > 4
    assert all(dtypes == {torch.float32} for dtypes in ran.dtypes)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y = case.layer(*wide)
    right = torch.autograd.grad(y, wide, case.dy.double(), create_graph=True)
    right = torch.autograd.grad(sum(grad.square().sum() for grad in right), wide[:3])
    for found, expected in zip(seconds, right, strict=True):
        assert_matches(found, expected, torch.bfloat16, case.length, roundings=8)


@pytest.mark.usefixtures("_wrong")
@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
@pytest.mark.parametrize("form", ["ours", "fused"])
def test_layers_under_autocast_are_widened(kind, form):
    """Autocast, which is still on inside the layer, would narrow the products again."""
    plain = kind(4, 4, 3)
    layer = parametrizations.weight_norm(copy.deepcopy(plain))
    if form == "fused":
        wn_kernels.fuse(layer)
    else:
        layer = wn_kernels.weight_norm(plain)
    x = torch.randn(2, 4, 5, 4, 5)
    with torch.autocast("cpu", torch.bfloat16), Convolutions() as ran:
        y = layer(x)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert len(ran.dtypes) >= 2
    assert all(dtypes == {torch.float32} for dtypes in ran.dtypes)
    with use_backend("reference"):
        right = copy.deepcopy(layer).double()(x.bfloat16().double())
    assert_matches(y, right, torch.bfloat16, 128, roundings=4)


@pytest.mark.usefixtures("_wrong")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_convolutions_stay(dtype):
    """Two spatial dimensions in bfloat16, and three in float32, are computed as they are."""
    case = ConvCase(2, 6, 4, (7, 6), (3, 3), 0, dtype)
    if dtype is torch.float32:
        case = ConvCase(2, 6, 4, (7, 6, 5), (3, 3, 3), 0, dtype)
    with use_backend("aten"), Convolutions() as ran:
        case.check(case.layer)
    assert all(dtypes == {dtype} for dtypes in ran.dtypes)


@pytest.mark.usefixtures("_wrong")
@pytest.mark.parametrize(
    ("dtype", "v_dtype"), [(dtype, None) for dtype in HALVES] + [(torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_native_library_widens(dtype, v_dtype, transposed):
    """It computes with a W in float32 and rounds once, to the same bits."""
    native.build()
    case = ConvCase(2, 6, 4, (5, 4, 4), (3, 3, 3), 0, dtype, v_dtype, transposed=transposed)
    prepare.forget()
    with use_backend("native"):
        y, _ = case.check(case.layer)
        w = WF.weight_norm(case.v.float(), case.g.float())
    wide = case.plain(case.x.float(), w, case.bias.float())
    assert_same_bits(y, wide.to(dtype))
    prepare.forget()


def test_nothing_is_widened_where_nothing_is_wrong(monkeypatch):
    monkeypatch.setattr(vendor, "WRONG_IN_3D", frozenset())
    case = ConvCase(1, 3, 4, (4, 4, 4), (2, 2, 2), 0, torch.bfloat16)
    with use_backend("aten"), Convolutions() as ran, torch.no_grad():
        WF.wn_conv3d(*case.leaves())
    assert ran.dtypes == [{torch.bfloat16}]


@pytest.mark.parametrize(
    ("flags", "held", "wrong"),
    [
        ("avx512f avx512_bf16", None, set()),
        ("avx512f amx_tile amx_bf16", None, {torch.bfloat16}),
        ("avx512f amx_tile amx_bf16 amx_fp16", None, set(HALVES)),
        ("amx_tile amx_bf16 amx_fp16", "AVX512_CORE_AMX", set(HALVES)),
        ("amx_tile amx_bf16", "DEFAULT", {torch.bfloat16}),
        ("amx_tile amx_bf16", "AVX512_CORE_FP16", set()),
        ("amx_tile amx_bf16", "avx2", set()),
        ("", None, set()),
    ],
)
@pytest.mark.parametrize("variable", vendor.ONEDNN_VARIABLES)
def test_what_is_wrong_where(flags, held, wrong, variable, monkeypatch):
    for name in vendor.ONEDNN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if held:
        monkeypatch.setenv(variable, held)
    monkeypatch.setattr(vendor, "cpu_flags", lambda: frozenset(flags.split()))
    assert vendor._wrong_in_3d() == wrong


def test_this_processors_flags():
    lines = Path("/proc/cpuinfo")
    assert vendor.cpu_flags() <= set(lines.read_text().split() if lines.exists() else ())
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert "avx512f" in vendor.cpu_flags()


def test_tests_hold_onednn(tmp_path, monkeypatch):
    """To what has no AMX, where there is AMX, and not where something is asked for."""
    amx, none = tmp_path / "amx", tmp_path / "none"
    amx.write_text("processor : 0\nflags : avx512f amx_tile amx_bf16\n")
    none.write_text("processor : 0\nflags : avx512f avx512_bf16\n")
    monkeypatch.setenv(onednn.VARIABLE, "set to restore it afterwards")
    for file, before, after in (
        (amx, None, onednn.MOST),
        (amx, "AVX2", "AVX2"),
        (none, None, None),
        (tmp_path / "nothing", None, None),
    ):
        monkeypatch.delenv(onednn.VARIABLE, raising=False)
        if before:
            monkeypatch.setenv(onednn.VARIABLE, before)
        onednn.hold(file)
        assert os.environ.get(onednn.VARIABLE) == after
    assert onednn.MOST in vendor._WITHOUT_AMX


@pytest.mark.parametrize("needs_weight", [False, True])
@pytest.mark.parametrize("sizes", [(1, 6, 2048), (4, 5, 40, 40), (4, 5, 14, 14, 14)])
def test_gradient_of_a_bias(sizes, needs_weight):
    """Its error is that of one rounding, where oneDNN's sum is wrong by up to 30 times as much."""
    dy, x = torch.rand(sizes), torch.randn(sizes[0], 3, *sizes[2:])
    rank = len(sizes) - 2
    w = torch.randn(sizes[1], 3, *[3] * rank)
    each = [1] * rank
    conv = Geometry(each, each, each, False, [0] * rank, 1)
    *_, db = vendor.convolution_grads(dy, x, w, conv, False, needs_weight, True)
    right = dy.double().transpose(0, 1).flatten(1).sum(1)
    assert_matches(db, right, torch.float32, length=0, roundings=1)


@pytest.mark.parametrize("backend", ["native", "aten"])
@pytest.mark.parametrize("groups", [1, 6])
def test_biases_that_are_added(backend, groups):
    """A dilated convolution adds its bias in a pass of its own where PyTorch's is slow."""
    case = ConvCase(1, 6, 6, (9,), (3,), dilation=2, groups=groups)
    conv = Geometry((1,), (0,), (2,), False, (0,), groups)
    assert vendor.adds_bias(case.x.shape, case.v.shape, torch.float32, conv)
    plain = conv._replace(dilation=(1,))
    assert not vendor.adds_bias(case.x.shape, case.v.shape, torch.float32, plain)
    options = {"dilation": 2, "groups": groups}
    native.build()
    with use_backend(backend), prepare.watching() as calls:
        WF.wn_conv1d(*case.leaves(), **options)
    formed = plan.Plan(backend, "materialize", "materialize", "weight")
    with use_backend(backend), prepare.fixed(calls[0][0], formed):
        y = WF.wn_conv1d(*case.leaves(), **options)
        with torch.no_grad():
            assert_same_bits(WF.wn_conv1d(*case.leaves(), **options), y.detach())
    assert_matches(y, case.y, torch.float32, case.length)
