"""`frozen_weights`: every weight is computed once, and again where a parameter has changed."""

import contextlib
import copy
import gc
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits
from tests.compatibility.layers import LAYERS, assert_right, gradients, made
from tests.compatibility.test_recurrent import made as made_recurrent
from tests.convert.frozen import assert_is_current, right
from tests.convert.layers import NORMALISE, Doubled, Scaled
from tests.convert.test_removal import output, subject
from tests.forms import parts
from wn_kernels import frozen_weights, plan, use_backend
from wn_kernels.backends import native
from wn_kernels.modules import kept as keeping

pytestmark = pytest.mark.usefixtures("paying")


# --- computed once -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_computed_once(name, count):
    layer, x = made(name)
    wide = right(layer, x)
    count.clear()
    with torch.no_grad(), frozen_weights(layer) as names:
        assert names == [""]
        for _ in range(3):
            assert_matches(layer(x), wide, torch.float32, 64, roundings=4)
        assert len(count) == 1
        weight = layer.weight
        assert layer.weight is weight
        kept = weakref.ref(weight)
        del weight
        assert len(count) == 1
    gc.collect()
    assert kept() is None
    assert_matches(layer.weight.detach(), layer.double().weight.detach(), torch.float32, 64)


@pytest.mark.parametrize("form", NORMALISE)
@pytest.mark.parametrize("kind", ["linear", "up", "2d", "lstm", "cell", "attention"])
def test_fused_layers(kind, form, count):
    """Also those with a forward of their own, which read the weight."""
    if kind == "attention":
        layer = NORMALISE[form](nn.Linear(6, 6))
        model, x, names = nn.Sequential(Doubled(6, 6), layer), torch.randn(3, 6), ["weight"]
        NORMALISE[form](model[0])
        names = ["weight", "weight"]
    elif kind == "cell":
        torch.manual_seed(0)
        model, x = nn.Sequential(NORMALISE[form](Scaled())), torch.randn(3, 6)
        names = ["weight"]
    else:
        model, x, names = subject(kind, form)
    wn_kernels.fuse(model)
    wide = right(model, x)
    count.clear()
    with torch.no_grad(), frozen_weights(model) as found:
        assert len(found) == (2 if kind == "attention" else 1)
        for _ in range(3):
            assert_matches(output(model, x), wide, torch.float32, 64, roundings=8)
        assert len(count) == len(names)


def test_what_is_not_of_this_package():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    with torch.no_grad(), frozen_weights(model) as names:
        assert names == []
        first = model(x)
        wn_kernels.fuse(model)  # it is not in the block
        assert_matches(model(x), first.double(), torch.float32, 4)
    for wrong in (None, 3, torch.zeros(2)):
        with pytest.raises(TypeError, match="model"), frozen_weights(wrong):
            raise AssertionError("the block ran")


@pytest.mark.parametrize("library", [True, False])
def test_a_kept_call_plans_nothing(library, monkeypatch):
    """The Python that runs: a look at the parameters, and the plain layer's own call."""
    if library and native.unavailable():
        pytest.skip(native.unavailable())
    if not library:
        monkeypatch.setattr(keeping, "native_library", lambda: None)
    layer, x = made("conv1d")
    called = set()

    def profile(frame, event, _):
        if event == "call" and "wn_kernels" in frame.f_code.co_filename:
            called.add(frame.f_code.co_qualname)

    with torch.no_grad(), frozen_weights(layer):
        layer(x)
        sys.setprofile(profile)
        try:
            layer(x)
        finally:
            sys.setprofile(None)
    looks = {"take", "_kept", "forced"}
    if not library:
        looks |= {"are_dense", "lies_as", "_pays", "Store.find"}
    assert called == {"_Convolution.forward", "WeightNormMixin._operands", "like"} | looks


