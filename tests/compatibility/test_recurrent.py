"""Recurrent layers and cells under what the files beside this one try on other layers."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import wn_kernels
import wn_kernels.functional as WF
from tests.comparison import assert_matches, assert_same_bits
from tests.compatibility import processes
from tests.compatibility.processes import WORLD
from wn_kernels.backends import native
from wn_kernels.modules import flat, kept, recurrent
from wn_kernels.operators import native_library

STEPS, BATCH, INPUTS, HIDDEN = 4, 2, 6, 8


def normed(layer):
    """The layer as PyTorch normalises it, fused."""
    for name in [name for name, _ in layer.named_parameters() if name.startswith("weight")]:
        parametrizations.weight_norm(layer, name)
    wn_kernels.fuse(layer)
    return layer


LAYERS = {
    "rnn": lambda: wn_kernels.WNRNN(INPUTS, HIDDEN),
    "lstm": lambda: wn_kernels.WNLSTM(INPUTS, HIDDEN, 2, bidirectional=True),
    "gru": lambda: wn_kernels.WNGRU(INPUTS, HIDDEN, dim=None),
    "fused": lambda: normed(nn.LSTM(INPUTS, HIDDEN)),
    "lstm cell": lambda: wn_kernels.WNLSTMCell(INPUTS, HIDDEN),
    "gru cell": lambda: wn_kernels.WNGRUCell(INPUTS, HIDDEN, dim=1),
    "fused cell": lambda: normed(nn.RNNCell(INPUTS, HIDDEN)),
}


def made(name):
    torch.manual_seed(2)
    layer = LAYERS[name]()
    with torch.no_grad():
        for key, p in layer.named_parameters():
            if key.endswith(("_g", "original0")):
                p.mul_(torch.rand_like(p) + 0.5)
    return layer, torch.randn(STEPS, BATCH, INPUTS)


def output(layer, x):
    """The hidden states of the last of two calls, which starts from where the first ended."""
    if isinstance(layer, nn.RNNBase):
        return layer(x, layer(x)[1])[0]
    state = layer(x[1], layer(x[0]))
    return state[0] if isinstance(state, tuple) else state


def loss(layer, x, run=output):
    y = run(layer, x)
    return (y * torch.arange(y.numel()).to(y).view(y.shape).sin()).sum()


def gradients(layer, x, run=output):
    named = dict(layer.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss(layer, x, run), named.values()), strict=True))


def reference(layer, x):
    """The output and the gradients by the definition, in float64."""
    wide = copy.deepcopy(layer).double()
    with wn_kernels.use_backend("reference"):
        return output(wide, x.double()).detach(), gradients(wide, x.double())


def assert_right(layer, x, y=None, grads=None, dtype=torch.float32):
    right, right_grads = reference(layer, x)
    if y is not None:
        assert_matches(y, right, dtype, 64, roundings=16)
    terms = max(grad.norm().item() for grad in right_grads.values())
    for name, grad in (grads or {}).items():
        expected = right_grads[name]
        assert_matches(grad, expected, dtype, 256, roundings=16, terms=terms, what=name)


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_backends(name, backend):
    layer, x = made(name)
    with wn_kernels.use_backend(backend):
        assert_right(layer, x, output(layer, x), gradients(layer, x))


def first(layer, x):
    """The output of one call without a state."""
    result = layer(x if isinstance(layer, nn.RNNBase) else x[0])
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.current
@pytest.mark.parametrize("name", ["rnn", "gru", "gru cell", "fused cell"])
def test_one_graph(name):
    """`allow_rnn` lets a compiler trace recurrent layers. PyTorch's own LSTM fails there as well,
    in its backward, which oneDNN computes."""
    layer, x = made(name)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        result = compiled(x[0] if name.endswith("cell") else x)
    y = result[0] if isinstance(result, tuple) else result
    grads = torch.autograd.grad(y.square().sum(), layer.parameters())
    wide = copy.deepcopy(layer).double()
    right = first(wide, x.double())
    right_grads = torch.autograd.grad(right.square().sum(), wide.parameters())
    assert_matches(y, right.detach(), torch.float32, 64, roundings=16)
    terms = max(grad.norm().item() for grad in right_grads)
    for grad, expected in zip(grads, right_grads, strict=True):
        if expected.any():  # not that of a weight which multiplies a state of zeros
            assert_matches(grad, expected, torch.float32, 256, roundings=16, terms=terms)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_export_and_trace(name):
    layer, x = made(name)
    given = x if isinstance(layer, nn.RNNBase) else x[0]
    right = first(copy.deepcopy(layer).double(), x.double()).detach()
    for program in (
        torch.export.export(layer, (given,)).module(),
        torch.jit.trace(layer, given),
    ):
        result = program(given)
        y = result[0] if isinstance(result, tuple) else result
        assert_matches(y, right, torch.float32, 64, roundings=16)


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_and_checkpoints(name):
    layer, x = made(name)
    values = {key: p.detach() for key, p in layer.named_parameters()}

    def of_values(values):
        def run(_, x):
            wrapped = Wrapped(layer)
            named = {"layer." + key: p for key, p in values.items()}
            return torch.func.functional_call(wrapped, named, (x,))

        return loss(layer, x, run)

    assert_right(layer, x, grads=torch.func.grad(of_values)(values))

    def again(layer, x):
        return checkpoint(output, layer, x, use_reentrant=False)

    assert_right(layer, x, again(layer, x), gradients(layer, x, again))


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return output(self.layer, x)


@pytest.mark.parametrize("name", ["lstm", "gru cell", "fused"])
def test_threads(name):
    layer, x = made(name)
    with ThreadPoolExecutor(4) as pool:
        every = list(pool.map(lambda _: (output(layer, x), gradients(layer, x)), range(8)))
    for y, grads in every:
        assert_right(layer, x, y, grads)


@pytest.mark.parametrize("name", ["lstm", "gru cell", "fused"])
def test_autocast(name):
    layer, x = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        y, grads = output(layer, x), gradients(layer, x)
    right, right_grads = reference(layer, x)
    assert_matches(y.float(), right, torch.bfloat16, 64, roundings=8)
    every = torch.cat([grads[key].flatten() for key in right_grads])
    assert every.dtype == torch.float32
    expected = torch.cat([grad.flatten() for grad in right_grads.values()])
    assert_matches(every, expected, torch.bfloat16, 256, roundings=16)


def test_second_derivatives():
    """A penalty on the gradient of the parameters."""
    layer = wn_kernels.WNGRUCell(INPUTS, HIDDEN, dtype=torch.float64)
    x, h = torch.randn(2, INPUTS).double(), torch.randn(2, HIDDEN).double()

    def run(*parameters):
        named = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(layer, named, (x, h))

    leaves = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


# --- several processes ---------------------------------------------------------------------------


def trains_as_one(rank, name):
    layer, _ = made(name)
    torch.manual_seed(3)
    x = torch.randn(STEPS, 2 * WORLD, INPUTS)
    model = DistributedDataParallel(Wrapped(layer))
    y = model(x[:, 2 * rank : 2 * rank + 2])
    y.pow(2).sum().div(2 * WORLD).backward()
    wide = copy.deepcopy(made(name)[0]).double()
    (Wrapped(wide)(x.double()).pow(2).sum() / (2 * WORLD) / WORLD).backward()
    right = {key: p.grad for key, p in wide.named_parameters()}
    terms = max(grad.norm().item() for grad in right.values())
    for key, p in layer.named_parameters():
        assert_matches(p.grad, right[key], torch.float32, 256, roundings=16, terms=terms, what=key)


@pytest.mark.parametrize("name", ["lstm", "fused"])
def test_data_parallel(name, tmp_path):
    processes.run(tmp_path, trains_as_one, name)


# --- where the weights lie -----------------------------------------------------------------------


def weights(layer):
    return [w for w in recurrent.flat_weights(layer) if w.ndim == 2]


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("records", [True, False])
def test_memory_of_weights_is_kept(dim, records):
    """A thread keeps the memory of the weights of a forward for those of the next one, but not
    while something refers to them. None is a view."""
    layer = wn_kernels.WNLSTM(128, 128, dim=dim)
    right = {name: getattr(layer, name).detach() for name in layer._normed()}.values()
    with torch.set_grad_enabled(records):
        first = weights(layer)
        second = weights(layer)
        for found in (first, second):
            for w, value in zip(found, right, strict=True):
                assert_same_bits(w.detach(), value)
                assert w.data_ptr() % 64 == 0
                assert not w._is_view()
                assert w.requires_grad == records
        addresses = {w.data_ptr() for w in first}
        assert len(addresses | {w.data_ptr() for w in second}) == 4
        versions = [w._version for w in first]
        first[0].detach().zero_()
        assert [w._version for w in first] == [versions[0] + 1, versions[1]]
        assert_same_bits(first[1].detach(), [*right][1])
        del first, w, found
        third = weights(layer)
    if native.unavailable() is None:
        assert {w.data_ptr() for w in third} <= addresses
    for w, value in zip(third, right, strict=True):
        assert_same_bits(w.detach(), value)


def test_kept_memory_serves_inference_mode():
    """A forward in inference mode may take memory that one outside of it has left, and one outside
    of it memory that one inside has left. The weights are tensors of the mode of their forward."""
    layer = wn_kernels.WNGRU(128, 128)
    for infers in (False, True, False):
        with torch.inference_mode(infers):
            found = weights(layer)
        assert all(w.is_inference() == infers and w.requires_grad != infers for w in found)
        for w, name in zip(found, layer._normed(), strict=True):
            assert_same_bits(w.detach(), getattr(layer, name).detach())
        del found, w


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weights_in_kept_memory(dim):
    layer = wn_kernels.WNGRU(INPUTS, 256, dim=dim)
    x = torch.randn(STEPS, BATCH, INPUTS)
    for _ in range(2):
        assert_right(layer, x, output(layer, x), gradients(layer, x))
        with torch.no_grad():
            y = output(layer, x)
        assert_right(layer, x, y)


def test_gradients_pass_through_places():
    """What is not computed at its place is copied there, in the dtype of the place."""
    tensors = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    places = [torch.empty(3, 4, dtype=torch.float16), torch.empty(5, dtype=torch.float16)]
    copies = flat.Placed.apply(places, *tensors)
    (copies[0].float().pow(2).sum() + 3 * copies[1].float().sum()).backward()
    for copied, place, t in zip(copies, places, tensors, strict=True):
        assert copied.data_ptr() == place.data_ptr()
        assert_matches(copied, t.detach().double(), torch.float16, 1)
    assert_matches(tensors[0].grad, 2 * tensors[0].detach().double(), torch.float16, 1)
    assert_matches(tensors[1].grad, torch.full((5,), 3.0).double(), torch.float32, 1)


@pytest.mark.parametrize("backend", ["native", "triton", "aten"])
def test_weights_are_written_to_places(backend):
    """On the paths that can; on any, they are right."""
    v = [torch.randn(6, 4, requires_grad=True), torch.randn(5, 7, requires_grad=True)]
    g = [torch.rand(6, 1) + 0.5, torch.rand(5, 1) + 0.5]
    memory = torch.empty(64)
    places = [
        torch.empty(0).set_(memory.untyped_storage(), offset, t.shape, t.stride())
        for t, offset in zip(v, (0, 29), strict=True)
    ]
    with wn_kernels.use_backend(backend):
        w = WF.weight_norms(v, g, places=places)
    for t, scale, weight, place in zip(v, g, w, places, strict=True):
        assert (weight.data_ptr() == place.data_ptr()) == (backend != "aten")
        wide, dw = t.detach().double().requires_grad_(), torch.randn_like(t)
        right = scale.double() * wide / wide.norm(dim=1, keepdim=True)
        assert_matches(weight, right.detach(), torch.float32, 16)
        (expected,) = torch.autograd.grad(right, wide, dw.double())
        (grad,) = torch.autograd.grad(weight, t, dw, retain_graph=True)
        assert_matches(grad, expected, torch.float32, 16, terms=dw.norm().item() * 4)
    with pytest.raises(ValueError, match=r"weight 1: its place has shape \(6, 4\)"):
        WF.weight_norms(v, g, places=[places[0], places[0]])
    with pytest.raises(ValueError, match="places has 1 tensors, but v has 2"):
        WF.weight_norms(v, g, places=places[:1])


def test_a_gradient_that_others_hold_is_not_overwritten():
    """`dV` takes the memory of `dW` only where nothing else refers to it."""
    v, g = torch.randn(6, 4, requires_grad=True), torch.rand(6, 1)
    dw = torch.randn(6, 4)
    before = dw.clone()
    (w,) = WF.weight_norms([v], [g])
    w.retain_grad()
    seen = []
    w.register_hook(seen.append)
    torch.autograd.backward(w, dw)
    assert_same_bits(dw, before)
    assert_same_bits(w.grad, before)
    assert_same_bits(seen[0], before)
    (w,) = WF.weight_norms([v], [g])
    other = torch.randn(6, 4, requires_grad=True)
    ((w + other) * before).sum().backward()  # both get the same gradient
    assert_same_bits(other.grad, before)


def test_memory_without_biases(monkeypatch):
    """cuDNN reads biases from its buffer, whether the layer has any or not."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    tensors = {"first": torch.ones(2, 3), "second": torch.ones(4)}
    layout = flat.Layout(16, (0, 8))
    parts = flat._memory(layout, tensors, torch.float32, zeroed=True)
    buffer = torch.empty(0).set_(parts["first"].untyped_storage())
    assert buffer.tolist() == [0.0] * 16
    asked = []
    monkeypatch.setattr(flat, "_is_for_cudnn", lambda _: True)
    monkeypatch.setattr(flat, "_options", lambda _: ())
    monkeypatch.setattr(flat, "_layout_of_cudnn", lambda *_: layout)
    monkeypatch.setattr(flat, "_memory", lambda *_, zeroed: asked.append(zeroed) or {})
    for bias in (True, False):
        layer = wn_kernels.WNGRU(INPUTS, HIDDEN, bias=bias, device="meta")
        v = {name: layer._tensors(name)[1] for name in layer._normed()}
        rest = set(layer._flat_weights_names) - set(v)
        assert flat.places(layer, v, {name: getattr(layer, name) for name in rest}) == {}
    assert asked == [False, True]


