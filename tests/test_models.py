"""Real models, at their default size with random weights: fused, each is what it was."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import wn_kernels
from bench.models import MODELS, assert_as_good, built
from tests.comparison import assert_matches, assert_same_bits
from wn_kernels.call import Member
from wn_kernels.modules import prepared

transformers = pytest.importorskip("transformers", reason="the extra 'models' is not installed")
pytest.importorskip("pytorch_tcn", reason="the extra 'models' is not installed")


def step(name, model, x):
    """The loss's terms and every gradient; of the critic, those of a gradient penalty."""
    call = MODELS[name].call
    x = x.detach().to(next(model.parameters()).dtype).requires_grad_()
    model.zero_grad()
    y = call(model, x)
    loss = y.square().mean()
    if name == "critic":
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        loss = loss + (slope.flatten(1).norm(dim=1) - 1).square().mean()
    loss.backward()
    found = {"output": y.detach(), "input": x.grad}
    found |= {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: t.detach().clone() for key, t in found.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_as_before(name, dtype):
    """Outputs, every gradient, and three steps of an optimizer made beforehand."""
    eager, x = built(name)
    # With the first input, the vocoder has an activation within rounding of a kink at its very end,
    # which the gradients of every layer pass: the composite's are off there, too.
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    eager = eager.to(dtype)
    x = x.to(dtype)
    twin, ours = copy.deepcopy(eager).double(), copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (ours, eager, twin)]
    report = wn_kernels.fuse(ours)
    assert len([line for line in report if line.path]) == MODELS[name].layers, report
    models = (ours, eager, twin)
    steps = []
    for _ in range(3):
        steps.append([step(name, model, x) for model in models])
        for optimizer in optimizers:
            optimizer.step()
    # All steps at once: eager's error, the yardstick, may by chance be small in one of them.
    results = [
        {key: torch.stack([result[key] for result in results]) for key in results[0]}
        for results in zip(*steps, strict=True)
    ]
    if dtype == torch.bfloat16:  # it has too few digits for the gradients of a deep network
        results = [{"output": result["output"]} for result in results]
    assert_as_good(*results, dtype)
    with torch.no_grad():
        outputs = [
            {"output": MODELS[name].call(m, x.to(next(m.parameters()).dtype))} for m in models
        ]
    assert_as_good(*outputs, dtype)
    if dtype == torch.float32:
        assert_as_good(*(dict(model.named_parameters()) for model in models), dtype)


@pytest.mark.parametrize("name", MODELS)
def test_lives_on(name):
    """State dict, deepcopy, pickle, folding, and going back."""
    eager, x = built(name)
    call = MODELS[name].call
    ours = copy.deepcopy(eager)
    wn_kernels.fuse(ours)
    assert list(ours.state_dict()) == list(eager.state_dict())
    fresh = MODELS[name].build().eval()
    fresh.load_state_dict(ours.state_dict())
    wn_kernels.fuse(fresh)
    with torch.no_grad():
        right = call(copy.deepcopy(eager).double(), x.double())
        y = call(ours, x)
        assert_same_bits(call(fresh, x), y)
        assert_same_bits(call(copy.deepcopy(ours), x), y)
        assert_same_bits(call(pickle.loads(pickle.dumps(ours)), x), y)
        # A network of dozens of layers: twenty roundings of a sum each.
        assert_matches(y, right, torch.float32, 512, roundings=20)
        assert len(wn_kernels.fold(fresh)) == MODELS[name].layers
        assert_matches(call(fresh, x), right, torch.float32, 512, roundings=20)
        assert not any(parametrize.is_parametrized(m) for m in fresh.modules())
        wn_kernels.unfuse(ours)
        assert_same_bits(call(ours, x), call(eager, x))


# Vocoders whose `remove_weight_norm()` calls PyTorch's function for the older form, though their
# `apply_weight_norm()` uses the newer: class, configuration, the shape of the input.
VOCODERS = {
    "SpeechT5HifiGan": ({"upsample_initial_channel": 32}, (1, 12, 80)),
    "FastSpeech2ConformerHifiGan": ({"upsample_initial_channel": 32}, (1, 12, 80)),
    "UnivNetModel": ({"model_hidden_channels": 8}, None),
    "VitsModel": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "ffn_dim": 16,
            "flow_size": 16,
            "upsample_initial_channel": 32,
            "spectrogram_bins": 9,
        },
        None,
    ),
}


