"""This plugin of pytest lets tests launch their kernels over the stand-in, and compare nothing.

    python -m pytest -p bench.gpu.launching tests/backends/triton

What a kernel would have computed is not there, so an `AssertionError` says nothing. Every other
error is one of compiling, binding or launching, and fails the test.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

from bench import stand_in

COMPARISONS = ("assert_matches", "assert_same_bits", "assert_zero")

stand_in.activate(divmod(int(os.environ.get("WN_KERNELS_STAND_IN", "90")), 10))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="runs one test of so many")


def pytest_configure() -> None:
    from tests import comparison

    for name in COMPARISONS:  # before a test imports them
        setattr(comparison, name, _compare_nothing)


def _compare_nothing(*arguments: Any, **options: Any) -> None:
    """Accepts everything, so that a test goes on."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = items[:: config.getoption("every")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    try:
        return (yield)
    except AssertionError:
        return None
