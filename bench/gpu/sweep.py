"""This section times configurations of single kernels beside those that ship, to show what a pinned
configuration leaves.

A sweep is a line of `sweeps()`: a case, the path and the direction that launch the kernel, the
function of `configs.py` that chooses its configuration, and the values of some of its fields. The
call runs as it ships but for these fields, and the kernel alone is timed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import CONV, Case
from bench.gpu import layers, predict
from bench.gpu.context import Context
from bench.gpu.linear import BF16
from bench.providers import PROVIDERS
from bench.runner import check_close
from wn_kernels import plan
from wn_kernels.call import Call, kept_shape
from wn_kernels.plan import devices
from wn_kernels.plan.stages import Stage

SHIPPED = "shipped"

# The share of a sweep's time in which its configurations are compiled and checked.
COMPILING = 0.6


@dataclass(frozen=True)
class Sweep:
    """One kernel at one size, and the configurations that are tried.

    Attributes:
        label: what it is called.
        case: the layer.
        kernel: the kernel's name.
        variant: the path that launches it, in the direction of the case's mode; none for the call
            of the weight alone.
        chooser: the function of `configs.py` that chooses its configuration.
        fields: values of fields of that configuration, tried in all combinations.
    """

    label: str
    case: Case
    kernel: str
    variant: str
    chooser: str
    fields: dict[str, tuple[int, ...]]

    @property
    def alone(self) -> bool:
        """Returns whether the call is that of the weight alone."""
        return not self.variant

    def changes(self) -> list[dict[str, int]]:
        """Returns what is changed of the configuration that ships, for each that is tried."""
        values = itertools.product(*self.fields.values())
        return [dict(zip(self.fields, some, strict=True)) for some in values]

    def call(self, device: torch.device) -> Call:
        """Returns the call that the backend computes."""
        case = replace(self.case, mode="infer")
        layer = PROVIDERS["ours"].make(case, case.layer(device))
        x = torch.empty(case.x_shape, dtype=case.torch_dtype, device=device)
        found = layers.paths(case, layer, _laid_out(case, x))
        assert found is not None
        return found.call.of_weight() if self.alone else found.call


def sweeps() -> list[Sweep]:
    """Returns what is swept. Kernels whose configuration is the least certain come first."""
    few, middle = (partial(_linear, rows) for rows in (16, 64))
    long, up = partial(_conv, "1d 128→128 k11 d5"), partial(_conv, "up 512→256")
    thin = {"BLOCK_O": (16, 32), "BLOCK_R": (128, 256), "num_stages": (3, 5)}
    wide = {"BLOCK_O": (32, 64), "BLOCK_R": (64, 128), "num_stages": (4, 5)}
    rows = {"BLOCK_N": (1, 2, 4), "num_warps": (4, 8)}
    owned = {"BLOCK_O": (16, 32), "BLOCK_R": (128, 256), "num_stages": (4, 5)}
    tiles = {"BLOCK_M": (16, 32, 64), "BLOCK_R": (32, 64), "num_stages": (3, 4)}
    parts = {"BLOCK_M": (32, 64, 128), "BLOCK_R": (32, 64), "num_stages": (2, 3)}
    matmul, conv = ("one_pass_kernel", "one_pass", "one_pass"), ("conv_kernel", "packed", "conv")
    grad, owner = ("conv_grad_kernel", "packed", "conv_grad"), "grad_one_pass_kernel"
    lanes = {"BLOCK_M": (8, 16), "BLOCK_O": (16, 32), "BLOCK_R": (32, 64), "num_stages": (4, 6)}
    sums = {"BLOCK_M": (16, 32), "BLOCK_R": (16, 32), "num_stages": (2, 3)}
    single = [replace(case("infer"), dtype="float32") for case in (few, middle, long)]
    return [
        Sweep("one-pass forward in float32, 16 rows", single[0], *matmul, lanes),
        Sweep("one-pass forward in float32, 64 rows", single[1], *matmul, lanes),
        Sweep("packed convolution in float32, long", single[2], *conv, sums),
        Sweep("packed convolution, long", long("infer"), *conv, tiles),
        Sweep("packed convolution, up", up("infer"), *conv, tiles),
        Sweep("gradient of a convolution, long", long("train"), *grad, parts),
        Sweep("gradient of a convolution, up", up("train"), *grad, parts),
        Sweep("one-pass forward, 16 rows", few("infer"), *matmul, thin),
        Sweep("one-pass forward, 64 rows", middle("infer"), *matmul, wide),
        Sweep("dV in one pass, 16 rows", few("train"), owner, "one_pass", "grad_one_pass", owned),
        Sweep("W of a weight", few("infer"), "weight_kernel", "", "slices", rows),
        Sweep("dV of a weight", few("train"), "weight_grad_kernel", "", "slices", rows),
    ]


def _linear(rows: int, mode: str) -> Case:
    shape = (rows, 4096)
    return next(c for c in BF16 if c.x_shape == shape and c.arguments[1] == 4096 and c.mode == mode)


def _conv(label: str, mode: str) -> Case:
    case = next(case for case in CONV if case.label.startswith(label) and case.mode == mode)
    return replace(case, dtype="bfloat16", channels_last=True)


def _laid_out(case: Case, t: Tensor) -> Tensor:
    """Returns a tensor of activations in the case's layout."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if case.channels_last else t


