"""What holds for every file of the project."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 500  # lines of Python that a reader can hold in mind


def tracked(*patterns):
    """The files of the repository, which git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("the sources are not a repository")
    command = "git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for line in listed.splitlines() if (path := ROOT / line).exists()]


def test_no_file_is_long():
    """A longer one has more than one idea: it is split along them."""
    files = tracked("*.py")
    assert len(files) > 200
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in files}
    long = {path.relative_to(ROOT).as_posix(): n for path, n in lengths.items() if n > LONGEST}
    assert not long
