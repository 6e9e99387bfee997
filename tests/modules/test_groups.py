"""Which layers take part in the forwards of a group, and how they take their weights, with the
native library and without it."""

import pytest
import torch
from torch import nn

import wn_kernels
from tests import library
from tests.comparison import assert_matches
from wn_kernels import grouped, plan, use_backend
from wn_kernels.backends import native, reference
from wn_kernels.modules import prepared

X = torch.linspace(-1, 1, 24).view(2, 3, 4)


class Net(nn.Module):
    """Three layers, of which the last is not used at first."""

    def __init__(self):
        super().__init__()
        self.first = wn_kernels.WNConv1d(3, 4, 3, padding=1)
        self.second = wn_kernels.WNConvTranspose1d(4, 4, 3, padding=1)
        self.idle = wn_kernels.WNLinear(4, 4)
        self.is_idle = True

    def forward(self, x):
        y = self.second(self.first(x).tanh())
        return y if self.is_idle else self.idle(y)


class Pair:
    """A grouped model, beside a copy in float64 without a group. `formed` has the number of weights
    that each call computed."""

    def __init__(self):
        torch.manual_seed(0)
        self.plain = Net().double()
        self.grouped = Net()
        self.grouped.load_state_dict(self.plain.state_dict())
        wn_kernels.fuse(self.grouped, grouped=True)
        self.formed = []

    def __call__(self, x=X, train=False):
        models = self.plain, self.grouped
        with torch.set_grad_enabled(train):
            expected, found = (
                model(x.to(model.first.weight_v.dtype).requires_grad_(train)) for model in models
            )
        assert_matches(found, expected, torch.float32, 64)
        if train:
            for model, y in zip(models, (expected, found), strict=True):
                model.zero_grad()
                y.square().sum().backward()
            grads = (model.second.weight_v.grad for model in models)
            assert_matches(*reversed([*grads]), torch.float32, 256, roundings=8)

    def counts(self):
        """The weights that were computed since the last time, call by call."""
        found = self.formed[:]
        self.formed.clear()
        return found


@pytest.fixture(params=["library", "python"])
def pair(request, monkeypatch):
    native.build()
    if request.param == "python":
        library.hide(monkeypatch)
    pair = Pair()
    real = grouped.formed

    def formed(v, *rest, **options):
        pair.formed.append(len(v))
        return real(v, *rest, **options)

    monkeypatch.setattr(prepared.grouped, "formed", formed)
    return pair


@pytest.fixture
def shares(monkeypatch):
    """A function that sets which calls take the group's weight."""

    def decided_by(decision):
        monkeypatch.setattr(prepared.plan, "shares", decision)

    return decided_by


def test_a_group_of_layers_with_better_ways(pair, shares):
    """It does nothing, but looks at its layers now and then."""
    shares(lambda call, *_: call.x_shape[0] > 2)
    pair()
    assert pair.counts() == [3]
    group = pair.grouped._group
    with torch.no_grad():
        begun = group.begin()
        group.end(begun)
        assert begun is not None  # a layer that was not used may take part
        pair.grouped.is_idle = pair.plain.is_idle = False
        for _ in range(prepared.RESTS + 1):
            pair()
        assert group.begin() is None
    assert pair.counts() == []
    for _ in range(prepared.RESTS + 2):
        pair(torch.cat([X, X]))
    assert 3 in pair.counts()


def test_layers_take_part_one_by_one(pair, shares):
    shares(lambda call, *_: call.conv is not None and not call.conv.transposed)
    for _ in range(prepared.RESTS + 3):
        pair(train=True)
    assert set(pair.counts()[1:]) == {1}
    pair.grouped.is_idle = pair.plain.is_idle = False
    pair(train=True)
    assert pair.counts() == [1]


def test_a_layer_that_was_not_used(pair, shares):
    """The next forward leaves its weight out, and the one after its use computes it."""
    shares(lambda *_: True)
    for expected in ([3], [2], [2]):
        pair()
        assert pair.counts() == expected
    pair.grouped.is_idle = pair.plain.is_idle = False
    for expected in ([2], [3]):
        pair()
        assert pair.counts() == expected


def test_modes_do_not_mix(pair, shares):
    """Layers have other ways in training than in inference."""
    shares(lambda call, plan, records: records)
    counts = []
    for _ in range(3):
        for train in (True, False):
            pair(train=train)
            counts.append(pair.counts())
    assert counts == [[3], [3], [2], [], [2], []]


