"""The convolutions' kernels, launched one form at a time."""

import pytest
import torch

import wn_kernels.functional as WF
from tests.comparison import ConvCase, assert_matches, assert_same_bits
from tests.test_convolution import KINDS, case_of
from wn_kernels import use_backend
from wn_kernels.backends.triton import configs, convolution, convolution_backward, slice_norms
from wn_kernels.backends.triton.launch import recording

# Small blocks, so that small tensors span several of them.
SMALL = configs.SplitConfig(16, 16, 16, 4, 2)
SMALL_DIRECT = configs.DirectConfig(8, 4, 4, 2)
SMALL_GRAD = configs.GradConfig(16, 16, 16, 4, 2)

FORWARD = ("one_pass", "packed")
BACKWARD = ("packed", "weight_grad")

# Padding modes and one-sided padding are the module's, not the kernels'.
ONES = [kind for kind in KINDS if kind not in ("same", "reflect", "replicate", "circular")]

DTYPES = [
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),  # autocast
    (torch.float16, torch.float32),  # autocast, where V may leave float16's range
    (torch.float32, torch.bfloat16),
]


def run(case, forward=None, backward=None, small=False, splits=1, kept=None):
    """Checks a form of the forward, or of the backward."""
    conv = case.geometry()
    direct = conv.has_small_groups(case.v.shape)
    inputs = (case.x, case.v, case.g)
    config = None
    if small or splits > 1:
        config = SMALL_DIRECT if direct else SMALL._replace(splits=splits)
    if forward:
        options = conv, case.dim, case.eps, forward
        y, n, w = convolution(*inputs, case.bias, *options, norm=case.norm, config=config)
        case.check_forward(y)
        expected = slice_norms(case.v.double(), case.dim, case.eps, norm=case.norm)
        finite = expected.isfinite()
        assert n.isfinite().tolist() == finite.tolist()
        assert_matches(n[finite], expected[finite], n.dtype, case.v.numel(), what="n")
        assert (w is None) == (forward == "one_pass")
        return [y, n]
    n = slice_norms(case.v, case.dim, case.eps, norm=case.norm)
    needs = (True, True, True, case.bias is not None)
    grads = convolution_backward(
        case.dy,
        *inputs,
        n,
        conv,
        case.dim,
        case.eps,
        backward,
        needs,
        kept,
        norm=case.norm,
        config=config,
        grad_config=(SMALL_DIRECT if direct else SMALL_GRAD) if small else None,
    )
    case.check_backward(grads)
    return grads


def takes_one_pass(case):
    conv = case.geometry()
    return conv.has_small_groups(case.v.shape) and conv.owns_slices(case.dim)


def run_all(case, small=False, forward=FORWARD, backward=BACKWARD):
    for form in forward:
        if form != "one_pass" or takes_one_pass(case):
            run(case, forward=form, small=small)
    for form in backward:
        run(case, backward=form, small=small)


@pytest.mark.parametrize("kind", ONES)
@pytest.mark.parametrize("dim", [0, 1])
def test_kinds(kind, dim, device):
    run_all(case_of(KINDS, kind, dim, device=device))


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("dim", "sizes", "options"),
    [
        (0, (1, 18, 17, (19,), (3,)), {"padding": 1}),
        (0, (1, 3, 17, (5, 5), (2, 3)), {"stride": (1, 2), "padding": 1}),
        (1, (1, 18, 17, (7,), (4,)), {"transposed": True, "stride": 3, "padding": 1}),
        (2, (1, 6, 6, (19,), (3,)), {"groups": 6, "padding": 1}),
        (0, (1, 6, 6, (7,), (3,)), {"groups": 3, "transposed": True, "stride": 2}),
        (0, (1, 2, 3, (3, 3, 3), (2, 2, 2)), {"padding": 1}),
    ],
)
def test_bounds(dim, sizes, options, device):
    """What the launch checker sees: every kernel and form, several programs each."""
    case = ConvCase(*sizes, dim, **options, device=device)
    run_all(case, small=True, backward=["packed"])
    run(case, forward="packed", splits=3)
    run(case, backward="packed", splits=3)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("kind", "dim"), [("depthwise", 0), ("up 2d", 0), ("1d", 1), ("grouped", 2)]
)
@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_other_norms(norm, kind, dim, device):
    case = case_of(KINDS, kind, dim, device=device)
    case.take(norm)
    run_all(case)
    if kind == "1d":
        options = {**KINDS[kind][1], "dim": dim, "norm": norm}
        with use_backend("triton"):
            case.check(lambda *inputs: WF.wn_conv1d(*inputs, **options))


@pytest.mark.parametrize("kind", ["grouped", "depthwise", "up", "up depthwise", "up 2d"])
@pytest.mark.parametrize("dim", [2, None])
def test_taps_and_whole(kind, dim, device):
    run_all(case_of(KINDS, kind, dim, device=device))


