"""Mean-only batch normalisation is `y = t − μ[t] + b`, and its gradient `dt = dy − μ[dy]`."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits, assert_zero
from tests.compatibility import processes
from tests.compatibility.processes import WORLD

SHAPES = {
    "1d": (wn_kernels.WNMeanOnlyBatchNorm1d, (6, 4)),
    "1d, sequences": (wn_kernels.WNMeanOnlyBatchNorm1d, (5, 4, 7)),
    "2d": (wn_kernels.WNMeanOnlyBatchNorm2d, (3, 4, 5, 2)),
    "3d": (wn_kernels.WNMeanOnlyBatchNorm3d, (2, 4, 3, 2, 3)),
    "synchronised, one process": (wn_kernels.WNMeanOnlySyncBatchNorm, (3, 4, 5)),
}


def made(kind, dtype=torch.float64, **options):
    torch.manual_seed(0)
    cls, shape = SHAPES[kind]
    layer = cls(4, **options, dtype=dtype)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer, torch.randn(shape, dtype=dtype) + 1


def rows(t):
    """A row for each channel."""
    return t.movedim(1, 0).flatten(1)


@pytest.mark.parametrize("kind", SHAPES)
def test_is_the_formula_of_the_paper(kind):
    layer, t = made(kind)
    t.requires_grad_()
    y = layer(t)
    wanted = (
        rows(t).detach() - rows(t).detach().mean(1, keepdim=True) + layer.bias.detach()[:, None]
    )
    assert_matches(rows(y), wanted, torch.float64, 64)
    dy = torch.randn_like(t) + 0.5
    dt, db = torch.autograd.grad(y, (t, layer.bias), dy)
    assert_matches(rows(dt), rows(dy) - rows(dy).mean(1, keepdim=True), torch.float64, 64)
    assert_matches(db, rows(dy).sum(1), torch.float64, 64)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_running_mean(kind, momentum):
    """The running mean after three batches is that of `torch.nn`'s, and serves evaluation."""
    layer, _ = made(kind, momentum=momentum)
    twin = nn.BatchNorm1d(4, momentum=momentum, dtype=torch.float64)
    for _ in range(3):
        t = torch.randn(SHAPES[kind][1], dtype=torch.float64) + 2
        layer(t)
        twin(rows(t).T)
    assert_matches(layer.running_mean, twin.running_mean, torch.float64, 64)
    assert layer.num_batches_tracked == 3
    assert layer.state_dict().keys() == {"bias", "running_mean", "num_batches_tracked"}
    layer.eval()
    shift = (layer.bias - layer.running_mean).detach()
    assert_matches(rows(layer(t)), rows(t) + shift[:, None], torch.float64, 64)
    assert_matches(rows(layer(t[:1])), rows(t[:1]) + shift[:, None], torch.float64, 64)
    assert layer.num_batches_tracked == 3
    layer.reset_parameters()
    assert_zero(layer.running_mean)
    assert_zero(layer.bias)


@pytest.mark.parametrize("kind", SHAPES)
def test_without_bias_or_running_mean(kind):
    layer, t = made(kind, affine=False, track_running_stats=False)
    assert not layer.state_dict()
    wanted = rows(t) - rows(t).mean(1, keepdim=True)
    assert_matches(rows(layer(t)), wanted, torch.float64, 64)
    assert_matches(rows(layer.eval()(t)), wanted, torch.float64, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype):
    """The mean of many values is accumulated in float32."""
    layer, t = made("2d", dtype)
    t = (torch.randn(32, 4, 30, 30) + 3).to(dtype)
    y = layer(t)
    wide = rows(t.double())
    wanted = wide - wide.mean(1, keepdim=True) + layer.bias.detach().double()[:, None]
    assert y.dtype == dtype
    assert_matches(rows(y), wanted, dtype, 30000, scale=wide.norm().item())


def test_derivatives_of_the_second_order():
    layer, t = made("1d, sequences")
    t.requires_grad_()
    assert torch.autograd.gradcheck(layer, t)
    assert torch.autograd.gradgradcheck(lambda t: layer(t).square(), t)


def test_compiled_without_breaks():
    layer, t = made("2d")
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    assert_matches(compiled(t), layer(t).detach(), torch.float64, 64)
    assert_matches(compiled.running_mean, layer.running_mean, torch.float64, 64)


def test_rejects_what_it_cannot_use():
    layer, t = made("1d")
    with pytest.raises(ValueError, match=r"shape \(6, 4, 1, 1\); expected 2-d or 3-d input"):
        layer(t[..., None, None])
    with pytest.raises(ValueError, match=r"shape \(6, 3\); its dimension 1 must be 4"):
        layer(t[:, :3])
    with pytest.raises(ValueError, match="at least two values per channel in training"):
        layer(t[:1])
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got list"):
        layer([1.0])
    with pytest.raises(TypeError, match=r"input has dtype torch\.int64"):
        layer(t.long())
    assert layer.num_batches_tracked == 0


# --- over processes ------------------------------------------------------------------------------


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        wn_kernels.WNConv1d(3, 4, 3, bias=False, dtype=dtype),
        wn_kernels.WNMeanOnlyBatchNorm1d(4, dtype=dtype),
        nn.ReLU(),
        nn.Flatten(),
        wn_kernels.WNLinear(24, 2, bias=False, dtype=dtype),
        wn_kernels.WNMeanOnlyBatchNorm1d(2, dtype=dtype),
    )


def synchronised(rank, sizes):
    net = network()
    x = torch.randn(8, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1
    twin = copy.deepcopy(net)
    right = twin(x)
    ((right + 1).square().sum() / WORLD).backward()  # DDP averages
    held = list(net.parameters())
    net = wn_kernels.WNMeanOnlySyncBatchNorm.convert_sync_batchnorm(net)
    assert [id(p) for p in net.parameters()] == [id(p) for p in held]
    assert type(net[1]) is type(net[5]) is wn_kernels.WNMeanOnlySyncBatchNorm
    own = x.split(sizes)[rank]
    wrapped = DistributedDataParallel(net)
    y = wrapped(own)
    (y + 1).square().sum().backward()
    if len(own):
        assert_matches(y, right.split(sizes)[rank].detach(), torch.float64, 64, roundings=8)
    for (name, p), q in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        assert_matches(p.grad, q[1].grad, torch.float64, 512, roundings=16, what=name)
    for name, buffer in net.named_buffers():
        if "running" in name:
            assert_matches(buffer, twin.get_buffer(name), torch.float64, 64, what=name)
    if sizes[0] == sizes[1]:
        net.eval()
        twin.eval()
        assert_matches(net(own), twin(own).detach(), torch.float64, 64)


@pytest.mark.parametrize("sizes", [(4, 4), (7, 1), (8, 0)])
def test_processes_are_normalised_together(sizes, tmp_path):
    """Outputs, gradients and running means are those of one process with the whole batch."""
    processes.run(tmp_path, synchronised, sizes)


def test_conversion_keeps_the_rest():
    layer, _ = made("2d", momentum=None)
    layer.eval()
    converted = wn_kernels.WNMeanOnlySyncBatchNorm.convert_sync_batchnorm(layer)
    assert converted.bias is layer.bias
    assert converted.running_mean is layer.running_mean
    assert converted.momentum is None
    assert not converted.training
    again = wn_kernels.WNMeanOnlySyncBatchNorm.convert_sync_batchnorm(converted)
    assert again is converted
    assert_same_bits(converted.bias, layer.bias)
