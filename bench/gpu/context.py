"""What a section is given: its device, its clock, its time, and where its results go."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pytest_benchmark.stats import Stats

from bench import timing
from bench.gpu import results
from bench.suite import medians, ratios_of
from bench.timing import Replay, interleaved, is_wide, session_of

T = TypeVar("T")
Run = Callable[[], None]

# Seconds of timing that no case needs more of.
ENOUGH = 0.6
# Seconds of a sample of graphs, which no processor delays.
SPAN = 1e-3
# The share of a case's time that is timing; the rest sets it up and checks it.
TIMING = 0.4


class Clock:
    """A GPU's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sets(self, run: Any) -> list[Any]:
        """A runner and its twins, over whose operands a graph rotates."""
        count = timing.sets_beyond_cache(run.operand_bytes(), self.device)
        return [run, *(run.twin() for _ in range(count - 1))]

    def graphs(self, sets: dict[str, Sequence[Run]], seconds: float) -> dict[str, Stats]:
        """Seconds of a call of each by its kernels: its calls one after the other, in one graph."""
        replays: dict[str, Run] = {}
        for name, runs in sets.items():
            with session_of(runs[0])():
                replays[name] = Replay(runs)
        return interleaved(replays, self.device, seconds, span=SPAN)

    def host(self, runs: dict[str, Run], seconds: float) -> dict[str, Stats]:
        """Seconds of the processor for a call of each."""
        return interleaved(runs, self.device, seconds, sample=timing.host)

    def wall(self, runs: dict[str, Run], seconds: float) -> dict[str, Stats]:
        """Seconds of a call of each, in a row of them, by events."""
        return interleaved(runs, self.device, seconds)


class DryClock(Clock):
    """The stand-in's: everything is run and nothing is measured. Its seconds are the processor's,
    for a call that launches nothing, so that what is made of seconds runs as well."""

    def sets(self, run: Any) -> list[Any]:
        return [run, run.twin()] if run.operand_bytes() < 2**24 else [run]

    def graphs(self, sets: dict[str, Sequence[Run]], seconds: float) -> dict[str, Stats]:
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
    """What a section is given.

    Attributes:
        section: its name.
        folder: where results go.
        until: the time, as `time.time()` has it, after which it starts no other case.
        dry: whether it runs over the stand-in.
        most: cases of each kind at most, `None` or 0 for all.
        device: where it runs.
        failed: what was wrong or raised so far.
    """

    section: str
    folder: Path
    until: float
    dry: bool
    most: int | None
    device: torch.device
    failed: list[str] = field(default_factory=list)
    left: int = 1  # cases that are not done, with the present one

    def __post_init__(self) -> None:
        self.clock = (DryClock if self.dry else Clock)(self.device)

    def add(self, kind: str, **fields: Any) -> None:
        """Writes a line of results."""
        results.append(self.folder, self.section, kind, **fields)

    def wrong(self, message: str) -> None:
        """Writes that a provider's values are wrong, or that something cannot run."""
        self.failed.append(message)
        self.add("wrong", message=message)

    def cases(self, cases: Sequence[T], label: Callable[[T], str] = str) -> Iterator[T]:
        """The cases, as long as there is time."""
        cases = cases[: self.most or None]  # of 0, all
        for i, case in enumerate(cases):
            self.left = len(cases) - i
            if time.time() >= self.until:
                self.add("left out", cases=[label(case) for case in cases[i:]])
                return
            print(f"{self.section}: {label(case)}", flush=True)
            yield case
            self._give_back()

    def _give_back(self) -> None:
        """Memory that a case has left cached, where it is much: the next one's may not fit."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            if free < total / 2:
                torch.cuda.empty_cache()

    def seconds(self) -> float:
        """What the present case's timing may take of the time that is left."""
        share = (self.until - time.time()) / self.left
        return min(max(TIMING * share, 0.0), ENOUGH)

    @contextmanager
    def attempt(self, label: str) -> Iterator[None]:
        """Writes an error that is raised inside the block, and goes on.

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
        """The runners whose values are right, by name, each set up; the others are written down."""
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
                    self.wrong(str(error))
        return found

    def result(
        self, case: dict[str, Any], stats: dict[str, Stats], predicted: dict[str, Any], **more: Any
    ) -> None:
        """Writes the figures of a case, with what was predicted."""
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
    """A case in a few words."""
    words = [case.label, case.mode, getattr(case, "dtype", ""), getattr(case, "precision", "")]
    last = ["channels last"] if getattr(case, "channels_last", False) else []
    return " ".join([word for word in words if word and word != "own"] + last)


def runs_of(function: Callable[..., Any], sets: Sequence[tuple]) -> list[Run]:
    """A call of a function for each set of arguments."""
    return [partial(function, *arguments) for arguments in sets]
