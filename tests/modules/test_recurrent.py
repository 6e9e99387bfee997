"""`WNRNN`, `WNLSTM`, `WNGRU` and their cells as drop-ins for `torch.nn`'s."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import wn_kernels
import wn_kernels.functional as WF
from tests.comparison import DIMS, assert_matches, assert_same_bits, assert_zero
from tests.convert.layers import NORMALISE
from tests.library import watch_weights
from wn_kernels import plan
from wn_kernels.modules import sequences
from wn_kernels.modules.weight import NormedWeights
from wn_kernels.operators import native_library

INPUTS, HIDDEN, BATCH, STEPS = 6, 8, 3, 5
LAYERS = {
    "rnn": (wn_kernels.WNRNN, {}),
    "relu": (wn_kernels.WNRNN, {"nonlinearity": "relu"}),
    "lstm": (wn_kernels.WNLSTM, {}),
    "projected": (wn_kernels.WNLSTM, {"proj_size": 2}),
    "gru": (wn_kernels.WNGRU, {}),
}
CELLS = {
    "rnn cell": (wn_kernels.WNRNNCell, {}),
    "relu cell": (wn_kernels.WNRNNCell, {"nonlinearity": "relu"}),
    "lstm cell": (wn_kernels.WNLSTMCell, {}),
    "gru cell": (wn_kernels.WNGRUCell, {}),
}
ALL = LAYERS | CELLS


def made(kind, inputs=INPUTS, units=HIDDEN, **options):
    """A layer whose `g` is not the norm."""
    cls, more = ALL[kind]
    layer = cls(inputs, units, **more, **options)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.endswith("_g"):
                p.mul_(torch.rand_like(p) + 0.5)
    return layer


def flat(result):
    """Every tensor of an output: the sequence, and the states at its end."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, torch.Tensor) else [t for r in result for t in flat(r)]


def widened(layer):
    """The plain layer in float64, and its parameters by name: `g · v / ‖v‖` by its definition."""
    parameters = {
        name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()
    }
    values = {name: p for name, p in parameters.items() if name.startswith("bias")}
    for name in layer._normed():
        g, v = parameters[name + "_g"], parameters[name + "_v"]
        dims = [d for d in (0, 1) if d != layer.dim]
        norm = v.square().sum(dims, keepdim=layer.dim is not None).sqrt().clamp_min(layer.eps)
        values[name] = v * (g / norm)
    names = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
    given = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    if not given.get("proj_size"):
        given.pop("proj_size", None)
    if hasattr(layer, "nonlinearity"):
        given["nonlinearity"] = layer.nonlinearity
    plain = layer.plain(layer.input_size, layer.hidden_size, **given, dtype=torch.float64)
    return plain.train(layer.training), parameters, values


def wide(argument):
    if isinstance(argument, torch.Tensor):
        return argument.detach().double().requires_grad_()
    if isinstance(argument, PackedSequence):
        return argument.to(torch.float64)
    return argument if argument is None else tuple(map(wide, argument))


def loss(results):
    """A different weight for every number, so that little cancels."""
    return sum((y * torch.arange(y.numel()).to(y).view(y.shape).sin()).sum() for y in results)


def check(layer, *arguments, dtype=torch.float32, seed=None):
    """Output, states and gradients against the plain layer in float64."""
    plain, parameters, values = widened(layer)
    if seed is not None:
        torch.manual_seed(seed)
    right = flat(torch.func.functional_call(plain, values, tuple(map(wide, arguments))))
    if seed is not None:
        torch.manual_seed(seed)
    found = flat(layer(*arguments))
    assert len(found) == len(right)
    for y, expected in zip(found, right, strict=True):
        assert_matches(y, expected.detach(), dtype, 64, roundings=16)
    grads = torch.autograd.grad(loss(right), parameters.values())
    layer.zero_grad()
    loss(found).backward()
    terms = max(g.norm().item() for g in grads)
    options = {"roundings": 16, "scale": terms / 8, "terms": terms}
    if torch.finfo(dtype).eps > 1e-3:  # small ones drown in the rounding of the others
        every = torch.cat([p.grad.flatten() for p in layer.parameters()])
        wide_grads = torch.cat([g.flatten() for g in grads])
        assert_matches(every, wide_grads, dtype, 256, **options, what="gradients")
        return
    for name, expected, p in zip(parameters, grads, layer.parameters(), strict=True):
        if arguments[1:] or not isinstance(layer, nn.RNNCellBase) or "_hh" not in name:
            assert_matches(p.grad, expected, dtype, 256, **options, what=name)
        elif name.startswith("weight"):  # it multiplies a state of zeros
            assert_zero(p.grad)


