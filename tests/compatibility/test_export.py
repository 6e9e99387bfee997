"""Programs that leave for elsewhere hold ATen operations alone, and compute the same."""

import io
import logging
import warnings

import pytest
import torch

import wn_kernels
from tests.comparison import assert_matches
from tests.compatibility.layers import LAYERS, made, reference

BATCH = torch.export.Dim("batch", min=1, max=64)


def exported(layer, x, dynamic=False):
    shapes = ({0: BATCH},) if dynamic else None
    return torch.export.export(layer.eval(), (x,), dynamic_shapes=shapes)


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(name, dynamic):
    layer, x = made(name)
    program = exported(layer, x, dynamic)
    sizes = [x, torch.cat([x, x, x])] if dynamic else [x]
    for input in sizes:
        assert_matches(program.module()(input), reference(layer, input)[0], torch.float32, 64)
    for step in (program, program.run_decompositions()):
        assert operators(step)
        assert all(op.startswith(("aten.", "<built-in")) for op in operators(step)), operators(step)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    again = torch.export.load(saved).module()
    assert_matches(again(x), reference(layer, x)[0], torch.float32, 64)


@pytest.mark.parametrize("name", ["linear", "conv1d", "transposed", "fused"])
def test_ahead_of_time_on_the_cpu(name, tmp_path):
    layer, x = made(name)
    package = torch._inductor.aoti_compile_and_package(
        exported(layer, x), package_path=str(tmp_path / "layer.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    assert_matches(run(x), reference(layer, x)[0], torch.float32, 64)


@pytest.mark.parametrize("name", LAYERS)
def test_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    layer, x = made(name)
    path = str(tmp_path / "layer.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer.eval(), (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_matches(torch.from_numpy(y), reference(layer, x)[0], torch.float32, 64)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "error::torch.jit.TracerWarning")
def test_jit_trace(name):
    layer, x = made(name)
    traced = torch.jit.trace(layer, (x,))
    assert "wn_kernels::" not in str(traced.inlined_graph)
    saved = io.BytesIO()
    torch.jit.save(traced, saved)
    saved.seek(0)
    for run in (traced, torch.jit.load(saved)):
        assert_matches(run(x), reference(layer, x)[0], torch.float32, 64)


@pytest.mark.parametrize("name", ["linear", "fused"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script(name):
    """It is refused by a message that says what to do, and serves the folded layer."""
    layer, x = made(name)
    model = torch.nn.Sequential(layer)
    with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile .*fold"):
        torch.jit.script(model)
    right = reference(model, x)[0]
    wn_kernels.fold(model)
    assert_matches(torch.jit.script(model)(x), right, torch.float32, 64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forced_backend_that_cannot_be_traced():
    layer, x = made("linear")
    with wn_kernels.use_backend("triton"), pytest.raises(RuntimeError, match="cannot serve"):
        torch.jit.trace(layer, (x,))
