"""The linear layer's kernels, launched one form at a time."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.comparison import DIMS, LAYOUTS, Case, assert_matches, assert_same_bits
from wn_kernels.backends.triton import configs, linear, linear_backward, slice_norms
from wn_kernels.backends.triton.launch import recording
from wn_kernels.plan.costs import one_pass_rows

FORWARD = {0: ("one_pass", "scaled"), 1: ("scaled",), None: ("scaled",)}
BACKWARD = {0: ("one_pass", "scaled"), 1: ("one_pass", "scaled"), None: ("scaled",)}

# Small blocks, so that small tensors span several of them.
SMALL = configs.MatmulConfig(16, 16, 16, 4, 2)
SMALL_GRAD = configs.GradConfig(16, 16, 16, 4, 2)

# Several blocks long in every direction, and no multiple of them.
BLOCKS = (35, 50, 41)

DTYPES = [
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),  # autocast
    (torch.float16, torch.float32),  # autocast, where V may leave float16's range
    (torch.float32, torch.bfloat16),
]


def run(case, forward=None, backward=None, config=SMALL, grad_config=SMALL_GRAD):
    """Checks a form of the forward, or of the backward."""
    inputs = (case.x, case.v, case.g)
    if forward:
        y, n = linear(*inputs, case.bias, case.dim, case.eps, forward, config=config)
        case.check_forward(y)
        expected = slice_norms(case.v.double(), case.dim, case.eps)
        assert_matches(n, expected, n.dtype, case.v.numel(), what="n")
        return y, n
    n = slice_norms(case.v, case.dim, case.eps)
    needs = (True, True, True, case.bias is not None)
    grads = linear_backward(
        case.dy,
        *inputs,
        n,
        case.dim,
        case.eps,
        backward,
        needs,
        matmul_config=config,
        grad_config=grad_config,
    )
    case.check_backward(grads)
    return grads


def forms(table):
    return [(dim, form) for dim in DIMS for form in table[dim]]


@pytest.mark.sanitize
@pytest.mark.parametrize(("dim", "form"), forms(FORWARD))
@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
def test_forward(dim, form, x_dtype, v_dtype, device):
    if form == "one_pass" and (x_dtype, v_dtype) == (torch.float16, torch.float32):
        form = "scaled"  # the planner never takes one_pass here: see test_range
    m = 15 if form == "one_pass" else BLOCKS[0]
    run(Case(m, *BLOCKS[1:], dim, x_dtype, v_dtype, device=device), forward=form)


@pytest.mark.sanitize
@pytest.mark.parametrize(("dim", "form"), forms(BACKWARD))
@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
def test_backward(dim, form, x_dtype, v_dtype, device):
    m = 15 if form == "one_pass" else BLOCKS[0]
    run(Case(m, *BLOCKS[1:], dim, x_dtype, v_dtype, device=device), backward=form)


@pytest.mark.sanitize
@pytest.mark.parametrize(("dim", "form"), forms(BACKWARD))
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strides(dim, form, layout, device):
    m = 15 if form == "one_pass" else BLOCKS[0]
    case = Case(m, *BLOCKS[1:], dim, layout=layout, device=device)
    if form in FORWARD[dim]:
        run(case, forward=form)
    run(case, backward=form)


@pytest.mark.parametrize(("dim", "form"), forms(BACKWARD))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [0.0, 7.0])
def test_bias_and_eps(dim, form, bias, eps, device):
    """eps = 7 lies in the middle of the norms, so that some are clamped."""
    case = Case(9, 48, 33, dim, eps=eps, bias=bias, device=device)
    if form in FORWARD[dim]:
        run(case, forward=form)
    run(case, backward=form)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", list(itertools.product((1, 17), repeat=3)))
def test_sizes_of_one(dim, shape, device):
    case = Case(*shape, dim, device=device)
    for form in FORWARD[dim]:
        run(case, forward=form)
    for form in BACKWARD[dim]:
        if form == "scaled" or shape[0] <= SMALL_GRAD.BLOCK_M:
            config = SMALL_GRAD if form == "scaled" else SMALL_GRAD._replace(BLOCK_M=32)
            run(case, backward=form, grad_config=config)
    if shape[0] == 17:
        for form in BACKWARD[dim]:
            run(case, backward=form, grad_config=SMALL_GRAD._replace(BLOCK_M=32))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", [(0, 5, 4), (5, 0, 4), (5, 4, 0), (0, 0, 0)])
def test_sizes_of_zero(dim, shape, device):
    m, k, n = shape
    case = Case(m, k, n, dim, device=device)
    for form in FORWARD[dim]:
        y, _ = linear(case.x, case.v, case.g, case.bias, dim, 0.0, form)
        assert y.shape == (m, n)
        if k == 0 and y.numel():  # an empty sum: the bias alone
            case.check_forward(y)
    needs = (True, True, True, True)
    for form in BACKWARD[dim]:
        norm = slice_norms(case.v, dim, 0.0)
        dx, dv, dg, db = linear_backward(
            case.dy, case.x, case.v, case.g, norm, dim, 0.0, form, needs
        )
        for grad, like in ((dx, case.x), (dv, case.v), (dg, case.g), (db, case.bias)):
            assert grad.shape == like.shape
            assert torch.isfinite(grad).all()
        if k == 0 and db.numel():
            assert_same_bits(db, case.dy.sum(0))


@pytest.mark.parametrize("regime", [(1, 70, 40), (30, 300, 70), (60, 130, 50), (70, 140, 150)])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pinned_configurations(regime, dim, dtype, device):
    """What ships: small, middling and large batches under their own configurations."""
    case = Case(*regime, dim, dtype, device=device)
    for form in FORWARD[dim]:
        if form == "scaled" or regime[0] <= one_pass_rows(dtype.itemsize):
            run(case, forward=form, config=None)
    for form in BACKWARD[dim]:
        if form == "scaled" or regime[0] <= one_pass_rows(dtype.itemsize):
            run(case, backward=form, config=None, grad_config=None)


def runs_on(architecture, device):
    """Whether kernels as an architecture gets them run on a device: on a GPU its own alone."""
    return device.type != "cuda" or configs.target(device.index or 0).architecture == architecture


def test_a_gpu_runs_its_own_kernels(monkeypatch):
    """`warp_specialize` is Blackwell's, and not for a Hopper."""
    monkeypatch.setattr(configs, "target", lambda index: configs.Target(index, "cuda:90", 132))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert runs_on("cuda:90", gpu)
    assert not runs_on("cuda:100", gpu)
    assert runs_on("cuda:100", cpu), "the interpreter runs them all"


