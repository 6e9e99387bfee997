"""The package stores its measurements and the library that it builds in a cache of the user's.

The library is code, and the table decides what runs. Both are therefore used only if they and their
folders belong to the user or to root, and no other user may write there. Only the user may access a
folder that is made here. A file is written elsewhere and then moved into its place, under a lock.
Other processes therefore never read an incomplete file.
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
    """Returns the folder of all of the user's caches. If the user has no home, it returns a path
    below which nothing exists and nothing can be made."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(os.devnull)


def directory() -> Path:
    """Returns this package's folder in the user's cache. It need not exist yet."""
    return root() / "wn_kernels"


def _chain(path: Path, top: Path) -> list[Path]:
    """Returns the folders from `top` down to `path`, and `path`. If `path` is not below `top`, it
    returns `path` alone."""
    below = [part for part in path.parents if part.is_relative_to(top)]
    return [*reversed(below), path]


def distrust(path: Path, top: Path) -> str | None:
    """Returns why `path` must not be used, or `None` if it may be. It must not if another user owns
    it or a folder from `top` down, or may write to one of them.

    Raises:
        OSError: one of them does not exist or cannot be examined.
    """
    if not hasattr(os, "geteuid"):  # systems other than POSIX protect the user's folders
        return None
    for part in _chain(path, top):
        found = part.stat()
        if found.st_uid not in (0, os.geteuid()):
            return f"{part} belongs to another user (number {found.st_uid})"
        if found.st_mode & _OTHERS_WRITE:
            return f"others may write to {part} (chmod go-w {part} forbids it)"
    return None


def make(folder: Path, top: Path) -> None:
    """Makes a folder and those above it that are missing. Only the user may access them.

    Raises:
        OSError: the folder cannot be made, or `distrust` gives a reason not to use it.
    """
    for part in (*reversed(folder.parents), folder):
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)
    if reason := distrust(folder, top):
        raise PermissionError(reason)


@contextlib.contextmanager
def replacing(path: Path, top: Path) -> Iterator[Path]:
    """Yields the path of a new file, in an empty folder beside `path`. It makes the folder of
    `path` if that is missing. At the end the new file replaces `path`. If no file was written, or
    an error was raised, nothing changes. Processes that do this at the same time take turns.

    Raises:
        OSError: the folder cannot be made or written, or `distrust` gives a reason not to use it.
    """
    make(path.parent, top)
    with FileLock(path.with_name(path.name + ".lock")):
        prefix = path.name + ".new-"
        for left in path.parent.glob(prefix + "*"):  # a process that was killed may leave these
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as folder:
            new = Path(folder) / path.name
            yield new
            if new.exists():
                # The user's mask may let others write, and `distrust` would reject such a file.
                new.chmod(stat.S_IMODE(new.stat().st_mode) & ~_OTHERS_WRITE)
                new.replace(path)
