"""Defective arguments, a few at once: the right result, or an error that names what was wrong.

Values are positive and of size one but where a defect changes them, so that no sum cancels.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import wn_kernels
import wn_kernels.functional as WF
from tests.comparison import assert_matches, assert_zero
from wn_kernels.backends import reference
from wn_kernels.call import canonical_dim, kept_shape

# Shapes of the input and of V, by function. For those that take no input, of V.
SHAPES = {
    "weight_norm": [(None, (4, 3)), (None, (5,)), (None, (2, 3, 4)), (None, ())],
    "slice_norm": [(None, (4, 3)), (None, (5,)), (None, (2, 3, 4)), (None, ())],
    "wn_linear": [((2, 3), (4, 3)), ((3,), (2, 3)), ((2, 2, 5), (3, 5)), ((0, 3), (4, 3))],
    "wn_conv1d": [((2, 4, 7), (6, 4, 3)), ((4, 7), (6, 2, 3)), ((2, 4, 7), (4, 1, 2))],
    "wn_conv2d": [((2, 2, 5, 4), (4, 2, 3, 2)), ((2, 5, 4), (4, 1, 3, 2))],
    "wn_conv3d": [((2, 2, 3, 4, 3), (4, 2, 2, 2, 1)), ((0, 2, 3, 4, 3), (4, 1, 2, 2, 1))],
    "wn_conv_transpose1d": [((2, 4, 5), (4, 3, 3)), ((4, 5), (4, 2, 4))],
    "wn_conv_transpose2d": [((2, 2, 3, 4), (2, 3, 2, 3)), ((2, 3, 4), (2, 1, 2, 2))],
    "wn_conv_transpose3d": [((1, 2, 2, 3, 2), (2, 2, 2, 1, 2))],
}


def _sparse_csr(t):
    return t.to_sparse_csr() if t.ndim == 2 else t.to_sparse()


def _nested(t):
    return torch.nested.nested_tensor([t, t])


def _quantized(t):
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8)


def _dead_slice(t):
    if t.ndim and len(t):
        t[0] = 0
    return t


def _one(value):
    def put(t):
        if t.numel():
            t.view(-1)[0] = value
        return t

    return put


def _sliced(t):
    wide = torch.ones(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype) if t.ndim else t
    if t.ndim:
        wide[..., 1::2] = t
        wide = wide[..., 1::2]
    return wide


def _expanded(t):
    """Every slice is the first, and lies in its memory."""
    return t[:1].expand(t.shape) if t.ndim and len(t) else t


def _overlapping(t):
    if t.ndim < 2 or not t.numel():
        return t
    room = torch.rand(t.numel() + 8, dtype=torch.float64).to(t.dtype) + 0.5
    return room.as_strided(t.shape, [1] * t.ndim)


def _non_leaf(t):
    return t.requires_grad_() * 1


TENSOR_DEFECTS = {
    "one more dimension": lambda t: t[None],
    "one dimension less": lambda t: t[0] if t.ndim and len(t) else t,
    "transposed": lambda t: t.transpose(0, -1) if t.ndim else t,
    "longer": lambda t: torch.cat([t, t]) if t.ndim else t,
    "empty": lambda t: t[:0] if t.ndim else t,
    "empty at the end": lambda t: t[..., :0] if t.ndim else t,
    "flat": lambda t: t.reshape(-1),
    **{
        str(dtype): lambda t, dtype=dtype: t.to(dtype)
        for dtype in (
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.int64,
            torch.bool,
            torch.complex64,
            torch.float8_e4m3fn,
        )
    },
    "quantized": _quantized,
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": _sparse_csr,
    "nested": _nested,
    "of mkldnn": lambda t: t.float().to_mkldnn(),
    "on another device": lambda t: t.to("meta"),
    "NaN": _one(math.nan),
    "inf": _one(math.inf),
    "all NaN": lambda t: torch.full_like(t, math.nan),
    "huge": lambda t: t * 1e30,
    "tiny": lambda t: t * 1e-30,
    "negative": lambda t: -t,
    "zeros": torch.zeros_like,
    "a dead slice": _dead_slice,
    "sliced": _sliced,
    "expanded": _expanded,
    "overlapping": _overlapping,
    "a leaf": lambda t: t.requires_grad_(),
    "no leaf": _non_leaf,
    "a list": lambda t: t.tolist(),
    "a number": lambda t: 1.0,
    "None": lambda t: None,
    "a string": lambda t: "v",
    "an array": lambda t: t.float().detach().numpy(),
}

# Values for options; a few are good.
SCALAR = st.sampled_from(
    [-1, 0, 1, 2, 3, 1.5, True, None, "x", "same", "valid", (1,), (2, 1), (1, 1, 1), [1, 2], (), -7]
)
OPTION_DEFECTS = {
    "dim": st.sampled_from([-9, -3, -2, -1, 0, 1, 2, 3, 9, None, 0.5, True, "0", (0,), 2**70]),
    "eps": st.sampled_from([0, 1e-12, 1.0, 1e30, -1.0, math.nan, math.inf, "x", None, 2, (0.0,)]),
    **dict.fromkeys(("stride", "padding", "dilation", "groups", "output_padding"), SCALAR),
}


@st.composite
def calls(draw, name):
    """`(tensors, options, defects)`: a good call with up to three defects."""
    x_shape, v_shape = draw(st.sampled_from(SHAPES[name]))
    options = {}
    if "conv" in name and v_shape[1] != (x_shape[1] if len(x_shape) > len(v_shape) - 1 else 0):
        channels = x_shape[-len(v_shape) + 1]
        if "transpose" not in name and channels % v_shape[1] == 0:
            options["groups"] = channels // v_shape[1]
    dim = draw(st.sampled_from([None, *range(len(v_shape))]))
    options["dim"] = dim
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)

    def positive(*shape):
        return torch.rand(shape, generator=generator) + 0.5

    tensors = {"v": positive(*v_shape)}
    if name != "slice_norm":
        tensors["g"] = positive(*kept_shape(v_shape, canonical_dim(dim, len(v_shape))))
    if x_shape is not None:
        outputs = v_shape[1] if "transpose" in name else v_shape[0]
        tensors |= {"input": positive(*x_shape), "bias": positive(outputs)}
    for key in draw(st.lists(st.sampled_from(sorted(tensors)), max_size=4)):
        tensors[key].requires_grad_()

    defects = []
    takes = {"dim"} | ({"eps"} if name != "slice_norm" else set())
    if "conv" in name:
        takes |= {"stride", "padding", "dilation", "groups"}
    if "transpose" in name:
        takes |= {"output_padding"}
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from([*sorted(tensors), *sorted(tensors), *sorted(takes)]))
        if key in takes:
            options[key] = draw(OPTION_DEFECTS[key])
            defects.append((key, options[key]))
        elif isinstance(tensors[key], torch.Tensor) and tensors[key].layout is torch.strided:
            what = draw(st.sampled_from(sorted(TENSOR_DEFECTS)))
            try:
                tensors[key] = TENSOR_DEFECTS[what](tensors[key].detach())
            except (RuntimeError, TypeError):
                continue  # two defects that PyTorch does not combine
            defects.append((key, what))
    return tensors, options, defects


def right(name, tensors, options, wide):
    """`(result, W)` in float64 from PyTorch's own operations."""
    options = dict(options)
    dim, eps = options.pop("dim", 0), options.pop("eps", 0.0)
    v = wide["v"]
    dim = canonical_dim(dim, v.ndim)
    if name == "slice_norm":
        return WF.slice_norm(v, dim=dim), v
    g = wide["g"].reshape(kept_shape(v.shape, dim))
    w = reference.weight_norm(v, g, dim, float(eps))
    if name == "weight_norm":
        return w, w
    function = getattr(F, name.removeprefix("wn_"))
    return function(wide["input"], w, wide["bias"], **options), w