@pytest.mark.sanitize
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("architecture", ["cuda:90", "cuda:100"])
def test_tiles_copied_by_hardware(architecture, dim, device):
    """The tiles of large batches: scaled in the loop or not, of V as it lies and turned, over the
    edges of every matrix."""
    if not runs_on(architecture, device):
        pytest.skip(f"this GPU does not run the kernels of {architecture}")
    case = Case(260, 72, 264, dim, torch.bfloat16, device=device)
    scaled = {0: "backward", 1: "forward"}.get(dim)
    wide, tall = (configs.MatmulConfig(*tile, 64, 8, 3) for tile in ((128, 256), (256, 128)))
    with configs.architecture(architecture):
        run(case, forward="scaled", config=tall if scaled == "forward" else wide)
        tile = tall if scaled == "backward" else wide
        run(case, backward="scaled", config=tile, grad_config=None)


def test_how_tiles_are_loaded(device):
    """By descriptors where rows start at multiples of 16 bytes, on a GPU that has them, in the
    tiles that would not fit otherwise."""

    def loads(architecture, k, dim=0, dtype=torch.bfloat16):
        x, v = (torch.empty(4096, k, dtype=dtype, device="meta") for _ in range(2))
        g = v.new_empty([size if i == dim else 1 for i, size in enumerate(v.shape)])
        with configs.architecture(architecture), recording() as launches:
            linear(x, v, g, None, dim, 0.0, "scaled")
        (launch,) = (x for x in launches if "LOADS" in x.arguments)
        assert (launch.arguments["LOADS"] == "pointers") == isinstance(
            launch.arguments["A"], Tensor
        )
        return launch.arguments["LOADS"]

    assert loads("cuda:90", 4096) == loads("cuda:100", 4096) == "descriptors"
    assert loads("cuda:90", 4096, dim=1) == "descriptors"
    assert loads("cuda:100", 4096, dim=1) == "specialized"
    assert (
        loads("cuda:90", 4095) == loads("cuda:80", 4096) == loads("hip:gfx942", 4096) == "pointers"
    )
    assert loads("cuda:90", 4096, dtype=torch.float32) == "pointers"


