"""The wheel, installed into an environment of its own: it runs, and its types are checked."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

import wn_kernels
from tests.docs.test_code import blocks

ROOT = Path(__file__).parent.parent.parent

USER = """
import torch
import wn_kernels
import wn_kernels.functional as WF
from torch import Tensor, nn
from wn_kernels import WNConv1d, WNLinear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = WNConv1d(3, 8, 5, padding=2, eps=1e-6)
        self.out = WNLinear(8, 2, dim=None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.conv(x).relu().mean(-1))
        return y


linear: nn.Linear = wn_kernels.weight_norm(nn.Linear(3, 4))
with wn_kernels.use_backend("aten"):
    layer = WNLinear(3, 4)
    y: Tensor = WF.wn_linear(torch.ones(2, 3), layer.weight_v, layer.weight_g, dim=0)
report = wn_kernels.fuse(Net(), dry_run=True)
names: list[str] = [line.name for line in report if line.dim == 0]
folded: list[str] = wn_kernels.fold(Net())
state: dict[str, Tensor] = wn_kernels.state_dict(Net(), "plain")
"""

WRONG = """
import wn_kernels

wn_kernels.fuse(3)
wn_kernels.functional.wn_linear("x", None, None)
wn_kernels.WNLinear(3, 4, dim="rows")
"""


def run(*command, cwd, **environment):
    """The output of a command, which must succeed."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=clean | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The `bin` of an environment that holds the wheel, and sees torch where it lies."""
    folder = tmp_path_factory.mktemp("package")
    sources = folder / "sources"  # a build leaves files beside the sources
    shutil.copytree(ROOT / "wn_kernels", sources / "wn_kernels")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    options = ("--no-deps", "--no-build-isolation", "--quiet")
    run(*pip, "wheel", *options, "--wheel-dir", folder, sources, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    binaries = folder / "env" / "bin"
    python = binaries / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(
        run(python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd=folder)
    )
    (Path(str(site).strip()) / "rest.pth").write_text(sysconfig.get_path("purelib"))
    return binaries


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


def test_a_program_of_a_user_type_checks(environment, tmp_path):
    """Strict mypy accepts it, and finds the mistakes in another."""
    cache = ROOT / ".mypy_cache" / "user"  # torch takes a minute, once
    mypy = (sys.executable, "-m", "mypy", "--strict", "--cache-dir", cache)
    mypy += ("--python-executable", environment / "python", "--no-error-summary")
    (tmp_path / "user.py").write_text(USER)
    run(*mypy, "user.py", cwd=tmp_path)
    (tmp_path / "wrong.py").write_text(WRONG)
    with pytest.raises(AssertionError) as found:
        run(*mypy, "wrong.py", cwd=tmp_path)
    lines = {int(line) for line in re.findall(r"wrong\.py:(\d+): error", str(found.value))}
    assert lines == {4, 5, 6}


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
