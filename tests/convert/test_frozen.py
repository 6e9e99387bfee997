"""`frozen_weights`: every weight is computed once, and again where a parameter has changed."""

import copy
import gc
import io
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize, prune

import wn_kernels
import wn_kernels.functional as WF
from tests.comparison import assert_matches, assert_same_bits
from tests.compatibility.layers import LAYERS, assert_right, gradients, made
from tests.convert.layers import NORMALISE, Doubled, Scaled, Twice
from tests.convert.test_removal import output, subject
from tests.forms import parts
from wn_kernels import frozen_weights, plan, use_backend
from wn_kernels.modules import kept as keeping
from wn_kernels.modules import prepared


@pytest.fixture(autouse=True)
def _paying(monkeypatch):
    """The inputs are so small that the planner may compute without a weight."""
    monkeypatch.setattr(prepared, "_shares", lambda *_: True)


@pytest.fixture
def count(monkeypatch):
    """How often a weight is computed by itself, other than for a reference."""
    calls = []
    form = WF.weight_norm

    def counted(*arguments, **options):
        if not plan.is_forced():
            calls.append(1)
        return form(*arguments, **options)

    monkeypatch.setattr(WF, "weight_norm", counted)
    return calls


def right(layer, x):
    """The output by the definition, in float64."""
    with torch.no_grad(), use_backend("reference"):
        return output(copy.deepcopy(layer).double(), x.double())


def assert_is_current(layer, x, roundings=4, dtype=torch.float32):
    with torch.no_grad():
        assert_matches(output(layer, x), right(layer, x), dtype, 64, roundings=roundings)


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


def test_a_kept_call_plans_nothing():
    """The Python that runs: a look at the parameters, and the plain layer's own call."""
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
    assert called == {
        "_Convolution.forward",
        "WeightNormMixin._operands",
        "WeightNormMixin._prepared_weight",
        "take",
        "_pays",
        "forced",
        "Store.get",
        "like",
    }


def test_what_is_faster_without_a_weight(monkeypatch):
    """Where the planner has a better way than PyTorch's product with a weight that is there, a call
    takes it, as outside of the block. Other inputs take the weight."""
    monkeypatch.undo()
    layer = wn_kernels.WNLinear(1024, 512)
    row, rows = torch.randn(1, 1024), torch.randn(256, 1024)
    choices = {1: False, 256: True}
    monkeypatch.setattr(plan, "shares", lambda call, *_: choices[call.x_shape[0]])
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


def _step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
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


# --- blocks --------------------------------------------------------------------------------------


def test_nesting_and_exceptions(count):
    (first, x), (last, _) = made("linear"), made("linear", seed=1)
    model = nn.Sequential(first, nn.Linear(4, 6), last)
    count.clear()
    with torch.no_grad(), frozen_weights(model):
        model(x)
        with suppress(KeyError), frozen_weights(first):
            model(x)
            raise KeyError
        model(x)
        assert len(count) == 2
        parts(first)[0].mul_(2)
        assert_is_current(model, x)
    assert first._store is last._store is None
    with torch.no_grad():
        assert_is_current(model, x)


def test_blocks_that_overlap():
    """The end of one, in whatever order, leaves the other alone."""
    layer, x = made("linear")
    first, second = frozen_weights(layer), frozen_weights(layer)
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        kept = layer.weight
        assert layer.weight is kept
        second.__exit__(None, None, None)
        assert layer.weight is not kept
        assert_is_current(layer, x)


def test_threads():
    """Blocks begin and end in several threads while these run the layer. A change of `g` that was
    made before a call is in its result."""
    layer, x = made("conv1d")
    before = right(layer, x)
    changed = threading.Event()

    def run(_):
        results = []
        for _ in range(20):
            is_late = changed.is_set()
            with torch.no_grad(), frozen_weights(layer):
                results += [(is_late, layer(x)), (is_late, layer(x))]
        return results

    with ThreadPoolExecutor(4) as pool, torch.no_grad(), frozen_weights(layer):
        assert_matches(layer(x), before, torch.float32, 64, roundings=4)
        futures = [pool.submit(run, i) for i in range(4)]
        parts(layer)[0].mul_(2)
        changed.set()
        results = [pair for future in futures for pair in future.result()]
        results.append((True, layer(x)))
        after = right(layer, x)
    assert layer._store is None
    assert len(results) == 4 * 40 + 1
    for is_late, y in results:
        is_new = is_late or (y - after).norm() < (y - before).norm()
        assert_matches(y, after if is_new else before, torch.float32, 64, roundings=4)


