"""Training over gloo, in processes of its own: as one process does it."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits
from tests.compatibility import processes
from tests.compatibility.processes import WORLD
from tests.releases import IS_CURRENT
from wn_kernels import parallel
from wn_kernels.modules import prepared


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


def frozen(rank, dim, options):
    """A sharded model is left out of `frozen_weights`, also where it is unsharded on entry, and
    follows a step between two calls. A replicated one is not left out, and follows as well."""
    sharded = options["sharded"]
    net = network(dim)
    if sharded:
        fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)), reshard_after_forward=False)
    else:
        net = DistributedDataParallel(net)
    x, y = data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    with torch.no_grad():
        before = net(x)
    with wn_kernels.frozen_weights(net) as names:
        assert len(names) == (0 if sharded else 3)
        for _ in range(2):
            with torch.no_grad():
                net(x)
            loss_of(net, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            after = net(x)
    twin = network(dim).double()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    for _ in range(2):
        with wn_kernels.use_backend("reference"):
            loss_of(twin, x.double(), y.double()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (after - before).norm() > 0.1 * before.norm()
    assert_matches(after, twin(x.double()).detach(), torch.float32, 64, roundings=8)


def tensor_parallel(rank, dim, options):
    """Outputs, gradients, and how often processes talk: forward, then backward."""
    norm = options.get("norm", "l2")
    layer = wn_kernels.WNLinear(8, 6, dim=dim, norm=norm)
    if options["fused"]:
        layer = parametrizations.weight_norm(nn.Linear(8, 6), dim=dim)
        wn_kernels.fuse(layer)
    torch.manual_seed(0)
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    if norm != "l2":  # ties, whose slope all processes share
        with torch.no_grad():
            layer.weight_v.clamp_(max=1.0)
    twin = copy.deepcopy(layer).double()
    columns = options["plan"] == "columns"
    whole = {"output_layouts" if columns else "input_layouts": Replicate()}
    plan = (parallel.ColwiseParallel if columns else parallel.RowwiseParallel)(**whole)
    parallelize_module(layer, init_device_mesh("cpu", (WORLD,)), plan)
    x, _ = data()
    x = torch.cat([x, x[:, :2]], dim=1)
    with CommDebugMode() as forward:
        y = layer(x)
    with CommDebugMode() as backward:
        y.square().sum().backward()
    with wn_kernels.use_backend("reference"):
        right = twin(x.double())
    right.square().sum().backward()
    assert_matches(y, right, torch.float32, 8)
    terms = twin.bias.grad.norm().item()
    for (name, p), q in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert_matches(p.grad.full_tensor(), q.grad, torch.float32, 64, terms=terms, what=name)
        assert isinstance(p, DTensor)
    if not IS_CURRENT:  # DTensor communicates in other steps there
        return
    if dim == (0 if columns else 1):  # the norms are at home
        assert forward.get_total_counts() == 1
        assert backward.get_total_counts() == 0
    else:
        assert forward.get_total_counts() == 2
        assert backward.get_total_counts() == (3 if norm == "linf" else 1)


def saved(rank, dim, options):
    """A sharded checkpoint, for the test to load in one process."""
    net = network(dim)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in net:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    checkpoint.save(net.state_dict(), checkpoint_id=options["path"])


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
    processes.run(tmp_path, run, dim, options)


@pytest.mark.parametrize("sharded", [False, True])
def test_frozen_weights(sharded, tmp_path):
    processes.run(tmp_path, frozen, 0, {"sharded": sharded})


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("plan", ["columns", "rows"])
def test_tensor_parallel(plan, dim, tmp_path):
    processes.run(tmp_path, tensor_parallel, dim, {"plan": plan, "fused": False})


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_tensor_parallel_of_other_norms(norm, tmp_path):
    options = {"plan": "rows", "fused": False, "norm": norm}
    processes.run(tmp_path, tensor_parallel, 0, options)


def test_tensor_parallel_of_a_fused_layer(tmp_path):
    processes.run(tmp_path, tensor_parallel, 0, {"plan": "rows", "fused": True})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_reloads_at_another_world_size(tmp_path):
    path = str(tmp_path / "checkpoint")
    processes.run(tmp_path, saved, 0, {"path": path})
    net = network(0)
    right = {key: 2 * t for key, t in net.state_dict().items()}
    state = net.state_dict()
    checkpoint.load(state, checkpoint_id=path, no_dist=True)
    net.load_state_dict(state)
    for key, t in net.state_dict().items():
        assert_same_bits(t, right[key], key)


# --- grouped -------------------------------------------------------------------------------------


def grouped(rank, shards):
    """A grouped model, by DDP or by FSDP2: the whole of it, or its layers by themselves."""
    prepared.plan.shares = lambda *_: True  # small layers on a CPU have better ways
    formed, real = [], prepared.grouped.formed
    prepared.grouped.formed = lambda v, *rest, **how: formed.append(len(v)) or real(v, *rest, **how)
    net = network(None if shards else 0)
    wn_kernels.fuse(net, grouped=True)
    module = net
    if shards:
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in net if shards == "layers" else ():
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    else:
        module = DistributedDataParallel(net)
    x, y = (t.chunk(WORLD)[rank] for t in data())
    for _ in range(2):
        module.zero_grad()
        loss_of(module, x, y).backward()
    assert bool(formed) == (shards != "layers")
    grads = {name: p.grad for name, p in net.named_parameters()}
    check({n: g.full_tensor() if shards else g for n, g in grads.items()}, None if shards else 0)


@pytest.mark.parametrize("shards", ["", "model", "layers"])
def test_grouped(shards, tmp_path):
    processes.run(tmp_path, grouped, shards)
