"""The registered operators: schemas and fakes, and the layer under a compiler."""

import functools

import pytest
import torch

import wn_kernels.functional as WF
from tests.comparison import DIMS, FLOATS, LAYOUTS, Case, ConvCase
from wn_kernels import WNLinear, use_backend

OPS = torch.ops.wn_kernels


def check(op, *arguments):
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(6, 33, 20), (0, 5, 4), (5, 0, 4), (5, 4, 0)])
def test_opcheck(shape, dtype, dim):
    case = Case(*shape, dim, dtype)
    w, n = OPS.weight_norm(case.v, case.g, dim, 0.0, dtype, "")
    check(OPS.weight_norm, case.v, case.g, dim, 0.0, dtype, "")
    check(OPS.weight_norm_backward, w, case.v, case.g, n, dim, 0.0, "")
    for bias in (case.bias, None):
        check(OPS.linear, case.x, case.v, case.g, bias, dim, 0.0, "")
    for mask in ([True] * 4, [True, False, False, False], [False, True, True, False]):
        check(OPS.linear_backward, case.dy, case.x, case.v, case.g, n, dim, 0.0, "", mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_layouts(grad, dtype, layout):
    """Every operator, with inputs that want gradients and with inputs that do not."""
    case = Case(6, 33, 20, 0, dtype, layout=layout)
    x, v, g, bias = case.leaves() if grad else (case.x, case.v, case.g, case.bias)
    check(OPS.weight_norm, v, g, 0, 0.0, torch.bfloat16, "")
    w, n = OPS.weight_norm(v.detach(), g.detach(), 0, 0.0, dtype, "")
    check(OPS.weight_norm_backward, w, v, g, n, 0, 0.0, "")
    for rows, dy in ((x, case.dy), (x.view_as(x)[None, :, None], case.dy[None, :, None])):
        check(OPS.linear, rows, v, g, bias, 0, 0.0, "")
        check(OPS.linear_backward, dy, rows, v, g, n, 0, 0.0, "", [True] * 4)


def test_triton_backend_through_the_operator(device):
    """The same operators with the backend named."""
    case = Case(6, 33, 20, 0, device=device)
    y, n = OPS.linear(case.x, case.v, case.g, case.bias, 0, 0.0, "triton")
    case.check_forward(y)
    arguments = (case.dy, case.x, case.v, case.g, n, 0, 0.0, "triton", [True] * 4)
    case.check_backward(OPS.linear_backward(*arguments))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dim", DIMS)
def test_compile(dim):
    """One graph, forward and backward, equal to eager."""
    case = Case(6, 33, 20, dim)
    layer = WNLinear(33, 20, dim=dim)
    with torch.no_grad():
        layer.weight_v.copy_(case.v)
        layer.weight_g.copy_(case.g)
        layer.bias.copy_(case.bias)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = case.x.requires_grad_()
    y = compiled(x)
    case.check_forward(y)
    y.backward(case.dy)
    case.check_backward([x.grad, layer.weight_v.grad, layer.weight_g.grad, layer.bias.grad])


# --- convolution ---------------------------------------------------------------------------------

CONVOLUTIONS = [
    ConvCase(2, 6, 8, (9,), (3,), stride=2, padding=1),
    ConvCase(2, 6, 8, (9,), (3,), dim=None, groups=2, bias=False),
    ConvCase(2, 4, 6, (7, 5), (3, 3), dim=1, layout="channels-last"),
    ConvCase(2, 4, 6, (7, 5), (3, 3), dim=2, x_dtype=torch.bfloat16, v_dtype=torch.float32),
    ConvCase(2, 6, 4, (5,), (4,), transposed=True, stride=2, output_padding=1),
    ConvCase(1, 3, 4, (3, 4, 2), (2, 2, 2), transposed=True, x_dtype=torch.float64),
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_opcheck_convolution(case, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    rest = (*case.geometry(), case.dim, 0.0, backend)
    for x in (case.x, case.x[:0]):
        check(OPS.convolution, x, case.v, case.g, case.bias, *rest)
    y, n = OPS.convolution(case.x, case.v, case.g, case.bias, *rest)
    case.check_forward(y)
    arguments = (case.dy, case.x, case.v, case.g, n, *rest)
    for mask in ([True] * 4, [True, False, False, False], [False, True, True, False]):
        check(OPS.convolution_backward, *arguments, mask)
    needs = [True, True, True, case.bias is not None]
    grads = OPS.convolution_backward(*arguments, needs)
    case.check_backward([grad if need else None for grad, need in zip(grads, needs, strict=True)])


@pytest.mark.parametrize("layout", [*LAYOUTS, "channels-last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_opcheck_convolution_layouts(transposed, grad, dtype, layout):
    case = ConvCase(2, 4, 6, (7, 5), (3, 2), 1, dtype, transposed=transposed, layout=layout)
    x, v, g, bias = case.leaves() if grad else (case.x, case.v, case.g, case.bias)
    rest = (*case.geometry(), case.dim, 0.0, "aten")
    for optional in (bias, None):
        check(OPS.convolution, x, v, g, optional, *rest)
    _, n = OPS.convolution(case.x, case.v, case.g, None, *rest)
    check(OPS.convolution_backward, case.dy, x, v, g, n, *rest, [True] * 4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CONVOLUTIONS[:5])
@pytest.mark.parametrize("forced", [None, "aten"])
def test_compile_convolution(case, forced):
    """One graph, forward and backward, whoever chose the backend."""
    torch.compiler.reset()
    function = functools.partial(getattr(WF, f"wn_conv{case.suffix}"), **case.options, dim=case.dim)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with use_backend(forced or "auto"):
        case.check(compiled)
