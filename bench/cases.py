"""What is timed: the cases of each suite, and a provider set up for one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import precision
from bench.allocation import saved_bytes
from bench.providers import Provider, Session, providers_of
from wn_kernels.backends import reference
from wn_kernels.call import Call, Geometry

MODES = ("infer", "train")


@dataclass(frozen=True)
class Case:
    """One layer: its class in `torch.nn`, what that takes, and the shape of the input."""

    label: str
    kind: str
    arguments: tuple[Any, ...]
    x_shape: tuple[int, ...]
    mode: str  # "train": forward and backward of every gradient; "infer": forward, no_grad
    options: dict[str, Any] = field(default_factory=dict)
    dim: int = 0
    is_large: bool = True  # whether its ratio to the plain layer counts in the suite's mean
    dtype: str = "float32"
    precision: str = "own"  # "autocast": the call's in bfloat16; "tf32": float32 products in TF32
    channels_last: bool = False  # of the input, and of the weights of two dimensions
    frozen_g: bool = False  # whether the magnitudes are not trained

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def layer(self, device: torch.device) -> nn.Module:
        """The plain layer."""
        kind = getattr(nn, self.kind)
        layer = kind(*self.arguments, **self.options, device=device, dtype=self.torch_dtype)
        last = self.channels_last and layer.weight.ndim == 4
        return layer.to(memory_format=torch.channels_last) if last else layer

    def call(self) -> Call:
        """The call of ours in it."""
        layer: Any = self.layer(torch.device("meta"))
        x_shape, v_shape, dtype = torch.Size(self.x_shape), layer.weight.shape, self.torch_dtype
        x_dtype = torch.bfloat16 if self.precision == "autocast" else dtype
        conv = None
        if layer.weight.ndim > 2:
            padding = layer.padding
            if layer.padding_mode != "zeros":  # the input is padded before
                sizes = zip(x_shape[2:], padding, strict=True)
                x_shape = torch.Size((*x_shape[:2], *(size + 2 * p for size, p in sizes)))
                padding = (0,) * len(padding)
            rest = layer.dilation, layer.transposed, layer.output_padding, layer.groups
            conv = Geometry(layer.stride, padding, *rest)
        options = self.channels_last, self.precision == "tf32"
        return Call(x_shape, v_shape, x_dtype, dtype, self.dim, conv, *options)

    def session(self, device: torch.device) -> AbstractContextManager[Any]:
        """What its calls run inside of."""
        if self.precision == "autocast":
            return torch.autocast(device.type, torch.bfloat16)
        return precision.tf32() if self.precision == "tf32" else nullcontext()

    @property
    def eps(self) -> float:
        """The unit of rounding of its products."""
        rounded = {"autocast": torch.finfo(torch.bfloat16).eps, "tf32": 2.0**-10}
        return rounded.get(self.precision, torch.finfo(self.torch_dtype).eps)

    def competitors(self, device: torch.device, full: bool) -> dict[str, Callable[[], Runner]]:
        """What sets each provider up for this case, by its name."""
        found = providers_of(self, device, full)
        return {name: partial(Runner, self, name, p, device) for name, p in found.items()}

    def work(self) -> tuple[float, float]:
        """Operations, and the bytes that have to move: what is given is read, and what is asked for
        is written, once."""
        layer = self.layer(torch.device("meta"))
        x = torch.empty(self.x_shape, dtype=self.torch_dtype, device="meta")
        y, w = layer(x), layer.weight
        # A product for every element of the output, or of the input where that is spread out.
        pixels = x if "Transpose" in self.kind else y
        operations = 2.0 * pixels.numel() * w[0].numel()
        moved = float(sum(t.numel() * t.element_size() for t in (x, w, y)))
        return (operations, moved) if self.mode == "infer" else (3 * operations, 3 * moved)

    def record(self) -> dict[str, Any]:
        operations, moved = self.work()
        return asdict(self) | {"operations": operations, "bytes": moved, "parameters": self.size()}

    def size(self) -> int:
        """Parameters of the plain layer."""
        return sum(p.numel() for p in self.layer(torch.device("meta")).parameters())


def _linear(m: int, k: int, n: int) -> list[Case]:
    return [
        Case(f"{m}, {k}, {n}", "Linear", (k, n), (m, k), mode, is_large=min(k, n) >= 1024)
        for mode in MODES
    ]


def _conv(
    label: str, kind: str, arguments: tuple, x_shape: tuple, dim: int = 0, **options: Any
) -> list[Case]:
    return [Case(label, kind, arguments, x_shape, mode, options, dim) for mode in MODES]


LINEAR = [
    *_linear(32, 64, 64),
    *_linear(1, 1024, 1024),
    *_linear(8, 1024, 1024),
    *_linear(64, 1024, 1024),
    *_linear(1, 4096, 4096),
    *_linear(16, 4096, 4096),
    *_linear(128, 4096, 4096),
    *_linear(512, 1024, 4096),
    # The last layer of a DINO head, whose magnitudes are not trained.
    *(replace(case, frozen_g=True) for case in _linear(128, 256, 65536)),
]

# Vocoders and codecs, speech encoders, discriminators, temporal networks, super-resolution.
CONV = [
    *_conv("1d 80→512 k7, 32", "Conv1d", (80, 512, 7), (1, 80, 32), padding=3),
    *_conv("up 512→256 k16 s8, 32", "ConvTranspose1d", (512, 256, 16, 8), (1, 512, 32), padding=4),
    *_conv(
        "up 1024→512 k16 s8, 16", "ConvTranspose1d", (1024, 512, 16, 8), (1, 1024, 16), padding=4
    ),
    *_conv("up 256→128 k8 s4, 256", "ConvTranspose1d", (256, 128, 8, 4), (1, 256, 256), padding=2),
    *_conv("up 128→64 k4 s2, 512", "ConvTranspose1d", (128, 64, 4, 2), (1, 128, 512), padding=1),
    *_conv("1d 256→256 k3, 256", "Conv1d", (256, 256, 3), (1, 256, 256), padding=1),
    *_conv(
        "1d 128→128 k11 d5, 512", "Conv1d", (128, 128, 11), (1, 128, 512), padding=25, dilation=5
    ),
    *_conv("1d 64→64 k3 d27, 1024", "Conv1d", (64, 64, 3), (1, 64, 1024), padding=27, dilation=27),
    *_conv(
        "1d 32→1 k7 reflect, 2048",
        "Conv1d",
        (32, 1, 7),
        (1, 32, 2048),
        padding=3,
        padding_mode="reflect",
    ),
    *_conv("depthwise 768 k7, 128", "Conv1d", (768, 768, 7), (1, 768, 128), padding=3, groups=768),
    *_conv(
        "positions 768 k128 g16, 49",
        "Conv1d",
        (768, 768, 128),
        (1, 768, 49),
        dim=2,
        padding=64,
        groups=16,
    ),
    *_conv(
        "2d 32→128 (5,1) s(3,1)",
        "Conv2d",
        (32, 128, (5, 1), (3, 1)),
        (2, 32, 256, 3),
        padding=(2, 0),
    ),
    *_conv(
        "2d 32→32 (3,9) s(1,2)",
        "Conv2d",
        (32, 32, (3, 9), (1, 2)),
        (1, 32, 32, 129),
        padding=(1, 4),
    ),
    *_conv("1d 64→64 k3 d8, 4×416", "Conv1d", (64, 64, 3), (4, 64, 416), dilation=8),
    *_conv("2d 32→128 3×3, 4×48²", "Conv2d", (32, 128, 3), (4, 32, 48, 48), padding=1),
    *_conv("2d 3→48 5×5, 4×48²", "Conv2d", (3, 48, 5), (4, 3, 48, 48), padding=2),
]


def _narrow(dtype: str, cases: list[Case]) -> list[Case]:
    """Returns the cases in half precision, or in float32 under autocast."""
    options = {"precision": dtype} if dtype == "autocast" else {"dtype": dtype}
    return [replace(case, label=f"{dtype} {case.label}", **options) for case in cases]


_CONV_HALF = [
    *_conv("1d 256→256 k3, 256", "Conv1d", (256, 256, 3), (1, 256, 256), padding=1),
    *_conv("up 512→256 k16 s8, 32", "ConvTranspose1d", (512, 256, 16, 8), (1, 512, 32), padding=4),
]
HALF = [
    *_narrow("bfloat16", _linear(8, 1024, 1024)),
    *_narrow("bfloat16", _linear(512, 1024, 1024)),
    *_narrow("bfloat16", _linear(16, 4096, 4096)),
    *_narrow("bfloat16", _CONV_HALF),
    *_narrow("float16", _linear(8, 1024, 1024)),
    *_narrow("float16", _linear(16, 3072, 3072)[:1]),  # eager's training step takes a second
    *_narrow("autocast", _linear(100, 512, 2048)),
    *_narrow("autocast", _linear(16, 4096, 4096)),
    *_narrow("autocast", _CONV_HALF),
]

SUITES = {"linear": LINEAR, "conv": CONV, "half": HALF}


class Runner:
    """One provider set up for one case: call it to run the case once, inside its `session`."""

    def __init__(self, case: Case, name: str, provider: Provider, device: torch.device) -> None:
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
        """What a call reads: input, gradient of the output, and parameters."""
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
        w = reference.weight_norm(v, *g, self.case.dim, 0.0) if g else v
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
