"""Building and loading the native library, and going without."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wn_kernels import cache
from wn_kernels.backends import native


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_without_the_library(tmp_path):
    code = """
import torch, wn_kernels
from wn_kernels import plan
layer = wn_kernels.WNLinear(6, 4)
layer(torch.randn(2, 6)).sum().backward()
assert layer.weight_v.grad.abs().sum() > 0
print(plan.serving(torch.empty(0)))
with wn_kernels.use_backend("native"):
    try:
        layer(torch.randn(2, 6))
    except RuntimeError as error:
        print(error)
"""
    done = run("-c", code, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.startswith("aten\n"), done.stderr
    assert "it was not built (run python -m wn_kernels build)" in done.stdout


def test_a_broken_library_is_no_obstacle(tmp_path):
    code = "from wn_kernels.backends import native; print(native.location())"
    file = run("-c", code, XDG_CACHE_HOME=str(tmp_path)).stdout.strip()
    os.makedirs(os.path.dirname(file))
    with open(file, "w") as text:
        text.write("no library")
    done = run("-m", "wn_kernels", "info", XDG_CACHE_HOME=str(tmp_path))
    assert "the native library cannot be used: loading" in done.stdout, done.stderr
    assert "float32   aten" in done.stdout


def test_a_compiler_that_is_not_there_is_named(tmp_path):
    done = run("-m", "wn_kernels", "build", XDG_CACHE_HOME=str(tmp_path), CXX="no-such-compiler")
    assert done.returncode != 0
    assert "no-such-compiler" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


# --- a compiler that takes no time: its libraries are empty --------------------------------------

COMPILER = """#!/bin/sh
echo "$@" >> {log}
out=
for word in "$@"; do
  [ "$last" = -o ] && out=$word
  [ "$last" = -MF ] && echo "$out:" > "$word"
  last=$word
done
case " $* " in *" -c "*) action=compile ;; *" -shared "*) action=link ;; *) exec cc "$@" ;; esac
{behaviour}
[ $action = compile ] && exec touch "$out"
echo | exec cc -x c - -shared -o "$out"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """`compiler(behaviour)` puts a compiler in the environment, and returns its log; `behaviour` is
    what it does first."""

    def make(behaviour=""):
        script, log = tmp_path / "cc", tmp_path / "log"
        log.touch()
        script.write_text(COMPILER.format(log=log, behaviour=behaviour))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    return make


BUILD = (sys.executable, "-m", "wn_kernels", "build")


def left(tmp_path):
    """What lies in the cache, but for locks."""
    files = (tmp_path / "cache").rglob("*")
    return [file for file in files if file.is_file() and file.suffix != ".lock"]


def test_processes_that_build_at_once(compiler, tmp_path):
    """One builds, the others wait and find what it built."""
    log = compiler("sleep 1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(BUILD, **pipes) for _ in range(3)]
    done = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, done
    paths = {out.strip().splitlines()[-1] for out, _ in done}
    assert left(tmp_path) == [Path(path) for path in paths]
    links = [line for line in log.read_text().splitlines() if f"{native.NAME}.so" in line]
    assert len(links) == 1


def test_a_build_that_was_interrupted(compiler, tmp_path):
    """Killed, with no time to clean up; the next build does, and succeeds."""
    log = compiler("sleep 600")
    process = subprocess.Popen(BUILD, start_new_session=True, stderr=subprocess.DEVNULL)
    while " -c " not in log.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.rglob("*.so"))
    assert list(tmp_path.rglob("*.new-*"))
    assert "it was not built" in run("-m", "wn_kernels", "info").stdout
    compiler()
    done = run("-m", "wn_kernels", "build")
    assert left(tmp_path) == [Path(done.stdout.strip().splitlines()[-1])], done.stderr
    assert not list(tmp_path.rglob("*.new-*"))


@pytest.mark.parametrize("action", ["compile", "link"])
def test_a_full_disk(compiler, tmp_path, action):
    """The compiler's message arrives, and nothing is left."""
    message = "fatal error: error writing to out: No space left on device"
    compiler(f'[ $action = {action} ] && {{ echo half > "$out"; echo "{message}" >&2; exit 1; }}')
    done = run("-m", "wn_kernels", "build")
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert left(tmp_path) == []


def test_a_disk_that_is_full_before_the_compiler_starts(compiler, monkeypatch):
    def mkdtemp(*_, **__):
        raise OSError(28, "No space left on device")

    compiler()
    monkeypatch.setattr(cache.tempfile, "mkdtemp", mkdtemp)
    place = re.escape(str(native.location()))
    with pytest.raises(RuntimeError, match=f"cannot be built as {place}: .*No space left"):
        native.build()


def test_a_home_that_cannot_be_written(tmp_path):
    """It lies below a file, where nobody can make a folder, root neither."""
    (tmp_path / "file").touch()
    home = str(tmp_path / "file" / "home")
    done = run("-m", "wn_kernels", "build", XDG_CACHE_HOME="", HOME=home)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: the native library cannot be")
    assert home in done.stderr
    code = "import torch, wn_kernels; print(wn_kernels.WNLinear(6, 4)(torch.ones(2, 6)).shape)"
    done = run("-W", "error::UserWarning", "-c", code, XDG_CACHE_HOME="", HOME=home)
    assert done.stdout == "torch.Size([2, 4])\n", done.stderr


def test_a_folder_that_cannot_be_made(compiler, monkeypatch):
    def mkdir(self, *_, **__):
        raise OSError(30, "Read-only file system", str(self))

    compiler()
    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(RuntimeError, match=r"cannot be built as .*Read-only file system"):
        native.build()


# --- what is loaded ------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The library in a cache of this test's, and a function that loads it anew."""
    built = native.build()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = native.location()
    cache.make(path.parent, cache.root())
    shutil.copy(built, path)
    path.chmod(0o755)
    return path


def unavailable():
    """Why the library is not loaded, looked at anew."""
    return native._loaded.__wrapped__()[1]


def test_ones_own_library_is_loaded(copied):
    code = (
        "from wn_kernels.backends import native; print(native.unavailable(), native._loaded()[0])"
    )
    found = run("-c", code).stdout
    assert found.startswith("None <module")
    assert str(copied) in found
    assert native.build() == copied


@pytest.mark.parametrize("level", range(5))
def test_a_library_that_others_may_write_is_not_loaded(copied, level):
    """It, or a folder from the cache's root down."""
    part = (copied, *copied.parents)[level]
    part.chmod(stat.S_IMODE(part.stat().st_mode) | 0o022)
    assert unavailable().startswith(f"{copied} is not loaded: others may write to {part} ")
    with pytest.raises(RuntimeError, match="others may write"):
        native.build()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("level", range(5))
def test_a_library_of_another_user_is_not_loaded(copied, level):
    part = (copied, *copied.parents)[level]
    os.chown(part, 12345, -1)
    found = unavailable()
    assert found.startswith(f"{copied} is not loaded: {part} belongs to another user")


def test_why_it_is_not_loaded_is_said(copied):
    copied.chmod(0o777)
    done = run("-m", "wn_kernels", "info")
    assert f"{copied} is not loaded: others may write to {copied} (chmod go-w" in done.stdout


@pytest.mark.current
def test_what_is_built_is_the_users_alone(compiler, tmp_path):
    compiler()
    before = os.umask(0)
    try:
        path = native.build()
    finally:
        os.umask(before)
    for part in path.parents:
        if part == tmp_path:
            break
        assert stat.S_IMODE(part.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert cache.distrust(path, cache.root()) is None