def test_range(device):
    """A float16 product scales before it can overflow or underflow."""
    case = Case(20, 48, 33, 0, torch.float16, torch.float32, device=device)
    for factor in (1e-8, 1e5):
        case.v = case.v * factor  # the weight does not change with the length of V
        y, _ = linear(case.x, case.v, case.g, case.bias, 0, 0.0, "scaled", config=SMALL)
        case.check_forward(y)
        case.v = case.v / factor
    # In float16 throughout, the unscaled product would overflow: 300 · 48 · 30 > 65504.
    case = Case(20, 48, 33, 0, torch.float16, device=device)
    x, v = torch.full_like(case.x, 30), torch.full_like(case.v, 300)
    for form in FORWARD[0]:
        y, _ = linear(x, v, case.g, None, 0, 0.0, form, config=SMALL)
        expected = (30 * case.g.double().view(1, -1) * 48**0.5).expand(y.shape)
        assert_matches(y, expected, y.dtype, 48)


@pytest.mark.parametrize("dim", DIMS)
def test_dead_slice_and_nan(dim, device):
    """A slice of norm zero gives zeros and finite gradients; a NaN stays a NaN."""
    case = Case(9, 20, 18, dim, device=device)
    dead = case.v if dim is None else case.v.select(dim, 3)
    dead.zero_()
    for form in FORWARD[dim]:
        y, n = linear(case.x, case.v, case.g, None, dim, 0.0, form, config=SMALL)
        assert torch.isfinite(y).all()
        assert (n == float("inf")).sum() == 1
    for form in BACKWARD[dim]:
        grads = linear_backward(
            case.dy, case.x, case.v, case.g, n, dim, 0.0, form, (True, True, True, False)
        )
        assert all(torch.isfinite(t).all() for t in grads[:3])
    case.v[2, 3] = float("nan")
    for form in FORWARD[dim]:
        y, _ = linear(case.x, case.v, case.g, None, dim, 0.0, form, config=SMALL)
        assert torch.isnan(y).any()


@pytest.mark.parametrize(("dim", "form"), forms(BACKWARD))
def test_deterministic(dim, form, device):
    first, second = (run(Case(15, 50, 41, dim, device=device), backward=form) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


def test_tf32_follows_pytorch(device):
    """The precision of matmuls reaches the kernel; the interpreter computes both in float32."""
    case = Case(5, 16, 16, 0)
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            for cudnn in (True, False):
                with torch.backends.cudnn.flags(allow_tf32=cudnn), recording() as launches:
                    linear(case.x, case.v, case.g, None, 0, 0.0, "one_pass")
                assert launches[0].arguments["PRECISION"] == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_one_pass_limits(device):
    case = Case(70, 20, 18, None, device=device)
    norm = slice_norms(case.v, None, 0.0)
    with pytest.raises(ValueError, match="dim=None"):
        linear(case.x, case.v, case.g, None, None, 0.0, "one_pass")
    with pytest.raises(ValueError, match="dim=None"):
        linear_backward(
            case.dy, case.x, case.v, case.g, norm, None, 0.0, "one_pass", (False, True, True, False)
        )
    case = Case(70, 20, 18, 0, device=device)
    with pytest.raises(ValueError, match="32 rows"):
        linear_backward(
            case.dy, case.x, case.v, case.g, norm, 0, 0.0, "one_pass", (False, True, True, False)
        )
