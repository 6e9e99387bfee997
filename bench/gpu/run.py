"""The command runs each section in a process group of its own, with a limit of its own.

The limits of the sections so far, and not what they took, say when a section has to be done: what
one leaves goes to the next.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu import cache, results, summary
from bench.gpu.sections import DRY_GRACE, DRY_SECONDS, GRACE, SECTIONS, Section, named, total

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Options:
    """The options of a run.

    Attributes:
        out: the folder of results, which is made.
        sections: those to run, in this order.
        seconds: about how long they take together at most; each has its share.
        dry: the compute capability of the stand-in that takes the place of a GPU, as `90`.
        most: cases of each kind at most; 0 for every one of them, and of the tests as well.
        archive: a packed cache of Triton's to unpack first.
    """

    out: Path
    sections: Sequence[Section] = SECTIONS
    seconds: float | None = None
    dry: int | None = None
    most: int | None = None
    archive: Path | None = None


def run(options: Options) -> int:
    """Runs the sections one after the other, whatever becomes of each, and prints the table.
    Returns 1 if one failed. What is done is kept on Ctrl-C."""
    options.out.mkdir(parents=True, exist_ok=True)
    for name in (results.RESULTS, results.JUNIT, results.LOG, results.TABLE):
        (options.out / name).unlink(missing_ok=True)
    kernels = cache.unpacked(options.archive) if options.archive else cache.Kernels.present()
    print(kernels.said, flush=True)
    failed, limits = False, total(options.sections)
    try:
        until, scale = time.time(), (options.seconds or limits) / limits
        for section in options.sections:
            until += scale * section.limit
            failed |= not _run_section(section, until, options, kernels)
    except KeyboardInterrupt:
        failed = True
        print("interrupted: the table is of what is done", flush=True)
    text = summary.table(results.read(options.out / results.RESULTS))
    (options.out / results.TABLE).write_text(text, "utf-8")
    print(text, flush=True)
    return 1 if failed else 0


def _run_section(section: Section, until: float, options: Options, kernels: cache.Kernels) -> bool:
    """Runs a section and returns whether it passed."""
    start, before = time.time(), kernels.count()
    kill = until - start + (GRACE if options.dry is None else DRY_GRACE)
    command = [sys.executable, "-m", "bench.gpu.section", section.name]
    command += ["--out", str(options.out.resolve()), "--until", str(until)]
    if options.most is not None:
        command += ["--most", str(options.most)]
    if options.dry is not None:
        command += ["--dry-run", str(options.dry)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(kernels.folder), "PYTHONUNBUFFERED": "1"}
    if options.dry is None:
        environment.pop("TRITON_INTERPRET", None)
    if not section.native:  # it is looked for in the user's cache
        environment["XDG_CACHE_HOME"] = str(options.out.resolve() / "no-such-cache")
    with open(options.out / results.LOG, "a", encoding="utf-8") as log:
        print(f"== {section.name}: {section.what}", file=log, flush=True)
        found = outcome(command, kill, log.fileno(), environment)
    taken, compiled = time.time() - start, kernels.count() - before
    results.append(
        options.out, section.name, "status", outcome=found, seconds=taken, compiled=compiled
    )
    print(f"{section.name}: {found}, {taken:.0f} s, {compiled} kernels compiled", flush=True)
    return found == "passed"


def outcome(command: list[str], limit: float, log: int, environment: dict[str, str]) -> str:
    """Runs a command in a process group of its own and returns what became of it. All of the group
    ends with it, or after `limit` seconds."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        code = process.wait(limit)
        return "passed" if code == 0 else f"FAILED, exit code {code}"
    except subprocess.TimeoutExpired:
        return f"FAILED, killed after {limit:.0f} s"
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(
    out: str | None,
    sections: str | None,
    seconds: float | None,
    dry_run: bool,
    archive: str | None,
    capability: int,
    most: int | None,
) -> int:
    """Runs the command line. Without `out` the archive is made; with it, it is used."""
    if out is None:
        if archive is None:
            print("name a folder for the results (--out), or a cache to make (--cache)")
            return 2
        return cache.make(Path(archive), capability)
    if not dry_run and not _has_gpu():
        print("there is no GPU here, or this torch is built without support for one (--dry-run)")
        return 1
    try:
        chosen = [named(name) for name in sections.split(",")] if sections else SECTIONS
    except ValueError as error:
        print(error)
        return 2
    dry = capability if dry_run else None
    seconds = seconds or (DRY_SECONDS if dry_run else None)
    packed = Path(archive) if archive else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    return run(Options(Path(out), chosen, seconds, dry, most, packed))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