def compare(actual, expected, dtype, length, terms=None, what="result"):
    """Where float64 has a number that `dtype` can hold; elsewhere neither has a finite one."""
    limits = torch.finfo(dtype)
    size = expected.abs()
    fits = torch.isfinite(expected) & (size < limits.max / 16) & (size > limits.tiny * 1e4)
    numbers = torch.isfinite(expected) & (size < limits.max / 16)
    assert actual.shape == expected.shape
    assert not torch.isfinite(actual[expected.isnan() | (size > 2 * limits.max)]).any(), what
    assert torch.isfinite(actual[numbers]).all(), f"{what}: not finite where float64 is"
    assert_zero(actual[expected == 0], what) if terms is None else None
    if fits.any():
        scale = 0.0 if terms is None else terms.norm().item()
        chosen = expected[fits]
        if terms is not None and chosen.norm() < 1e-2 * scale:
            return  # it cancels
        assert_matches(
            actual[fits], chosen, dtype, length, roundings=6, scale=scale, terms=scale, what=what
        )


def check(name, tensors, options, defects):
    given = {key: t for key, t in tensors.items() if isinstance(t, torch.Tensor)}
    leaves = {key: t for key, t in given.items() if t.requires_grad}
    refused = None
    try:
        y = getattr(WF, name)(**tensors, **options)
    except (TypeError, ValueError) as error:
        refused = str(error)
    if refused is not None:
        assert defects, f"a good call was refused: {refused}"
        named = {*tensors, *options, "all tensors"}
        assert any(key in refused for key in named), f"the error names nothing: {refused}"
        return
    if y.is_meta or any(isinstance(t, (tuple, str)) and not t for t in options.values()):
        return
    wide = {key: t.detach().double() for key, t in given.items()} | (
        {} if given.get("bias") is not None else {"bias": None}
    )
    for key in leaves:
        wide[key].requires_grad_()
    expected, w = right(name, tensors, options, wide)
    dtypes = [t.dtype for t in given.values()]
    dtype = max((y.dtype, *dtypes), key=lambda dtype: torch.finfo(dtype).eps)
    length = max(64, *(t.numel() for t in given.values()))
    compare(y.detach().double(), expected.detach(), dtype, length)
    if not leaves or not y.requires_grad:
        assert not leaves or not expected.requires_grad
        return
    dy = torch.rand_like(expected) + 0.5
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True)
    dw, *rights = torch.autograd.grad(
        expected, [w if w.requires_grad else expected, *(wide[key] for key in leaves)], dy
    )
    for key, grad, wanted in zip(leaves, grads, rights, strict=True):
        assert grad is not None
        assert grad.dtype == given[key].dtype
        if not torch.isfinite(wanted).all():
            assert not torch.isfinite(grad).all(), f"gradient of {key} is finite"
            continue
        terms = None
        if key == "v":  # a difference of terms as large as s ⊙ dW
            scale = (w / wide["v"]).nan_to_num(0.0, 0.0, 0.0) if w.shape == wide["v"].shape else 1
            terms = (scale * dw).detach() if w.requires_grad else wanted
            terms = terms.nan_to_num(0.0, 0.0, 0.0)
        compare(grad.double(), wanted, dtype, length * 8, terms, f"gradient of {key}")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SHAPES)
