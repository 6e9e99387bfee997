"""The linear layer's kernels, launched one form at a time."""

import itertools

import pytest
import torch

import wn_kernels.functional as WF
from tests.comparison import DIMS, LAYOUTS, Case, assert_matches, assert_same_bits
from wn_kernels import use_backend
from wn_kernels.backends import tiles
from wn_kernels.backends.tiles import one_pass_rows
from wn_kernels.backends.triton import configs, linear, linear_backward, slice_norms
from wn_kernels.backends.triton.launch import recording
from wn_kernels.call import fits_unscaled, narrows_range

FORWARD = {
    0: ("one_pass", "scaled", "materialize"),
    1: ("scaled", "materialize"),
    None: ("scaled", "materialize"),
}
BACKWARD = {
    0: ("product", "one_pass", "scaled", "materialize"),
    1: ("one_pass", "scaled", "materialize"),
    None: ("scaled", "materialize"),
}
# Those that hold the batch in one tile.
FEW = ("one_pass", "product")

# Small blocks, so that small tensors span several of them.
SMALL = configs.SplitConfig(16, 16, 16, 4, 2)
SMALL_GRAD = configs.GradConfig(16, 16, 16, 4, 2)
SMALL_WALK = configs.SplitConfig(16, 16, 16, 4, 2, 2)
# A product for `dV` beside PyTorch's for `dX`, where one walk would compute both.
SMALL_TILE = configs.GradConfig(16, 16, 16, 4, 2)._replace(BLOCK_R=32)

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
        options = case.dim, case.eps, forward
        y, n = linear(*inputs, case.bias, *options, norm=case.norm, config=config)
        case.check_forward(y)
        expected = slice_norms(case.v.double(), case.dim, case.eps, norm=case.norm)
        finite = expected.isfinite()
        assert n.isfinite().tolist() == finite.tolist()
        assert_matches(n[finite], expected[finite], n.dtype, case.v.numel(), what="n")
        return y, n
    n, kept = slice_norms(case.v, case.dim, case.eps, norm=case.norm), None
    if backward == "product":
        kept = product(case)
        grad_config = SMALL_WALK if grad_config is SMALL_GRAD else grad_config
    needs = (True, True, True, case.bias is not None)
    grads = linear_backward(
        *(case.dy, *inputs, n, case.dim, case.eps, backward, needs, kept),
        norm=case.norm,
        config=grad_config,
    )
    case.check_backward(grads)
    return grads


def product(case, config=None):
    """What the forward in one pass keeps."""
    inputs = case.x, case.v, case.g, case.bias
    options = case.dim, case.eps, "one_pass", True
    y, _, kept = linear(*inputs, *options, norm=case.norm, config=config)
    case.check_forward(y)
    return kept


def forms(table):
    return [(dim, form) for dim in DIMS for form in table[dim]]


def served(table):
    """Every form with the dtypes that the planner gives it. Of the others, `scaled` refuses the
    ones in test_what_is_refused, and in one pass a float32 `V` may leave the range of a float16
    product."""

    def serves(form, x_dtype, v_dtype):
        if form == "scaled":
            return fits_unscaled(x_dtype, v_dtype)
        if form == "product":
            return x_dtype != torch.float16
        in_range = table is BACKWARD or not narrows_range(x_dtype, v_dtype)
        return form == "materialize" or in_range

    every = itertools.product(forms(table), DTYPES)
    return [(*form, *dtypes) for form, dtypes in every if serves(form[1], *dtypes)]


@pytest.mark.sanitize
@pytest.mark.parametrize(("dim", "form", "x_dtype", "v_dtype"), served(FORWARD))
def test_forward(dim, form, x_dtype, v_dtype, device):
    m = 15 if form in FEW else BLOCKS[0]
    run(Case(m, *BLOCKS[1:], dim, x_dtype, v_dtype, device=device), forward=form)


@pytest.mark.sanitize
@pytest.mark.parametrize(("dim", "form", "x_dtype", "v_dtype"), served(BACKWARD))
def test_backward(dim, form, x_dtype, v_dtype, device):
    m = 15 if form in FEW else BLOCKS[0]
    run(Case(m, *BLOCKS[1:], dim, x_dtype, v_dtype, device=device), backward=form)


@pytest.mark.sanitize
@pytest.mark.parametrize(("dim", "form"), forms(BACKWARD))
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strides(dim, form, layout, device):
    m = 15 if form in FEW else BLOCKS[0]
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