GAP = 3  # elements between two tensors


@pytest.fixture
def one_piece(monkeypatch):
    """Kernels are launched, and tensors lie as if cuDNN ran the layers: one behind the other.
    Yields whether the native library placed them, for each call."""
    if reason := native.unavailable():
        pytest.skip(reason)
    library, calls = native_library(), []

    def layout(shapes, *_):
        ends = [0]
        for shape in shapes:
            ends.append(ends[-1] + shape.numel() + GAP)
        return flat.Layout(ends[-1], tuple(ends[:-1]))

    class Counted:
        def __getattr__(self, name):
            return getattr(library, name)

        def placed_weights(self, *arguments):
            found = library.placed_weights(*arguments)
            calls.append(found is not None)
            return found

    monkeypatch.setattr(flat, "_is_for_cudnn", lambda _: True)
    monkeypatch.setattr(flat, "_options", lambda _: ())
    monkeypatch.setattr(flat, "_layout_of_cudnn", layout)
    monkeypatch.setattr(flat, "_layouts", {})
    monkeypatch.setattr(kept, "native_library", functools.cache(Counted))
    with wn_kernels.use_backend("triton"):
        yield calls


PLACED = {
    "rnn": lambda: wn_kernels.WNRNN(INPUTS, HIDDEN, norm="linf"),
    "lstm": lambda: wn_kernels.WNLSTM(INPUTS, HIDDEN, 2, bidirectional=True, proj_size=3),
    "gru": lambda: wn_kernels.WNGRU(INPUTS, HIDDEN, dim=None, bias=False),
    "fused": lambda: normed(nn.LSTM(INPUTS, HIDDEN)),
}


