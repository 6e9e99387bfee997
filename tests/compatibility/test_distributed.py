"""Data-parallel training over gloo, in processes of its own: as one process does it."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import wn_kernels
from tests.comparison import assert_matches

WORLD = 2


def network(dim, unused=False):
    """Layers of ours and a fused one; with `dim=None`, `g` is 1-d, as sharding wants it."""
    torch.manual_seed(0)
    fused = parametrizations.weight_norm(nn.Linear(4, 2))
    wn_kernels.fuse(fused)
    net = nn.Sequential(
        wn_kernels.WNLinear(6, 8, dim=dim),
        nn.Tanh(),
        nn.Unflatten(1, (8, 1)),
        wn_kernels.WNConv1d(8, 4, 1, dim=dim),
        nn.Flatten(),
        fused,
    )
    for layer in net:
        if dim is None and isinstance(layer, (wn_kernels.WNLinear, wn_kernels.WNConv1d)):
            layer.weight_g = nn.Parameter(layer.weight_g.detach().view(1))
    if unused:
        net[0].register_module("extra", wn_kernels.WNLinear(3, 3))
    return net


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 2, generator=generator)


def loss_of(net, x, y):
    return (net(x).to(y.dtype) - y).square().mean()


def expected(dim, **options):
    """The gradients of one process over the whole batch, by the definition in float64."""
    net = copy.deepcopy(network(dim, **options)).double()
    x, y = (t.double() for t in data())
    with wn_kernels.use_backend("reference"):
        loss_of(net, x, y).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def check(grads, dim, dtype=torch.float32, **options):
    right = expected(dim, **options)
    assert grads.keys() == right.keys()
    for name, grad in grads.items():
        # The largest terms are those of the loss; bfloat16 rounds each layer's output and W.
        scale = max(t.norm().item() for t in right.values()) if dtype != torch.float32 else 0.0
        scale = min(scale, 4 * right[name].norm().item())
        assert_matches(grad, right[name], dtype, 64, roundings=6, scale=scale, what=name)


def ddp(rank, dim, options):
    unused = "find_unused_parameters" in options
    net = DistributedDataParallel(network(dim, unused=unused), **options)
    x, y = (t.chunk(WORLD)[rank] for t in data())
    loss_of(net, x, y).backward()
    grads = {n: p.grad for n, p in net.module.named_parameters() if "extra" not in n}
    check(grads, dim, unused=unused)


def accumulated(rank, dim, options):
    """Two half batches, the first without communication."""
    net = DistributedDataParallel(network(dim), **options)
    x, y = (t.chunk(WORLD)[rank] for t in data())
    with net.no_sync():
        (loss_of(net, x[:2], y[:2]) / 2).backward()
    (loss_of(net, x[2:], y[2:]) / 2).backward()
    check({n: p.grad for n, p in net.module.named_parameters()}, dim)


def fsdp(rank, dim, options):
    net = network(dim)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in net:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    x, y = (t.chunk(WORLD)[rank] for t in data())
    loss_of(net, x, y).backward()
    grads = {name: p.grad.full_tensor() for name, p in net.named_parameters()}
    check(grads, dim, torch.bfloat16 if options else torch.float32)


def worker(rank, file, run, dim, options):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=WORLD)
    try:
        run(rank, dim, options)
    finally:
        dist.destroy_process_group()


MIXED = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("dim", [0, None])
@pytest.mark.parametrize(
    ("run", "options"),
    [
        (ddp, {}),
        (ddp, {"find_unused_parameters": True}),
        (ddp, {"static_graph": True}),
        (accumulated, {}),
        (fsdp, {}),
        (fsdp, MIXED),
    ],
    ids=["ddp", "ddp-unused", "ddp-static", "ddp-accumulation", "fsdp", "fsdp-mixed"],
)
def test_as_one_process(run, options, dim, tmp_path):
    mp.spawn(worker, (str(tmp_path / "rendezvous"), run, dim, options), nprocs=WORLD)
