"""The one comparison of the suite, its tolerances, and the inputs that most tests share.

Every numerical test goes through `assert_matches`, which itself fails when an all-zero result
would have passed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import wn_kernels
from wn_kernels.call import Geometry, Norm, kept_shape

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DIMS = (0, 1, None)


class AcceptsZeros(AssertionError):
    """The comparison could not have told the result from zeros."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_matches(
    actual: Tensor,
    reference: Tensor,
    dtype: torch.dtype,
    length: int,
    *,
    roundings: int = 2,
    scale: float = 0.0,
    terms: float = 0.0,
    what: str = "result",
) -> None:
    """`‖actual - reference‖` is within what `dtype` and the length of the sums account for:

        roundings · eps(dtype) · scale  +  4 √length · eps(accumulator) · terms

    The first term is for values rounded to `dtype` on the way, each worth a whole ulp (Triton's
    interpreter truncates to bfloat16 where hardware rounds); the second for sums of `length`
    numbers, whose error grows as the square root of their number. `scale` and `terms` are the
    sizes those errors are relative to: by default `‖reference‖`, larger for a difference of large
    terms. `reference` is float64.
    """
    assert reference.dtype == torch.float64, "the reference must be float64"
    assert actual.shape == reference.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    )
    if reference.numel() == 0:
        return
    expected = reference.detach().cpu()
    size = expected.norm().item()
    eps = torch.finfo(dtype).eps
    accumulator_eps = torch.finfo(accumulator(dtype)).eps
    bound = roundings * eps * max(size, scale)
    bound += 4 * math.sqrt(max(length, 1)) * accumulator_eps * max(size, terms, scale)
    if not size > 2 * bound:
        raise AcceptsZeros(f"{what}: zeros would pass (‖reference‖ = {size:.3g}, {bound = :.3g})")
    error = (actual.detach().double().cpu() - expected).norm().item()
    assert error <= bound, f"{what}: relative error {error / size:.3g} > {bound / size:.3g}"


def is_close(value: float, expected: float) -> bool:
    """Whether a number is the expected one, but for roundings of float64."""
    return abs(value - expected) <= 1e-9 * abs(expected)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Equality of every bit, of something that is not zero."""
    if not bool((expected != 0).any()):
        raise AcceptsZeros(f"{what}: zeros would pass")
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected), f"{what}: bits differ"


def assert_zero(actual: Tensor, what: str = "result") -> None:
    """For what is zero by definition, such as the gradient of a dead slice."""
    assert not bool((actual != 0).any()), f"{what}: expected zeros"


def strided(t: Tensor, layout: str) -> Tensor:
    """`t`'s values in another memory layout."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels-last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1] + 1)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if layout == "offset":
        flat = t.new_zeros(t.numel() + 3)
        flat[3:] = t.reshape(-1)
        return flat[3:].view(t.shape)
    raise ValueError(layout)


LAYOUTS = ("contiguous", "transposed", "sliced", "offset")