def vocoder(name):
    """A vocoder under weight norm, and a call of it."""
    options, shape = VOCODERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, name.removesuffix("Model") + "Config")(**options)
    model = getattr(transformers, name)(config).eval()
    inputs = [torch.randn(shape)] if shape else []
    call = model
    if name == "UnivNetModel":
        inputs = [
            torch.randn(1, 12, config.num_mel_bins),
            torch.randn(1, 12, config.model_in_channels),
        ]
        call = lambda *x: model(*x).waveforms  # noqa: E731
    elif name == "VitsModel":
        model = model.decoder
        inputs = [torch.randn(1, config.flow_size, 12)]
        call = model
    model.apply_weight_norm()
    for key, p in model.named_parameters():
        if key.endswith(("_g", "original0")):
            p.data.mul_(torch.rand_like(p) + 0.5)
    return model, lambda dtype: call(*(x.to(dtype) for x in inputs))


@pytest.mark.parametrize("convert", [wn_kernels.fuse, None])
@pytest.mark.parametrize("name", VOCODERS)
@torch.no_grad()
def test_their_own_removal(name, convert):
    model, call = vocoder(name)
    model.double()
    right = call(torch.float64)
    model.float()
    if convert is None:
        with pytest.raises(ValueError, match="not found"):
            model.remove_weight_norm()
        return
    convert(model)
    model.remove_weight_norm()
    assert wn_kernels.fold(model) == []
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d))]
    assert {type(m) for m in layers} == {nn.Conv1d, nn.ConvTranspose1d}
    assert all(isinstance(m.weight, nn.Parameter) for m in layers)
    assert not any(list(m._forward_pre_hooks.items()) for m in layers)
    assert_matches(call(torch.float32), right, torch.float32, 512, roundings=20)


@pytest.mark.parametrize("name", ["hifigan", "encodec"])
def test_one_launch_for_all_norms_of_a_model(name, monkeypatch):
    """One call of a forward, and one node of its graph. On a GPU each is one launch."""
    group = pytest.importorskip("wn_kernels.backends.triton.group")
    eager, x = built(name)
    single, grouped, wide = copy.deepcopy(eager), copy.deepcopy(eager), eager.double()
    wn_kernels.fuse(single)
    wn_kernels.fuse(grouped, grouped=True)
    calls, make = [], prepared.grouped.formed

    def counted(v, g, options, **more):
        calls.append((v, g, options))
        return make(v, g, options, **more)

    monkeypatch.setattr(prepared.grouped, "formed", counted)
    monkeypatch.setattr(prepared.plan, "fewest", lambda _: 1)
    monkeypatch.setattr(prepared.plan, "shares", lambda *_: True)
    nodes, todo = set(), [MODELS[name].call(grouped, x).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [edge for edge, _ in node.next_functions]
    assert sum("WeightNorms" in node.name() for node in nodes) == 1
    ((v, g, options),) = calls
    assert len(v) == MODELS[name].layers
    members = tuple(map(Member, *options))
    target = group.target_of(v[0])
    vs, gs = ([t.detach().to("meta") for t in each] for each in (v, g))
    for launches in (
        group._prepare(target, *vs, *gs, members),
        group._prepare_backward(target, *vs, *vs, *gs, members),
    ):
        assert (len(launches.tables), launches.alone) == (1, [])
    assert_as_good(*(step(name, model, x) for model in (grouped, single, wide)), torch.float32)


def test_torchs_own_removal():
    for name in ("attention", "tcn", "wav2vec2", "encodec"):
        model, x = built(name)
        wn_kernels.fuse(model)
        call = MODELS[name].call
        right = call(model, x).detach().double()
        for module in model.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        assert not wn_kernels.fold(model)
        assert_matches(call(model, x), right, torch.float32, 512, roundings=20)
