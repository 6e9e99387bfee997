"""This section runs the tests of the kernels, each with a time limit, on as many workers as there
are cores."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import results
from bench.gpu.context import Context

TESTS = "tests/backends/triton"
WORKERS = 16
SECONDS = 25  # a test's own limit
ENDING = 2  # the seconds that workers have to end when the time is up

# Over the stand-in, where every kernel has to be compiled on few cores.
SAMPLE = 100


class Outcomes:
    """A plugin that writes what became of each test as soon as it is done, and stops when the time
    is up.

    Attributes:
        left: the tests that are not done, in their order.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.config: Any = None
        self.left: dict[str, None] = {}

    def pytest_configure(self, config: Any) -> None:
        self.config = config

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.left.update(dict.fromkeys(ids))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            more = {} if report.passed else {"message": _reason(report)}
            case = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            self.left.pop(report.nodeid, None)
            self.context.add("result", **case, **more)
            if report.failed:
                self.context.failed.append(f"{report.nodeid}: {more['message']}")
        if time.time() > self.context.until:
            self._stop()

    def _stop(self) -> None:
        """Ends the run; the JUnit file is written all the same. `shouldstop` would let every worker
        run the tests that it was sent, which are all of its share."""
        session = self.config.pluginmanager.getplugin("dsession")
        if session is not None and self.left:
            session.nodemanager.EXIT_TIMEOUT = ENDING
            self.context.add("left out", cases=[*self.left])
            pytest.exit("the time is up")


def _reason(report: Any) -> str:
    """Returns the last line of what a test printed when it failed, or why it was skipped."""
    text = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else text).partition("\n")[0][:400]


def arguments(context: Context) -> list[str]:
    """Returns the arguments of pytest."""
    workers = min(WORKERS, len(os.sched_getaffinity(0)))
    junit = Path(context.folder, results.JUNIT).resolve()
    found = [TESTS, "-q", "-p", "no:cacheprovider", f"--numprocesses={workers}"]
    found += ["--dist=worksteal", f"--timeout={SECONDS}", f"--junitxml={junit}"]
    if context.dry:
        every = 1 if context.most == 0 else 3 * SAMPLE if context.most else SAMPLE
        found += ["-p", "bench.gpu.launching", f"--every={every}", "--timeout=300"]
    return found


def main(context: Context) -> None:
    code = pytest.main(arguments(context), plugins=[Outcomes(context)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        context.wrong(f"pytest stopped with {code!r}")
