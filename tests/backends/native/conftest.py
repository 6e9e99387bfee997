"""The native library is built, and a test may force it."""

import pytest

from wn_kernels import use_backend
from wn_kernels.backends import native


@pytest.fixture(scope="session")
def built():
    """The path of the library."""
    return native.build()


@pytest.fixture
def forced(built):
    """A call that the library leaves alone raises."""
    with use_backend("native"):
        yield
