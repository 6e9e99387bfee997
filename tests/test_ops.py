"""The registered operators: schemas and fakes, and the layer under a compiler."""

import pytest
import torch

from tests.comparison import DIMS, FLOATS, LAYOUTS, Case
from wn_kernels import WNLinear, ops  # noqa: F401  (registers the operators)

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


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_opcheck_layouts(layout):
    case = Case(6, 33, 20, 0, layout=layout)
    check(OPS.weight_norm, case.v, case.g, 0, 0.0, torch.bfloat16, "")
    check(OPS.linear, case.x, case.v, case.g, case.bias, 0, 0.0, "")
    x = torch.randn(2, 3, 33)
    check(OPS.linear, x, case.v, case.g, case.bias, 0, 0.0, "")


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
