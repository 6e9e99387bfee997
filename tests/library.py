"""Going without the native library, where it was built."""

import pytest

from wn_kernels import functional
from wn_kernels.backends import native


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every call served as if the library was not built."""
    monkeypatch.setattr(native, "library", lambda *callbacks: None)
    monkeypatch.setattr(functional, "_servers", {})  # what a call goes to first