def test_what_is_faster_without_a_weight(monkeypatch):
    """Where the planner has a better way than PyTorch's product with a weight that is there, a call
    takes it, as outside of the block. Other inputs take the weight."""
    monkeypatch.undo()
    layer = wn_kernels.WNLinear(1024, 512)
    row, rows = torch.randn(1, 1024), torch.randn(256, 1024)
    choices = {1: False, 256: True}
    monkeypatch.setattr(plan, "is_better_formed", lambda call, *_: choices[call.x_shape[0]])
    products = []
    linear = F.linear

    def counted(x, *arguments):
        if x.dtype == torch.float32:  # not that of the reference
            products.append(len(x))
        return linear(x, *arguments)

    monkeypatch.setattr(F, "linear", counted)
    with torch.no_grad(), frozen_weights(layer):
        for _ in range(2):
            assert_is_current(layer, row)
            assert_is_current(layer, rows)
    assert products == [256, 256]


# --- changes -------------------------------------------------------------------------------------


def _step(layer, kind=torch.optim.SGD, **options):
    optimizer = kind(layer.parameters(), lr=0.3, **options)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    layer.zero_grad()


def _load(layer, **options):
    state = {key: 1.5 * t + 0.1 for key, t in layer.state_dict().items()}
    layer.load_state_dict(state, **options)


def _data(layer):
    """What is freed first gives its address to what is made next."""
    for p in parts(layer):
        for _ in range(2):
            p.data = p.data * 1.5 + 0.1


def _replace(layer):
    holder = layer if isinstance(layer, wn_kernels.WNConv1d) else layer.parametrizations.weight
    for key, p in list(holder._parameters.items()):
        if key != "bias":
            setattr(holder, key, nn.Parameter(p.detach() * 1.5 + 0.1))


def _assign(layer):
    layer.weight = torch.randn(layer.weight.shape)


def _functional(layer):
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(layer.parameters()) * 1.5 + 0.1, layer.parameters()
    )


CHANGES = {
    "in place, g": lambda layer: parts(layer)[0].mul_(1.5),
    "in place, v": lambda layer: parts(layer)[1].add_(0.3),
    "an optimizer": _step,
    "a fused optimizer": lambda layer: _step(layer, fused=True),
    "a fused Adam": lambda layer: _step(layer, torch.optim.AdamW, fused=True),
    "a load": _load,
    "an assigning load": lambda layer: _load(layer, assign=True),
    "data": _data,
    "a new parameter": _replace,
    "the weight": _assign,
    "a vector": _functional,
    "narrow and back": lambda layer: layer.half().float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["conv1d", "fused"])
def test_changes_are_noticed(name, change, count):
    layer, x = made(name)
    with torch.no_grad(), frozen_weights(layer):
        before = layer(x)
        CHANGES[change](layer)
        assert (layer(x) - before).abs().max() > 0
        assert_is_current(layer, x)
        count.clear()
        layer(x)
        assert not count


def test_optimizers_have_no_hook_outside():
    """Nothing counts their steps, nor after an exception."""
    layer, _ = made("conv1d")
    with pytest.raises(ZeroDivisionError), frozen_weights(layer), frozen_weights(layer):
        raise ZeroDivisionError
    version = layer.weight_v._version
    _step(layer, fused=True)
    assert layer.weight_v._version == version


def test_no_tensor_gets_a_parameter_s_address():
    """Otherwise another `.data` could be where the values of the kept weight were."""
    layer, x = made("conv1d")
    with torch.no_grad(), frozen_weights(layer):
        layer(x)
        addresses = {p.data_ptr() for p in parts(layer)}
        for p in parts(layer):
            p.data = p.data * 2
        others = [torch.empty_like(p) for p in parts(layer) for _ in range(256)]
        assert not addresses & {t.data_ptr() for t in others}
        assert_is_current(layer, x)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("name", ["linear", "lstm", "gru cell"])
def test_data_that_lies_otherwise(name, library, monkeypatch):
    """At the same address, without a change of a version counter."""
    if not library:
        monkeypatch.setattr(keeping, "native_library", lambda: None)
    square = {
        "linear": lambda: wn_kernels.WNLinear(16, 16),
        "lstm": lambda: wn_kernels.WNLSTM(64, 16),
        "gru cell": lambda: wn_kernels.WNGRUCell(48, 16),
    }[name]()
    key = next(key for key, _ in square.named_parameters() if key.endswith("_v"))
    x = torch.randn(2, 3, 64) if name == "lstm" else torch.randn(3, 48 if "cell" in name else 16)
    with torch.no_grad(), frozen_weights(square):
        for _ in range(2):
            assert_is_current(square, x)
        parameter = getattr(square, key)
        parameter.data = parameter.data.t()
        for _ in range(2):
            assert_is_current(square, x)


