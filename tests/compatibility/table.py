"""What works with a weight-normed linear layer: PyTorch's two forms and ours, found by trying.

    python -m tests.compatibility.table          # writes docs/compatibility.md

Each row is a function that uses the layer and fails, or is wrong, or passes. `test_table.py` runs
them all, wants every one of ours to pass, and the committed page to say what it found.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import tempfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.distributed import checkpoint as sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import wn_kernels
import wn_kernels.parallel
from tests.comparison import assert_matches
from tests.compatibility import processes
from wn_kernels.backends import reference

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def _parametrized(layer, dim=0):
    return parametrizations.weight_norm(layer, dim=dim)


def _legacy(layer, dim=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=dim)


def _ours(layer, dim=0):
    if isinstance(layer, nn.LazyLinear):
        return wn_kernels.WNLazyLinear(layer.out_features, dim=dim)
    arguments = (layer.in_features, layer.out_features, layer.bias is not None)
    own = wn_kernels.WNLinear(*arguments, dim=dim, device=layer.weight.device)
    if not layer.weight.is_meta:
        own.load_state_dict(layer.state_dict())
    return own


PROVIDERS: dict[str, Callable] = {
    "PyTorch, parametrized": _parametrized,
    "PyTorch, legacy": _legacy,
    "wn_kernels": _ours,
}

ROWS: dict[str, Callable[[Callable], None]] = {}


def row(title: str) -> Callable:
    """Registers a function of a provider as a row of the table."""

    def register(function: Callable) -> Callable:
        ROWS[title] = function
        return function

    return register


def layer_of(normalise, dim=0):
    torch.manual_seed(0)
    return normalise(nn.Linear(6, 4), dim)


def data():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def parts(layer):
    """`(g, v)`."""
    if hasattr(layer, "weight_v"):
        return layer.weight_g, layer.weight_v
    originals = layer.parametrizations.weight
    return originals.original0, originals.original1


def right_of(layer, x, dim=0):
    """Output and gradients of `(x, g, v, bias)` of the squares' sum, in float64."""
    g, v = parts(layer)
    wide = [t.detach().double().requires_grad_() for t in (x, g, v, layer.bias)]
    y = reference.linear(wide[0], wide[2], wide[1], wide[3], dim, 0.0)
    return y.detach(), torch.autograd.grad(y.square().sum(), wide)


def assert_right(found, wanted, dtype=torch.float32):
    assert_matches(found, wanted, dtype, 256, roundings=8)


def assert_trains(layer, x, call=None):
    """Forward and backward, through `call` where it is not the layer itself."""
    x = x.detach().clone().requires_grad_()
    y, grads = right_of(layer, x)
    out = (layer if call is None else call)(x)
    assert_right(out, y)
    g, v = parts(layer)
    for found, right in zip(
        torch.autograd.grad(out.square().sum(), (x, g, v, layer.bias)), grads, strict=True
    ):
        assert_right(found, right)


# --- compile and export --------------------------------------------------------------------------


@row("`torch.compile(fullgraph=True)`, forward and backward")
def _compile(normalise):
    layer = layer_of(normalise)
    torch.compiler.reset()
    assert_trains(layer, data(), torch.compile(layer, fullgraph=True, backend="aot_eager"))


@row("… dynamic shapes, without recompiling")
def _dynamic(normalise):
    from torch._dynamo.testing import CompileCounterWithBackend

    layer = layer_of(normalise)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for repeats in (1, 2, 3):
        assert_trains(layer, torch.cat([data()] * repeats), compiled)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], "recompiled"


@row("`torch.export`, decomposed to core ATen")
def _export(normalise):
    layer, x = layer_of(normalise), data()
    program = torch.export.export(layer, (x,)).run_decompositions()
    names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in")) for name in names), names
    assert_right(program.module()(x), right_of(layer, x)[0])


@row("AOTInductor on the CPU")
def _ahead_of_time(normalise):
    layer, x = layer_of(normalise), data()
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(layer, (x,)), package_path=f"{folder}/layer.pt2"
        )
        assert_right(torch._inductor.aoti_load_package(package)(x), right_of(layer, x)[0])


@row("ONNX, run in onnxruntime")
def _onnx(normalise):
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    layer, x = layer_of(normalise), data()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/layer.onnx"
        torch.onnx.export(layer, (x,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_right(torch.from_numpy(y), right_of(layer, x)[0])


@row("`torch.jit.trace`, saved and loaded")
def _trace(normalise):
    layer, x = layer_of(normalise), data()
    saved = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, (x,)), saved)
    saved.seek(0)
    assert_right(torch.jit.load(saved)(x), right_of(layer, x)[0])


# --- transforms ----------------------------------------------------------------------------------


def functional(layer):
    parameters = dict(layer.named_parameters())
    return parameters, lambda p, x: torch.func.functional_call(layer, p, (x,))


@row("`torch.func.grad` and `vjp` of a `functional_call`")
def _grad(normalise):
    layer, x = layer_of(normalise), data()
    parameters, call = functional(layer)
    grads = torch.func.grad(lambda p: call(p, x).square().sum())(parameters)
    _, right = right_of(layer, x)
    assert_right(grads["bias"], right[3])
    values = sorted((t for k, t in grads.items() if k != "bias"), key=torch.numel)
    for found, wanted in zip(values, right[1:3], strict=True):
        assert_right(found, wanted)


