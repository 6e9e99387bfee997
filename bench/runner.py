"""A provider that is set up for a layer: what is checked, and then called and timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from bench.layer import Layer
from bench.measure.allocation import saved_bytes
from bench.providers import Provider, Session
from wn_kernels.backends import reference


class Runner:
    """One provider set up for one case: call it to run the case once, inside its `session`."""

    def __init__(self, case: Layer, name: str, provider: Provider, device: torch.device) -> None:
        self.case, self.name, self.provider = case, name, provider
        self.session = provider.session if case.precision == "own" else self._sessions
        torch.manual_seed(0)
        layer = case.layer(device)
        self.plain = copy.deepcopy(layer).double()
        x = torch.randn(case.x_shape, dtype=case.torch_dtype, device=device)
        if case.channels_last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        self.x = x.requires_grad_(case.mode == "train")
        with torch.no_grad(), case.session(device):
            self.dy = torch.randn_like(layer(self.x))
        self.module = provider.make(case, layer)
        if case.frozen_g:
            for name, parameter in self.module.named_parameters():
                if name.endswith(("weight_g", "original0")):
                    parameter.requires_grad_(False)
        self.right: dict[str, Tensor] = {}  # what is compared with, once it is there
        self.leaves = [self.x, *self.module.parameters()]

    @contextmanager
    def _sessions(self) -> Iterator[None]:
        with self.provider.session(), self.case.session(self.x.device):
            yield

    def operand_bytes(self) -> int:
        """Returns the bytes of the input, of the gradient of the output, and of the parameters."""
        return sum(t.numel() * t.element_size() for t in (*self.leaves, self.dy))

    def twin(self) -> Runner:
        """Returns a runner of the same case that has operands of its own."""
        shared = self.plain, self.right
        twin = copy.deepcopy(self, {id(one): one for one in shared})
        if self.module._compiled_call_impl is not None:  # what a copy leaves behind
            twin.module.compile()
        return twin

    def under(self, name: str, session: Session) -> Runner:
        """Returns a runner that shares the operands and runs inside of another session."""
        other = copy.copy(self)
        other.name, other.provider = name, replace(self.provider, session=session)
        other.session = session if self.case.precision == "own" else other._sessions
        return other

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
        if not self.right:
            self.right.update(self._reference())
        results = {"output": self.module(self.x)}
        if self.case.mode == "train":
            leaves = {what: leaf for what, leaf in self._leaves().items() if leaf.requires_grad}
            grads = torch.autograd.grad(results["output"], list(leaves.values()), self.dy)
            results |= dict(zip(leaves, grads, strict=True))
        # The sums of the output, of the input's gradient and of the weight's.
        y, shape = results["output"], self.plain.weight.shape
        length = max(math.prod(shape) // min(shape[:2]), y.numel() // len(self.plain.bias))
        for what, result in results.items():
            self._compare(what, result, self.right[what], length)

    def _leaves(self) -> dict[str, Tensor]:
        """Returns the tensors whose gradients a training step computes, by name, `V` and `g`
        last."""
        parameters = dict(self.module.named_parameters())
        bias = parameters.pop("bias")
        weights = sorted(parameters.items(), key=lambda item: item[1].numel())
        named = {"input": self.x, "bias": bias, **dict(reversed(weights))}
        return {f"gradient of {name}": leaf for name, leaf in named.items()}

    def _reference(self) -> dict[str, Tensor]:
        """The output and, of a training step, every gradient, by the definition in float64."""
        wide = [t.detach().double().requires_grad_() for t in self._leaves().values()]
        x, b, v, *g = wide
        w = reference.weight_norm(v, *g, self.case.dim, 0.0, self.case.norm) if g else v
        y = torch.func.functional_call(self.plain, {"weight": w, "bias": b}, (x,))
        found = {"output": y.detach()}
        if self.case.mode == "train":
            found |= dict(
                zip(self._leaves(), torch.autograd.grad(y, wide, self.dy.double()), strict=True)
            )
        return found

    def _compare(self, what: str, actual: Tensor, expected: Tensor, length: int) -> None:
        message = f"{self.name} is wrong for {self.case}: {what}"
        check_close(message, actual, expected, length, self.case.eps)

    def saved_bytes(self) -> int:
        return saved_bytes(self.leaves, lambda: self.module(self.x))


def check_close(
    what: str, actual: Tensor, expected: Tensor, length: int, product_eps: float = 0.0
) -> None:
    """Within what the dtype accounts for, or the products' unit of rounding where that is larger,
    and sums of that length in float32 or wider.

    Raises:
        AssertionError: it is not, or zeros would be.
    """
    eps = max(torch.finfo(actual.dtype).eps, product_eps)
    summed = min(eps, torch.finfo(torch.float32).eps)
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    bound = 4 * eps + 4 * length**0.5 * summed
    if not error <= bound < 0.5:
        raise AssertionError(
            f"{what} has relative error {error:.2e}, allowed {bound:.2e}; it is not timed"
        )
