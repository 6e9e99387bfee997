"""What the processor takes for a call on the Triton path: layers so small that a GPU would wait for
it. Their launches go to a driver that does nothing (`stand_in/`), in one thread.

    plain     the layer without weight norm; of a whole model, its weights folded
    eager     PyTorch's weight norm
    triton    ours with its Triton kernels
    grouped   the same, of a model whose weights are formed by one launch; so small a vocoder has
              none that shares it, so that there is a chain of layers whose plan forms every weight
    auto      ours as the planner has it for a CPU: the native library where it was built, or ATen

Triton's kernels compute nothing here. PyTorch's run on the CPU, in the time of the others and,
where a product goes to the vendor's library, in ours: a GPU would run them beside the processor.
The gates of a recurrent cell are those of a CPU, which are more operations than a GPU has.
What is compared with the baseline are ratios, each the median over the rounds of one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrizations

import wn_kernels
from bench import models, overhead, recurrent, stand_in
from bench.cases import Case
from bench.layer import MODES
from bench.measure.timing import interleaved, paired_ratio, session_of
from bench.norms import NormCase, NormRunner
from bench.providers import PROVIDERS, Provider
from bench.report.tables import printed
from bench.runner import Runner
from bench.static import baseline
from bench.suite import environment, finish
from wn_kernels import plan, prepare, tuning

CPU = torch.device("cpu")
OURS = ("triton", "auto")
OTHERS = ("eager", "plain")

# What a ratio may be of that in the baseline: the machine is another one, and busy.
TOLERANCE = 1.6

CASES = [
    Case(label, kind, arguments, x_shape, mode, options)
    for label, kind, arguments, x_shape, options in (
        ("linear 16, 64, 64", "Linear", (64, 64), (16, 64), {}),
        ("1d 32→32 k3, 16", "Conv1d", (32, 32, 3), (1, 32, 16), {"padding": 1}),
        ("2d 16→16 3×3, 8²", "Conv2d", (16, 16, 3), (1, 16, 8, 8), {"padding": 1}),
        ("up 16→16 k4 s2, 16", "ConvTranspose1d", (16, 16, 4, 2), (1, 16, 16), {}),
    )
    for mode in MODES
]
NORMS = [NormCase((64, 64), 0, mode) for mode in MODES]
CELLS = recurrent.cells(16, 4)
MODEL = "SpeechT5HifiGan, 78 layers"
CHAIN = "78 layers that form W"


def vocoder() -> tuple[nn.Module, torch.Tensor]:
    """A vocoder of 16 channels and fewer, and an input of four frames."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(model_in_dim=16, upsample_initial_channel=16)
    model = SpeechT5HifiGan(config)
    model.apply_weight_norm()
    return model, torch.randn(4, 16)


def chain() -> tuple[nn.Module, torch.Tensor]:
    """Convolutions one after the other, and an input."""
    layers = (parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1)) for _ in range(78))
    return nn.Sequential(*layers), torch.randn(1, 8, 8)


@contextmanager
def forming(model: nn.Module, x: torch.Tensor) -> Iterator[None]:
    """Inside the block, the layers of this model, and of its copies, have a plan that forms `W`
    once for both directions. PyTorch's product is in it, as in the other providers."""
    wn_kernels.fuse(model)
    with wn_kernels.use_backend("triton"), torch.no_grad():
        calls = {call for call, _ in tuning.calls_of(model, (x,))}
    with ExitStack() as stack:
        for call in calls:
            chosen = plan.Plan("triton", "materialize", "materialize", "weight")
            stack.enter_context(prepare.fixed(call, chosen))
        yield


class CellRunner(models.ModelRunner):
    """A recurrent cell as one provider has it."""

    session: Any = nullcontext


class ModelRunner:
    """A model as one provider has it."""

    def __init__(
        self, build: Callable[[], tuple[nn.Module, torch.Tensor]], name: str, mode: str
    ) -> None:
        torch.manual_seed(0)
        self.model, self.x = build()
        self.mode = mode
        if name == "plain":
            wn_kernels.fold(self.model)
        if name in OURS:
            wn_kernels.fuse(self.model)
        if name == "grouped":
            wn_kernels.fuse(self.model, grouped=True)

    def __call__(self) -> None:
        if self.mode == "infer":
            with torch.no_grad():
                self.model(self.x)
            return
        self.model(self.x).sum().backward()
        self.model.zero_grad(set_to_none=True)


