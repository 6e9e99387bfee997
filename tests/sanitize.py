"""The native library under the address and the undefined-behaviour sanitizer.

    python -m tests.sanitize

It is built with both, as a file of its own, and its tests run on that: every variant, and a
thousand random layers, forward and backward. A finding ends the run. The sanitizers' own libraries
have to be in the process before torch is, so they are preloaded into the one that tests.
"""

from __future__ import annotations

import os
import subprocess
import sys

from wn_kernels.backends.native import FLAGS_VARIABLE

FLAGS = (
    "-O1 -g1 -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS -fsanitize=address,undefined "
    "-fno-sanitize=vptr -fno-sanitize-recover=all"  # vptr would need torch's type information
)
OPTIONS = {
    # Python and torch leave to the end of the process what they allocate once.
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

# The files of tests/backends/native that run its kernels.
TESTED = "native", "linear", "convolution", "weight", "norms", "recurrence"
BUILD = "import os; from wn_kernels.backends import native; print(native.build()); os._exit(0)"


def runtime(name: str) -> str:
    """A sanitizer's library, of the compiler that builds.

    Raises:
        SystemExit: it has none.
    """
    command = [os.environ.get("CXX", "c++"), f"-print-file-name=lib{name}.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"sanitize: {command[0]} comes without lib{name}.so")
    return os.path.realpath(path)


def main(arguments: list[str]) -> int:
    environment = {**os.environ, **OPTIONS, FLAGS_VARIABLE: FLAGS}
    preloaded = {"LD_PRELOAD": " ".join(map(runtime, ("asan", "ubsan")))}
    # The build loads what it built, after torch, where the sanitizers find nothing. What was
    # allocated before them must not be freed through them, so nothing is at the end.
    late = {"ASAN_OPTIONS": OPTIONS["ASAN_OPTIONS"] + ":verify_asan_link_order=0"}
    subprocess.run([sys.executable, "-c", BUILD], env=environment | late, check=True)
    files = [f"tests/backends/native/test_{name}.py" for name in TESTED]
    tests = [sys.executable, "-m", "pytest", *files, "--quiet", "--numprocesses", "2"]
    return subprocess.run([*tests, *arguments], env=environment | preloaded, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