@pytest.mark.parametrize("name", PLACED)
def test_the_library_places_the_tensors(name, one_piece):
    """All in one piece of memory, biases too. The gradients of both are right."""
    layer, x = PLACED[name](), torch.randn(STEPS, BATCH, INPUTS)
    with torch.no_grad():
        for key, p in layer.named_parameters():
            if key.endswith(("_g", "original0")):
                p.mul_(torch.rand_like(p) + 0.5)
    for records in (False, True):
        with torch.set_grad_enabled(records):
            found = recurrent.flat_weights(layer)
        assert len({t.untyped_storage().data_ptr() for t in found}) == 1
        offset = 0
        for t in found:
            assert t.storage_offset() == offset
            assert t.requires_grad == records
            assert not t._is_view()
            offset += t.numel() + GAP
    assert one_piece == [True, True]
    assert_right(layer, x, output(layer, x), gradients(layer, x))
    with torch.no_grad():
        y = output(layer, x)
    assert_right(layer, x, y)
    for p in layer.parameters():  # one gradient alone
        for other in layer.parameters():
            other.requires_grad_(other is p)
        (grad,) = torch.autograd.grad(loss(layer, x), [p])
        p.requires_grad_(False)
        wide = copy.deepcopy(layer).double()
        with wn_kernels.use_backend("reference"):
            both = zip(wide.parameters(), layer.parameters(), strict=True)
            right = next(other for other, own in both if own is p).requires_grad_()
            (expected,) = torch.autograd.grad(loss(wide, x.double()), [right])
        assert_matches(grad, expected, torch.float32, 256, roundings=16)
    assert all(one_piece)


