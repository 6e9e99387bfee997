"""What the processor takes for a call: its rows, figures and places."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench import host, overhead
from bench.static import baseline

ROOT = Path(__file__).parents[2]

QUICK = """
import re, sys
from bench import cli, host, overhead, stand_in
from bench.static import baseline
from pathlib import Path
host.CASES, host.MODES = host.CASES[:2], ()
overhead.CALLS = 20
baseline.FOLDER = Path(sys.argv[1])
path = sys.argv[1] + "/host.json"
arguments = ["host", "--seconds", "0.01", "--json", sys.argv[1] + "/results.json"]
assert cli.main([*arguments, "--profile", "--write"]) == 0
committed = Path(path).read_text()
stand_in.activate = lambda: None  # it is
# A baseline that is faster: what is timed now is worse.
Path(path).write_text(re.sub('("triton/eager": )[0-9.]+', r'\\g<1>0.01', committed))
assert cli.main(arguments) == 1
"""


def test_host(tmp_path):
    """In a process that compiles: two cases and the operator alone."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", QUICK, str(tmp_path)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WORSE" in done.stdout
    report = json.loads((tmp_path / "results.json").read_text())
    labels = [(r["case"]["label"], r["case"]["mode"]) for r in report["results"]]
    assert labels == [
        *(("linear 16, 64, 64", mode) for mode in ("infer", "train")),
        *(("weight_norm 64×64, dim=0", mode) for mode in ("infer", "train")),
    ]
    for r in report["results"]:
        times = r["microseconds"]
        assert times.keys() == {"plain", "eager", "triton", "auto"}
        assert all(time > 0 for time in times.values())
        assert all(ratio > 0 for ratio in r["ratios"].values())


def test_the_baseline_has_every_row():
    """That of the committed figures, by the rows that are timed."""
    committed, _ = baseline.read("host")
    expected = {
        f"{label}, {mode}": {
            f"{ours}/{other}"
            for ours in (*host.OURS, "grouped")
            if ours in makes
            for other in host.OTHERS
        }
        | ({"grouped/triton"} if "grouped" in makes else set())
        for label, mode, makes in host.rows()
    }
    assert list(committed) == list(expected)
    assert {row: figures.keys() for row, figures in committed.items()} == expected


def test_a_busy_machine_is_no_reason_to_fail(monkeypatch, tmp_path):
    """Half as much again passes; twice as much does not."""
    monkeypatch.setattr(baseline, "FOLDER", tmp_path)
    baseline.write("host", {"a": {"triton/eager": 1.0}})
    for ratio, worse in ((1.5, 0), (2.0, 1)):
        found = {"a": {"triton/eager": ratio}}
        assert len(baseline.worse("host", found, tolerance=host.TOLERANCE)) == worse


def test_places():
    """The files of the package, its backends one by one, Triton's own Python, and the rest."""
    package = str(overhead.PACKAGE)
    for file, function, place in (
        (f"{package}/ops.py", "linear", "ops"),
        (f"{package}/backends/triton/launch.py", "find", "triton"),
        (f"{package}/backends/aten.py", "linear", "aten"),
        ("/lib/site-packages/triton/backends/nvidia/driver.py", "__call__", "Triton"),
        ("~", "<built-in method cuda_utils.launch>", "Triton"),
        ("~", "<method 'new_empty'>", "ATen and autograd"),
        ("/lib/site-packages/torch/nn/modules/module.py", "_call_impl", "torch's Python"),
    ):
        assert overhead._place(file, function) == place