def states(layer, *shape):
    """Initial states for a layer with this batch."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, *shape, layer.proj_size or layer.hidden_size)
    return (h, torch.randn(count, *shape, layer.hidden_size)) if isinstance(layer, nn.LSTM) else h


@pytest.mark.parametrize("kind", LAYERS)
def test_every_argument(kind):
    flags = (True, False)
    every = itertools.product((1, 2), flags, flags, flags)
    for (layers, bias, batch_first, both), dim in zip(every, itertools.cycle(DIMS)):
        layer = made(
            kind,
            num_layers=layers,
            bias=bias,
            batch_first=batch_first,
            bidirectional=both,
            dim=dim,
        )
        x = torch.randn(*((BATCH, STEPS) if batch_first else (STEPS, BATCH)), INPUTS)
        check(layer, x, states(layer, BATCH))


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_and_no_batch(kind):
    for both, batch_first in ((False, True), (True, False)):
        layer = made(kind, num_layers=2, bidirectional=both, batch_first=batch_first)
        check(layer, torch.randn(STEPS, INPUTS), states(layer))
        check(layer, torch.randn(STEPS, INPUTS))
        x = torch.randn(BATCH, STEPS, INPUTS)
        lengths = torch.tensor([2, 5, 3])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        check(layer, packed)
        check(layer, packed, states(layer, BATCH))


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_between_layers(kind):
    layer = made(kind, num_layers=3, dropout=0.5).double()
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    check(layer, x, dtype=torch.float64, seed=7)
    with torch.no_grad():
        assert (layer(x)[0] != layer(x)[0]).any()
        layer.eval()
        assert_same_bits(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind):
    for dim, bias, batch in itertools.product(DIMS, (True, False), ((), (BATCH,))):
        cell = made(kind, bias=bias, dim=dim)
        h = torch.randn(*batch, HIDDEN)
        state = (h, torch.randn(*batch, HIDDEN)) if "lstm" in kind else h
        check(cell, torch.randn(*batch, INPUTS), state)
        check(cell, torch.randn(*batch, INPUTS))


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_forms_no_weight(kind, norm, count, monkeypatch):
    """It takes the products of layers, unless a weight is kept or cached, or torch.nn's own
    `forward` has to look at an argument. The native library takes the second product itself."""
    if count == 2:
        monkeypatch.setattr(sequences, "library_for", lambda x: None)
    elif native_library() is None:
        pytest.skip("there is no native library")
    cell = made(kind, norm=norm)
    x, h = torch.randn(BATCH, INPUTS), torch.randn(BATCH, HIDDEN)
    state = (h, h) if "lstm" in kind else h
    with torch.no_grad():
        y = flat(cell(x, state))[0]
    products, weights = [], watch_weights(monkeypatch)
    of_product = WF.wn_linear
    monkeypatch.setattr(WF, "wn_linear", lambda *a, **k: products.append(1) or of_product(*a, **k))
    cell(x, state)
    assert (len(products), len(weights)) == (count, 0)
    with parametrize.cached():
        assert_matches(flat(cell(x, state))[0], y.double(), torch.float32, 64, roundings=8)
    with torch.no_grad(), wn_kernels.frozen_weights(cell):
        assert_matches(flat(cell(x, state))[0], y.double(), torch.float32, 64, roundings=8)
    with torch.autocast("cpu", torch.bfloat16):
        cell(x, state)
    one = flat(cell(x[0], (h[0], h[0]) if "lstm" in kind else h[0]))[0]
    assert_matches(one, y[0].double(), torch.float32, 64, roundings=8)
    assert len(weights) > 0
    for wrong in (x[:, 1:], x.double(), x[:, None]):
        with pytest.raises((RuntimeError, ValueError)):
            cell(wrong, state)
    with pytest.raises((RuntimeError, ValueError)):
        cell(x, (h[1:], h[1:]) if "lstm" in kind else h[1:])
    assert len(products) == count


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(kind, dtype):
    layer = made(kind, dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    check(layer, torch.randn(STEPS, INPUTS, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("kind", ALL)
def test_eps(kind):
    """Norms below `eps` count as `eps`, which may change."""
    layer = made(kind, eps=2.0)
    check(layer, torch.randn(STEPS, INPUTS))
    layer.eps = 4.0
    check(layer, torch.randn(STEPS, INPUTS))


@pytest.mark.parametrize("kind", ALL)
def test_starts_as_the_plain_layer(kind):
    """The same seed gives the weights that torch.nn has, and leaves the generator where it does."""
    cls, options = ALL[kind]
    options = options | ({"num_layers": 2, "bidirectional": True} if kind in LAYERS else {})
    torch.manual_seed(3)
    plain = cls.plain(INPUTS, HIDDEN, **options)
    after = torch.rand(1)
    torch.manual_seed(3)
    layer = cls(INPUTS, HIDDEN, **options, dim=1, eps=1e-9)
    assert_same_bits(torch.rand(1), after)
    assert isinstance(layer, cls.plain)
    for name, p in plain.named_parameters():
        assert_matches(getattr(layer, name), p.detach().double(), torch.float32, 24)
    assert [*layer.state_dict()][:2] == [
        f"weight_ih{'_l0' if kind in LAYERS else ''}_{k}" for k in "vg"
    ]
    x = torch.randn(STEPS, INPUTS)
    right = flat(copy.deepcopy(plain).double()(x.double()))[0].detach()
    assert_matches(flat(layer(x))[0], right, torch.float32, 64, roundings=8)
    assert repr(layer).endswith("dim=1, eps=1e-09)")
    with pytest.raises(ValueError, match="dim=2 is out of range"):
        cls(INPUTS, HIDDEN, dim=2)
    with pytest.raises((TypeError, ValueError)):
        cls(INPUTS, HIDDEN, proj_size=HIDDEN)


@pytest.mark.parametrize("kind", ALL)
def test_weights_read_and_assign(kind):
    layer = made(kind)
    name = layer._normed()[1]
    g, v = layer._tensors(name)
    weight = torch.randn_like(v)
    setattr(layer, name, nn.Parameter(weight))
    assert layer._tensors(name)[1] is v
    assert not hasattr(layer, "weight")
    assert_matches(getattr(layer, name), weight.double(), torch.float32, 8)
    getattr(layer, name).square().sum().backward()
    assert_matches(g.grad, 2 * g.detach().double(), torch.float32, 8)
    x = torch.randn(STEPS, INPUTS)
    check(layer, x)
    with pytest.raises(ValueError, match=f"weight has shape .*, expected .{v.shape[0]}, "):
        setattr(layer, name, torch.zeros(2, 2))
    new = nn.Parameter(torch.randn(v.shape[0]))
    layer.register_parameter("bias_ih" + name.removeprefix("weight_hh"), new)
    check(layer, x)


# --- state dicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*NORMALISE, "plain"])
@pytest.mark.parametrize("kind", ALL)
def test_loads_and_saves_every_form(kind, form):
    cls, options = ALL[kind]
    torch.manual_seed(7)
    plain = cls.plain(INPUTS, HIDDEN, **options)
    layer = cls(INPUTS, HIDDEN, **options)
    weights = {n: p.detach().clone() for n, p in plain.named_parameters()}
    x = torch.randn(STEPS, INPUTS)
    right = flat(copy.deepcopy(plain).double()(x.double()))[0].detach()
    if form != "plain":
        for name in layer._normed():
            NORMALISE[form](plain, name)
    state = plain.state_dict()
    keys = list(state)
    layer.load_state_dict(state)
    assert list(state) == keys, "the caller's state dict was changed"
    for name, weight in weights.items():
        assert_matches(getattr(layer, name), weight.double(), torch.float32, 24)
    assert_matches(flat(layer(x))[0], right, torch.float32, 64, roundings=8)
    saved = wn_kernels.state_dict(layer, form)
    assert set(saved) == set(keys)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    plain.load_state_dict(saved)
    assert_matches(flat(plain(x))[0], right, torch.float32, 64, roundings=8)
    before = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(saved | {keys[0]: torch.zeros(9, 9)})
    for p, old in zip(layer.parameters(), before, strict=True):
        assert_same_bits(p.detach(), old)


# --- life as a module ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_copies_pickles_and_moves(kind):
    layer = made(kind, dim=1, eps=1e-6)
    x = torch.randn(STEPS, INPUTS)

    @torch.no_grad()
    def output(module):
        return flat(module(x))[0]

    y = output(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    expected = flat(copy.deepcopy(layer).double()(x.double()))[0].detach()
    assert_matches(y, expected, torch.float32, 64, roundings=8)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    for other in others:
        assert type(other) is type(layer)
        assert (other.dim, other.eps) == (1, 1e-6)
        assert_same_bits(output(other), y)
        if isinstance(other, nn.RNNBase):
            other.flatten_parameters()
        empty = copy.deepcopy(other).to("meta").to_empty(device="cpu")
        empty.load_state_dict(other.state_dict())
        assert_same_bits(output(empty), y)
        replica = other._replicate_for_data_parallel()
        for name, p in other._parameters.items():
            setattr(replica, name, p.detach().clone())
        found = output(replica)
        if isinstance(layer, nn.RNNBase):
            assert_same_bits(found, y)
        else:  # a replica of a cell has no parameters, and forms its weights
            assert_matches(found, expected, torch.float32, 64, roundings=8)


@pytest.mark.parametrize("kind", ALL)
def test_nothing_of_a_call_is_kept(kind):
    layer = made(kind)
    kept = set(map(id, layer.__dict__.values()))
    layer(torch.randn(STEPS, INPUTS))
    assert {id(value) for value in layer.__dict__.values()} == kept
    if isinstance(layer, nn.RNNBase):
        assert layer._flat_weights == [None] * len(layer._flat_weights_names)


@pytest.mark.parametrize("kind", ALL)
def test_one_call_for_all_weights(kind, monkeypatch):
    calls = watch_weights(monkeypatch)
    monkeypatch.setattr(plan.sequences, "pays", lambda *size: False)
    layer = made(kind)
    x = torch.randn(STEPS, INPUTS)
    layer(x if isinstance(layer, nn.RNNBase) else x[0])
    assert calls == [len(layer._normed())]
    with parametrize.cached(), torch.no_grad():
        y = flat(layer(torch.ones(STEPS, INPUTS)))[0]
        next(layer.parameters()).zero_()
        assert_same_bits(flat(layer(torch.ones(STEPS, INPUTS)))[0], y)
    assert (flat(layer(torch.ones(STEPS, INPUTS)))[0] != y).any()


def test_writes_into_weights():
    layer = made("lstm")
    layer.apply(lambda m: nn.init.orthogonal_(m.weight_hh_l0))
    w = layer.weight_hh_l0.detach()
    assert_matches(w.T @ w, torch.eye(HIDDEN, dtype=torch.float64), torch.float32, 16, roundings=8)
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
    with pytest.warns(UserWarning, match="weight_ih_l0 of WNLSTM was written to in place"):
        layer(torch.randn(STEPS, INPUTS))


# --- back to a plain layer -----------------------------------------------------------------------

REMOVALS = {
    "fold": lambda layer, name: wn_kernels.fold(layer),
    "own": wn_kernels.remove_weight_norm,
    "hook": nn.utils.remove_weight_norm,
    "parametrization": parametrize.remove_parametrizations,
}


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("kind", ALL)
def test_removals(kind, removal):
    layer = made(kind)
    plain = type(layer).plain
    x = torch.randn(STEPS, INPUTS)
    right = flat(copy.deepcopy(layer).double()(x.double()))[0].detach()
    names = layer._normed()
    layer._tensors(names[0])[0].requires_grad_(False)
    layer._tensors(names[0])[1].requires_grad_(False)
    for name in names:
        if isinstance(layer, NormedWeights):
            REMOVALS[removal](layer, name)
        assert_matches(flat(layer(x))[0], right, torch.float32, 64, roundings=8)
        assert_matches(flat(copy.deepcopy(layer).double()(x.double()))[0], right, torch.float32, 64)
    assert type(layer) is plain
    _, options = ALL[kind]
    assert list(layer.state_dict()) == list(plain(INPUTS, HIDDEN, **options).state_dict())
    assert [p.requires_grad for p in layer.parameters()] == [False, True, True, True, True][
        : len([*layer.parameters()])
    ]
    assert not layer._forward_pre_hooks
    assert wn_kernels.fold(layer) == []


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = made("lstm", num_layers=2, dropout=0.1)
        layer(torch.randn(STEPS, INPUTS))[0].sum().backward()
        copy.deepcopy(layer).half().float()


@pytest.mark.parametrize("kind", ALL)
def test_is_explained(kind):
    layer = made(kind)
    text = wn_kernels.explain(layer, (STEPS, INPUTS))
    size = 4 * sum(layer._tensors(name)[1].numel() for name in layer._normed())
    lines = [line.split() for line in text.splitlines()]
    count = len(layer._normed())
    title = [f"{type(layer).__name__}:", str(count), *["weights", "in", "one", "call"]]
    assert title in lines
    if not isinstance(layer, nn.RNNBase):  # the products of a step
        assert lines[0][0] == "linear"
    assert ["forward", "weight", f"{2 * size:.3g}", "1"] in lines
    assert ["backward", "weight", f"{3 * size:.3g}", "1"] in lines
    model = nn.Sequential(layer)
    assert f"\n0: {count} weights" in f"\n{wn_kernels.explain(model, (STEPS, INPUTS))}"


@pytest.mark.parametrize("make", [lambda: made("lstm"), lambda: wn_kernels.WNLinear(6, 8)])
def test_no_other_parameter_is_normalised(make):
    """It is refused, and nothing has changed."""
    layer = make()
    x = torch.randn(STEPS, INPUTS)
    right = flat(copy.deepcopy(layer).double()(x.double()))[0].detach()
    before = list(layer.state_dict())
    name = next(name for name in before if name.startswith("bias"))
    with pytest.raises(TypeError, match=f"{name} of {type(layer).__name__} cannot be"):
        wn_kernels.weight_norm(layer, name)
    assert list(layer.state_dict()) == before
    assert_matches(flat(layer(x))[0], right, torch.float32, 64, roundings=8)