@pytest.mark.parametrize("change", ["dtype", "shape", "layout", "missing"])
def test_what_the_library_does_not_place(change, one_piece):
    """Tensors of several dtypes, or that do not lie as they should, go through Python."""
    layer = wn_kernels.WNLSTM(INPUTS, HIDDEN)
    recurrent.flat_weights(layer)
    if change == "dtype":
        layer.bias_hh_l0 = nn.Parameter(layer.bias_hh_l0.double())
    elif change == "shape":
        layer.bias_hh_l0 = nn.Parameter(torch.ones(1))
    elif change == "layout":
        layer.weight_ih_l0_v = nn.Parameter(layer.weight_ih_l0_v.t().contiguous().t())
    else:
        layer.bias_hh_l0 = None
    found = recurrent.flat_weights(layer)
    assert one_piece == [True, False]
    names = layer._flat_weights_names
    for name, t in zip(names, found, strict=True):
        wanted = getattr(layer, name)
        assert (t is None) == (wanted is None)
        if t is not None:
            assert_same_bits(t.detach(), wanted.detach())


def test_frozen_weights_are_brought_to_their_places_once(monkeypatch):
    """As long as neither they nor the biases change, and no gradient is needed."""
    layer, x = made("lstm")
    gathered = []

    def copies(tensors, places):
        gathered.append(1)
        return [t.clone() for t in tensors]

    monkeypatch.setattr(flat, "gathered", copies)
    with wn_kernels.frozen_weights(layer):
        with torch.inference_mode():
            first = output(layer, x)
        with torch.no_grad():
            second = output(layer, x)
        assert len(gathered) == 1
        for y in (first, second):
            assert_right(layer, x, y.clone())
        for key in ("bias_hh_l0", "weight_ih_l0_v"):
            for change in (lambda p: p.mul_(2), lambda p: p.set_(p * 2)):
                count = len(gathered)
                with torch.no_grad():
                    change(getattr(layer, key))
                    y = output(layer, x)
                assert len(gathered) == count + 1
                assert_right(layer, x, y)
        assert_right(layer, x, grads=gradients(layer, x))
    assert layer._store is None
