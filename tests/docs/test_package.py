"""The wheel, installed into an environment of its own, runs there."""

import re
import sys
import tarfile
from pathlib import Path

import pytest

import wn_kernels
from tests.docs.conftest import run
from tests.docs.test_code import blocks

ROOT = Path(__file__).parent.parent.parent


def test_it_is_the_wheel_that_runs(environment, tmp_path):
    """The command and the code of the README, far from the sources."""
    where = run(
        environment / "python", "-c", "import wn_kernels as w; print(w.__file__)", cwd=tmp_path
    )
    assert where.startswith(str(environment.parent))
    installed = Path(where.strip()).parent
    assert (installed / "py.typed").exists()
    assert (installed / "backends" / "native" / "library.cpp").exists()
    info = run(environment / "wn-kernels", "info", cwd=tmp_path)
    assert info.startswith(f"wn_kernels  {wn_kernels.__version__}\n")
    code = "\n".join(code for _, code in blocks(ROOT / "README.md"))
    assert "2 fused, 0 left alone" in run(environment / "python", "-c", code, cwd=tmp_path)


def test_it_runs_without_triton(environment, tmp_path):
    code = "\n".join(code for _, code in blocks(ROOT / "README.md"))
    hidden = "import sys; sys.modules['triton'] = None\n"
    out = run(environment / "python", "-c", hidden + code, cwd=tmp_path)
    assert "2 fused, 0 left alone" in out


def test_the_version():
    """The citation and the changelog have the version."""
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {wn_kernels.__version__}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## {re.escape(wn_kernels.__version__)}\b", changes, flags=re.MULTILINE)


def test_the_source_archive_is_whole(tmp_path):
    """It holds every tracked file but settings of git."""
    if not (ROOT / ".git").exists():
        pytest.skip("the sources are not a repository")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    copy = tmp_path / "sources"
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-c", code, cwd=copy)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert set(tracked) - names <= {".gitignore"}
