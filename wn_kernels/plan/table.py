"""The tuned table: what was measured to be the fastest on this machine, in a JSON file.

    {machine and versions: {call: {"forward": variant, "backward": variant, ...}}}

`variants.py` reads it, `tuning.py` writes it. A file is written whole and then takes the old one's
place, under a lock: processes that tune at the same time all keep what they found. One that cannot
be read, or that others may write to (`cache.py`), is ignored with a warning, and put aside by the
next that is written.
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

Entries = dict[str, dict[str, dict[str, Any]]]

_entries: Entries | None = None


def location() -> Path:
    """The file: what the environment variable `WN_KERNELS_TABLE` names, or the user's cache."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return cache.directory() / "tuned.json"


def _top(path: Path) -> Path:
    """From where on the table's folders have to be the user's: a file that was named may lie
    anywhere."""
    return cache.root() if path.is_relative_to(cache.root()) else path.parent


@functools.cache
def processor() -> str:
    """The name of the CPU, and the instructions that PyTorch uses of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def machine(backend: str, device: torch.device | None = None) -> str:
    """What a measurement holds for: the device and the versions. A GPU is that of the tensors, or
    the current one."""
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


def _read(path: Path) -> Entries | None:
    """The file's contents, none where there is no file; `None` where it cannot be read."""
    try:
        if reason := cache.distrust(path, _top(path)):
            raise PermissionError(reason)
        entries = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"the tuned table {path} is ignored: {error}", stacklevel=3)
        return None
    if not isinstance(entries, dict) or not all(
        isinstance(calls, dict) and all(isinstance(choice, dict) for choice in calls.values())
        for calls in entries.values()
    ):
        warnings.warn(f"the tuned table {path} is ignored: it is none", stacklevel=3)
        return None
    return entries


def find(backend: str, call: str, device: torch.device | None = None) -> dict[str, Any] | None:
    """What is stored for a call on this machine and device. The file is read once in a process."""
    global _entries
    if _entries is None:
        _entries = _read(location()) or {}
    return _entries.get(machine(backend, device), {}).get(call) if _entries else None


def store(
    backend: str, calls: dict[str, dict[str, Any]], device: torch.device | None = None
) -> Path:
    """Adds what was measured for some calls to the file, and returns its path.

    Raises:
        OSError: it cannot be written, or its folder is not to be trusted; what was there stays.
    """
    path = location()
    with cache.replacing(path, _top(path)) as new:
        entries = _read(path)
        if entries is None:
            os.replace(path, path.with_name(path.name + ".unreadable"))
            entries = {}
        entries.setdefault(machine(backend, device), {}).update(calls)
        new.write_text(json.dumps(entries, indent=1, sort_keys=True, ensure_ascii=False), "utf-8")
    forget()
    return path


def forget() -> None:
    """Has the file read anew."""
    global _entries
    _entries = None
