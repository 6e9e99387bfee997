"""`frozen_weights`: how blocks nest, overlap and end, and what is copied or recorded inside one."""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize, prune

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits
from tests.compatibility.layers import made
from tests.convert.frozen import assert_is_current, right
from tests.convert.layers import Twice
from tests.forms import parts
from wn_kernels import frozen_weights
from wn_kernels.modules import kept as keeping

pytestmark = pytest.mark.usefixtures("paying")


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
    first = store.find(module, "weight", v, g, torch.float32)
    stream[0] = 2
    second = store.find(module, "weight", v, g, torch.float32)
    assert first is not second
    is_capturing[0] = True
    assert store.find(module, "weight", v, g, torch.float32) is None
    is_capturing[0] = False
    assert store.find(module, "weight", v, g, torch.float32) is second
    stream[0] = 1
    assert store.find(module, "weight", v, g, torch.float32) is first
