"""Recurrent layers whose steps the native library takes, without a weight."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck
from torch.nn.utils import parametrize

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits
from tests.library import watch_weights
from tests.modules import test_recurrent
from tests.modules.test_recurrent import LAYERS, check, flat, states
from wn_kernels import plan
from wn_kernels.modules import sequences
from wn_kernels.operators import native_library

pytestmark = pytest.mark.skipif(native_library() is None, reason="there is no native library")

KINDS = [kind for kind in LAYERS if kind != "projected"]
made = partial(test_recurrent.made, inputs=5, units=20)


@pytest.fixture
def taken(monkeypatch):
    """The library takes every sequence that it serves. The list has an entry for each direction."""
    calls = []
    library, of_library = native_library(), native_library().recurrence

    def watched(*arguments):
        found = of_library(*arguments)
        if found is not None:
            calls.append(arguments[0])
        return found

    monkeypatch.setattr(library, "recurrence", watched)
    monkeypatch.setattr(plan.sequences, "pays", lambda *size: True)
    return calls


def folded(layer):
    plain = copy.deepcopy(layer)
    wn_kernels.fold(plain)
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument(kind, taken, monkeypatch):
    flags = (True, False)
    weights = watch_weights(monkeypatch)
    for layers, bias, batch_first, both in itertools.product((1, 2), flags, flags, flags):
        layer = made(
            kind, num_layers=layers, bias=bias, batch_first=batch_first, bidirectional=both
        )
        x = torch.randn(*((2, 4) if batch_first else (4, 2)), 5)
        taken.clear()
        check(layer, x, states(layer, 2))
        check(layer, x)
        assert len(taken) == 2 * layers * (1 + both)
    assert weights == []


@pytest.mark.parametrize("kind", KINDS)
def test_shared_weights(kind, taken, monkeypatch):
    """Kept, cached and partly normed weights are formed, and the steps take them."""
    for batch_first in (False, True):
        layer = made(kind, batch_first=batch_first)
        x, state = torch.randn(3, 3, 5), states(layer, 3)
        y = flat(layer(x, state))
        wide = [t.detach().double() for t in y]
        taken.clear()
        with parametrize.cached():
            check(layer, x, state)
        with torch.no_grad(), wn_kernels.frozen_weights(layer):
            for _ in range(2):
                for t, right in zip(flat(layer(x, state)), wide, strict=True):
                    assert_matches(t, right, torch.float32, 64, roundings=8)
        assert len(taken) == 3
        taken.clear()
        layer = made(kind, dim=1, batch_first=batch_first)
        check(layer, x, state)
        assert len(taken) == 1


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_one_weight_of_two(kind, norm, taken):
    """A layer of which PyTorch norms one weight is converted, and computes what it did."""
    plain = LAYERS[kind][0].plain(5, 8)
    nn.utils.parametrizations.weight_norm(plain, "weight_hh_l0")
    wide = copy.deepcopy(plain).double()
    wn_kernels.fuse(plain)
    x = torch.randn(4, 2, 5)
    assert_matches(plain(x)[0], wide(x.double())[0].detach(), torch.float32, 64, roundings=8)
    assert len(taken) == 1
    layer = made(kind, norm=norm, eps=0.5)
    assert_same_bits(layer(x)[0], layer(x)[0])
    assert len(taken) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_pytorchs(kind, taken):
    """After the same seed, the layer drops the numbers that torch.nn's layer drops."""
    layer = made(kind, num_layers=3, dropout=0.5, bidirectional=True).double()
    plain = folded(layer)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    torch.manual_seed(3)
    expected = flat(plain(x))
    torch.manual_seed(3)
    for y, right in zip(flat(layer(x)), expected, strict=True):
        assert_matches(y, right.detach(), torch.float64, 64, roundings=8)
    assert len(taken) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind, taken):
    layer = made(kind, inputs=3, units=3, num_layers=2, bidirectional=True).double()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)

    def output(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))[0]

    if kind == "relu":
        with torch.no_grad():
            for p in parameters:
                p.abs_()
            x.abs_()
    assert gradgradcheck(output, (x, *parameters), fast_mode=True)
    assert taken


@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_serves(kind, taken):
    """Wrong arguments raise what they raise in torch.nn, and other calls go to its functions."""
    layer = made(kind)
    plain = folded(layer)
    x, state = torch.randn(4, 2, 5), states(layer, 2)
    is_lstm = kind == "lstm"
    wrong = [
        (x[..., 1:],),
        (x[None],),
        (x.double(),),
        (x, state[0]) if is_lstm else (x, (state, state)),
        (x, tuple(t[:, :1] for t in state) if is_lstm else state[:, :1]),
        (x, tuple(t.double() for t in state) if is_lstm else state.double()),
        (x[0], state),
    ]
    for arguments in wrong:
        with pytest.raises(Exception) as expected:  # noqa: PT011
            plain(*arguments)
        with pytest.raises(type(expected.value)) as found:
            layer(*arguments)
        assert str(found.value) == str(expected.value)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    with wn_kernels.use_backend("aten"):
        layer(x)
    layer(nn.utils.rnn.pack_sequence([x[:, 0], x[:2, 1]]))
    torch.func.grad(lambda x: layer(x)[0].sum())(x)
    assert taken == []


