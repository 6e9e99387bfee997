"""Rows of the table: dtypes, and how a layer is made, changed and copied."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset

import wn_kernels
import wn_kernels.parallel
from tests.compatibility.rows import (
    assert_right,
    assert_trains,
    data,
    layer_of,
    own_layer,
    parts,
    right_of,
    row,
)

# --- precision -----------------------------------------------------------------------------------


@row("autocast, bfloat16 and float16; gradients stay float32")
def _autocast(normalise):
    for dtype in (torch.bfloat16, torch.float16):
        layer, x = layer_of(normalise), data()
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert y.dtype == dtype
        assert_right(y, right_of(layer, x)[0], dtype)
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@row("`GradScaler`")
def _scaler(normalise):
    layer, x = layer_of(normalise), data()
    _, right = right_of(layer, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = parts(layer)[1].detach().clone()
    scaler.scale(layer(x).square().sum()).backward()
    scaler.step(optimizer)
    assert_right(before - parts(layer)[1], right[2])


@row("`v` in bfloat16 with `g` in float32")
def _mixed(normalise):
    layer, x = layer_of(normalise), data().bfloat16()
    parts(layer)[1].data = parts(layer)[1].data.bfloat16()
    layer.bias.data = layer.bias.data.bfloat16()
    assert_right(layer(x), right_of(layer, x)[0], torch.bfloat16)


@row("a slice of norm zero: finite output and gradients")
def _dead(normalise):
    layer, x = layer_of(normalise), data()
    with torch.no_grad():
        parts(layer)[1][1] = 0
    layer(x).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())


@row("`v` of size 1e-30 and 1e30, whose squares float32 cannot hold")
def _extreme(normalise):
    for size in (1e-30, 1e30):
        layer, x = layer_of(normalise), data()
        with torch.no_grad():
            parts(layer)[1].mul_(size)
        assert_trains(layer, x)


@row("a `g` of the wrong shape is refused")
def _wrong_g(normalise):
    layer, x = layer_of(normalise), data()
    assert_right(layer(x), right_of(layer, x)[0])
    parts(layer)[0].data = torch.rand(1, 4)
    try:
        layer(x)
    except (RuntimeError, ValueError):
        return
    raise AssertionError("it computed something")


@row("no read of a tensor's values, as a CUDA graph requires (on tensors without any)")
def _no_reads(normalise):
    layer, x = layer_of(normalise), data()
    assert_right(layer(x), right_of(layer, x)[0])
    layer = normalise(nn.Linear(6, 4, device="meta"), 0)
    x = torch.empty(5, 6, device="meta", requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None


# --- construction and copies ---------------------------------------------------------------------


@row('`device="meta"`, then `to_empty` and a checkpoint')
def _meta(normalise):
    layer = normalise(nn.Linear(6, 4, device="meta"), 0).to_empty(device="cpu")
    other, x = layer_of(normalise), data()
    layer.load_state_dict(other.state_dict())
    assert_right(layer(x), right_of(other, x)[0])


@row("`torch.nn.utils.skip_init`, then a checkpoint")
def _skip_init(normalise):
    other, x = layer_of(normalise), data()
    if normalise is own_layer:
        layer = nn.utils.skip_init(wn_kernels.WNLinear, 6, 4)
    else:
        layer = normalise(nn.utils.skip_init(nn.Linear, 6, 4), 0)
    layer.load_state_dict(other.state_dict())
    assert_right(layer(x), right_of(other, x)[0])


@row("a lazy layer")
def _lazy(normalise):
    x = data()
    layer = normalise(nn.LazyLinear(4), 0)
    layer(x)
    assert_right(layer(x), right_of(layer, x)[0])


@row("assigning to `.weight`")
def _assign(normalise):
    layer, x = layer_of(normalise), data()
    weight = torch.randn(4, 6)
    layer.weight = weight
    assert_right(layer(x), (x.double() @ weight.double().t() + layer.bias.double()).detach())


@row("`model.apply` of a function that writes into `.weight.data`")
def _apply(normalise):
    layer, x = layer_of(normalise), data()
    weight = torch.randn(4, 6)
    layer.apply(lambda m: m.weight.data.copy_(weight) if isinstance(m, nn.Linear) else None)
    assert_right(layer(x), (x.double() @ weight.double().t() + layer.bias.double()).detach())


def _removed(normalise, remove):
    layer, x = layer_of(normalise), data()
    right = layer_of(lambda plain, dim: plain).double()(x.double()).detach()
    with torch.inference_mode():
        remove(layer)
    assert type(layer) is nn.Linear
    y = layer(x)
    assert_right(y, right)
    y.sum().backward()
    assert layer.weight.grad is not None


@row("`torch.nn.utils.remove_weight_norm`, under inference mode, then training")
def _remove_weight_norm(normalise):
    _removed(normalise, nn.utils.remove_weight_norm)


@row("`parametrize.remove_parametrizations`, under inference mode, then training")
def _remove_parametrizations(normalise):
    _removed(normalise, lambda layer: parametrize.remove_parametrizations(layer, "weight"))


@row("`parametrize.cached()`")
def _cached(normalise):
    layer, x = layer_of(normalise), data()
    right = layer_of(lambda plain, dim: plain).double()(x.double()).detach()
    with parametrize.cached():
        assert_right(layer(x), right)
        first = layer.weight
        layer(x)
        assert layer.weight is first


@row("`copy.deepcopy` after a forward")
def _deepcopy(normalise):
    layer, x = layer_of(normalise), data()
    layer(x)
    assert_right(copy.deepcopy(layer)(x), right_of(layer, x)[0])


@row("`pickle`, `torch.save(model)`")
def _pickle(normalise):
    layer, x = layer_of(normalise), data()
    with torch.no_grad():
        layer(x)
    assert_right(pickle.loads(pickle.dumps(layer))(x), right_of(layer, x)[0])


@row("EMA copies (`swa_utils.AveragedModel`)")
def _ema(normalise):
    layer, x = layer_of(normalise), data()
    average = torch.optim.swa_utils.AveragedModel(layer)
    average.update_parameters(layer)
    assert_right(average(x), right_of(layer, x)[0])


@row("`torch.use_deterministic_algorithms(True)`")
def _deterministic(normalise):
    torch.use_deterministic_algorithms(True)
    try:
        assert_trains(layer_of(normalise), data())
    finally:
        torch.use_deterministic_algorithms(False)


@row("forwards and backwards from several threads")
def _threads(normalise):
    """Two threads meet in the middle of their forwards, where a weight that the module holds for
    one of them would be the other's."""
    layer, x = layer_of(normalise), data()
    y, grads = right_of(layer, x)
    meeting = threading.Barrier(2, timeout=60)

    def meet(module, inputs):
        meeting.wait()

    layer.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(layer, (x, x)))
    for out in outputs:
        assert_right(out, y)
        found = torch.autograd.grad(out.square().sum(), (*parts(layer), layer.bias))
        for grad, right in zip(found, grads[1:], strict=True):
            assert_right(grad, right)


class _Through(Dataset):
    """A dataset whose worker runs the layer."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 2

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(data())


@row("a `DataLoader`'s forked workers")
def _forked(normalise):
    layer, x = layer_of(normalise), data()
    layer(x)
    for y in DataLoader(_Through(layer), num_workers=1, multiprocessing_context="fork"):
        assert_right(y[0], right_of(layer, x)[0])
