"""State dicts of converted models, in every form."""

import copy

import pytest
import torch
from torch import nn

import wn_kernels
from tests.comparison import assert_matches, assert_same_bits
from tests.convert.layers import (
    FORMS,
    NORMALISE,
)

# --- checkpoints ---------------------------------------------------------------------------------


def checkpoint(form):
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(4, 3, 2))
    if form != "plain":
        for layer in plain:
            NORMALISE[form](layer)
    return plain.state_dict(), [layer.weight.detach() for layer in plain]


def targets():
    torch.manual_seed(5)
    yield nn.Sequential(wn_kernels.WNLinear(6, 4), wn_kernels.WNConv1d(4, 3, 2))
    for form in FORMS:
        model = nn.Sequential(NORMALISE[form](nn.Linear(6, 4)), NORMALISE[form](nn.Conv1d(4, 3, 2)))
        wn_kernels.fuse(model)
        yield model


@pytest.mark.parametrize("form", [*FORMS, "plain"])
def test_loads_and_saves_every_form(form):
    state, weights = checkpoint(form)
    keys = list(state)
    for model in targets():
        result = model.load_state_dict(state)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert list(state) == keys, "the caller's state dict was changed"
        for layer, weight in zip(model, weights, strict=True):
            assert_matches(layer.weight, weight.double(), torch.float32, 8)
        # What is saved in that form is what PyTorch's own module loads.
        saved = wn_kernels.state_dict(model, form)
        assert set(saved) == set(keys)
        other = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(4, 3, 2))
        if form != "plain":
            for layer in other:
                NORMALISE[form](layer)
        other.load_state_dict(saved)
        x = torch.randn(4, 6)
        assert_matches(other[0](x), model[0](x).detach().double(), torch.float32, 8)
    with pytest.raises(ValueError, match="form is 'other'; expected one of"):
        wn_kernels.state_dict(model, "other")


@pytest.mark.parametrize("form", [*FORMS, "plain"])
def test_partial_checkpoints_are_reported(form):
    state, _ = checkpoint(form)
    lost = [key for key in state if key.startswith("0.") and "bias" not in key]
    for model in targets():
        own = [key for key in model.state_dict() if key.startswith("0.") and "bias" not in key]
        partial = {key: t for key, t in state.items() if key not in lost}
        result = model.load_state_dict(partial | {"0.more": torch.ones(1)}, strict=False)
        assert set(result.missing_keys) == set(own)
        assert result.unexpected_keys == ["0.more"]


@pytest.mark.parametrize("form", [*FORMS, "plain"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_shape_mismatch_changes_nothing(form, assign):
    state, _ = checkpoint(form)
    wrong = next(key for key in state if key.startswith("1.") and key.endswith(("_v", "1", "ght")))
    state[wrong] = torch.randn(3, 4, 5)
    for model in list(targets())[1:]:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match=r"(?s)size mismatch for 1\..*\[3, 4, 5\]") as error:
            model.load_state_dict(state, assign=assign)
        assert "Missing" not in str(error.value)
        assert "Unexpected" not in str(error.value)
        for key, t in model.state_dict().items():
            assert_same_bits(t, before[key], key)


class Resized(nn.Module):
    """A table that takes the length of the one in the checkpoint, as positions or codes do."""

    def __init__(self, length):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(length))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.table = nn.Parameter(torch.zeros_like(state_dict[prefix + "table"]))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def flatten_bias(state_dict, prefix, *rest):
    state_dict[prefix + "bias"] = state_dict[prefix + "bias"].flatten()


@pytest.mark.parametrize("form", [*FORMS, "plain"])
def test_modules_that_adapt_their_entries(form):
    """An entry that does not fit until its module has changed it is no reason to load nothing."""
    state, weights = checkpoint(form)
    state |= {"1.bias": state["1.bias"].view(-1, 1), "2.0.table": torch.ones(5)}
    for model in targets():
        model.append(nn.Sequential(Resized(3)))
        wn_kernels.fuse(model)
        model[1]._register_load_state_dict_pre_hook(flatten_bias)
        model.load_state_dict(state)
        for layer, weight in zip(model, weights, strict=False):
            assert_matches(layer.weight, weight.double(), torch.float32, 64)
        assert_same_bits(model[1].bias, state["1.bias"].flatten())
        assert_same_bits(model[2][0].table, torch.ones(5))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match=r"(?s)size mismatch for 0\.bias.*\[7\]"):
            model.load_state_dict(state | {"0.bias": torch.ones(7)})
        for key, t in model.state_dict().items():
            assert_same_bits(t, before[key], key)