@row("forward mode (`torch.func.jvp`) through the parameters")
def _jvp(normalise):
    layer, x = layer_of(normalise), data()
    parameters, call = functional(layer)
    _, moved = torch.func.jvp(lambda p: call(p, x), (parameters,), (parameters,))
    # y is linear in g and the bias, and does not change with the length of v.
    assert_right(moved, right_of(layer, x)[0])


@row("`vmap` over inputs, per-sample gradients")
def _per_sample(normalise):
    layer, x = layer_of(normalise), data()
    parameters, call = functional(layer)
    each = torch.func.grad(lambda p, sample: call(p, sample[None]).square().sum())
    grads = torch.func.vmap(each, (None, 0))(parameters, x)
    assert_right(grads["bias"].sum(0), right_of(layer, x)[1][3])


@row("`vmap` over stacked parameters (`stack_module_state`)")
def _ensemble(normalise):
    layers, x = [layer_of(normalise), layer_of(normalise)], data()
    parameters, buffers = torch.func.stack_module_state(layers)
    _, call = functional(layers[0])
    y = torch.func.vmap(lambda p, b: call((p, b), x))(parameters, buffers)
    assert_right(y[1], right_of(layers[1], x)[0])


@row("`torch.func.hessian` with respect to the parameters")
def _hessian(normalise):
    layer, x = layer_of(normalise).double(), data().double()
    g, v = (t.detach() for t in parts(layer))

    def loss(v):
        return reference.linear(x, v, g, layer.bias, 0, 0.0).square().sum()

    key = next(k for k, p in layer.named_parameters() if p is parts(layer)[1])
    parameters, call = functional(layer)
    found = torch.func.hessian(lambda v: call(parameters | {key: v}, x).square().sum())(v)
    assert_right(found, torch.func.hessian(loss)(v).detach(), torch.float64)


@row("activation checkpointing, both modes")
def _checkpoint(normalise):
    for reentrant in (False, True):
        layer, x = layer_of(normalise), data().requires_grad_()
        _, right = right_of(layer, x)
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        for found, wanted in zip((x, *parts(layer)), right[:3], strict=True):
            assert_right(found.grad, wanted)


@row("saved-tensor hooks, `save_on_cpu`")
def _hooks(normalise):
    layer, x = layer_of(normalise), data()
    with torch.autograd.graph.save_on_cpu():
        assert_trains(layer, x)


# --- second derivatives --------------------------------------------------------------------------


@row("`gradgradcheck`")
def _gradgradcheck(normalise):
    layer, x = layer_of(normalise).double(), data().double()[:2]
    parameters, call = functional(layer)

    def by_values(*values):
        return call(dict(zip(parameters, values, strict=True)), x)

    values = tuple(p.detach().requires_grad_() for p in parameters.values())
    assert torch.autograd.gradgradcheck(by_values, values, atol=1e-6)


def _second(normalise, loss):
    layer, x = layer_of(normalise).double(), data().double().requires_grad_()
    g, v = parts(layer)
    wide = [t.detach().requires_grad_() for t in (g, v, layer.bias)]
    found = torch.autograd.grad(loss(layer, x, (g, v, layer.bias)), (g, v))

    def plain(x):
        return reference.linear(x, wide[1], wide[0], wide[2], 0, 0.0)

    right = torch.autograd.grad(loss(plain, x, wide), wide[:2])
    for one, wanted in zip(found, right, strict=True):
        assert_right(one, wanted, torch.float64)


@row("a penalty on the gradient of the input (WGAN-GP, R1, eikonal)")
def _penalty(normalise):
    def loss(net, x, parameters):
        (slope,) = torch.autograd.grad(net(x).tanh().sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()

    _second(normalise, loss)


@row("a penalty on the gradient of the parameters")
def _parameter_penalty(normalise):
    def loss(net, x, parameters):
        loss = net(x).square().sum()
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        return sum(grad.square().sum() for grad in grads)

    _second(normalise, loss)


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
    if normalise is _ours:
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


# --- distributed ---------------------------------------------------------------------------------


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
    ours = normalise is _ours
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


# --- the page ------------------------------------------------------------------------------------


def outcome(title: str, provider: str) -> str:
    """What comes of a row: "yes", "wrong", or "fails"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ROWS[title](PROVIDERS[provider])
        except AssertionError:
            return "wrong"
        except Exception as error:
            return "wrong" if "AssertionError: result: relative" in str(error) else "fails"
    return "yes"


def line_of(title: str) -> str:
    """A line of the table, by trying."""
    return f"| {title} | " + " | ".join(outcome(title, name) for name in PROVIDERS) + " |"


def page() -> str:
    """The table, by trying everything."""
    lines = [
        "# Compatibility",
        "",
        "This page says what of PyTorch works with a weight-normed `nn.Linear` on a CPU. Every",
        "cell is what a test found, and `python -m tests.compatibility.table` writes the page.",
        "*fails* is an exception, and *wrong* a result that is not the float64 reference's.",
        f"The table was made with torch {torch.__version__.split('+')[0]}.",
        "",
        "| | " + " | ".join(PROVIDERS) + " |",
        "|---|" + "---|" * len(PROVIDERS),
    ]
    for title in ROWS:
        lines.append(line_of(title))
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
