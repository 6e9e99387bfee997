"""The package as a user installs it: its wheel, in an environment of its own."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


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


@pytest.fixture(scope="session")
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
    site = run(python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd=folder)
    rest = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site.strip()) / "rest.pth").write_text("\n".join(rest))
    return binaries