def test_few_layers_have_no_group(pair, shares, monkeypatch):
    """Where the native library launches on a GPU."""
    shares(lambda *_: True)
    assert plan.fewest("native") == 1 < plan.fewest("triton")
    monkeypatch.setattr(prepared.plan, "fewest", lambda _: 3)
    pair()
    assert pair.counts() == [3]
    pair()
    assert pair.counts() == []


def test_settings_that_change(pair, shares):
    """Options are read again, and what depends on TF32 is decided again."""
    decided = []
    shares(lambda *_: decided.append(1) or True)
    pair()
    pair()
    assert len(decided) == 2
    for model in (pair.plain, pair.grouped):
        model.first.eps = 8.0
    pair()
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        pair()
        first = len(decided)
        torch.backends.cudnn.allow_tf32 = True
        pair()
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert len(decided) == first + 2
    for model in (pair.plain, pair.grouped):
        model.first.dim = None
        model.first.weight_g = nn.Parameter(torch.tensor(2.0, dtype=model.first.weight_v.dtype))
    pair()


def test_what_a_layer_does_not_take(pair, shares):
    """Every reason, by the function that a layer calls."""
    shares(lambda *_: True)
    model = pair.grouped
    layer, group = model.first, model._group
    v, g, bias = layer.weight_v, layer.weight_g, layer.bias
    pair()
    pair(train=True)

    def taken(x=X, v=v, g=g, bias=bias):
        return prepared.take(layer, x, v, g, bias)

    begun = group.begin()
    try:
        w = taken()
        assert_matches(w, reference.weight_norm(v.double(), g.double(), 0, 0.0), v.dtype, 16)
        assert w.requires_grad
        assert taken(X.requires_grad_()) is w
        assert taken(v=v.detach()) is taken(g=g.detach()) is None
        assert taken(X.half()) is taken(X, bias=bias.double()) is None
        assert taken(X.to("meta")) is None
        with torch.no_grad():
            assert taken() is None
        with torch.inference_mode():
            assert taken() is None
        with torch.autocast("cpu", torch.bfloat16):
            assert taken() is None
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            assert taken() is None
        assert taken() is w
        with torch.no_grad():
            v.mul_(1.0)
        assert taken() is None
    finally:
        group.end(begun)
        X.requires_grad_(False)
    assert taken() is None


def test_one_piece_of_memory(device):
    """On a GPU, weights that no graph keeps share one piece of memory."""
    native.build()
    shapes = [((6, 5, 3), 0), ((40, 7), 0), ((5, 4, 16), 2), ((5, 2, 2, 3), 0)]
    v = [torch.randn(shape, device=device) for shape, _ in shapes]
    v[3] = v[3].to(memory_format=torch.channels_last)
    g = [torch.rand(wn_kernels.call.kept_shape(*each), device=device) + 0.5 for each in shapes]
    dtypes = None, torch.bfloat16, torch.float16, None
    options = tuple(dim for _, dim in shapes), (0.0,) * 4, dtypes, ("l2",) * 4

    def pieces(w):
        for t, own, scale, (_, dim) in zip(w, v, g, shapes, strict=True):
            expected = reference.weight_norm(own.double(), scale.double(), dim, 0.0)
            assert_matches(t, expected, t.dtype, own.numel())
            assert t.stride() == own.stride()
            assert not t._is_view()
        return len({t.untyped_storage().data_ptr() for t in w})

    with use_backend("triton"):
        with torch.no_grad():
            w = grouped.formed(v, g, options, together=True)
            assert pieces(w) == 1
            begins = sorted(t.data_ptr() for t in w)
            assert not any((begin - begins[0]) % 512 for begin in begins)
            w[0].zero_()
            assert {t._version for t in w[1:]} == {0}
            assert pieces(grouped.formed(v, g, options)) == 4
        v[0].requires_grad_()
        w = grouped.formed(v, g, options, together=True)
        assert pieces(w) == 4
        assert all(t.requires_grad for t in w)


def test_the_report_of_a_small_group(monkeypatch):
    """It states what too few layers do."""
    monkeypatch.setattr(plan, "shares", lambda *_: True)
    for fewest, note in ((3, "grouped: "), (4, "its own weight: fewer than 4 would be grouped")):
        monkeypatch.setattr(plan, "fewest", lambda _, fewest=fewest: fewest)
        report = wn_kernels.fuse(Net(), grouped=True)
        assert [note in line.note for line in report] == [True] * 3
    text = wn_kernels.explain(wn_kernels.WNLinear(8, 8), (2, 8))
    assert "A group of fewer than 4 such layers forms no weight." in text