class Operands:
    """The operands of one call, which runs when they are called."""

    def __init__(self, sweep: Sweep, call: Call, device: torch.device) -> None:
        self.sweep, self.described, self.device = sweep, call, device
        self.plan = plan.Plan("triton", sweep.variant, sweep.variant)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=call.x_dtype, device=device)

        x = None if sweep.alone else _laid_out(sweep.case, random(*call.x_shape))
        g = random(*kept_shape(call.v_shape, call.dim)).abs() + 0.5
        self.tensors = x, random(*call.v_shape), g, None
        y, self.norm, _ = self._forward()
        self.dy = torch.randn_like(y)

    def _forward(self) -> Any:
        from wn_kernels.backends import triton

        return triton.layer(self.described, self.plan, self.tensors, False)

    def operand_bytes(self) -> int:
        """Returns the bytes that a call reads."""
        return _bytes([*self.tensors, self.dy])

    def twin(self) -> Operands:
        """Returns other operands of the same sizes."""
        return Operands(self.sweep, self.described, self.device)

    def __call__(self) -> list[Tensor]:
        """Runs the call, and returns its results."""
        from wn_kernels.backends import triton

        if self.sweep.case.mode == "infer":
            results = self._forward()
        else:
            given = self.dy, self.tensors, self.norm, None, (False, True, True, False)
            results = triton.layer_backward(self.described, self.plan, *given)
        return [t for t in results if t is not None]

    def compare(self, results: list[Tensor], right: list[Tensor]) -> None:
        """Compares a configuration's results with those of the one that ships, which the tests
        compare with float64.

        Raises:
            AssertionError: they are wrong.
        """
        pixels = self.dy.numel() // max(1, self.tensors[2].numel())
        length = max(pixels, self.tensors[1].numel() // max(1, self.tensors[2].numel()))
        for result, expected in zip(results, right, strict=True):
            check_close("a result", result, expected, length)

    def launches(self) -> list[Any]:
        """Returns the launches of the swept kernel in a call, with their operands.

        Raises:
            LookupError: there is none.
        """
        found = [one for one in layers.traced(self) if one.kernel.__name__ == self.sweep.kernel]
        if not found:
            raise LookupError(f"the call launches no {self.sweep.kernel}")
        return found


def _bytes(tensors: Iterable[Any]) -> int:
    """Returns the bytes of those that are tensors, each counted once."""
    found = {t.data_ptr(): t for t in tensors if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in found.values())


@contextmanager
def _configured(sweep: Sweep, changes: dict[str, int]) -> Iterator[list[Any]]:
    """Inside the block the sweep's kernel is launched with changes to its configuration. The block
    is given the configurations that were chosen."""
    from wn_kernels.backends.triton import configs, launch

    ships, chosen = getattr(configs, sweep.chooser), []

    def choose(*arguments: Any, **options: Any) -> Any:
        chosen.append(ships(*arguments, **options)._replace(**changes))
        return chosen[-1]

    launch.forget()
    setattr(configs, sweep.chooser, choose)
    try:
        yield chosen
    finally:
        setattr(configs, sweep.chooser, ships)
        launch.forget()


def main(context: Context) -> None:
    for sweep in context.cases(sweeps(), label=lambda sweep: sweep.label):
        with context.attempt(sweep.label):
            _measure(context, sweep)


def _measure(context: Context, sweep: Sweep) -> None:
    """Times every configuration that runs, and writes down those that do not."""
    begin, share = time.time(), (context.until - time.time()) / context.left
    sets = context.clock.sets(Operands(sweep, sweep.call(context.device), context.device))
    right = [t.double() for t in sets[0]()]
    runs: dict[str, list[Any]] = {}
    refused: dict[str, str] = {}
    tried = [{}, *sweep.changes()[: 2 * context.most if context.most else None]]
    for i, changes in enumerate(tried):
        if runs and not context.dry and time.time() - begin > COMPILING * share:
            context.add("left out", cases=[f"{sweep.label}, {some}" for some in tried[i:]])
            break
        name = "×".join(map(str, changes.values())) or SHIPPED
        try:
            with _configured(sweep, changes) as chosen:
                results = sets[0]()
                launches = [one.launches() for one in sets]
            if not context.dry:
                sets[0].compare(results, right)
        except AssertionError as error:
            context.wrong(f"{sweep.label}, {name}: {error}")
            continue
        except Exception as error:  # such as a tile that does not fit the shared memory
            if name == SHIPPED:
                raise
            refused[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
            if context.device.type == "cuda":
                torch.cuda.synchronize(context.device)
            continue
        runs[name] = [partial(_again, some) for some in launches]
        if name == SHIPPED:
            ships, expected = "×".join(map(str, chosen[-1])), _expected(sweep, launches[0])
    stats = context.clock.graphs(runs, context.seconds(), sets[0].operand_bytes())
    record = {"label": sweep.label, "mode": "sweep", "of": sweep.case.label}
    record |= {"dtype": sweep.case.dtype, "kernel": sweep.kernel, "ships": ships}
    record["fields"] = list(sweep.fields)
    context.result(record, stats, dict.fromkeys(stats, expected), refused=refused)


def _again(launches: list[Any]) -> None:
    for one in launches:
        layers.launch_again(one)


def _expected(sweep: Sweep, launches: list[Any]) -> float:
    """Returns the seconds by the cost model's constants if each operand is read or written once."""
    moved = sum(_bytes(one.arguments.values()) for one in launches)
    operations = 0.0 if sweep.alone else replace(sweep.case, mode="infer").work()[0]
    device = devices.gpu()
    return predict.seconds([Stage(float(moved), operations)], device, device.rates[0])
