"""Where this package keeps what it measures and what it builds, and what it trusts there.

The library that is built is code, and the table decides what runs. So both are used only where they
and their folders belong to the user, or to root, and nobody else may write there. A folder that is
made here is the user's alone. A file is written elsewhere and then moved into its place, under a
lock: a process that reads, or one that writes at the same time, never finds half of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def root() -> Path:
    """The folder of all of the user's caches. A user without a home has none: below the path
    returned, nothing lies and nothing can be made."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(os.devnull)


def directory() -> Path:
    """A folder in the user's cache; it need not exist yet."""
    return root() / "wn_kernels"


def _chain(path: Path, top: Path) -> list[Path]:
    """The folders from `top` down to `path`, and `path`; `path` alone where it is not below."""
    below = [part for part in path.parents if part.is_relative_to(top)]
    return [*reversed(below), path]


def distrust(path: Path, top: Path) -> str | None:
    """Why `path` must not be used: it, or a folder from `top` down, belongs to somebody else, or
    somebody else may write to it. `None` where nothing is wrong.

    Raises:
        OSError: one of them is not there, or cannot be looked at.
    """
    if not hasattr(os, "geteuid"):  # not a POSIX system, where the user's folders are protected
        return None
    for part in _chain(path, top):
        found = part.stat()
        if found.st_uid not in (0, os.geteuid()):
            return f"{part} belongs to another user (number {found.st_uid})"
        if found.st_mode & _OTHERS_WRITE:
            return f"others may write to {part} (chmod go-w {part} forbids it)"
    return None


def make(folder: Path, top: Path) -> None:
    """Makes a folder and those above it that are missing, for the user alone.

    Raises:
        OSError: it cannot be made, or it, or one from `top` down, is not to be trusted.
    """
    for part in (*reversed(folder.parents), folder):
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)
    if reason := distrust(folder, top):
        raise PermissionError(reason)


@contextlib.contextmanager
def replacing(path: Path, top: Path) -> Iterator[Path]:
    """The path of a new file, in an empty folder beside `path`, whose folder is made if need be. At
    the end the file takes `path`'s place; where none was written, or an error was raised, nothing
    is changed. Processes that do this at once take turns.

    Raises:
        OSError: the folder cannot be made or written, or is not to be trusted.
    """
    make(path.parent, top)
    with FileLock(path.with_name(path.name + ".lock")):
        prefix = path.name + ".new-"
        for left in path.parent.glob(prefix + "*"):  # by a process that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as folder:
            new = Path(folder) / path.name
            yield new
            if new.exists():
                # Whatever the user's mask is: what others may write would not be trusted.
                new.chmod(stat.S_IMODE(new.stat().st_mode) & ~_OTHERS_WRITE)
                new.replace(path)