@pytest.mark.parametrize("name", ["linear", "lstm", "gru cell"])
def test_a_copy_keeps_nothing(name):
    layer, x = made("linear") if name == "linear" else of_several(name)
    with torch.no_grad(), frozen_weights(layer):
        output(layer, x)
        other = copy.copy(layer)
        other.eps = 100.0
        assert other._store is None
        assert_is_current(other, x)
        assert_is_current(layer, x)


def of_several(name):
    """A recurrent layer or a cell, and an input."""
    layer, x = made_recurrent(name)
    return layer, x[0] if name.endswith("cell") else x


@pytest.mark.parametrize("name", ["lstm", "fused", "gru cell", "fused cell"])
def test_a_write_into_a_weight_of_several(name):
    """As into that of a layer with one weight: a warning, and the weight is computed again."""
    layer, x = of_several(name)
    with torch.no_grad(), frozen_weights(layer):
        for _ in range(2):
            right_y = output(layer, x)
        getattr(layer, layer._normed()[0]).mul_(3)
        with pytest.warns(UserWarning, match="was written to in place"):
            y = output(layer, x)
        assert_same_bits(y, right_y)
        assert_same_bits(output(layer, x), right_y)


@pytest.mark.parametrize("kind", ["sparse", "nested", "meta"])
def test_inputs_that_a_layer_rejects(kind):
    """It does so with the same message, whether it has a weight or not."""
    layer, x = made("linear")
    wrong = {
        "sparse": lambda: x.to_sparse(),
        "nested": lambda: torch.nested.nested_tensor([x, x]),
        "meta": lambda: x.to("meta"),
    }[kind]()
    messages = []
    for block in (contextlib.nullcontext(), frozen_weights(layer)):
        with torch.no_grad(), block:
            for _ in range(2):
                layer(x)
                with pytest.raises((TypeError, ValueError)) as raised:
                    layer(wrong)
                messages.append(str(raised.value))
    assert len(set(messages)) == 1


def test_data_that_comes_back():
    """The same memory may hold other values later on, without a change of a version counter."""
    layer, x = made("linear")
    with torch.no_grad(), frozen_weights(layer):
        for _ in range(2):
            assert_is_current(layer, x)
        first = layer.weight_v.data
        layer.weight_v.data = 2 * first + 1
        for _ in range(2):
            assert_is_current(layer, x)
        first.copy_(torch.randn_like(first))
        layer.weight_v.data = first
        for _ in range(2):
            assert_is_current(layer, x)


def test_a_move():
    """To another dtype and to another device."""
    layer, x = made("conv2d")
    with torch.no_grad(), frozen_weights(layer):
        layer(x)
        layer.double()
        assert layer(x.double()).dtype == torch.float64
        assert_is_current(layer, x.double(), dtype=torch.float64)
        layer.to("meta")
        assert layer(x.double().to("meta")).is_meta


def test_eps():
    layer, x = made("conv2d")
    with torch.no_grad(), frozen_weights(layer):
        layer(x)
        layer.eps = 100.0
        assert_is_current(layer, x)


@pytest.mark.parametrize("kind", ["own", *NORMALISE])
def test_shared_parameters(kind):
    """Two layers share `v`, and one of them is at two places."""
    torch.manual_seed(0)
    if kind == "own":
        layers = [wn_kernels.WNLinear(4, 4) for _ in range(2)]
        layers[1].weight_v = layers[0].weight_v
    else:
        layers = [NORMALISE[kind](nn.Linear(4, 4)) for _ in range(2)]
        if kind == "weight_norm":
            layers[1].weight_v = layers[0].weight_v
        else:
            lists = [layer.parametrizations.weight for layer in layers]
            lists[1].original1 = lists[0].original1
    model, x = nn.Sequential(*layers, layers[0]), torch.randn(3, 4)
    wn_kernels.fuse(model)
    with torch.no_grad(), frozen_weights(model) as names:
        assert names == ["0", "1"]
        for _ in range(2):
            assert_is_current(model, x)
            parts(layers[1])[1].add_(0.3)
        assert_is_current(model, x)


