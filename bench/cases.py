"""What is timed: cases, and the layers that compete in them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wn_kernels import WNLinear
from wn_kernels.backends import reference


class LinearCase(NamedTuple):
    """One linear layer: `x` is `(m, k)`, the weight `(n, k)`."""

    m: int
    k: int
    n: int
    mode: str  # "train": forward and backward of every gradient; "infer": forward, no_grad

    @property
    def label(self) -> str:
        return f"{self.m}, {self.k}, {self.n}"

    @property
    def is_large(self) -> bool:
        return min(self.k, self.n) >= 1024


SHAPES = [
    (32, 64, 64),
    (1, 1024, 1024),
    (8, 1024, 1024),
    (64, 1024, 1024),
    (1, 4096, 4096),
    (16, 4096, 4096),
    (128, 4096, 4096),
    (512, 1024, 4096),
]
MODES = ("infer", "train")
LINEAR = [LinearCase(*shape, mode) for mode in MODES for shape in SHAPES]

PROVIDERS: dict[str, Callable[[nn.Linear], nn.Module]] = {}


def provider(name: str) -> Callable:
    """Registers a function that turns a plain layer into the competitor of that name."""

    def register(make: Callable[[nn.Linear], nn.Module]) -> Callable:
        PROVIDERS[name] = make
        return make

    return register


@provider("plain")
def _plain(layer: nn.Linear) -> nn.Module:
    """The floor: the layer without weight norm."""
    return layer


@provider("eager")
def _eager(layer: nn.Linear) -> nn.Module:
    """PyTorch's parametrization, the baseline."""
    return torch.nn.utils.parametrizations.weight_norm(layer)


@provider("legacy")
def _legacy(layer: nn.Linear) -> nn.Module:
    """PyTorch's older forward hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer)


@provider("ours")
def _ours(layer: nn.Linear) -> nn.Module:
    weight = layer.weight
    fused = WNLinear(
        layer.in_features, layer.out_features, device=weight.device, dtype=weight.dtype
    )
    fused.load_state_dict(layer.state_dict())
    return fused


class Runner:
    """One provider set up for one case: call it to run the case once."""

    def __init__(self, case: LinearCase, name: str, device: torch.device) -> None:
        self.case, self.name = case, name
        torch.manual_seed(0)
        layer = nn.Linear(case.k, case.n, device=device)
        self.module = PROVIDERS[name](layer)
        train = case.mode == "train"
        self.x = torch.randn(case.m, case.k, device=device, requires_grad=train)
        self.dy = torch.randn(case.m, case.n, device=device)
        self.leaves = [self.x, *self.module.parameters()]

    def __call__(self) -> None:
        if self.case.mode == "infer":
            with torch.no_grad():
                self.module(self.x)
            return
        self.module(self.x).backward(self.dy)
        for leaf in self.leaves:
            leaf.grad = None

    def check(self) -> None:
        """Compares with the definition in float64.

        Raises:
            AssertionError: the provider is wrong; it must not be timed.
        """
        parameters = dict(self.module.named_parameters())
        bias = parameters.pop("bias")
        weights = sorted(parameters.items(), key=lambda item: item[1].numel())
        x, dy, b = (t.detach().double() for t in (self.x, self.dy, bias))
        leaves = [x.requires_grad_(), b.requires_grad_()]
        wide = [p.detach().double().requires_grad_() for _, p in weights]
        if self.name == "plain":
            y = torch.nn.functional.linear(x, wide[0], b)
        else:
            y = reference.linear(x, wide[1], wide[0], b, 0, 0.0)
        self._compare("output", self.module(self.x), y)
        if self.case.mode == "infer":
            return
        expected = torch.autograd.grad(y, leaves + wide, dy)
        actual = [self.x, bias, *(p for _, p in weights)]
        grads = torch.autograd.grad(self.module(self.x), actual, self.dy)
        names = ["input", "bias", *(name for name, _ in weights)]
        for name, grad, right in zip(names, grads, expected, strict=True):
            self._compare(f"gradient of {name}", grad, right)

    def _compare(self, what: str, actual: Tensor, expected: Tensor) -> None:
        eps = torch.finfo(actual.dtype).eps
        length = max(self.case[:3])
        error = ((actual.double() - expected).norm() / expected.norm()).item()
        bound = eps * (4 + 4 * length**0.5)
        if not error <= bound < 0.5:
            raise AssertionError(
                f"{self.name} is wrong for {self.case}: {what} has relative error {error:.2e}, "
                f"allowed {bound:.2e}; it is not timed"
            )

    def saved_bytes(self) -> int:
        """Memory kept between forward and backward, beyond the input and the parameters."""
        known = {t.untyped_storage().data_ptr() for t in self.leaves}
        saved: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = self.module(self.x)
        del y
        return sum(saved.values())
