"""`fuse(model, grouped=True)`: one call for the weights of all layers, under what a model meets."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import wn_kernels
from tests.comparison import assert_matches
from wn_kernels.modules import prepared


class Net(nn.Module):
    """Two layers that are used once, one that is used twice, and one that is not used."""

    def __init__(self):
        super().__init__()
        norm = parametrizations.weight_norm
        self.first = norm(nn.Conv1d(3, 8, 3, padding=1))
        self.twice = norm(nn.Conv1d(8, 8, 3, padding=1))
        self.up = norm(nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1))
        self.idle = norm(nn.Conv1d(8, 8, 1))
        self.last = wn_kernels.WNLinear(128, 4)

    def forward(self, x):
        x = self.first(x).tanh()
        x = self.twice(self.twice(x).tanh()).tanh()
        return self.last(self.up(x).flatten(1))


def nets(cls=Net):
    """A model in float64, and the same one grouped, with parameters of the same values."""
    torch.manual_seed(0)
    plain = cls().double()
    grouped = copy.deepcopy(plain)
    wn_kernels.fuse(grouped, grouped=True)
    return plain, grouped


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


X = torch.linspace(-1, 1, 2 * 3 * 8, dtype=torch.float64).view(2, 3, 8)


def step(model):
    """A forward and a backward. Returns the output."""
    y = model(X)
    y.square().sum().backward()
    return y


def check(plain, grouped, run):
    """The same outputs and gradients."""
    expected, found = run(plain), run(grouped)
    assert_matches(found, expected.double(), torch.float64, 128)
    for a, b in zip(grads(grouped), grads(plain), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None and b.any():
            assert_matches(a, b, torch.float64, 1024, roundings=64)


@pytest.fixture
def calls(monkeypatch):
    """How many weights each call of a group computes."""
    found = []
    make = prepared.grouped.formed

    def counted(v, *rest, **options):
        found.append(len(v))
        return make(v, *rest, **options)

    monkeypatch.setattr(prepared.grouped, "formed", counted)
    return found


@pytest.fixture(autouse=True)
def _every_layer_shares(request, monkeypatch):
    """Small layers on a CPU have better ways."""
    if "planned" not in request.keywords:
        monkeypatch.setattr(prepared.plan, "shares", lambda *_: True)


def test_a_training_step(calls):
    plain, grouped = nets()

    check(plain, grouped, step)
    assert calls == [5]
    check(plain, grouped, step)  # gradients add up
    assert calls == [5, 4]  # without the layer that was not used
    nodes, todo = set(), [grouped(X).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [edge for edge, _ in node.next_functions]
    assert sum("WeightNorms" in node.name() for node in nodes) == 1
    assert not any("Linear" in node.name() or "Launched" in node.name() for node in nodes)
    assert prepared._state.forward is None


def test_several_forwards_before_a_backward():
    def run(model):
        y = model(X) + model(-X).square()
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()
        return y

    check(*nets(), run)


@pytest.mark.parametrize("frozen", ["twice", "first", "all"])
def test_frozen_parts(frozen):
    plain, grouped = nets()
    for model in (plain, grouped):
        (model if frozen == "all" else getattr(model, frozen)).requires_grad_(False)

    def run(model):
        x = X.clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        return torch.cat([y.flatten(), x.grad.flatten()])

    check(plain, grouped, run)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, calls):
    plain, grouped = nets()

    def run(model):
        with mode():
            return model(X).clone()

    check(plain, grouped, run)
    assert calls == [5]

    class Inner(nn.Module):
        """Gradients, inside a forward whose weights were prepared without."""

        def __init__(self):
            super().__init__()
            self.layer = wn_kernels.WNConv1d(3, 4, 3).double()

        def forward(self, x):
            with torch.inference_mode(False), torch.enable_grad():
                return self.layer(x.clone())

    model = Inner()
    wn_kernels.fuse(model, grouped=True)
    with mode():
        y = model(X)
    y.sum().backward()
    assert model.layer.weight_v.grad.any()


def test_autocast(calls):
    _, grouped = nets()
    grouped = grouped.float()
    single = copy.deepcopy(grouped)
    wn_kernels.fuse(single)
    x = X.float()

    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
        return y

    expected, found = run(single), run(grouped)
    assert found.dtype == torch.bfloat16
    assert_matches(found, expected.double(), torch.bfloat16, 128, roundings=8)
    for a, b in zip(grads(grouped), grads(single), strict=True):
        if b is not None and b.any():
            assert_matches(a, b.double(), torch.bfloat16, 128, roundings=32)
    assert calls == [5]


def test_autocast_inside_of_the_forward():
    """The layers compute their own weights, in the dtype that they take."""

    class Inside(Net):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    model = Inside()
    wn_kernels.fuse(model, grouped=True)
    with torch.no_grad():
        first = model(X.float())
        with torch.autocast("cpu", torch.bfloat16):
            second = model(X.float())
    assert_matches(second, first.double(), torch.bfloat16, 128, roundings=8)


def test_double_backward():
    def run(model):
        x = X.clone().requires_grad_()
        y = model(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        return torch.cat([y.flatten(), dx.flatten()])

    check(*nets(), run)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, calls):
    class Saving(Net):
        def forward(self, x):
            x = self.first(x).tanh()
            x = checkpoint(self.part, x, use_reentrant=reentrant)
            return self.last(self.up(x).flatten(1))

        def part(self, x):
            return self.twice(self.twice(x).tanh()).tanh()

    plain, grouped = nets(Saving)

    check(plain, grouped, step)
    check(plain, grouped, step)


def test_a_checkpoint_of_the_whole_model():
    def run(model):
        y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=False)
        y.square().sum().backward()
        return y

    check(*nets(), run)


@pytest.mark.current
def test_one_compiled_graph():
    plain, grouped = nets()
    graphs = []

    def recorded(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return aot_eager(graph, inputs)

    compiled = torch.compile(grouped, fullgraph=True, backend=recorded)

    check(plain, grouped, lambda model: step(compiled if model is grouped else plain))
    assert not any(
        "_traced" in module.__dict__ and module._traced is not None for module in grouped.modules()
    )
    (graph,) = graphs
    assert [name for name in graph if "wn_kernels" in name] == ["wn_kernels.weight_norms.default"]


def test_a_compiled_part_of_an_eager_model():
    plain, grouped = nets()
    grouped.twice.compile(fullgraph=True, backend="aot_eager")

    check(plain, grouped, step)
    check(plain, grouped, step)


def copies():
    yield "deepcopy", copy.deepcopy
    yield "pickle", lambda model: pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in copies()])
def test_a_copy_has_a_group_of_its_own(make, calls):
    plain, grouped = nets()
    grouped.first.weight  # noqa: B018
    other = make(grouped)
    with torch.no_grad():
        for p, q in zip(plain.parameters(), other.parameters(), strict=True):
            p.mul_(1.5)
            q.mul_(1.5)

    check(plain, other, step)
    assert calls == [5]
    assert all(p.grad is None for p in grouped.parameters())
    layer = make(grouped.first)  # a layer takes no model with it
    assert not list(layer.modules())[1:] or all(m is not grouped for m in layer.modules())


def test_models_that_are_stacked():
    """They have one class, which `stack_module_state` requires."""
    _, first = nets()
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.first.bias.add_(1)
    stacked = torch.func.stack_module_state([first, second])
    run = torch.func.vmap(lambda p, b: torch.func.functional_call(first, (p, b), (X,)))
    for found, model in zip(run(*stacked), (first, second), strict=True):
        assert_matches(found, model(X).detach(), torch.float64, 128)


def test_state_dicts():
    plain, grouped = nets()
    assert list(grouped.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(1.5)
    grouped.load_state_dict(plain.state_dict())
    check(plain, grouped, lambda model: model(X))


def test_weights_change_between_forwards_and_within_one():
    class Changing(Net):
        def forward(self, x):
            y = super().forward(x)
            with torch.no_grad():
                for p in self.twice.parameters():
                    p.mul_(1.5)
                self.first.parametrizations.weight.original1 = nn.Parameter(
                    self.first.parametrizations.weight.original1.detach().flip(0)
                )
            return y + super().forward(x)

    plain, grouped = nets(Changing)

    def run(model):
        return torch.stack([model(X), model(X)])

    check(plain, grouped, run)


def test_eps_changes_between_forwards():
    plain, grouped = nets()
    for eps in (4.0, 8.0):
        plain.last.eps = grouped.last.eps = eps
        check(plain, grouped, step)


def test_layers_by_themselves(calls):
    plain, grouped = nets()
    check(plain, grouped, lambda model: model.twice(model.first(X)))
    assert calls == []


def test_other_weights_for_a_call():
    """`functional_call` replaces parameters for a call of the model, or of a part of it."""
    plain, grouped = nets()
    other = {name: 1.5 * p.detach() for name, p in plain.named_parameters()}

    def run(model):
        return torch.func.functional_call(model, other, (X,))

    check(plain, grouped, run)


def test_an_exception():
    plain, grouped = nets()
    with pytest.raises(ValueError, match="needs 3 channels"):
        grouped(X[:, :2])
    assert prepared._state.forward is None
    check(plain, grouped, lambda model: model(X))


def test_a_model_within_a_model():
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.head = inner, wn_kernels.WNLinear(4, 4).double()

        def forward(self, x):
            return self.head(self.inner(x)) + self.head(self.inner(-x))

    plain, grouped = nets()
    torch.manual_seed(1)
    outer = Outer(plain)
    other = copy.deepcopy(outer)
    other.inner = grouped
    wn_kernels.fuse(other, grouped=True)
    check(outer, other, lambda model: model(X))


def test_threads():
    plain, grouped = nets()
    inputs = [X * (i + 1) for i in range(4)]
    with torch.no_grad():
        expected = [plain(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: [grouped(x).detach() for _ in range(5)][-1], inputs))
    for a, b in zip(found, expected, strict=True):
        assert_matches(a, b, torch.float64, 128)


def test_cached_parametrizations(calls):
    plain, grouped = nets()

    def run(model):
        with parametrize.cached():
            y = model(X)
        y.square().sum().backward()
        return y

    check(plain, grouped, run)
    assert calls == []


def test_the_report_says_what_is_grouped():
    model = Net()
    report = wn_kernels.fuse(model, grouped=True)
    notes = {line.name: line.note for line in report}
    assert notes["first"].startswith("grouped: ")
    model = nn.Sequential(wn_kernels.WNLinear(4096, 4096))
    (line,) = wn_kernels.fuse(model, grouped=True)
    assert line.note.startswith("of this package; ")
    text = wn_kernels.explain(model, (1, 4096))
    assert "In a group a forward " in text
    with pytest.raises(TypeError, match="WNLinear is weight-normed itself"):
        wn_kernels.fuse(model[0], grouped=True)


def test_the_end_of_a_group(calls):
    _, grouped = nets()
    wn_kernels.fuse(grouped)
    grouped(X)
    assert calls == []
    for end in (wn_kernels.unfuse, wn_kernels.fold):
        wn_kernels.fuse(grouped, grouped=True)
        end(grouped)
        assert type(grouped) is Net
        assert "_group" not in vars(grouped)