def test_a_write_into_a_kept_weight():
    layer, x = made("linear")
    wide = right(layer, x)
    with torch.no_grad(), frozen_weights(layer):
        layer(x)
        layer.weight.mul_(2)
        with pytest.warns(UserWarning, match="weight of WNLinear was written to in place"):
            assert_matches(layer(x), wide, torch.float32, 6)
        # The initialisation of a model has effect, as outside.
        layer.apply(lambda module: module.weight.data.fill_(0.5))
        assert (layer.weight - 0.5).abs().max() < 1e-6
        assert_is_current(layer, x)


# --- gradients and modes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_with_gradients(name, count):
    """A call that needs gradients of `g` or `v` is computed as outside of the block."""
    layer, x = made(name)
    with frozen_weights(layer):
        with torch.no_grad():
            layer(x)
        count.clear()
        assert_right(*gradients(layer, x), layer, x)
        assert layer.weight.requires_grad
        y, grads = gradients(layer, x)
    outside, outside_grads = gradients(layer, x)
    assert_same_bits(y, outside)
    for key, grad in grads.items():
        assert_same_bits(grad, outside_grads[key], key)


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed", "fused"])
def test_frozen_parameters(name, count):
    """The gradients of the input and of the bias need no gradient of the weight."""
    layer, x = made(name)
    for p in parts(layer):
        p.requires_grad_(False)
    wide = copy.deepcopy(layer).double()
    x.requires_grad_()
    wide_x = x.detach().double().requires_grad_()
    count.clear()
    with frozen_weights(layer):
        for _ in range(2):
            got = torch.autograd.grad(layer(x).square().sum(), [x, layer.bias])
        assert len(count) == 1
    with use_backend("reference"):
        expected = torch.autograd.grad(wide(wide_x).square().sum(), [wide_x, wide.bias])
    for grad, wanted in zip(got, expected, strict=True):
        assert_matches(grad, wanted, torch.float32, 512, roundings=4)


def test_inference_mode():
    """What is computed in inference mode serves a call outside of it. Parameters that were made in
    inference mode have no version counter, and no weight of them is kept."""
    layer, x = made("conv1d")
    with frozen_weights(layer):
        with torch.inference_mode():
            first = layer(x)
        for p in parts(layer):
            p.requires_grad_(False)
        x.requires_grad_()
        y = layer(x)
        assert_same_bits(y.detach(), first.clone())
        y.sum().backward()
        assert x.grad.norm() > 0
    with torch.inference_mode():
        layer, x = made("conv1d")
        with frozen_weights(layer):
            layer(x)
            parts(layer)[0].mul_(2)
            assert_is_current(layer, x)


@pytest.mark.parametrize("name", ["linear", "conv1d", "transposed 2d", "fused"])
def test_autocast(name, count):
    """A weight is kept in each dtype that it is used in."""
    layer, x = made(name)
    wide = copy.deepcopy(layer).double()
    count.clear()
    with torch.no_grad(), frozen_weights(layer):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
            assert y.dtype == torch.bfloat16
            rounded = x.bfloat16().double()
            assert_matches(y, right(wide, rounded), torch.bfloat16, 64, roundings=4)
            assert_is_current(layer, x)
        assert len(count) == 2


@pytest.mark.parametrize(
    ("x_dtype", "v_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64,) * 2],
)
def test_dtypes(x_dtype, v_dtype, count):
    """The product is in the dtype of the input, and the weight is rounded to it alone."""
    layer, x = made("conv1d")
    layer, x = layer.to(v_dtype), x.to(x_dtype)
    count.clear()
    with torch.no_grad(), frozen_weights(layer):
        for _ in range(2):
            assert layer(x).dtype == x_dtype
            assert_is_current(layer, x, dtype=x_dtype)
        assert len(count) == 1


def test_wrong_input():
    """The messages are those of outside the block, for what the plain layer would take."""
    layer, _ = made("linear")
    for wrong in ([1.0] * 6, torch.zeros(2, 6, dtype=torch.int64)):
        with torch.no_grad():
            with pytest.raises(TypeError) as outside:
                layer(wrong)
            with frozen_weights(layer), pytest.raises(TypeError) as inside:
                layer(wrong)
        assert str(inside.value) == str(outside.value)