def rows() -> Iterator[tuple[str, str, dict[str, Callable[[], Any]]]]:
    """Label and mode of each row, and what sets its providers up."""
    for case in CASES:
        makes = {name: PROVIDERS["ours" if name in OURS else name].make for name in OTHERS + OURS}
        yield (
            case.label,
            case.mode,
            {n: partial(Runner, case, n, Provider(make), CPU) for n, make in makes.items()},
        )
    kinds = {name: "ours" if name in OURS else name for name in OTHERS + OURS}
    for norm in NORMS:
        yield (
            f"weight_norm {norm.label}",
            norm.mode,
            {name: partial(NormRunner, norm, of, CPU) for name, of in kinds.items()},
        )
    for cell in [models.ModelCase(label, mode, CELLS) for label in CELLS for mode in MODES]:
        yield (
            cell.label,
            cell.mode,
            {name: partial(CellRunner, cell, of, CPU) for name, of in kinds.items()},
        )
    for label, build, names in ((MODEL, vocoder, OURS), (CHAIN, chain, ("triton",))):
        for mode in MODES:
            every = (*OTHERS, *names, "grouped")
            yield label, mode, {name: partial(ModelRunner, build, name, mode) for name in every}


def processor(run: Callable[[], None], repeats: int, _device: torch.device) -> float:
    """Seconds that this process computes for so many calls, whatever else the machine does."""
    begin = time.process_time()
    for _ in range(repeats):
        run()
    return time.process_time() - begin


def row(
    label: str, mode: str, makes: dict[str, Callable[[], Any]], seconds: float, profile: bool
) -> dict[str, Any]:
    """Times the providers of a row by turns: microseconds of a call, and ratios."""
    runners = {name: make() for name, make in makes.items()}
    ours = [name for name in (*OURS, "grouped") if name in runners]
    for name in ours:
        backend = "auto" if name == "auto" else "triton"
        runners[name].session = partial(wn_kernels.use_backend, backend)
    context = forming(*chain()) if label == CHAIN else nullcontext()
    with context:
        stats = interleaved(runners, CPU, seconds, sample=processor)
    pairs = [(mine, other) for mine in ours for other in OTHERS]
    if "grouped" in runners:
        pairs.append(("grouped", "triton"))
    result = {
        "case": {"label": label, "mode": mode},
        "microseconds": {name: s.median * 1e6 for name, s in stats.items()},
        "ratios": {
            f"{mine}/{other}": paired_ratio(stats[mine], stats[other])["median"]
            for mine, other in pairs
        },
    }
    if profile:
        calls = 20 if label in (MODEL, CHAIN) else overhead.CALLS
        with session_of(runners["triton"])():
            shares = overhead.shares(runners["triton"], calls)
        micros = result["microseconds"]["triton"]
        result["places"] = {place: share * micros for place, share in shares.items()}
    return result


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of the table, the header first."""
    providers, pairs = (
        list(dict.fromkeys(name for r in results for name in r[what]))
        for what in ("microseconds", "ratios")
    )
    lines = [["case", "mode", *(f"{name}, µs" for name in providers), *pairs]]
    for r in results:
        microseconds, ratios = r["microseconds"], r["ratios"]
        cells = [f"{microseconds[x]:.0f}" if x in microseconds else "" for x in providers]
        cells += [f"{ratios[x]:.2f}" if x in ratios else "" for x in pairs]
        lines.append([r["case"]["label"], r["case"]["mode"], *cells])
    return lines


def places(results: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of the profile, the header first: the largest places of each case."""
    lines = [["case", "mode", "microseconds"]]
    for r in results:
        found = (f"{place} {time:.1f}" for place, time in r["places"].items() if time >= 0.05)
        lines.append([r["case"]["label"], r["case"]["mode"], ", ".join(found)])
    return lines


def figures(results: list[dict[str, Any]]) -> baseline.Figures:
    """What is held by the baseline."""
    return {
        f"{r['case']['label']}, {r['case']['mode']}": {
            name: round(ratio, 2) for name, ratio in r["ratios"].items()
        }
        for r in results
    }


def main(path: str, seconds: float, profile: bool, write: bool) -> int:
    """Prints the table; 1 where a ratio is worse than in the baseline."""
    stand_in.activate()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what no kernel has written may hold slow numbers
    console = Console()
    wide = console if console.is_terminal else Console(width=170)
    results = [row(*each, seconds, profile) for each in rows()]
    wide.print(printed("microseconds of the processor for a call", table(results)))
    if profile:
        title = "ours by Triton: microseconds by place (shares by cProfile, an estimate)"
        wide.print(printed(title, places(results)))
    where = environment(CPU)
    finish("host", path, where, {"seconds": seconds}, results, [], console)
    if baseline.settle(console, "host", figures(results), write, tolerance=TOLERANCE):
        return 1
    return 0
