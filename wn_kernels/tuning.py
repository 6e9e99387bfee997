"""`tune` measures what the planner otherwise estimates, and `explain` shows the estimates.

    print(wn_kernels.tune(model, sample))            # times every candidate, stores the fastest
    print(wn_kernels.explain(layer, input_shape))    # the candidates, and why one is picked

A tuned plan holds for calls of the same shapes, dtypes and options, on the same device with the
same versions (`plan/table.py`). The backend `auto` uses it from then on, in this process and in
others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from . import calibration, plan, prepare
from . import functional as WF
from .call import Call
from .plan import Plan, costs, devices, table
from .plan.devices import Device
from .plan.stages import Stage, narrowest
from .text import Tabular, aligned, html, progress

# A candidate replaces the cost model's choice only if its time is below this fraction of it.
# Smaller differences vary from one process to the next.
MARGIN = 0.97


@dataclass(frozen=True)
class Tuned:
    """Describes one call that was tuned.

    Attributes:
        call: its name in the tuned table, made of shapes, dtypes and options.
        backend: the backend that serves it.
        seconds: the time of a forward without gradients by variant, and of a training step by plan.
        default: the cost model's plan.
        choice: the fastest plan, or the default if no other is faster by 3 %.
    """

    call: str
    backend: str
    seconds: dict[Any, float]
    default: Plan
    choice: Plan


class Tuning(Tabular, tuple[Tuned, ...]):
    """Holds the results of `tune`, one for each call. It prints as a table, and a notebook shows it
    as one."""

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("call", "backend", "default", "step", "choice", "step")]
        for x in self:
            times = (f"{x.seconds[choice] * 1e6:.0f} µs" for choice in (x.default, x.choice))
            default, chosen = times
            rows.append((x.call, x.backend, str(x.default), default, str(x.choice), chosen))
        return rows

    def _summary(self) -> str:
        changed = sum(x.choice != x.default for x in self)
        return f"{len(self)} tuned, {changed} not the default"


# --- what a model calls --------------------------------------------------------------------------


def calls_of(model: nn.Module, inputs: Sequence[Any]) -> list[tuple[Call, str]]:
    """Returns the layers' calls that are planned when the model runs, with their backends. The
    model does not change."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), prepare.watching() as calls:
            model(*inputs)
    finally:
        for module, flag in training.items():
            module.training = flag
    return calls


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def operands_of(call: Call, device: torch.device) -> list[Tensor]:
    """Returns random `x, v, g` and bias for a call. Each requires its gradient."""
    x = torch.randn(call.x_shape, dtype=call.x_dtype, device=device)
    if call.channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    v = torch.randn(call.v_shape, dtype=call.v_dtype, device=device)
    g = WF.slice_norm(v, dim=call.dim, norm=call.norm)
    outputs = call.v_shape[0] if call.conv is None else call.conv.out_channels(call.v_shape)
    bias = torch.randn(outputs, dtype=call.v_dtype, device=device)
    return [t.detach().requires_grad_() for t in (x, v, g, bias)]


def run_call(call: Call, operands: Sequence[Tensor]) -> Tensor:
    x, v, g, bias = operands
    if call.conv is None:
        return WF.wn_linear(x, v, g, bias, dim=call.dim, norm=call.norm)
    return WF.run(x.ndim - 2, x, v, g, bias, tuple(call.conv), call.dim, 0.0, call.norm)


# --- tune ----------------------------------------------------------------------------------------


def tune(model: nn.Module, sample: Any, *, seconds: float = 1.0) -> Tuning:
    """Times every plan that can serve each call of a model, and stores the fastest.

    The forward's variant is the fastest without gradients. The backward's is the fastest in a
    training step after that forward. The candidates are timed alternately, on random values. On a
    CPU whose rates were not measured when the native library was built, they are measured first, in
    about a second.

    Args:
        model: any module that calls layers or functions of this package. It runs once, in
            evaluation mode and without gradients.
        sample: its input, or a tuple of its inputs, of the shapes to tune.
        seconds: about how long each call is timed, in seconds.

    Returns:
        The results, which print as a table. They are stored in `table.location()`, and `auto` uses
        them from now on.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `seconds` is not positive, or a backend is forced, so that nothing is left to
            choose.
        OSError: the table, or the file of rates, cannot be written.
    """
    prepare.check_module("model", model)
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    if plan.is_forced():
        raise ValueError("a backend is forced, so there is nothing to tune")
    inputs = sample if isinstance(sample, tuple) else (sample,)
    device = _device(model)
    if device.type == "cpu":
        calibration.ensure()
    calls = progress(calls_of(model, inputs), "tuning call")
    found = [_tuned(*call, device, seconds) for call in calls]
    for backend in {x.backend for x in found}:
        chosen = {x.call: x.choice.entry() for x in found if x.backend == backend}
        table.store(backend, chosen, device)
    _forget()
    return Tuning(found)