@pytest.mark.parametrize("name", ["linear", "fused"])
def test_conversions_inside(name):
    """A layer that loses its weight norm in a block has the current weight, and keeps nothing."""
    conversions = [wn_kernels.fold, wn_kernels.remove_weight_norm]
    if name == "fused":
        conversions += [wn_kernels.unfuse, torch.nn.utils.remove_weight_norm]
        conversions.append(lambda m: parametrize.remove_parametrizations(m, "weight"))
    for convert in conversions:
        layer, x = made(name)
        with torch.no_grad(), frozen_weights(layer):
            layer(x)
            parts(layer)[0].mul_(2)
            wide = right(layer, x)
            convert(layer)
            assert_matches(layer(x), wide, torch.float32, 64, roundings=4)
            assert "_store" not in vars(layer)
            assert isinstance(layer.weight, torch.Tensor)
        assert_matches(layer(x).detach(), wide, torch.float32, 64, roundings=4)


def test_what_else_takes_part_inside():
    """A second parametrization, a hook on the list and pruning have effect inside a block."""
    for change in (
        lambda m: parametrize.register_parametrization(m, "weight", Twice()),
        lambda m: prune.l1_unstructured(m.parametrizations.weight, "original1", 5),
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ):
        layer, x = made("fused")
        twin = copy.deepcopy(layer).double()
        change(twin)
        wide = twin(x.double()).detach()
        with torch.no_grad(), frozen_weights(layer):
            layer(x)
            change(layer)
            for _ in range(2):
                assert_matches(layer(x), wide, torch.float32, 64, roundings=4)
    layer, x = made("fused")
    layer.parametrizations.weight.register_forward_hook(lambda *args: 2 * args[-1])
    with torch.no_grad():
        wide = copy.deepcopy(layer).double()(x.double())
        with frozen_weights(layer):
            for _ in range(2):
                assert_matches(layer(x), wide, torch.float32, 64, roundings=4)


@pytest.mark.parametrize("name", ["linear", "fused"])
def test_a_block_that_ends_during_a_read(name, monkeypatch):
    """As another thread may end it."""
    layer, _ = made(name)
    block = frozen_weights(layer)
    ends = [block.__exit__]
    is_claimed = type(layer)._is_claimed

    def ending(layer, name):
        if ends:
            ends.pop()(None, None, None)
        return is_claimed(layer, name)

    monkeypatch.setattr(type(layer), "_is_claimed", ending)
    with torch.no_grad():
        expected = layer.weight
        block.__enter__()
        assert_same_bits(layer.weight, expected)
    assert layer._store is None
    assert not ends


