"""A monitor records what it says, in every form that a layer may have, without waiting."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import wn_kernels
from tests.comparison import assert_matches
from tests.convert.layers import stacked
from tests.forms import FORMS, LAYERS, made, normalised, parts


def network(form="ours", dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        normalised(nn.Linear(6, 8, dtype=dtype), form),
        nn.Tanh(),
        nn.Unflatten(1, (8, 1)),
        normalised(nn.ConvTranspose1d(8, 4, 3, dtype=dtype), form),
        nn.Flatten(),
        nn.Linear(12, 2, dtype=dtype),
    )


def step(net, optimizer, x):
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()


def wanted(before, after, g, grad, lr):
    """By the definitions, in float64: the angle by its cosine and sine."""
    before, after, g, grad = (t.detach().double() for t in (before, after, g, grad))
    norm = (before.square().sum() / g.numel()).sqrt()
    a, b = before.flatten() / before.norm(), after.flatten() / after.norm()
    angle = 2 * torch.atan2((a - b).norm(), (a + b).norm())
    return {
        "norm": norm,
        "g": g.abs().mean(),
        "rate": lr / norm**2,
        "gradient": grad.norm(),
        "angle": angle * 180 / math.pi,
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_records_are_the_definitions(kind, form):
    layer, x = made(kind, form)
    g, v = parts(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    watch = wn_kernels.monitor(layer, optimizer)
    for number in (1, 2):
        before = v.detach().clone()
        step(layer, optimizer, x)
        for name, value in wanted(before, v, g, v.grad, 0.01).items():
            found = watch.read()[name]
            assert found.shape == (number, 1)
            assert_matches(found[-1, 0], value, torch.float64, 256, roundings=64, what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    """Norms are taken in float32, whose rounding bounds the error of a small angle."""
    net = network(dtype=dtype)
    optimizer = torch.optim.SGD(wn_kernels.param_groups(net), lr=0.1)
    watch = wn_kernels.monitor(net, optimizer)
    before = net[3].weight_v.detach().clone()
    step(net, optimizer, torch.randn(5, 6, dtype=dtype))
    v, g = net[3].weight_v, net[3].weight_g
    for name, value in wanted(before, v, g, v.grad, 0.1).items():
        found = watch.read()[name][0, 1]
        scale = 100.0 if name == "angle" else 0.0
        assert_matches(found, value, torch.float32, 256, roundings=8, scale=scale, what=name)


def test_learning_rates_are_those_of_the_groups():
    net = network()
    rate = torch.tensor(0.3)
    groups = [
        {"params": [net[0].weight_v], "lr": 0.2},
        {"params": [net[0].weight_g, net[3].weight_g], "lr": 0.7},
    ]
    optimizer = torch.optim.SGD(groups, lr=rate)
    watch = wn_kernels.monitor(net, optimizer)
    optimizer.add_param_group({"params": [net[5].weight]})
    step(net, optimizer, torch.randn(5, 6).double())
    read = watch.read()
    rates = read["rate"] * read["norm"].square()
    assert_matches(rates[0, :1], torch.tensor([0.2]).double(), torch.float64, 4, scale=1e8 * 0.2)
    assert rates[0, 1].isnan()  # the optimizer does not have it
    assert read["angle"][0, 1] == 0
    optimizer.add_param_group({"params": [net[3].weight_v], "lr": rate})
    step(net, optimizer, torch.randn(5, 6).double())
    rate.fill_(9)  # a scheduler's next value
    read = watch.read()
    found = read["rate"][1, 1] * read["norm"][1, 1].square()
    assert_matches(found, torch.tensor(0.3).double(), torch.float64, 4)


def test_every_so_many_steps_and_the_last_ones():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watch = wn_kernels.monitor(net, optimizer, every=3, keep=2)
    x = torch.randn(5, 6).double()
    for _ in range(10):
        before = net[0].weight_v.detach().clone()
        step(net, optimizer, x)
    assert watch.steps == [7, 10]
    right = wanted(before, net[0].weight_v, net[0].weight_g, net[0].weight_v.grad, 0.1)
    assert_matches(watch.read()["angle"][1, 0], right["angle"], torch.float64, 64, roundings=64)
    watch.close()
    step(net, optimizer, x)
    assert watch.step == 10


def test_without_an_optimizer():
    net = network()
    net[0].weight_v.requires_grad_(False)
    watch = wn_kernels.monitor(net)
    assert "step 0" in str(watch)
    assert watch.read()["angle"].shape == (0, 2)
    for _ in range(2):
        before = net[3].weight_v.detach().clone()
        net.zero_grad()
        net(torch.randn(5, 6).double()).square().sum().backward()
        with torch.no_grad():
            net[3].weight_v -= 0.1 * net[3].weight_v.grad
        watch.record(0.1)
    watch.record()
    read = watch.read()
    right = wanted(before, net[3].weight_v, net[3].weight_g, net[3].weight_v.grad, 0.1)
    for name in ("norm", "rate", "gradient", "angle"):
        assert_matches(read[name][1, 1], right[name], torch.float64, 64, roundings=64, what=name)
    assert read["gradient"][:, 0].isnan().all()
    assert read["rate"][2].isnan().all()
    assert read["angle"][2, 1] == 0


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **kwargs or {})


def test_a_record_is_a_few_operations_and_waits_for_nothing():
    """Their number does not depend on that of the layers."""
    counts = []
    for layers in (2, 20):
        net = nn.Sequential(*[wn_kernels.WNLinear(4, 4) for _ in range(layers)])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        watch = wn_kernels.monitor(net, optimizer)
        step(net, optimizer, torch.randn(3, 4))
        with Operations() as operations:
            watch._before_step()
            watch._after_step(optimizer)
        assert "_local_scalar_dense.default" not in operations.names
        counts.append(len(operations.names))
    assert counts[0] == counts[1] == 8


def test_tables(capsys):
    rich = pytest.importorskip("rich")
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watch = wn_kernels.monitor(net, optimizer)
    step(net, optimizer, torch.randn(5, 6).double())
    value = f"{watch.read()['angle'][0, 1].item():.3g}"
    plain = str(watch)
    rich.print(watch)
    coloured = capsys.readouterr().out
    for text in (plain, coloured):
        assert "step 1" in text
        assert value in text
        assert "lr / ‖V‖²" in text
    assert watch.table().row_count == 2


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watch = wn_kernels.monitor(net, optimizer)
    for _ in range(3):
        step(net, optimizer, torch.randn(5, 6).double())
    figure = watch.plot(tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000
    shown = figure._repr_png_()  # what a notebook shows
    assert shown.startswith(b"\x89PNG")
    assert len(shown) > 10_000
    drawn = torch.tensor(figure.axes[0].lines[1].get_ydata())
    assert_matches(drawn, watch.read()["norm"][:, 1], torch.float64, 1)


class Writer:
    """What a monitor needs of TensorBoard."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        assert (tag, step) not in self.scalars
        self.scalars[tag, step] = value