def test_functions(name):
    @settings(max_examples=280)
    @given(call=calls(name))
    def run(call):
        check(name, *call)

    run()


LAYERS = {
    "WNLinear": ("in_features", "out_features"),
    **{
        f"WNConv{kind}{rank}d": ("in_channels", "out_channels", "kernel_size")
        for kind in ("", "Transpose")
        for rank in (1, 2, 3)
    },
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=200)
@given(
    name=st.sampled_from(sorted(LAYERS)),
    sizes=st.lists(st.sampled_from([2, 4, 1, 0, -1, 1.5, "x", None]), min_size=3, max_size=3),
    options=st.dictionaries(
        st.sampled_from(["dim", "eps", "bias", "dtype"]),
        st.sampled_from(
            [0, 1, -1, -7, None, 0.5, "x", True, torch.int64, torch.bfloat16, math.nan]
        ),
        max_size=2,
    ),
)
def test_layers(name, sizes, options):
    """A layer is made as torch.nn makes its namesake, or refused as that is; `dim` and `eps`
    are ours to refuse."""
    sizes = sizes[: len(LAYERS[name])]
    plain = {key: value for key, value in options.items() if key not in ("dim", "eps")}
    own = {key: value for key, value in options.items() if key in ("dim", "eps")}

    def made(kind, options):
        try:
            return kind(*sizes, **options), None
        except Exception as error:
            return None, error

    expected, refused_by_torch = made(getattr(torch.nn, name.removeprefix("WN")), plain)
    layer, refused = made(getattr(wn_kernels, name), options)
    if refused is None:
        assert refused_by_torch is None
        assert layer.weight_v.shape == expected.weight.shape
        return
    ours = isinstance(refused, (TypeError, ValueError)) and any(k in str(refused) for k in own)
    assert ours or isinstance(refused, type(refused_by_torch)), refused