# --- copies and recordings -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv2d", "fused"])
def test_copies_have_no_kept_weights(name):
    layer, x = made(name)

    def saved(m):
        stream = io.BytesIO()
        torch.save(m, stream)
        return len(stream.getvalue())

    size, keys = saved(layer), list(layer.state_dict())
    with torch.no_grad(), frozen_weights(layer):
        wide = right(layer, x)
        layer(x)
        assert saved(layer) <= size + 200  # the attribute's name
        assert list(layer.state_dict()) == keys
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin._store is None
            assert twin.weight is not twin.weight
            assert_matches(twin(x), wide, torch.float32, 64, roundings=4)
        shallow = copy.copy(layer)
        assert_matches(shallow(x), wide, torch.float32, 64, roundings=4)
    with torch.no_grad():
        assert shallow.weight is not shallow.weight


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed", "fused"])
def test_compile(name):
    """A compiled program computes its weights in every call. It is one graph, the same inside the
    block as outside."""
    torch.compiler.reset()
    layer, x = made(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for block in (False, True, True, False):
            with frozen_weights(layer if block else nn.Identity()):
                layer(x)
                parts(layer)[0].mul_(1.5)
                assert_matches(compiled(x), right(layer, x), torch.float32, 64, roundings=4)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_a_block_inside_a_compiled_function():
    torch.compiler.reset()
    layer, x = made("linear")

    @torch.compile(backend="aot_eager")
    def stream(x):
        with torch.no_grad(), frozen_weights(layer):
            return layer(x) + layer(x)

    assert_matches(stream(x), 2 * right(layer, x), torch.float32, 64, roundings=4)
    assert layer._store is None
    torch.compiler.reset()


def test_recordings_hold_the_parameters():
    """Not the kept weight, which a change of the parameters would not reach."""
    layer, x = made("conv1d")
    with torch.no_grad(), frozen_weights(layer):
        layer(x)
        traced = torch.jit.trace(layer, x, check_trace=False)
        exported = torch.export.export(layer, (x,), strict=False).module()
        parts(layer)[0].mul_(2)
        assert_matches(traced(x), right(layer, x), torch.float32, 64, roundings=4)
        for program in (traced, exported):
            assert {"weight_g", "weight_v"} <= dict(program.named_parameters()).keys()
        values = {key: 3 * p for key, p in layer.named_parameters()}
        twin = copy.deepcopy(layer)
        for p in twin.parameters():
            p.mul_(3)
        called = torch.func.functional_call(layer, values, (x,))
        assert_matches(called, right(twin, x), torch.float32, 64, roundings=4)
        assert_is_current(layer, x)


def test_transforms():
    """`vmap` over the input uses the kept weight, and over the parameters it does not."""
    layer, x = made("linear")
    wide = right(layer, x)
    with torch.no_grad(), frozen_weights(layer):
        layer(x)
        assert_matches(torch.func.vmap(layer)(x), wide, torch.float32, 64, roundings=4)
        values = {key: torch.stack([p, 2 * p]) for key, p in layer.named_parameters()}

        def call(values):
            return torch.func.functional_call(layer, values, (x,))

        both = torch.func.vmap(call)(values)
        assert_matches(both[0], wide, torch.float32, 64, roundings=4)
        twin = copy.deepcopy(layer)
        for p in twin.parameters():
            p.mul_(2)
        assert_matches(both[1], right(twin, x), torch.float32, 64, roundings=4)
        assert_is_current(layer, x)


def test_lazy_layers(count):
    layer = wn_kernels.WNLazyConv1d(4, 3)
    with torch.no_grad(), frozen_weights(layer):
        x = torch.randn(2, 5, 9)
        for _ in range(2):
            layer(x)
        assert_is_current(layer, x)
        assert len(count) == 1


# --- a GPU's streams -----------------------------------------------------------------------------


def test_streams_and_captures(monkeypatch):
    """Each stream has a weight of its own, so that none uses one before it is computed, and a
    captured graph, which may be replayed after the block, has none."""
    stream, is_capturing = [1], [False]
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: stream[0], raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing[0])
    monkeypatch.setattr(keeping, "_can_keep", lambda *_: True)
    layer, _ = made("linear")

    class OnGpu(torch.Tensor):
        is_cuda = True

        def get_device(self):
            return 0

    g, v = (p.detach().as_subclass(OnGpu) for p in parts(layer))
    module = SimpleNamespace(
        _is_claimed=lambda name: False, _form=lambda name, dtype: torch.ones(2, dtype=dtype)
    )
    store = keeping.Store()
    store.blocks = 1
    first = store.get(module, "weight", v, g, torch.float32)
    stream[0] = 2
    second = store.get(module, "weight", v, g, torch.float32)
    assert first is not second
    is_capturing[0] = True
    assert store.get(module, "weight", v, g, torch.float32) is None
    is_capturing[0] = False
    assert store.get(module, "weight", v, g, torch.float32) is second
    stream[0] = 1
    assert store.get(module, "weight", v, g, torch.float32) is first