def test_taps_in_the_middle(device):
    run_all(case_of(KINDS, "3d", 3, device=device))


@pytest.mark.parametrize("kind", ONES)
@pytest.mark.parametrize("splits", [2, 5])
def test_split_reductions(kind, splits, device):
    """The parts of a sum over taps and channels, of which some may be empty, and some phases'."""
    case = case_of(KINDS, kind, 0, device=device)
    for option in ({"forward": "packed"}, {"backward": "packed"}):
        first, second = (run(case, splits=splits, **option) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("block_r", [32, 64])
@pytest.mark.parametrize("kind", ["1d", "up 2d"])
def test_channels_walked_with_the_taps(kind, block_r, device):
    """A block of the reduction holds several taps of 17 channels."""
    sizes, options = KINDS[kind]
    case = ConvCase(sizes[0], 17, 18, *sizes[3:], **options, device=device)
    conv, config = case.geometry(), SMALL._replace(BLOCK_R=block_r)
    inputs = case.x, case.v, case.g
    y, n, _ = convolution(*inputs, case.bias, conv, 0, 0.0, "packed", config=config)
    case.check_forward(y)
    needs = (True, True, True, True)
    options = 0, 0.0, "packed", needs
    case.check_backward(convolution_backward(case.dy, *inputs, n, conv, *options, config=config))


@pytest.mark.parametrize(("kind", "layout"), [("1d", "contiguous"), ("2d", "channels-last")])
@pytest.mark.parametrize("backward", ["packed", "weight_grad", "materialize"])
def test_kept(kind, layout, backward, device):
    """The W of the forward serves the backward; nothing forms it again."""
    case = case_of(KINDS, kind, 0, layout=layout, device=device)
    *_, w = convolution(case.x, case.v, case.g, None, case.geometry(), 0, 0.0, "packed")
    run(case, backward=backward, kept=w)
    doubled = convolution_backward(
        *(case.dy, case.x, case.v, case.g, slice_norms(case.v, 0, 0.0)),
        *(case.geometry(), 0, 0.0, backward, (True, False, False, False), 2 * w),
    )
    assert_matches(doubled[0] / 2, case.grads[0], case.x.dtype, case.v.numel())


@pytest.mark.parametrize(("kind", "dim"), [("1d", 0), ("1d", 1), ("depthwise", 0), ("up", 0)])
@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
def test_dtypes(kind, dim, x_dtype, v_dtype, device):
    run_all(case_of(KINDS, kind, dim, x_dtype, v_dtype, device=device))


@pytest.mark.parametrize("kind", ["2d", "depthwise", "up grouped"])
@pytest.mark.parametrize("layout", ["sliced", "channels-last"])
def test_layouts(kind, layout, device):
    run_all(case_of(KINDS, kind, 0, layout=layout, device=device))


@pytest.mark.parametrize("kind", ["grouped", "depthwise", "up 3d"])
@pytest.mark.parametrize("dim", [0, 1])
def test_eps_without_bias(kind, dim, device):
    """eps = 3 lies in the middle of the norms, so that some are clamped."""
    run_all(case_of(KINDS, kind, dim, eps=3.0, bias=False, device=device))


# The layers of models, with fewer channels and pixels: the geometry is theirs.
LAYERS = {
    "vocoder up 16/8": (
        (1, 40, 20, (9,), (16,)),
        0,
        {"transposed": True, "stride": 8, "padding": 4},
    ),
    "vocoder residual": ((1, 20, 20, (60,), (11,)), 0, {"dilation": 5, "padding": 25}),
    "vocoder input": ((1, 80, 24, (20,), (7,)), 0, {"padding": 3}),
    "vocoder output": ((1, 32, 1, (80,), (7,)), 0, {"padding": 3}),
    "depthwise 768": ((1, 768, 768, (6,), (7,)), 0, {"groups": 768, "padding": 3}),
    "positions": ((1, 64, 64, (10,), (6,)), 2, {"groups": 2, "padding": 3}),
    "period discriminator": ((1, 1, 32, (30, 3), (5, 1)), 0, {"stride": (3, 1), "padding": (2, 0)}),
    "spectrum discriminator": (
        (1, 20, 20, (5, 18), (3, 9)),
        0,
        {"stride": (1, 2), "padding": (1, 4)},
    ),
    "temporal": ((1, 20, 20, (60,), (3,)), 0, {"dilation": 27, "padding": 27}),
    "super-resolution": ((1, 3, 20, (8, 8), (5, 5)), 0, {"padding": 2}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_models(name, device):
    sizes, dim, options = LAYERS[name]
    case = ConvCase(*sizes, dim, **options, device=device)
    forward = "one_pass" if name == "depthwise 768" else "packed"
    run_all(case, forward=[forward], backward=["packed"])


@pytest.mark.parametrize("kind", ["1d", "up"])
def test_vendor(kind, device):
    run_all(
        case_of(KINDS, kind, 0, device=device), forward=["materialize"], backward=["materialize"]
    )


def test_range(device):
    """A float16 product scales before it can overflow or underflow."""
    for kind, dim in (("1d", 0), ("up", 1), ("1d", None)):
        case = case_of(KINDS, kind, dim, torch.float16, torch.float32, device=device)
        for factor in (1e-8, 1e5):
            case.v *= factor  # the weight does not change with the length of V
            run(case, forward="packed")
            case.v /= factor


@pytest.mark.parametrize("kind", ["1d", "depthwise", "up"])
@pytest.mark.parametrize("dim", [0, 1])
def test_dead_slice(kind, dim, device):
    """A slice of norm zero adds nothing to the output, and its gradients are zero."""
    case = case_of(KINDS, kind, dim, device=device)
    case.v.select(dim, case.v.shape[dim] - 1).zero_()
    case.refer()
    conv = case.geometry()
    for form in FORWARD:
        if form != "one_pass" or takes_one_pass(case):
            y, n, _ = convolution(case.x, case.v, case.g, case.bias, conv, dim, 0.0, form)
            case.check_forward(y)
            assert (n == float("inf")).sum() == 1
    for form in BACKWARD:
        options = n, conv, dim, 0.0, form, (True,) * 4
        grads = convolution_backward(case.dy, case.x, case.v, case.g, *options)
        case.check_backward_of_dead(grads)


@pytest.mark.parametrize("groups", [1, 6])
def test_split_sums_are_deterministic(groups, device):
    """Several parts of dW, and the same bits twice."""
    case = ConvCase(2, 6, 6, (90,), (3,), groups=groups, device=device)
    grad_config = SMALL_GRAD if groups == 1 else SMALL_DIRECT
    with recording() as launches:
        convolution_backward(
            *(case.dy, case.x, case.v, case.g, case.g, case.geometry(), 0, 0.0, "packed"),
            (False, True, True, True),
            grad_config=grad_config,
        )
    (grid,) = (
        x.grid for x in launches if x.kernel.__name__.endswith("_grad_kernel") if "P" in x.arguments
    )
    assert grid[1] > 1
    first, second = (run(case, backward="packed", small=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


def test_limits(device):
    for kind, dim in (("up depthwise", 1), ("1d", 0)):
        case = case_of(KINDS, kind, dim, device=device)
        with pytest.raises(ValueError, match="one_pass needs groups of few channels and whole"):
            convolution(case.x, case.v, case.g, None, case.geometry(), dim, 0.0, "one_pass")
    for kind, form in (("depthwise", "one_pass"), ("1d", "packed")):
        case = case_of(KINDS, kind, 0, device=device)
        y, n, _ = convolution(case.x[:0], case.v, case.g, None, case.geometry(), 0, 0.0, form)
        assert y.shape == (0, *case.y.shape[1:])
        assert_matches(n, slice_norms(case.v.double(), 0, 0.0), n.dtype, case.v.numel())
    needs = (True, True, True, True)
    arguments = (case.v, case.g, n, case.geometry(), 0, 0.0, "packed", needs)
    grads = convolution_backward(case.dy[:0], case.x[:0], *arguments)
    for grad, like in zip(grads, (case.x[:0], case.v, case.g, case.bias), strict=True):
        assert grad.shape == like.shape
        assert not grad.any()


@pytest.mark.parametrize("rank", [2, 3])
def test_channels_last_in_gives_channels_last_out(rank, device):
    case = ConvCase(2, 6, 8, (4,) * rank, (3,) * rank, device=device)
    memory_format = torch.channels_last if rank == 2 else torch.channels_last_3d
    for x in (case.x, case.x.to(memory_format=memory_format)):
        with use_backend("triton"):
            y = case.layer(x, case.v, case.g, case.bias)
        case.check_forward(y)
        assert y.stride() == case.plain(x, case.v, None).stride()


def test_tf32_follows_cudnn(device):
    """The precision of convolutions, forward and backward; that of matmuls is another setting."""
    case = case_of(KINDS, "1d", 0, device=device)
    inputs, conv = (case.x, case.v, case.g), case.geometry()
    before = torch.get_float32_matmul_precision()
    try:
        for cudnn, expected in ((False, "ieee"), (True, "tf32")):
            for matmul in ("highest", "high"):
                torch.set_float32_matmul_precision(matmul)
                with torch.backends.cudnn.flags(allow_tf32=cudnn), recording() as launches:
                    _, n, _ = convolution(*inputs, case.bias, conv, 0, 0.0, "packed")
                    needs = (True, True, True, True)
                    convolution_backward(case.dy, *inputs, n, conv, 0, 0.0, "packed", needs)
                taken = [x.arguments["PRECISION"] for x in launches if "PRECISION" in x.arguments]
                assert taken == [expected] * 3
    finally:
        torch.set_float32_matmul_precision(before)
