"""Rows of the table: a layer in several processes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.distributed import checkpoint as sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import wn_kernels
import wn_kernels.parallel
from tests.compatibility import processes
from tests.compatibility.rows import assert_right, data, layer_of, own_layer, parts, right_of, row


def _spawn(job, normalise, folder=None):
    with tempfile.TemporaryDirectory() as own:
        processes.run(folder or own, job, normalise, Path(folder or own))


def _shares(rank):
    return torch.cat([data(), data()[:1]]).chunk(2)[rank], torch.cat([data(), data()[:1]])


def _ddp_job(rank, normalise, _):
    layer = layer_of(normalise)
    share, whole = _shares(rank)
    right = right_of(layer, whole)
    net = nn.parallel.DistributedDataParallel(layer)
    net(share).square().sum().backward()
    for p, wanted in zip(parts(layer), right[1][1:3], strict=True):
        assert_right(p.grad, wanted / 2)


@row("`DistributedDataParallel`")
def _ddp(normalise):
    _spawn(_ddp_job, normalise)


def _fsdp_job(rank, normalise, _):
    for policy in (None, MixedPrecisionPolicy(torch.bfloat16, torch.float32)):
        layer = layer_of(normalise)
        share, whole = _shares(rank)
        right = right_of(layer, whole)
        options = {} if policy is None else {"mp_policy": policy}
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), **options)
        layer(share).float().square().sum().backward()
        dtype = torch.float32 if policy is None else torch.bfloat16
        for p, wanted in zip(parts(layer), right[1][1:3], strict=True):
            assert_right(p.grad.full_tensor(), wanted / 2, dtype)


@row("FSDP2 `fully_shard`, also in mixed precision")
def _fsdp(normalise):
    _spawn(_fsdp_job, normalise)


def _tensor_parallel_job(rank, normalise, _):
    own = wn_kernels.parallel
    ours = normalise is own_layer
    for theirs, plan, side in (
        (ColwiseParallel, own.ColwiseParallel, "output_layouts"),
        (RowwiseParallel, own.RowwiseParallel, "input_layouts"),
    ):
        layer, x = layer_of(normalise), data()
        right = right_of(layer, x)
        style = (plan if ours else theirs)(**{side: Replicate()})
        parallelize_module(layer, init_device_mesh("cpu", (2,)), style)
        y = layer(x)
        assert_right(y, right[0])
        y.square().sum().backward()
        for p, wanted in zip(parts(layer), right[1][1:3], strict=True):
            assert_right(p.grad.full_tensor(), wanted)


@row("tensor parallelism, column-wise and row-wise")
def _tensor_parallel(normalise):
    _spawn(_tensor_parallel_job, normalise)


def _checkpoint_job(rank, normalise, folder):
    layer = layer_of(normalise)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    sharded.save(layer.state_dict(), checkpoint_id=str(folder / "checkpoint"))


@row("`torch.distributed.checkpoint`, at another world size")
def _sharded(normalise):
    layer, x = layer_of(normalise), data()
    right = right_of(layer, x)[0]
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    state = layer.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        _spawn(_checkpoint_job, normalise, folder)
        sharded.load(state, checkpoint_id=f"{folder}/checkpoint", no_dist=True)
    layer.load_state_dict(state)
    assert_right(layer(x), right)
