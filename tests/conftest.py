"""Settings of the whole suite.

Without a GPU, Triton's kernels run on CPU tensors under its interpreter, which has to be chosen
before triton is imported; under the launch checker (`make sanitize`) they are compiled instead.
Fresh memory is filled with NaN, so an element that nobody wrote shows in the values. Importing
`bench` holds oneDNN to instructions whose results are right (`bench/measure/onednn.py`), which has
to happen before torch is imported.
"""

import importlib.util
import os
import sys

import pytest
import torch
from hypothesis import settings

import bench  # noqa: F401
from bench.measure import precision
from bench.stand_in import interpreter
from tests.releases import IS_CURRENT

if not torch.cuda.is_available() and "ttsem" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    interpreter.mend()

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores, so one thread each
    torch.set_num_threads(1)

precision.set_tf32(False)

# Nothing that was measured or tuned on this machine.
os.environ["WN_KERNELS_RATES"] = ""
os.environ["WN_KERNELS_TABLE"] = os.path.join(os.path.dirname(__file__), "no-such-table.json")

settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """Tools of the developers, and what torch or triton itself does, are those of the releases at
    hand. The oldest ones are for the package alone."""
    if IS_CURRENT:
        return
    for item in items:
        if item.get_closest_marker("current"):
            item.add_marker(pytest.mark.skip(reason="an older release of torch or triton"))


@pytest.fixture(autouse=True)
def _poisoned_and_seeded():
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton's kernels run in this session."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """The path of a tuned table of this test's, forgotten afterwards."""
    from wn_kernels import tuning
    from wn_kernels.plan import table

    path = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv(table.VARIABLE, str(path))
    tuning._forget()
    mask = os.umask(0o022)  # a file that a test writes by hand would not be trusted under every one
    yield path
    os.umask(mask)
    monkeypatch.undo()
    tuning._forget()
