"""The operator alone: `W = g · V / ‖V‖` and its gradients, beside a copy of `V`, the floor of what
reads and writes a weight once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import wn_kernels.functional as WF
from bench.layer import MODES
from bench.measure.allocation import saved_bytes
from bench.runner import check_close
from wn_kernels.backends import reference
from wn_kernels.call import kept_shape

PROVIDERS: dict[str, Callable[[Tensor, Tensor, int | None], Tensor]] = {
    "plain": lambda v, g, dim: v.clone(),
    "eager": lambda v, g, dim: torch._weight_norm(v, g, -1 if dim is None else dim),
    "ours": lambda v, g, dim: WF.weight_norm(v, g, dim=dim),
}


@dataclass(frozen=True)
class NormCase:
    """A weight, and the dimension whose slices are normalised."""

    v_shape: tuple[int, ...]
    dim: int | None
    mode: str
    is_large: bool = True

    @property
    def label(self) -> str:
        return f"{'×'.join(map(str, self.v_shape))}, dim={self.dim}"

    def competitors(self, device: torch.device, full: bool) -> dict[str, Callable[[], NormRunner]]:
        return {name: partial(NormRunner, self, name, device) for name in PROVIDERS}

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"label": self.label, "parameters": math.prod(self.v_shape)}


# Of a small layer, of linear layers and convolutions, of Wav2Vec2's positions, and few long slices.
SHAPES: list[tuple[tuple[int, ...], int | None]] = [
    ((64, 64), 0),
    ((1024, 1024), 0),
    ((1024, 1024), 1),
    ((1024, 1024), None),
    ((4096, 4096), 0),
    ((256, 256, 3), 0),
    ((512, 256, 16), 0),
    ((768, 48, 128), 2),
    ((256, 64, 3, 3), 1),
    ((4, 1 << 20), 0),
]
CASES = [NormCase(shape, dim, mode) for shape, dim in SHAPES for mode in MODES]


class NormRunner:
    """One provider set up for one weight: call it to run it once."""

    def __init__(self, case: NormCase, name: str, device: torch.device) -> None:
        self.case, self.name = case, name
        torch.manual_seed(0)
        self.v = torch.randn(case.v_shape, device=device)
        self.g = torch.rand(kept_shape(case.v_shape, case.dim), device=device) + 0.5
        self.dw = torch.randn_like(self.v) + self.v  # so that no ⟨dW, V⟩ is small by chance
        if case.mode == "train":
            self.v.requires_grad_()
            self.g.requires_grad_()

    def operand_bytes(self) -> int:
        """What a call reads."""
        return sum(t.numel() * t.element_size() for t in (self.v, self.g, self.dw))

    def twin(self) -> NormRunner:
        """The same with operands of its own."""
        return copy.deepcopy(self)

    def _weight(self) -> Tensor:
        return PROVIDERS[self.name](self.v, self.g, self.case.dim)

    def __call__(self) -> None:
        if self.case.mode == "infer":
            with torch.no_grad():
                self._weight()
            return
        self._weight().backward(self.dw)
        self.v.grad = self.g.grad = None

    def check(self) -> None:
        """Compares with the definition in float64.

        Raises:
            AssertionError: the provider is wrong; it must not be timed.
        """
        if self.name == "plain":
            return
        v, g = (t.detach().double().requires_grad_() for t in (self.v, self.g))
        w = reference.weight_norm(v, g, self.case.dim, 0.0)
        length = self.v.numel() // max(1, self.g.numel())
        what = f"{self.name} is wrong for {self.case}"
        check_close(f"{what}: output", self._weight(), w, length)
        if self.case.mode == "train":
            grads = torch.autograd.grad(self._weight(), (self.v, self.g), self.dw)
            right = torch.autograd.grad(w, (v, g), self.dw.double())
            for name, grad, expected in zip("vg", grads, right, strict=True):
                check_close(f"{what}: gradient of {name}", grad, expected, length)

    def saved_bytes(self) -> int:
        return saved_bytes([self.v, self.g], self._weight)
