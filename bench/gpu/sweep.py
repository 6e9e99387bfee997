"""Configurations of single kernels beside those that ship: what a pinned configuration leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu import predict
from bench.gpu.context import Context
from wn_kernels.plan import devices
from wn_kernels.plan.costs import Stage

SHIPPED = "shipped"
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Sweep:
    """One kernel at one size, and its configurations; `m` is 0 for the kernels of a weight, one of
    which `reads_dw`."""

    label: str
    m: int
    k: int
    n: int
    configs: tuple[Any, ...]
    call: Callable[[Operands, Any], Any]
    reads_dw: bool = False

    def seconds(self) -> float:
        """What the cost model expects of a kernel that reads and writes everything once."""
        device = devices.gpu()
        weight, activations = self.k * self.n, self.m * (self.k + self.n)
        grads = 3 if self.label.startswith("dV") else 2 if not self.m else 1
        stage = Stage(2.0 * (grads * weight + activations), 2.0 * self.m * weight)
        return predict.seconds([stage], device, device.rates[0])


class Operands:
    """Of one call."""

    def __init__(self, sweep: Sweep, device: torch.device) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=BF16, device=device)

        self.x, self.dy = random(sweep.m, sweep.k), random(sweep.m, sweep.n)
        self.v, self.g = random(sweep.n, sweep.k), random(sweep.n, 1)
        self.dw = random(sweep.n if sweep.reads_dw else 0, sweep.k)
        self.norm = torch.rand(sweep.n, 1, device=device) + 1.0
        self.sweep = sweep

    def operand_bytes(self) -> int:
        """What a call reads."""
        return sum(t.numel() * t.element_size() for t in (self.x, self.dy, self.v, self.dw))

    def twin(self) -> Operands:
        """Others of the same sizes."""
        return Operands(self.sweep, self.v.device)

    def __call__(self, config: Any = None) -> None:
        self.sweep.call(self, config)


def _forward(o: Operands, config: Any) -> Any:
    from wn_kernels.backends.triton import linear

    return linear(o.x, o.v, o.g, None, 0, 0.0, "one_pass", config=config)


def _dv(o: Operands, config: Any) -> Any:
    from wn_kernels.backends.triton import linear_backward

    needs = (False, True, True, False)
    return linear_backward(o.dy, o.x, o.v, o.g, o.norm, 0, 0.0, "one_pass", needs, config=config)


def _weight(o: Operands, config: Any) -> Any:
    from wn_kernels.backends.triton import weight_norm

    return weight_norm(o.v, o.g, 0, 0.0, BF16, config=config)


def _weight_grad(o: Operands, config: Any) -> Any:
    from wn_kernels.backends.triton import weight_norm_backward

    return weight_norm_backward(o.dw, o.v, o.g, o.norm, 0, 0.0, config=config)


def _product(kind: type, *axes: tuple[int, ...]) -> Iterator[Any]:
    return itertools.starmap(kind, itertools.product(*axes))


def sweeps() -> list[Sweep]:
    """Some fifty configurations in all."""
    from wn_kernels.backends.triton.configs import GradConfig, MatmulConfig, SliceConfig

    def of(kind: type, *axes: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(_product(kind, *axes))

    thin = of(MatmulConfig, (16,), (16, 32, 64), (128, 256), (4,), (3, 5))
    middle = of(MatmulConfig, (64,), (32, 64), (64, 128), (4,), (3, 4))
    dv = of(GradConfig, (16,), (16, 32), (64, 128, 256), (4,), (3, 5))
    slices = of(SliceConfig, (1, 2), (1,), (2048, 4096), (4, 8, 16))
    return [
        Sweep("one-pass forward, 16 rows", 16, 4096, 4096, thin, _forward),
        Sweep("dV in one pass, 16 rows", 16, 4096, 4096, dv, _dv),
        Sweep("W of a weight", 0, 4096, 4096, slices, _weight),
        Sweep("dV of a weight", 0, 4096, 4096, slices, _weight_grad, True),
        Sweep("one-pass forward, 64 rows", 64, 4096, 4096, middle, _forward),
    ]


def main(context: Context) -> None:
    for sweep in context.cases(sweeps(), lambda sweep: sweep.label):
        with context.attempt(sweep.label):
            _measure(context, sweep)


def _measure(context: Context, sweep: Sweep) -> None:
    """Times every configuration that runs, and writes those that do not."""
    sets = context.clock.sets(Operands(sweep, context.device))
    runs: dict[str, list[Callable[[], None]]] = {}
    most = 2 * context.most if context.most else None
    for config in (None, *sweep.configs[:most]):
        name = SHIPPED if config is None else "×".join(map(str, config))
        with context.attempt(f"{sweep.label}, {name}"):
            sets[0](config)
            runs[name] = [partial(one, config) for one in sets]
    stats = context.clock.graphs(runs, 2 * context.seconds())
    record = {"label": sweep.label, "mode": "sweep", "m": sweep.m, "k": sweep.k, "n": sweep.n}
    context.result(record, stats, dict.fromkeys(stats, sweep.seconds()))