@pytest.mark.sanitize
@pytest.mark.parametrize(("dim", "form"), forms(BACKWARD))
@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_other_norms(norm, dim, form, device):
    """With ties, and a slice of norm zero."""
    case = Case(15, *BLOCKS[1:], dim, device=device)
    case.take(norm)
    if form in FORWARD[dim]:
        run(case, forward=form)
    run(case, backward=form)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("variant", "splits", "x_dtype", "v_dtype"),
    [("one_pass", splits, *DTYPES[i]) for splits in (1, 3) for i in (1, 3, 4)]
    + [("scaled", 1, *DTYPES[i]) for i in (1, 3)],
)
def test_ties_that_are_kept(variant, splits, x_dtype, v_dtype, device):
    """The forward counts them, and both products of the backward take them; that of many rows takes
    one dtype. A slice has one tie, has two in its last part, or has nothing else."""
    case = Case(15, 50, 41, 0, x_dtype, v_dtype, device=device)
    case.take("linf")
    case.v[1, 3], case.v[2, 47:49], case.v[3] = -1.5, 1.25, 0.5
    case.refer()
    inputs, options = (case.x, case.v, case.g, case.bias, 0, 0.0), {"norm": "linf"}
    config = SMALL._replace(splits=splits)
    y, n, kept = linear(*inputs, variant, True, **options, config=config)
    case.check_forward(y)
    ties = (case.v.abs() == n).sum(1)
    assert ties[1:4].tolist() == [1, 2, 50]
    assert kept[0, :-1].tolist() == ties[:-1].tolist()  # the last slice is zero
    for config in (SMALL_WALK, SMALL_GRAD)[: 1 + (x_dtype == v_dtype)]:
        operands = case.dy, case.x, case.v, case.g, n, 0, 0.0, "product", (True,) * 4, kept
        case.check_backward(linear_backward(*operands, **options, config=config))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", list(itertools.product((1, 17), repeat=3)))
def test_sizes_of_one(dim, shape, device):
    case = Case(*shape, dim, device=device)
    for form in FORWARD[dim]:
        run(case, forward=form, config=SMALL._replace(BLOCK_M=32))
    for form in BACKWARD[dim]:
        config = SMALL_WALK if form == "product" else SMALL_GRAD
        run(case, backward=form, grad_config=config._replace(BLOCK_M=32))


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
            assert_matches(db, case.dy.double().sum(0), db.dtype, m, what="db")


@pytest.mark.parametrize(
    "regime", [(1, 70, 40), (30, 300, 70), (60, 130, 50), (70, 140, 150), (300, 40, 90)]
)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pinned_configurations(regime, dim, dtype, device):
    """What ships: small, middling and large batches under their own configurations."""
    case = Case(*regime, dim, dtype, device=device)
    for form in FORWARD[dim]:
        ieee = dtype == torch.float32
        if form != "one_pass" or regime[0] <= one_pass_rows(dtype.itemsize, ieee=ieee):
            run(case, forward=form, config=None)
    for form in BACKWARD[dim]:
        if form not in FEW or regime[0] <= one_pass_rows(dtype.itemsize, grad=form == "one_pass"):
            run(case, backward=form, grad_config=None)


