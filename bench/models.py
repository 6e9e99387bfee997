"""Real models in their default configuration, with random weights: whole networks to time, folded,
as PyTorch runs them, fused, and in inference fused with weights that are computed once. Needs the
extra `models`."""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wn_kernels
from bench.layer import MODES
from bench.measure.allocation import saved_bytes


class Model(NamedTuple):
    """How to build a model, the shapes of its input, and what makes one tensor of it."""

    build: Callable[[], nn.Module]
    small: tuple[int, ...]  # to check
    x_shape: tuple[int, ...]  # to time: about a second of sound, a batch of images
    call: Callable[[Any, Tensor], Tensor]
    layers: int  # those with weight norm
    is_layer: bool = False  # whether it is a single layer, which has no group


def _hifigan() -> nn.Module:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    model = SpeechT5HifiGan(SpeechT5HifiGanConfig())
    model.apply_weight_norm()
    return model


def _encodec() -> nn.Module:
    """Its codes between the two parts are discrete: a rounding may turn into another code."""
    from transformers import EncodecConfig, EncodecModel

    model = EncodecModel(EncodecConfig())
    return nn.Sequential(OrderedDict(encoder=model.encoder, decoder=model.decoder))


def _wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(Wav2Vec2Config())


def _attention() -> nn.Module:
    layer = nn.MultiheadAttention(256, 4, batch_first=True)
    parametrizations.weight_norm(layer.out_proj)
    return layer


def _tcn() -> nn.Module:
    from pytorch_tcn import TCN

    return TCN(num_inputs=16, num_channels=[64, 64, 64, 64], kernel_size=4)


def _critic() -> nn.Module:
    """Of a Wasserstein GAN, for images of 28×28."""
    normed = parametrizations.weight_norm
    return nn.Sequential(
        normed(nn.Conv2d(1, 32, 4, 2, 1)),
        nn.Softplus(2.0),
        normed(nn.Conv2d(32, 64, 4, 2, 1)),
        nn.Softplus(2.0),
        nn.Flatten(),
        normed(nn.Linear(64 * 49, 1)),
    )


MODELS = {
    "hifigan": Model(_hifigan, (8, 80), (64, 80), lambda model, x: model(x), 78),
    "encodec": Model(_encodec, (1, 1, 1280), (1, 1, 24000), lambda model, x: model(x), 36),
    "wav2vec2": Model(
        _wav2vec2, (1, 4000), (1, 16000), lambda model, x: model(x).last_hidden_state, 1
    ),
    "attention": Model(
        _attention, (2, 9, 256), (8, 128, 256), lambda model, x: model(x, x, x)[0], 1
    ),
    "tcn": Model(_tcn, (2, 16, 40), (16, 16, 400), lambda model, x: model(x), 8),
    "critic": Model(_critic, (4, 1, 28, 28), (64, 1, 28, 28), lambda model, x: model(x), 3),
}


# These are the providers. `grouped` is ours with the weights of all layers in one call.
NAMES = ("plain", "eager", "ours", "grouped")

# Inputs that a check may take.
INPUTS = 3


def built(
    name: str, x_shape: tuple[int, ...] | None = None, models: Mapping[str, Model] = MODELS
) -> tuple[nn.Module, Tensor]:
    """The model, without dropout, and an input, small by default. `g` is moved off the norm it
    starts from."""
    torch.manual_seed(0)
    model = models[name].build().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("original0"):
                p.mul_(torch.rand_like(p) / 2 + 0.75)
    return model, torch.randn(x_shape or models[name].small)


class Miss(NamedTuple):
    """A result that is further from float64 than rounding explains: its error, eager's error and
    the bound, each over the size of the result."""

    name: str
    error: float
    eager: float
    bound: float

    def __str__(self) -> str:
        return f"{self.name} {self.error:.1e} (eager's {self.eager:.1e}, bound {self.bound:.1e})"


# Misses that a message names.
WORST = 4


class Wrong(AssertionError):
    """Results are off by more than rounding.

    Attributes:
        what: what is wrong, without the worst misses.
        worst: the misses that are the largest multiples of their bounds.
        details: the same as fields of a line of results.
    """

    def __init__(self, what: str, misses: Sequence[Miss] = ()) -> None:
        self.what = what
        self.worst = sorted(misses, key=_excess, reverse=True)[:WORST]
        self.details = {"worst": [miss._asdict() for miss in self.worst]}
        named = "; the worst: " + ", ".join(map(str, self.worst)) if self.worst else ""
        super().__init__(what + named)


def _excess(miss: Miss) -> float:
    return math.inf if math.isnan(miss.error) else miss.error / miss.bound


class AtKinks(Wrong):
    """More results are off than the kinks of few blocks explain."""