class LayerCase(ABC):
    """Random inputs of a layer, in the dtypes asked for, and their float64 reference.

    A subclass says what the layer is: `plain(x, w, bias)`, differentiable.
    """

    norm: Norm = "l2"

    def __init__(
        self,
        x_shape: Sequence[int],
        v_shape: Sequence[int],
        outputs: int,
        dim: int | None,
        x_dtype: torch.dtype,
        v_dtype: torch.dtype | None,
        *,
        eps: float,
        bias: bool,
        layout: str,
        device: torch.device | str,
        seed: int,
    ) -> None:
        v_dtype = v_dtype or x_dtype
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, dtype: torch.dtype) -> Tensor:
            t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            return t.to(device)

        self.dim, self.eps = dim, eps
        # The norms of anything narrower than float64 are float32, whatever x is.
        mixed = x_dtype == torch.float64 and v_dtype != torch.float64
        self.dtype = torch.float32 if mixed else x_dtype
        self.x = strided(random(*x_shape, dtype=x_dtype), layout)
        self.v = strided(random(*v_shape, dtype=v_dtype), layout)
        self.g = random(*kept_shape(v_shape, dim), dtype=v_dtype).abs() + 0.5
        self.bias = random(outputs, dtype=v_dtype) if bias else None
        # Correlated with the output, so that no ⟨dW, V⟩ is small by chance.
        product = self.plain(self.x.double(), self.v.double(), None)
        spread = product.std().item() if product.numel() > 1 else 0.0
        dy = random(*product.shape, dtype=torch.float64) + (product / spread if spread else 0.0)
        self.dy = strided(dy.to(x_dtype), layout)
        self.refer()
        # No sum is longer.
        self.length = max(t.numel() for t in (self.x, self.v, self.y))

    def refer(self) -> None:
        """Computes the reference, once more where a test has changed an input in place."""
        from wn_kernels.backends import reference

        inputs = [self.x, self.v, self.g, self.bias]
        wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
        scale = reference.slice_scale(wide[1], wide[2], self.dim, self.eps, self.norm)
        w = wide[1] * scale
        y = self.plain(wide[0], w, wide[3])
        given = [t for t in wide if t is not None]
        dw, *rest = torch.autograd.grad(y, [w, *given], self.dy.double())
        grads = iter(rest)
        self.y = y.detach()
        self.grads = [None if t is None else next(grads) for t in wide]
        # dg sums products as large as dW, and db sums dY, whose elements may cancel; dV is a
        # difference of terms as large as s ⊙ dW.
        sizes = {"dg": dw, "db": self.dy, "dv": scale * dw}
        self.terms = {name: terms.double().norm().item() for name, terms in sizes.items()}

    def take(self, norm: Norm) -> None:
        """Takes another norm, for a `V` whose slices have largest elements of both signs, if they
        are long. Where there are several slices, every other one is half as large, and the last
        one zero."""
        self.norm = norm
        self.v.clamp_(-1.0, 1.0)
        if self.dim is not None:
            self.v.movedim(self.dim, 0)[1::2] /= 2
            self.v.select(self.dim, -1).zero_()
        self.refer()

    @abstractmethod
    def plain(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without weight norm."""

    def leaves(self) -> list[Tensor | None]:
        """`x, v, g, bias`, each a leaf that wants its gradient."""
        inputs = (self.x, self.v, self.g, self.bias)
        return [None if t is None else t.detach().requires_grad_() for t in inputs]

    def check(self, layer: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Checks `layer(x, v, g, bias)` and its gradients, and returns them."""
        leaves = self.leaves()
        y = layer(*leaves)
        self.check_forward(y)
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], self.dy))
        found = [None if t is None else next(grads) for t in leaves]
        self.check_backward(found)
        with torch.no_grad():
            self.check_forward(layer(*leaves))
        return y, found

    def check_forward(self, y: Tensor) -> None:
        assert y.dtype == self.x.dtype
        assert_matches(y, self.y, self.dtype, self.length, roundings=3, what="y")

    def check_backward_of_dead(self, grads: Sequence[Tensor | None]) -> None:
        """As `check_backward`, also where `V` is all zeros: then all but `db` are zero."""
        if bool((self.v != 0).any()):
            return self.check_backward(grads)
        for name, grad in zip(("dx", "dv", "dg"), grads, strict=False):
            assert grad is not None, f"{name} is missing"
            assert_zero(grad, name)

    def check_backward(self, grads: Sequence[Tensor | None]) -> None:
        names = ("dx", "dv", "dg", "db")
        for name, grad, expected in zip(names, grads, self.grads, strict=True):
            if expected is None:
                assert grad is None, f"{name} for an input that is not there"
                continue
            assert grad is not None, f"{name} is missing"
            terms = self.terms.get(name, 0.0)
            if name == "dv" and expected.norm() < 1e-9 * terms:
                # K = 1: a direction of one element has no gradient but rounding.
                bound = 8 * torch.finfo(self.dtype).eps * terms
                assert grad.double().norm().item() <= bound, "dv: larger than rounding"
                continue
            assert_matches(
                grad,
                expected,
                max(self.dtype, grad.dtype, key=lambda dtype: torch.finfo(dtype).eps),
                self.length,
                roundings=4,
                scale=terms if name == "dv" else 0.0,
                terms=terms,
                what=name,
            )