@pytest.mark.parametrize("forward", ["one_pass", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept(forward, dtype, device):
    """The product, and an output that does not depend on whether it is kept."""
    case = Case(15, 50, 41, 0, dtype, device=device)
    inputs = case.x, case.v, case.g, case.bias, 0, 0.0, forward
    y, n, kept = linear(*inputs, True, config=SMALL)
    assert_matches(kept, case.x.double() @ case.v.double().t(), dtype, 50, roundings=3)
    assert_same_bits(y, linear(*inputs, config=SMALL)[0])
    grads = linear_backward(
        case.dy, case.x, case.v, case.g, n, 0, 0.0, "product", (True,) * 4, kept, config=SMALL_WALK
    )
    case.check_backward(grads)


@pytest.mark.sanitize
@pytest.mark.parametrize("splits", [1, 2, 3, 4])
@pytest.mark.parametrize("needs_x", [True, False])
def test_walks_that_share_rows(splits, needs_x, device):
    """Three tiles of rows, the last of them short, by one to four programs; two and four are no
    divisors."""
    case = Case(15, 50, 41, 0, device=device)
    n = slice_norms(case.v, 0, 0.0)
    operands = case.dy, case.x, case.v, case.g, n, 0, 0.0, "product", (needs_x, True, True, True)
    config = SMALL_WALK._replace(splits=splits)
    grads = linear_backward(*operands, product(case), config=config)
    assert (grads[0] is None) == (not needs_x)
    case.check_backward(grads if needs_x else (case.grads[0].float(), *grads[1:]))


@pytest.mark.sanitize
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize(
    ("x_dtype", "v_dtype"), [d for d in DTYPES if d[0] == d[1] != torch.float16]
)
def test_product_of_many_rows(x_dtype, v_dtype, needs_x, device):
    """`dV` by a product of several steps, beside PyTorch's `dX`."""
    case = Case(*BLOCKS, 0, x_dtype, v_dtype, device=device)
    _, n, kept = linear(case.x, case.v, case.g, case.bias, 0, 0.0, "scaled", True)
    needs = needs_x, True, True, True
    operands = case.dy, case.x, case.v, case.g, n, 0, 0.0, "product", needs, kept
    with recording() as launches:
        linear_backward(*operands, config=SMALL_GRAD)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["scale_kernel", "weight_product_kernel"]
    grads = linear_backward(*operands, config=SMALL_GRAD)
    assert (grads[0] is None) == (not needs_x)
    case.check_backward(grads if needs_x else (case.grads[0].to(x_dtype), *grads[1:]))


def test_v_is_read_once(device):
    """By the kernel alone that computes `dX` and `dV`: no product of PyTorch's runs."""
    case = Case(15, 50, 41, 0, device=device)
    n, kept = slice_norms(case.v, 0, 0.0), product(case)
    operands = case.dy, case.x, case.v, case.g, n, 0, 0.0, "product"
    with recording() as launches:
        linear_backward(*operands, (True,) * 4, kept, config=SMALL_WALK)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["scale_kernel", "grads_kernel", "sum_kernel"]
    with recording() as launches:  # without the product, and where no gradient takes it
        linear_backward(*operands, (True,) * 4)
        linear_backward(*operands, (True, False, False, True), kept)
    assert "grads_kernel" not in [launch.kernel.__name__ for launch in launches]


def test_range(device):
    """A float16 product scales before it can overflow or underflow."""
    case = Case(20, 48, 33, 0, torch.float16, torch.float32, device=device)
    for factor in (1e-8, 1e5):
        case.v = case.v * factor  # the weight does not change with the length of V
        y, n = linear(case.x, case.v, case.g, case.bias, 0, 0.0, "materialize")
        case.check_forward(y)
        # The gradient of V shrinks as V grows; that of x does not.
        dx = linear_backward(
            *(case.dy, case.x, case.v, case.g, n, 0, 0.0, "one_pass", (True, False, False, False)),
        )[0]
        assert_matches(dx, case.grads[0], dx.dtype, 33, roundings=4)
        case.v = case.v / factor
    # In float16 throughout, the unscaled product would overflow: 300 · 48 · 30 > 65504.
    case = Case(20, 48, 33, 0, torch.float16, device=device)
    x, v = torch.full_like(case.x, 30), torch.full_like(case.v, 300)
    for form in ("one_pass", "materialize"):
        y, _ = linear(x, v, case.g, None, 0, 0.0, form)
        expected = (30 * case.g.double().view(1, -1) * 48**0.5).expand(y.shape)
        assert_matches(y, expected, y.dtype, 48)


@pytest.mark.parametrize(
    ("x_dtype", "v_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_what_is_refused(x_dtype, v_dtype, device):
    """A scale after the product, where that may leave its range, or takes two dtypes."""
    case = Case(3, 8, 6, 0, x_dtype, v_dtype, device=device)
    n = slice_norms(case.v, 0, 0.0)
    with pytest.raises(ValueError, match="scaled needs x and V of one dtype other than float16"):
        linear(case.x, case.v, case.g, None, 0, 0.0, "scaled")
    with pytest.raises(ValueError, match="scaled needs x and V of one dtype other than float16"):
        linear_backward(case.dy, case.x, case.v, case.g, n, 0, 0.0, "scaled", (True,) * 4)
    if x_dtype == torch.float16:
        with pytest.raises(ValueError, match="product needs dim=0 and no float16"):
            linear_backward(case.dy, case.x, case.v, case.g, n, 0, 0.0, "product", (True,) * 4)
    for variant, dim in (("materialize", 0), ("materialize", 1)):
        with pytest.raises(ValueError, match="does not compute the product"):
            linear(case.x, case.v, case.g, None, dim, 0.0, variant, True)


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_what_a_layer_launches_for_other_norms(norm, device):
    """By the functions, with eps between the norms of the slices."""
    case = Case(9, 20, 18, 0, eps={"l1": 10.0, "linf": 0.75}[norm], device=device)
    case.take(norm)
    with use_backend("triton"):
        case.check(lambda *inputs: WF.wn_linear(*inputs, eps=case.eps, norm=norm))


@pytest.mark.parametrize(("dim", "form"), forms(BACKWARD))
def test_gradients_that_are_wanted(dim, form, device):
    """Each alone and all of them, and no more kernels than they take."""
    case = Case(9, 20, 18, dim, device=device)
    n = slice_norms(case.v, dim, 0.0)
    kept, config = (product(case), SMALL_WALK) if form == "product" else (None, SMALL_GRAD)
    for needs in itertools.product((False, True), repeat=4):
        grads = linear_backward(
            case.dy, case.x, case.v, case.g, n, dim, 0.0, form, needs, kept, config=config
        )
        for wanted, grad, expected in zip(needs, grads, case.grads, strict=True):
            if wanted:
                terms = case.terms["dv"]
                assert_matches(grad, expected, torch.float32, case.length, terms=terms)


@pytest.mark.parametrize("m", [1, 255, 256, 257])
def test_sums_of_columns(m, device):
    """They ride along with the pass over `dY`, where a program can have every row of some."""
    case = Case(m, 20, 70, 0, torch.bfloat16, device=device)
    n = slice_norms(case.v, 0, 0.0)
    with recording() as launches:
        linear_backward(
            *(case.dy, case.x, case.v, case.g, n, 0, 0.0, "scaled", (True, False, False, True))
        )
    (scale,) = launches
    assert scale.arguments["SUM"] == (m <= tiles.SUMMED_ROWS)
    run(case, backward="scaled")


def test_a_gradient_of_any_strides(device):
    """That of a sum is one number, expanded."""
    case = Case(9, 20, 18, 0, device=device)
    n = slice_norms(case.v, 0, 0.0)
    dy = case.dy[:1, :1].expand(9, 18)
    operands = case.x, case.v, case.g, n, 0, 0.0
    for form in BACKWARD[0]:
        found = linear_backward(dy, *operands, form, (True,) * 4)
        dense = linear_backward(dy.contiguous(), *operands, form, (True,) * 4)
        for grad, other in zip(found, dense, strict=True):
            assert_matches(grad, other.double(), torch.float32, 20, terms=other.norm().item())


def test_products_are_pytorch_s_own(device, monkeypatch):
    """`scaled` multiplies by V itself, and writes no W."""
    case = Case(9, 20, 18, 0, device=device)
    seen = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append(b.data_ptr()) or real(a, b))
    run(case, forward="scaled")
    assert seen == [case.v.data_ptr()]
    seen.clear()
    run(case, backward="scaled")
    assert seen == [case.v.data_ptr(), case.x.data_ptr()]


@pytest.mark.parametrize("dim", DIMS)
def test_dead_slice(dim, device):
    """A slice of norm zero adds nothing to the output, and its gradients are zero."""
    case = Case(9, 20, 18, dim, device=device)
    dead = case.v if dim is None else case.v.select(dim, 3)
    dead.zero_()
    case.refer()
    for form in FORWARD[dim]:
        y, n = linear(case.x, case.v, case.g, case.bias, dim, 0.0, form, config=SMALL)
        case.check_forward(y)
        assert (n == float("inf")).sum() == 1
    for form in BACKWARD[dim]:
        kept = [product(case)] if form == "product" else []
        options = dim, 0.0, form, (True,) * 4, *kept
        grads = linear_backward(case.dy, case.x, case.v, case.g, n, *options)
        case.check_backward_of_dead(grads)


@pytest.mark.parametrize("dim", DIMS)
def test_nan(dim, device):
    """A NaN reaches what the definition has it reach, and no other slice."""
    case = Case(9, 20, 18, dim, device=device)
    names = "y", "dx", "dv", "dg", "db"
    expected, terms = dict(zip(names, (case.y, *case.grads), strict=True)), case.terms
    case.v[2, 3] = float("nan")
    case.refer()
    spoiled = dict(zip(names, (case.y, *case.grads), strict=True))

    def check(name, actual):
        nans = spoiled[name].isnan()
        assert actual.isnan().tolist() == nans.tolist(), f"{name}: NaN in other places"
        if not nans.all():
            one, other = (t.masked_fill(nans, 0.0) for t in (actual, expected[name]))
            scale = terms.get(name, 0.0)
            assert_matches(one, other, case.dtype, 20, roundings=4, scale=scale, what=name)

    inputs = case.x, case.v, case.g
    for form in FORWARD[dim]:
        y, n = linear(*inputs, case.bias, dim, 0.0, form, config=SMALL)
        check("y", y)
    for form in BACKWARD[dim]:
        options = dim, 0.0, form, (True,) * 4
        if form == "product":
            options += linear(*inputs, case.bias, dim, 0.0, "one_pass", True)[2:]
        grads = linear_backward(case.dy, *inputs, n, *options)
        for name, grad in zip(names[1:], grads, strict=True):
            check(name, grad)


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