def test_an_empty_batch(taken):
    layer = made("gru")
    for shape in ((4, 0, 5), (0, 2, 5)):
        plain = folded(layer)
        try:
            expected = plain(torch.zeros(shape))[0].shape
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=str(error)[:20]):
                layer(torch.zeros(shape))
        else:
            assert layer(torch.zeros(shape))[0].shape == expected
    assert taken == []


def test_norms_out_of_range(taken):
    """PyTorch's function gets the formed weights."""
    layer = made("gru", num_layers=2)
    with torch.no_grad():
        layer.weight_hh_l1_v.mul_(1e-25)
    x = torch.randn(3, 2, 5)
    right = folded(layer).double()(x.double())[0].detach()
    taken.clear()
    assert_matches(layer(x)[0], right, torch.float32, 64, roundings=8)
    assert len(taken) == 1  # the first storey


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_memory_of_a_training_step(kind, taken):
    """It keeps less than PyTorch's function with formed weights does."""
    x = torch.randn(16, 8, 64)

    def kept(layer):
        sizes = {}

        def pack(t):
            sizes[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        return sum(sizes.values())

    layer = made(kind, inputs=64, units=64)
    ours = kept(layer)
    with wn_kernels.use_backend("aten"):
        assert ours < kept(layer)


def test_the_way_follows_the_cost_model(monkeypatch):
    asked = []
    monkeypatch.setattr(plan.sequences, "pays", lambda *size: asked.append(size) or len(asked) < 2)
    layer = made("lstm", inputs=5, units=20, num_layers=3, bidirectional=True)
    calls = watch_weights(monkeypatch)
    layer(torch.randn(4, 2, 5))
    rest = (20, torch.float32, True, False)
    assert sorted(asked) == [(True, 4, 4, 2, 5, *rest), (True, 4, 4, 2, 40, *rest)]
    assert calls == [12]
    assert sequences.library_for(torch.randn(3)) is native_library()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_in_place(kind, taken):
    """The output may be written to and detached, as PyTorch's may be."""
    for batch_first in (False, True):
        layer = made(kind, batch_first=batch_first)
        x = torch.randn(3, 3, 5)
        y = layer(x)[0]
        right = torch.autograd.grad(y.relu().sum(), list(layer.parameters()))
        y = torch.relu_(layer(x)[0])
        for g, expected in zip(
            torch.autograd.grad(y.sum(), list(layer.parameters())), right, strict=True
        ):
            assert_same_bits(g, expected)
        assert not layer(x)[0].detach_().requires_grad


@pytest.mark.parametrize("kind", [*KINDS, "cell"])
def test_batched_gradients(kind, taken):
    layer = wn_kernels.WNGRUCell(5, 20) if kind == "cell" else made(kind)
    x = torch.randn(*((2,) if kind == "cell" else (4, 2)), 5, requires_grad=True)
    y = layer(x) if kind == "cell" else layer(x)[0]
    dy = torch.randn(3, *y.shape)
    every = torch.autograd.grad(y, x, dy, retain_graph=True, is_grads_batched=True)[0]
    for batched, one in zip(every, dy, strict=True):
        alone = torch.autograd.grad(y, x, one, retain_graph=True)[0]
        assert_matches(batched, alone.double(), torch.float32, 64, roundings=16)


def test_numbers_that_were_dropped(taken):
    """A layer that the library leaves to PyTorch after it has dropped numbers drops the same."""
    layer = made("gru", num_layers=2, dropout=0.5)
    plain = folded(layer)
    turned = layer.weight_hh_l1_v.detach().t().contiguous().t()
    layer.weight_hh_l1_v = nn.Parameter(turned)
    x = torch.randn(4, 2, 5)
    torch.manual_seed(3)
    right, after = plain.double()(x.double())[0].detach(), torch.rand(1)
    torch.manual_seed(3)
    y = layer(x)[0]
    assert len(taken) == 1
    assert_same_bits(torch.rand(1), after)
    assert ((y == 0) == (right == 0)).all()


def test_a_sparse_input_of_a_cell():
    cell = wn_kernels.WNGRUCell(5, 20)
    x = torch.randn(2, 5).to_sparse()
    right = folded(cell).double()(x.double()).detach()
    assert_matches(cell(x), right, torch.float32, 64, roundings=8)