class Case(LayerCase):
    """A linear layer: `x` is `(m, k)`, the weight `(n, k)`."""

    def __init__(
        self,
        m: int,
        k: int,
        n: int,
        dim: int | None,
        x_dtype: torch.dtype = torch.float32,
        v_dtype: torch.dtype | None = None,
        *,
        eps: float = 0.0,
        bias: bool = True,
        layout: str = "contiguous",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__(
            (m, k),
            (n, k),
            n,
            dim,
            x_dtype,
            v_dtype,
            eps=eps,
            bias=bias,
            layout=layout,
            device=device,
            seed=seed,
        )
        self.length = max(m, k, n)

    def plain(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, w, bias)


class ConvCase(LayerCase):
    """A convolution: `sizes` are the input's, `taps` the kernel's; options as in `torch.nn`."""

    def __init__(
        self,
        batch: int,
        inputs: int,
        outputs: int,
        sizes: tuple[int, ...],
        taps: tuple[int, ...],
        dim: int | None = 0,
        x_dtype: torch.dtype = torch.float32,
        v_dtype: torch.dtype | None = None,
        *,
        transposed: bool = False,
        groups: int = 1,
        eps: float = 0.0,
        bias: bool = True,
        layout: str = "contiguous",
        device: torch.device | str = "cpu",
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.rank, self.transposed = len(sizes), transposed
        self.inputs, self.outputs, self.taps = inputs, outputs, taps
        self.options = {"groups": groups, **options}
        self.suffix = f"_transpose{self.rank}d" if transposed else f"{self.rank}d"
        first, second = (inputs, outputs) if transposed else (outputs, inputs)
        super().__init__(
            (batch, inputs, *sizes),
            (first, second // groups, *taps),
            outputs,
            dim,
            x_dtype,
            v_dtype,
            eps=eps,
            bias=bias,
            layout=layout,
            device=device,
            seed=seed,
        )

        # The sums of the output, of the gradients of the input, of the weight and of the bias.
        sums = [self.v[0].numel(), self.v[:, :1].numel(), self.y.numel() // outputs]
        self.length = max(sums)

    def plain(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        options = dict(self.options)
        mode = options.pop("padding_mode", "zeros")
        if mode != "zeros":
            padding = self.geometry().padding
            both_sides = [p for size in reversed(padding) for p in (size, size)]
            x = F.pad(x, both_sides, mode=mode)
            options["padding"] = 0
        return getattr(F, f"conv{self.suffix}")(x, w, bias, **options)

    def layer(self, x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
        """Ours, by its module."""
        kind = getattr(wn_kernels, "WNConv" + self.suffix.replace("_t", "T"))
        sizes = (self.inputs, self.outputs, self.taps)
        options = {**self.options, "dim": self.dim, "eps": self.eps, "norm": self.norm}
        module = kind(*sizes, bias=bias is not None, **options, device="meta")
        parameters = {"weight_v": v, "weight_g": g, "bias": bias}
        return torch.func.functional_call(module, parameters, (x,))

    def geometry(self) -> Geometry:
        """As the backends take it; numbers alone for options."""

        def each(name: str, default: int) -> tuple[int, ...]:
            value = self.options.get(name, default)
            if isinstance(value, str):  # padding="same", of odd kernels, or "valid"
                reach = [d * (t - 1) for d, t in zip(each("dilation", 1), self.taps, strict=True)]
                return tuple(r // 2 if value == "same" else 0 for r in reach)
            return value if isinstance(value, tuple) else (value,) * self.rank

        return Geometry(
            each("stride", 1),
            each("padding", 0),
            each("dilation", 1),
            self.transposed,
            each("output_padding", 0),
            self.options["groups"],
        )
