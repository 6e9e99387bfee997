"""The section that runs the tests of the kernels."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import results

ROOT = Path(__file__).parents[3]

# These tests run in the place of the kernels' tests. Each of two workers is sent ten at once.
SLOW = """
import time
import pytest

@pytest.mark.parametrize("i", range(20))
def test_slow(i):
    assert i != 1
    time.sleep(0 if i in (0, 10) else 60)
"""

SECTION = """
import types
from pathlib import Path
import torch
from bench.gpu import results, tests
from bench.gpu.context import Context

def time():  # in tests that are done
    return len(results.read(Path(results.RESULTS))) if Path(results.RESULTS).exists() else 0

tests.TESTS, tests.WORKERS, tests.time = "test_slow.py", 2, types.SimpleNamespace(time=time)
context = Context("tests", Path(), 2.5, False, None, torch.device("cpu"))
tests.main(context)
print(context.failed)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="workers are killed")
def test_when_the_time_is_up(tmp_path):
    """It ends without the tests that the workers were sent already. What is done is written, what
    is not is named, and the JUnit file is there."""
    (tmp_path / "test_slow.py").write_text(SLOW)
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SECTION],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "['test_slow.py::test_slow[1]: assert 1 != 1']" in done.stdout
    lines = results.read(tmp_path / results.RESULTS)
    outcomes = {line["test"]: line["outcome"] for line in results.of(lines, "tests")}
    names = [f"test_slow.py::test_slow[{i}]" for i in range(20)]
    expected = zip((names[0], names[1], names[10]), ("passed", "failed", "passed"), strict=True)
    assert outcomes == dict(expected)
    (left,) = results.of(lines, "tests", "left out")
    assert left["cases"] == [name for name in names if name not in outcomes]
    assert 'tests="3"' in (tmp_path / results.JUNIT).read_text()