def _forget() -> None:
    """Clears all plans, so that every call is planned again from the current table."""
    table.forget()
    prepare.forget()


def _tuned(call: Call, backend: str, device: torch.device, seconds: float) -> Tuned:
    candidates = plan.choices(call, backend)
    default = plan.by_cost(call, backend)
    operands = operands_of(call, device)
    with torch.no_grad():
        dy = torch.randn_like(run_call(call, operands))

    def infer() -> None:
        with torch.no_grad():
            run_call(call, operands)

    def step() -> None:
        torch.autograd.grad(run_call(call, operands), operands, dy)

    forwards = {choice.forward: choice for choice in reversed(candidates)}
    times: dict[Any, float] = _interleaved(call, infer, forwards, seconds / 2)
    forward = _fastest(times, default.forward)
    after = {choice: choice for choice in candidates if choice.forward == forward} | {
        default: default
    }
    steps = _interleaved(call, step, after, seconds / 2)
    right = {choice: t for choice, t in steps.items() if choice.forward == forward}
    choice = _fastest(right, default if default in right else min(right, key=right.__getitem__))
    return Tuned(plan.key(call), backend, times | steps, default, choice)


def _fastest(times: dict[Any, float], default: Any) -> Any:
    best = min(times, key=times.__getitem__)
    return best if times[best] < MARGIN * times[default] else default


def _interleaved(
    call: Call, run: Callable[[], None], candidates: dict[Any, Plan], seconds: float
) -> dict[Any, float]:
    """Returns the seconds of a run under each candidate. They are medians over rounds, in each of
    which every candidate runs."""
    if len(candidates) == 1:
        return dict.fromkeys(candidates, float("nan"))
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    samples: dict[Any, list[float]] = {name: [] for name in candidates}
    repeats = 1
    start = time.perf_counter()
    while len(samples[next(iter(samples))]) < 5 or time.perf_counter() - start < seconds:
        for name, choice in candidates.items():
            with prepare.fixed(call, choice):
                run()  # plans the call again
                samples[name].append(timer.timeit(repeats).mean)
        if repeats == 1:  # the first round only determines the number of runs in the others
            fastest = min(times[0] for times in samples.values())
            repeats = max(2, int(seconds / (20 * len(candidates) * fastest)))
            samples = {name: [] for name in candidates}
    return {name: statistics.median(times) for name, times in samples.items()}


# --- explain -------------------------------------------------------------------------------------


class Explained(NamedTuple):
    """Holds what `explain` says about one call: a title, a table and the sentences below it."""

    title: str
    rows: list[tuple[str, ...]]
    notes: list[str]

    def text(self) -> str:
        return "\n".join([self.title, *aligned(self.rows), *self.notes])

    def html(self) -> str:
        above, *below = (escape(part) for part in (self.title, *self.notes))
        paragraphs = [f"<p>{part}</p>" for part in (above.replace("\n", "<br/>"), *below)]
        return "\n".join([paragraphs[0], html(self.rows), *paragraphs[1:]])


class Explanation(str):
    """This is a string whose `repr` is its text. A notebook shows its tables."""

    calls: Sequence[Explained] = ()

    __repr__ = str.__str__

    def _repr_html_(self) -> str:
        return "\n".join(["<div>", *(call.html() for call in self.calls), "</div>"])