MODULES = {
    "linear": lambda: torch.nn.Linear(3, 2),
    "normed": lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(2, 3, 2)),
    "ours": lambda: wn_kernels.WNLinear(3, 2),
    "no parameters": torch.nn.ReLU,
    "lazy": lambda: torch.nn.LazyLinear(2),
    "complex": lambda: torch.nn.Linear(3, 2, dtype=torch.complex64),
    "recurrent": lambda: torch.nn.GRU(3, 2),
    "nothing": lambda: None,
    "a number": lambda: 3,
    "a tensor": lambda: torch.ones(3, 2),
    "a class": lambda: torch.nn.Linear,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@settings(max_examples=250)
@given(
    function=st.sampled_from(
        ["fuse", "unfuse", "fold", "weight_norm", "remove_weight_norm", "state_dict", "use_backend"]
    ),
    kind=st.sampled_from(sorted(MODULES)),
    name=st.sampled_from(["weight", "bias", "weight_ih_l0", "nope", "", 3, None]),
    dim=OPTION_DEFECTS["dim"],
    form=st.sampled_from(["plain", "weight_norm", "parametrizations", "nope", 3, None]),
)
def test_conversion(function, kind, name, dim, form):
    """A model that is refused is as it was; one that is taken still runs."""
    module = MODULES[kind]()
    arguments = {
        "weight_norm": (module, name, dim),
        "remove_weight_norm": (module, name),
        "state_dict": (module, form),
        "use_backend": (form,),
    }.get(function, (module,))
    known = isinstance(module, torch.nn.Module)
    before = list(module.named_parameters()) if known else []
    kind_before = type(module)
    refused = None
    try:
        getattr(wn_kernels, function)(*arguments)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        refused = error
    if refused is not None:
        torch_raises = function == "weight_norm" and known  # as torch's namesake does
        assert torch_raises or isinstance(refused, (TypeError, ValueError)), refused
        words = [type(module).__name__, repr(name), "module", "form", "dim", "backend"]
        assert any(word in str(refused) for word in words), refused
        if known:
            assert type(module) is kind_before
            after = list(module.named_parameters())
            assert [key for key, _ in after] == [key for key, _ in before]
            assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
        return
    if known and function not in ("state_dict", "use_backend") and kind not in ("lazy", "complex"):
        width = 2 if kind == "normed" else 3
        module(torch.ones(2, width, width) if kind != "linear" else torch.ones(2, 3))
