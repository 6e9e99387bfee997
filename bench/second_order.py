"""Training steps whose loss contains a gradient, so that the backward is differentiated.

eikonal            |y| + (‖∂y/∂x‖ − 1)² of a network that learns a signed distance
                   (Gropp et al. 2020, equation (2))
gradient penalty   y + 10 (‖∂y/∂x‖ − 1)² of a critic (Gulrajani et al. 2017, equation (3))
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wn_kernels
from bench.measure.allocation import saved_bytes
from bench.models import MODELS, assert_as_good

INPUTS = {"eikonal, 8×256, 512 points": (512, 3), "gradient penalty, critic": (64, 1, 28, 28)}


def _distance() -> nn.Module:
    """Nine layers, of 256 inside."""
    sizes = [3, *[256] * 8, 1]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs)
        layers += [parametrizations.weight_norm(layer), nn.Softplus(100.0)]
    return nn.Sequential(*layers[:-1])


def _excess(y: Tensor, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def _eikonal(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y.abs().mean() + 0.1 * _excess(y, x)


def _penalty(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y.mean() + 10 * _excess(y, x)


STEPS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = dict(
    zip(INPUTS, ((_distance, _eikonal), (MODELS["critic"].build, _penalty)), strict=True)
)


@dataclass(frozen=True)
class StepCase:
    """A training step. `plain` is the network with its weights folded."""

    label: str
    mode: str = "train"
    is_large = True

    def competitors(self, device: torch.device, full: bool) -> dict[str, Callable[[], StepRunner]]:
        return {
            name: partial(StepRunner, self, name, device) for name in ("plain", "eager", "ours")
        }

    def record(self) -> dict[str, Any]:
        size = sum(p.numel() for p in STEPS[self.label][0]().parameters())
        shape = INPUTS[self.label]
        record = {"label": self.label, "mode": self.mode, "is_large": True, "x_shape": shape}
        return record | {"parameters": size}


class StepRunner:
    """One provider set up for one step: call it to run the step once."""

    def __init__(self, case: StepCase, name: str, device: torch.device) -> None:
        self.case, self.name = case, name
        build, self.loss = STEPS[case.label]
        torch.manual_seed(0)
        self.eager = build().to(device)
        self.x = torch.randn(INPUTS[case.label], device=device).requires_grad_()
        self.model = copy.deepcopy(self.eager)
        if name == "plain":
            wn_kernels.fold(self.model)
        if name == "ours":
            wn_kernels.fuse(self.model)
        self.leaves = [self.x, *self.model.parameters()]

    def operand_bytes(self) -> int:
        """Returns the bytes that a call reads, without those of activations."""
        return sum(t.numel() * t.element_size() for t in self.leaves)

    def twin(self) -> StepRunner:
        """Returns a runner of the same step that has operands of its own."""
        return copy.deepcopy(self)

    def __call__(self) -> None:
        self.loss(self.model, self.x).backward()
        for leaf in self.leaves:
            leaf.grad = None

    def check(self) -> None:
        """Compares with the network as PyTorch runs it, in float64.

        Raises:
            AssertionError: the provider is wrong; it must not be timed.
        """
        models = (self.model, self.eager, copy.deepcopy(self.eager).double())
        try:
            assert_as_good(*map(self._results, models), torch.float32)
        except AssertionError as error:
            raise AssertionError(
                f"{self.name} is wrong for {self.case}: {error}; it is not timed"
            ) from None

    def _results(self, model: nn.Module) -> dict[str, Tensor]:
        """The loss and, with weight norm, every gradient of it."""
        x = self.x.detach().to(next(model.parameters()).dtype).requires_grad_()
        loss = self.loss(model, x)
        parameters = {} if self.name == "plain" else dict(model.named_parameters())
        grads = torch.autograd.grad(loss, parameters.values()) if parameters else ()
        return {"output": loss.detach()} | dict(zip(parameters, grads, strict=True))

    def saved_bytes(self) -> int:
        return saved_bytes(self.leaves, lambda: self.loss(self.model, self.x))


CASES = [StepCase(label) for label in STEPS]
