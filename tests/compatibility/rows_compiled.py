"""Rows of the table: what compiles, exports, transforms or differentiates a layer."""

from __future__ import annotations

import io
import logging
import tempfile

import torch
from torch.utils.checkpoint import checkpoint

from tests.compatibility.rows import (
    assert_right,
    assert_trains,
    data,
    layer_of,
    parts,
    right_of,
    row,
)
from wn_kernels.backends import reference

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
