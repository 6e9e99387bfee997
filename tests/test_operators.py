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
    weight = None, case.v, case.g, None
    w, n = OPS.layer(*weight, [], dim, 0.0, "l2", dtype, "")
    check(OPS.layer, *weight, [], dim, 0.0, "l2", dtype, "")
    check(OPS.layer_backward, w, *weight[:3], n, [], dim, 0.0, "l2", "", [False, True, True, False])
    for bias in (case.bias, None):
        check(OPS.layer, case.x, case.v, case.g, bias, [], dim, 0.0, "l2", dtype, "")
    for mask in ([True] * 4, [True, False, False, False], [False, True, True, False]):
        check(OPS.layer_backward, case.dy, case.x, case.v, case.g, n, [], dim, 0.0, "l2", "", mask)


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_other_norms(norm):
    case = Case(6, 33, 20, 0)
    case.take(norm)
    given = case.x, case.v, case.g, case.bias, [], 0, 0.0, norm, torch.float32, ""
    y, n = OPS.layer(*given)
    case.check_forward(y)
    check(OPS.layer, *given)
    given = case.dy, case.x, case.v, case.g, n, [], 0, 0.0, norm, "", [True] * 4
    case.check_backward(OPS.layer_backward(*given))
    check(OPS.layer_backward, *given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_layouts(grad, dtype, layout):
    """Every operator, with inputs that want gradients and with inputs that do not."""
    case = Case(6, 33, 20, 0, dtype, layout=layout)
    x, v, g, bias = case.leaves() if grad else (case.x, case.v, case.g, case.bias)
    check(OPS.layer, None, v, g, None, [], 0, 0.0, "l2", torch.bfloat16, "")
    w, n = OPS.layer(None, v.detach(), g.detach(), None, [], 0, 0.0, "l2", dtype, "")
    check(OPS.layer_backward, w, None, v, g, n, [], 0, 0.0, "l2", "", [False, True, True, False])
    for rows, dy in ((x, case.dy), (x.view_as(x)[None, :, None], case.dy[None, :, None])):
        check(OPS.layer, rows, v, g, bias, [], 0, 0.0, "l2", dtype, "")
        check(OPS.layer_backward, dy, rows, v, g, n, [], 0, 0.0, "l2", "", [True] * 4)


def test_triton_backend_through_the_operator(device):
    """The same operators with the backend named."""
    case = Case(6, 33, 20, 0, device=device)
    y, n = OPS.layer(case.x, case.v, case.g, case.bias, [], 0, 0.0, "l2", case.x.dtype, "triton")
    case.check_forward(y)
    arguments = (case.dy, case.x, case.v, case.g, n, [], 0, 0.0, "l2", "triton", [True] * 4)
    case.check_backward(OPS.layer_backward(*arguments))


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
    rest = (case.geometry().packed(), case.dim, 0.0, "l2")
    dtype = case.x.dtype
    for x in (case.x, case.x[:0]):
        check(OPS.layer, x, case.v, case.g, case.bias, *rest, dtype, backend)
    y, n = OPS.layer(case.x, case.v, case.g, case.bias, *rest, dtype, backend)
    case.check_forward(y)
    arguments = (case.dy, case.x, case.v, case.g, n, *rest, backend)
    for mask in ([True] * 4, [True, False, False, False], [False, True, True, False]):
        check(OPS.layer_backward, *arguments, mask)
    needs = [True, True, True, case.bias is not None]
    grads = OPS.layer_backward(*arguments, needs)
    case.check_backward([grad if need else None for grad, need in zip(grads, needs, strict=True)])


@pytest.mark.parametrize("layout", [*LAYOUTS, "channels-last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_opcheck_convolution_layouts(transposed, grad, dtype, layout):
    case = ConvCase(2, 4, 6, (7, 5), (3, 2), 1, dtype, transposed=transposed, layout=layout)
    x, v, g, bias = case.leaves() if grad else (case.x, case.v, case.g, case.bias)
    rest = (case.geometry().packed(), case.dim, 0.0, "l2")
    for optional in (bias, None):
        check(OPS.layer, x, v, g, optional, *rest, dtype, "aten")
    _, n = OPS.layer(case.x, case.v, case.g, None, *rest, dtype, "aten")
    check(OPS.layer_backward, case.dy, x, v, g, n, *rest, "aten", [True] * 4)


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