def test_tensorboard():
    """Each record is written once."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watch = wn_kernels.monitor(net, optimizer)
    writer = Writer()
    for number in (1, 2):
        step(net, optimizer, torch.randn(5, 6).double())
        assert watch.log(writer) == 1
        for name, values in watch.read().items():
            assert writer.scalars[f"{name}/3", number] == values[-1, 1].item()
    assert watch.log(writer) == 0
    assert len(writer.scalars) == 2 * 2 * 5
    with pytest.raises(TypeError, match="writer has no add_scalar: str"):
        watch.log("runs")


def test_rejects_what_it_cannot_use():
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got int"):
        wn_kernels.monitor(wn_kernels.WNLinear(2, 2), 3)
    with pytest.raises(ValueError, match="model has no weight-normed layer"):
        wn_kernels.monitor(nn.Sequential(nn.Linear(2, 2), stacked()))
    with pytest.raises(ValueError, match="every is 0; expected a positive integer"):
        wn_kernels.monitor(network(), every=0)
    with pytest.raises(ValueError, match=r"keep is 1.5; expected a positive integer"):
        wn_kernels.monitor(network(), keep=1.5)
    with pytest.raises(TypeError, match="model must be"):
        wn_kernels.monitor([])


def test_the_defaults_of_torch_do_not_matter():
    """The model is on the CPU and in float64, while torch's default device and dtype are others."""
    layer = wn_kernels.WNLinear(2, 1001, dtype=torch.float64)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            watch = wn_kernels.monitor(layer)
            assert watch.read()["norm"].device.type == "cpu"
            watch.record(0.1)
            read = watch.read()
            assert "step 1" in str(watch)
    finally:
        torch.set_default_dtype(dtype)
    norm = (layer.weight_v.detach().square().sum() / 1001).sqrt()
    assert_matches(read["norm"][0, 0], norm, torch.float64, 2002)
    assert_matches(read["rate"][0, 0], 0.1 / norm**2, torch.float64, 2002, roundings=2)
