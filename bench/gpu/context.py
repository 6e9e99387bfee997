"""A section is given a context: its device, its clock, its time, and where its results go."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pytest_benchmark.stats import Stats

from bench.gpu import results
from bench.measure import timing
from bench.measure.timing import Replay, interleaved, is_wide, session_of
from bench.suite import medians, ratios_of
from wn_kernels.plan import devices

T = TypeVar("T")
Run = Callable[[], None]

# Seconds of timing that no case needs more of.
ENOUGH = 0.4
# Seconds of a sample of graphs, which no processor delays, and of one of calls.
SPAN = 1e-3
CALLS_SPAN = 5e-3
# The share of a case's time that is timing, as long as no case has shown what setting up takes.
TIMING = 0.4
# Cases that the estimate of the next one's time looks back at.
RECENT = 4
# The share of a call's time that operands found in the cache may save at most.
SAVED = 0.01


class Clock:
    """A clock that times calls on a GPU.

    Attributes:
        spent: the seconds that timing has taken in all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent = 0.0

    def sets(self, run: Any) -> list[Any]:
        """Returns a runner and its twins, over whose operands a graph rotates."""
        count = timing.sets_beyond_cache(run.operand_bytes(), self.device)
        return [run, *(run.twin() for _ in range(count - 1))]

    def graphs(
        self, sets: dict[str, Sequence[Run]], seconds: float, size: float = math.inf
    ) -> dict[str, Stats]:
        """Returns the seconds of a call of each by its kernels alone: its calls run one after the
        other in one graph. The operands of a call have `size` bytes."""
        replays: dict[str, Run] = {}
        for name, runs in sets.items():
            with session_of(runs[0])():
                replays[name] = self._captured(runs, size)
        return self._timed(replays, seconds, span=SPAN, alike=False)

    def _captured(self, runs: Sequence[Run], size: float) -> Replay:
        """Captures a call for each set of operands. If a call takes so long that it would not show
        whether its operands are in the cache, the graph has no more calls than a sample takes."""
        replay = Replay(timing.rotation(runs))
        call = timing.warm(replay, 1, self.device) / replay.calls
        enough = math.ceil(SPAN / max(call, 1e-9))
        if size / devices.gpu().bandwidth <= SAVED * call and 2 * enough <= replay.calls:
            return Replay(list(runs)[:enough])
        return replay

    def host(self, runs: dict[str, Run], seconds: float) -> dict[str, Stats]:
        """Returns the seconds of the processor for a call of each."""
        return self._timed(runs, seconds, span=CALLS_SPAN, sample=timing.host)

    def wall(self, runs: dict[str, Run], seconds: float) -> dict[str, Stats]:
        """Returns the seconds of a call of each, in a row of them, by events."""
        return self._timed(runs, seconds, span=CALLS_SPAN)

    def _timed(self, runs: dict[str, Run], seconds: float, **options: Any) -> dict[str, Stats]:
        begin = time.time()
        stats = interleaved(runs, self.device, seconds, **options) if runs else {}
        self.spent += time.time() - begin
        return stats


class DryClock(Clock):
    """A clock for the stand-in, where everything runs and nothing is measured. Its seconds are the
    processor's for a call that launches nothing, so that the code behind them runs as well."""

    def sets(self, run: Any) -> list[Any]:
        return [run, run.twin()] if run.operand_bytes() < 2**24 else [run]

    def graphs(
        self, sets: dict[str, Sequence[Run]], seconds: float, size: float = math.inf
    ) -> dict[str, Stats]:
        return {name: self._stats(runs) for name, runs in sets.items()}

    def host(self, runs: dict[str, Run], seconds: float) -> dict[str, Stats]:
        return {name: self._stats([run]) for name, run in runs.items()}

    wall = host

    def _stats(self, runs: Sequence[Run]) -> Stats:
        stats = Stats()
        with session_of(runs[0])():
            for run in (*runs, runs[0], runs[0]):
                begin = time.perf_counter()
                run()
                stats.update(time.perf_counter() - begin)
        return stats