def assert_as_good(
    ours: dict[str, Tensor], eager: dict[str, Tensor], right: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Each result's error against float64 is within twice eager's in the same dtype, which a deep
    network's amplified rounding makes the yardstick, and eight ulps.

    Some gradients cancel, such as that of an attention's key bias: where eager has no digit of one,
    there is nothing to compare. And an activation within rounding of a kink may fall on either side
    of it, for one as for the other, which shows in the gradients of its block: to 1 % there.

    Raises:
        Wrong: one is wrong, or zeros would have passed for a tenth of them.
        AtKinks: a tenth of them is at a kink.
    """
    assert ours.keys() == eager.keys() == right.keys()
    compared, misses, wrong = 0, [], []
    for key, reference in right.items():
        size = reference.norm().item()
        allowed = (eager[key].double() - reference).norm().item()
        bound = 2 * allowed + 8 * torch.finfo(dtype).eps * size
        if size <= bound:
            continue
        compared += 1
        error = (ours[key].double() - reference).norm().item()
        if not error <= bound:
            misses.append(Miss(key, error / size, allowed / size, bound / size))
        if not error <= max(bound, 0.01 * size * (key != "output")):
            wrong.append(key)
    if wrong:
        more = f" and {len(wrong) - 1} more are" if len(wrong) > 1 else " is"
        raise Wrong(f"{wrong[0]}{more} wrong", [miss for miss in misses if miss.name in wrong])
    if compared < 0.9 * len(right):
        raise Wrong(f"zeros would pass for {len(right) - compared} of {len(right)}")
    if len(misses) > 0.1 * len(right):
        raise AtKinks(f"{len(misses)} of {len(right)} are off by more than rounding", misses)


def _train_recurrences(model: nn.Module) -> None:
    """Puts the recurrent layers of a model into training mode, outside of which cuDNN has no
    backward for them. They must have no dropout."""
    for layer in model.modules():
        if isinstance(layer, nn.RNNBase):
            assert not layer.dropout, "two runs would differ"
            layer.train()


@functools.cache
def parameters_of(build: Callable[[], nn.Module]) -> int:
    """How many numbers a model's parameters are."""
    return sum(p.numel() for p in build().parameters())


@dataclass(frozen=True)
class ModelCase:
    """Describes one of the models in one mode. `plain` is the model with its weights folded."""

    label: str
    mode: str
    models: Mapping[str, Model] = field(default_factory=lambda: MODELS, repr=False, compare=False)
    is_large = True

    def names(self) -> tuple[str, ...]:
        """Returns the names of the providers."""
        names = NAMES[:-1] if self.model.is_layer else NAMES
        return (*names, "frozen") if self.mode == "infer" else names

    @property
    def model(self) -> Model:
        return self.models[self.label]

    def competitors(self, device: torch.device, full: bool) -> dict[str, Callable[[], ModelRunner]]:
        return {name: partial(ModelRunner, self, name, device) for name in self.names()}

    def record(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "mode": self.mode,
            "is_large": True,
            "x_shape": self.model.x_shape,
            "parameters": parameters_of(self.model.build),
        }


class ModelRunner:
    """One provider set up for one model: call it to run the model once."""

    def __init__(self, case: ModelCase, name: str, device: torch.device) -> None:
        self.case, self.name = case, name
        model, x = built(case.label, case.model.x_shape, case.models)
        if case.mode == "train":
            _train_recurrences(model)
        with torch.no_grad():  # PyTorch's recurrent layers keep the weights that a move computes
            self.eager, self.x = model.to(device), x.to(device)
        self.model = copy.deepcopy(self.eager)
        if name == "plain":
            wn_kernels.fold(self.model)
        if name in ("ours", "frozen"):
            wn_kernels.fuse(self.model)
        if name == "grouped":
            wn_kernels.fuse(self.model, grouped=True)
        self.parameters = list(self.model.parameters())

    @property
    def session(self) -> Callable[[], AbstractContextManager[Any]]:
        """Returns the context in which `bench.measure.timing` calls the runner."""
        if self.name == "frozen":
            return partial(wn_kernels.frozen_weights, self.model)
        return nullcontext

    def operand_bytes(self) -> int:
        """Returns the bytes that a call reads, without those of activations."""
        return sum(t.numel() * t.element_size() for t in (self.x, *self.parameters))

    def twin(self) -> ModelRunner:
        """Returns a runner of the same model that has operands of its own."""
        return copy.deepcopy(self)

    def __call__(self) -> None:
        if self.case.mode == "infer":
            with torch.no_grad():
                self._output(self.model)
            return
        self._loss(self.model).backward()
        for p in self.parameters:
            p.grad = None

    def _output(self, model: nn.Module) -> Tensor:
        x = self.x.to(next(model.parameters()).dtype)
        return self.case.model.call(model, x)

    def _loss(self, model: nn.Module) -> Tensor:
        return self._output(model).square().mean()

    def check(self) -> None:
        """Compares with the model as PyTorch runs it, in float64.

        Raises:
            Wrong: the provider is wrong; it must not be timed.
        """
        first = self.x
        try:
            self._compare()
        except Wrong as error:
            about = f"{self.name} is wrong for {self.case.label} {self.case.mode}, and not timed"
            raise Wrong(f"{about}: {error.what}", error.worst) from None
        finally:
            self.x = first
        del self.eager

    def _compare(self) -> None:
        """Compares at both of the model's inputs. A large input has activations within rounding of
        a kink, whose gradients may fall on either side, so that only the small one shows rounding.
        There, an input may be at a kink as well; what is wrong is wrong with each."""
        models = (self.model, self.eager, copy.deepcopy(self.eager).double())
        with suppress(AtKinks):
            assert_as_good(*map(self._results, models), self.x.dtype)
        for left in reversed(range(INPUTS)):
            self.x = torch.randn(self.case.model.small).to(self.x)
            try:
                return assert_as_good(*map(self._results, models), self.x.dtype)
            except AtKinks:
                if not left:
                    raise

    def _results(self, model: nn.Module) -> dict[str, Tensor]:
        """The output and, of a training step, every gradient."""
        with torch.no_grad():
            results = {"output": self._output(model)}
        if self.case.mode == "train" and self.name != "plain":
            self._loss(model).backward()
            named = model.named_parameters()
            results |= {key: p.grad for key, p in named if p.grad is not None}
            model.zero_grad()
        return results

    def saved_bytes(self) -> int:
        return saved_bytes([self.x, *self.parameters], lambda: self._loss(self.model))


CASES = [ModelCase(name, mode) for name in MODELS for mode in MODES]
