"""The tuned table is a JSON file with the plans that were measured to be the fastest.

    {machine and versions: {call: {"forward": variant, "backward": variant, ...}}}

`variants.py` reads it, and `tuning.py` writes it. A new file is written whole and then replaces the
old one, under a lock. Processes that tune at the same time therefore lose no results. A file that
cannot be read, or that other users may write to (`cache.py`), is ignored with a warning. The next
write renames it.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import cache

VARIABLE = "WN_KERNELS_TABLE"

_NAME = "the tuned table"

Entries = dict[str, dict[str, dict[str, Any]]]

_entries: Entries | None = None


def location() -> Path:
    """Returns the table's path. The environment variable `WN_KERNELS_TABLE` names it; by default it
    is in the user's cache."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return cache.directory() / "tuned.json"


def _top(path: Path) -> Path:
    """Returns the topmost folder that must belong to the user. If the file was named, which may be
    anywhere, that is the file's own folder."""
    return cache.root() if path.is_relative_to(cache.root()) else path.parent


@functools.cache
def processor() -> str:
    """Returns the name of the CPU and the instruction set that PyTorch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def machine(backend: str, device: torch.device | None = None) -> str:
    """Returns the name of the device and the versions for which a measurement is valid. `device` is
    the tensors' GPU. The default is the current one."""
    if backend in ("aten", "native"):
        name = f"{processor()}, {torch.get_num_threads()} threads"
    else:
        on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
        name = torch.cuda.get_device_name(device) if on_gpu else "Triton's interpreter"
    return "; ".join((backend, name, *(f"{package} {_version(package)}" for package in PACKAGES)))


PACKAGES = ("torch", "triton", "wn_kernels")


@functools.cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def read(path: Path, what: str = _NAME) -> Entries | None:
    """Returns the file's contents, which are empty if there is no file. It returns `None` if the
    file cannot be read, with a warning that says `what` it is."""
    try:
        if reason := cache.distrust(path, _top(path)):
            raise PermissionError(reason)
        entries = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{what} {path} is ignored: {error}", stacklevel=3)
        return None
    if not isinstance(entries, dict) or not all(
        isinstance(calls, dict) and all(isinstance(choice, dict) for choice in calls.values())
        for calls in entries.values()
    ):
        warnings.warn(f"{what} {path} is ignored: its structure is wrong", stacklevel=3)
        return None
    return entries


def find(backend: str, call: str, device: torch.device | None = None) -> dict[str, Any] | None:
    """Returns the entry of a call on this machine and device, or `None`. A process reads the file
    once."""
    global _entries
    if _entries is None:
        _entries = read(location()) or {}
    return _entries.get(machine(backend, device), {}).get(call) if _entries else None


def store(
    backend: str, calls: dict[str, dict[str, Any]], device: torch.device | None = None
) -> Path:
    """Adds the entries of some calls to the file, and returns its path.

    Raises:
        OSError: the file cannot be written, or other users may write to its folder. The old file
            stays.
    """
    path = location()
    write(path, machine(backend, device), calls)
    forget()
    return path


def write(path: Path, machine: str, calls: dict[str, dict[str, Any]], what: str = _NAME) -> None:
    """Adds the entries of a machine to a file of this form. If the old one cannot be read, a
    warning says `what` it is.

    Raises:
        OSError: as `store`.
    """
    with cache.replacing(path, _top(path)) as new:
        entries = read(path, what)
        if entries is None:
            os.replace(path, path.with_name(path.name + ".unreadable"))
            entries = {}
        entries.setdefault(machine, {}).update(calls)
        new.write_text(json.dumps(entries, indent=1, sort_keys=True, ensure_ascii=False), "utf-8")


def forget() -> None:
    """Drops the entries that were read, so that the file is read again."""
    global _entries
    _entries = None
