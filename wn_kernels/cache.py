"""Where this package keeps what it measures and what it builds."""

from __future__ import annotations

import os
from pathlib import Path


def directory() -> Path:
    """A folder in the user's cache; it need not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "wn_kernels"