def explain(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> Explanation:
    """Lists the variants that can serve each call of a module. For each, it gives the bytes,
    operations and launches, and the time that the cost model estimates. It marks the one that is
    picked. On a GPU it also gives the programs of the launch that fills it the least, how often
    they fill it, their bytes in flight, and the share of the bandwidth that these cover.

    Args:
        module: a layer of this package, a fused one, or any module that holds some. It runs once,
            in evaluation mode, on zeros.
        input_shape: the shape of its input.
        dtype: the dtype of its input, by default that of the module's first parameter.
        device: the name of a GPU in `devices.GPUS` ("H100", ...), whose Triton variants are listed.
            By default, the table lists the backend that serves the module on its own device.

    Returns:
        A string with a table for each call, and for all weights of each recurrent layer. Its `repr`
        is its text.

    Raises:
        TypeError: `module` is not a module, or `input_shape` not a sequence of sizes.
        ValueError: a size is negative, the device is unknown, or the module calls nothing of this
            package.
    """
    prepare.check_module("module", module)
    if device is not None and device not in devices.GPUS:
        raise ValueError(f"device is {device!r}; expected one of {[*devices.GPUS]} or None")
    try:
        shape = torch.Size(input_shape)
    except TypeError:
        raise TypeError(f"input_shape must be a sequence of sizes, got {input_shape!r}") from None
    if any(size < 0 for size in shape):
        raise ValueError(f"input_shape has a negative size: {tuple(shape)}")
    dtype = dtype or next((p.dtype for p in module.parameters()), torch.get_default_dtype())
    x = torch.zeros(shape, dtype=dtype, device=_device(module))
    calls = calls_of(module, (x,))
    weights = [_explained_weights(*item) for item in _recurrent(module)]
    if not calls and not weights:
        raise ValueError(f"{type(module).__name__} makes no planned call of this package")
    if device is not None:
        calls = [(call, "triton") for call, _ in calls]
    found = [_explained(*call, device) for call in dict.fromkeys(calls)]
    explanation = Explanation("\n\n".join(each.text() for each in (*found, *weights)))
    explanation.calls = [*found, *weights]
    return explanation


def _recurrent(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the recurrent layers and cells of a model that compute weights by this package."""
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase) and hasattr(module, "_normed"):
            yield name, module


def _explained_weights(name: str, module: Any) -> Explained:
    """Describes the one call that computes all weights of a recurrent layer."""
    v = [module._tensors(tensor)[1] for tensor in module._normed()]
    size = sum(t.numel() * t.element_size() for t in v)
    title = f"{name or type(module).__name__}: {len(v)} weights in one call"
    rows: list[tuple[str, ...]] = [
        ("direction", "variant", "bytes", "launches"),
        ("forward", "weight", f"{2 * size:.3g}", "1"),
        ("backward", "weight", f"{3 * size:.3g}", "1"),
    ]
    rest = "torch.nn computes the recurrence."
    if isinstance(module, nn.RNNCellBase) and v[0].is_cpu:
        rest = "A batch on a CPU takes the products above instead."
    title = f"{title}\n{plan.serving(v[0])}, nothing to choose"
    return Explained(title, rows, [rest])


def _filled(stages: list[Stage], device: Device) -> tuple[str, ...]:
    """Returns how the launch that fills a GPU the least fills it; empty strings for a vendor's."""
    least = narrowest(stages, device)
    if least is None or least.grid is None:
        return ("",) * 4
    waves, flight = least.grid.waves(device), least.grid.in_flight(device)
    covers = f"{least.covers(device):.2f}"
    return str(least.grid.programs), f"{waves:.2f}", f"{flight / 2**20:.2f} MiB", covers


def _explained(call: Call, backend: str, device: str | None) -> Explained:
    found = costs.costs(call, backend, devices.GPUS[device] if device else None)
    source = "cost model"
    if device:
        picked = plan.by_cost(call, backend, devices.GPUS[device])
    else:
        picked = plan.choose(call, backend)
        if table.find(backend, plan.key(call), call.device) is not None:
            source = "tuned table"
    fills: tuple[str, ...] = ()
    if backend == "triton":
        fills = ("programs", "waves", "in flight", "covers")
    rows = [("direction", "variant", "bytes", "operations", "launches", "estimate", *fills, "")]
    for direction, candidates in (("forward", found.forward), ("backward", found.backward)):
        for name, stages in candidates.items():
            rows.append(
                (
                    direction,
                    name,
                    f"{sum(s.bytes for s in stages):.3g}",
                    f"{sum(s.operations for s in stages):.3g}",
                    str(len(stages)),
                    f"{found.seconds(stages) * 1e6:.1f} µs",
                    *(_filled(stages, found.device) if fills else ()),
                    "<- picked" if name == getattr(picked, direction) else "",
                )
            )
    title = f"{plan.key(call)}\n{backend}, constants of {found.device.name}, picked by the {source}"
    keeps = []
    if picked.keeps:
        recorded = f"A training step keeps the {picked.kept}"
        keeps = [f"{recorded}; its forward is {picked.recorded}."]
    groups = [] if device else [_in_a_group(call, picked)]
    measured = plan.rates.find() if backend in ("aten", "native") else None
    measured_rates = [f"Rates of this CPU: {measured}."] if measured else []
    return Explained(title, rows, [*keeps, *groups, *measured_rates])


def _in_a_group(call: Call, picked: Plan) -> str:
    """Returns how a layer of a grouped model serves a call, and why."""
    parts = []
    for records, what in ((False, "a forward"), (True, "a training step")):
        seconds = plan.shared_seconds(call, picked, records)
        if seconds is None:
            return "In a group it forms its own weight: PyTorch has no product for it."
        own, shared = (f"{each * 1e6:.1f} µs" for each in seconds)
        shares = plan.shares(call, picked, records)
        takes = "takes the group's weight" if shares else "does without the group's"
        parts.append(f"{what} {takes} ({own} by itself, {shared} with the group's)")
    fewest = plan.fewest(picked.backend)
    least = f" A group of fewer than {fewest} such layers forms no weight." if fewest > 1 else ""
    return f"In a group {parts[0]}, and {parts[1]}.{least}"