@pytest.mark.parametrize("form", [*FORMS, "plain"])
def test_what_is_no_tensor_changes_nothing(form):
    state, _ = checkpoint(form)
    wrong = next(key for key in state if key.startswith("1.") and key.endswith(("_v", "1", "ght")))
    state[wrong] = 3
    for model in list(targets())[1:]:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match=r"copying the parameter named \"1\..*'int'"):
            model.load_state_dict(state)
        for key, t in model.state_dict().items():
            assert_same_bits(t, before[key], key)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_a_plain_checkpoint_of_another_dtype(dtype):
    """It is converted, as by a layer of torch.nn."""
    state = {key: (8 * t).to(dtype) for key, t in checkpoint("plain")[0].items()}
    for model in targets():
        model.load_state_dict(state)
        for i, layer in enumerate(model):
            assert_matches(layer.weight, state[f"{i}.weight"].double(), torch.float32, 64)


class Shared(nn.Module):
    """One layer at two places."""

    def __init__(self, layer):
        super().__init__()
        self.encode = layer
        self.decode = nn.Sequential(layer, nn.ReLU())

    def forward(self, input):
        return self.decode(self.encode(input))


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("form", [*FORMS, "own"])
def test_a_module_at_two_places(form, is_fused):
    torch.manual_seed(0)
    for make in (lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 1)):
        layer = make()
        if form == "own":
            layer = wn_kernels.WNLinear(4, 4) if isinstance(layer, nn.Linear) else None
            layer = layer or wn_kernels.WNConv1d(4, 4, 1)
        else:
            NORMALISE[form](layer)
        model = Shared(layer)
        if is_fused:
            wn_kernels.fuse(model)
        x = torch.randn(3, 4, 4)
        right = model.double()(x.double()).detach()  # PyTorch's older form cannot be copied
        model.float()
        for saved_form in (*FORMS, "plain"):
            state = wn_kernels.state_dict(model, saved_form)
            other = make()
            if saved_form != "plain":
                NORMALISE[saved_form](other)
            other = Shared(other)
            assert set(state) == set(other.state_dict())
            other.load_state_dict(state)
            assert_matches(other(x), right, torch.float32, 16, roundings=4)
            if is_fused or form == "own":
                model.load_state_dict(state)
                assert_matches(model(x), right, torch.float32, 16, roundings=4)
        assert len(wn_kernels.fold(model)) == 1
        assert list(model.state_dict()) == list(Shared(make()).state_dict())
        assert model.encode is model.decode[0]


# --- slices shorter than eps ---------------------------------------------------------------------

SHORT = {
    "linear": (nn.Linear, wn_kernels.WNLinear, (4, 3), "weight"),
    "conv": (nn.Conv1d, wn_kernels.WNConv1d, (4, 3, 2), "weight"),
    "transposed": (nn.ConvTranspose1d, wn_kernels.WNConvTranspose1d, (4, 3, 2), "weight"),
    "recurrent": (nn.GRU, wn_kernels.WNGRU, (4, 3), "weight_hh_l0"),
    "cell": (nn.LSTMCell, wn_kernels.WNLSTMCell, (4, 3), "weight_ih"),
}


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
@pytest.mark.parametrize("kind", SHORT)
def test_weights_whose_slices_are_shorter_than_eps(kind, norm):
    """A layer starts from the plain one's weight, loads it, is assigned it, and gives it back."""
    plain_class, ours, sizes, name = SHORT[kind]
    torch.manual_seed(3)
    plain = plain_class(*sizes)
    torch.manual_seed(3)
    layer = ours(*sizes, eps=2.5, norm=norm)
    weight = getattr(plain, name).detach()
    assert_matches(getattr(layer, name).detach(), weight.double(), torch.float32, 1)
    with torch.no_grad():
        getattr(plain, name).mul_(0.01)[1] = 0
    layer.load_state_dict(plain.state_dict())
    assert_matches(getattr(layer, name).detach(), weight.double(), torch.float32, 1)
    saved = wn_kernels.state_dict(layer, "plain")[name]
    assert_matches(saved, weight.double(), torch.float32, 1)
    setattr(layer, name, weight * 3)
    assert_matches(getattr(layer, name).detach(), 3 * weight.double(), torch.float32, 1)
