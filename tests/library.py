"""Going without the native library, where it was built, and watching what forms weights."""

import pytest

from wn_kernels import functional, grouped, operators
from wn_kernels.backends import native


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every call served as if the library was not built."""
    monkeypatch.setattr(native, "library", lambda *callbacks: None)
    monkeypatch.setattr(functional, "_servers", {})  # what a call goes to first


def watch_weights(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the number of weights of every call that forms several."""
    calls: list[int] = []
    formed, library = grouped.formed, operators.native_library()

    def watched(v, *rest, **how):
        calls.append(len(v))
        return formed(v, *rest, **how)

    monkeypatch.setattr(grouped, "formed", watched)
    if library is not None:
        of_layer = library.named_weights

        def watched_of_layer(names, own, rules, holders):
            found = of_layer(names, own, rules, holders)
            if found is not None:
                calls.append(len(rules))
            return found

        monkeypatch.setattr(library, "named_weights", watched_of_layer)
    return calls