@dataclass
class Context:
    """The context of a section, which measures on its device, by its clock and in its time.

    Attributes:
        section: its name.
        folder: where results go.
        until: the time, as `time.time()` has it, by which the section should be done.
        dry: whether it runs over the stand-in.
        most: cases of each kind at most, `None` or 0 for all.
        device: where it runs.
        failed: what was wrong or raised so far.
        left: how many cases are not done, with the present one.
        setups: the seconds that each case has taken besides its timing.
        seen: what was timed for an earlier case and need not be for another.
    """

    section: str
    folder: Path
    until: float
    dry: bool
    most: int | None
    device: torch.device
    failed: list[str] = field(default_factory=list)
    left: int = 1
    setups: list[float] = field(default_factory=list)
    seen: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.clock = (DryClock if self.dry else Clock)(self.device)

    def add(self, kind: str, **fields: Any) -> None:
        """Writes a line of results."""
        results.append(self.folder, self.section, kind, **fields)

    def wrong(self, message: str, **fields: Any) -> None:
        """Writes that a provider's values are wrong, or that something cannot run."""
        self.failed.append(message)
        self.add("wrong", message=message, **fields)

    def cases(self, *kinds: Sequence[T], label: Callable[[T], str] = str) -> Iterator[T]:
        """Yields the cases of each kind, one after the other, as long as there is time for the next
        one: as much as any of the last few took to set up and to check."""
        cases = [case for kind in kinds for case in kind[: self.most or None]]  # of 0, all
        for i, case in enumerate(cases):
            self.left = len(cases) - i
            begin, spent = time.time(), self.clock.spent
            if begin + max(self.setups[-RECENT:], default=0.0) >= self.until:
                self.add("left out", cases=[label(case) for case in cases[i:]])
                return
            print(f"{self.section}: {label(case)}", flush=True)
            yield case
            self._give_back()
            timed = self.clock.spent - spent
            self.setups.append(time.time() - begin - timed)

    def _give_back(self) -> None:
        """Frees memory that a case has left cached if it is much, because the next case may need
        it."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            if free < total / 2:
                torch.cuda.empty_cache()

    def seconds(self) -> float:
        """Returns the seconds that the present case's timing may take. They are its share of the
        time that is left, without the time that setting up the others will take. The first case is
        not counted there, because it starts the device as well."""
        share = (self.until - time.time()) / self.left
        if others := self.setups[1:]:
            share -= statistics.mean(others) * (self.left - 1) / self.left
        else:
            share *= TIMING
        return min(max(share, 0.0), ENOUGH)

    @contextmanager
    def attempt(self, label: str) -> Iterator[None]:
        """Writes down an error that is raised inside the block, and goes on.

        Raises:
            RuntimeError: the device is not usable any more.
        """
        try:
            yield
        except Exception as error:
            message = f"{label}: {type(error).__name__}: {error}".partition("\n")[0]
            self.failed.append(message)
            self.add("error", message=message, traceback=traceback.format_exc())
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def checked(self, builds: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """Sets up the runners and returns those whose values are right, by name. The others are
        written down."""
        found = {}
        for name, build in builds.items():
            with self.attempt(name):
                run = build()
                try:
                    with session_of(run)():
                        if not self.dry:
                            run.check()
                    found[name] = run
                except AssertionError as error:
                    self.wrong(str(error), **getattr(error, "details", {}))
        return found

    def result(
        self, case: dict[str, Any], stats: dict[str, Stats], predicted: dict[str, Any], **more: Any
    ) -> None:
        """Writes the figures of a case beside the predicted ones."""
        ratios = ratios_of(stats) if "ours" in stats else {}
        self.add(
            "result",
            case=case,
            seconds=medians(stats),
            predicted=predicted,
            ratios=ratios,
            noisy=any(map(is_wide, ratios.values())),
            saved_bytes={},
            **more,
        )


def named(case: Any) -> str:
    """Returns a case in a few words."""
    words = [case.label, case.mode, getattr(case, "dtype", ""), getattr(case, "precision", "")]
    words += ["channels last"] if getattr(case, "channels_last", False) else []
    words += [getattr(case, "norm", "l2")]
    return " ".join(word for word in words if word not in ("", "own", "l2"))
