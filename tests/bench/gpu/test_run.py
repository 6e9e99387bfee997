"""The command: sections in process groups of their own, and what becomes of the rest of them."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import cli
from bench.gpu import results, run, sections
from bench.gpu.run import Options
from bench.gpu.sections import SECTIONS

ROOT = Path(__file__).parents[3]


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["gpu", "--out", str(tmp_path)]) == 1
    assert "there is no GPU here" in capsys.readouterr().out


def test_arguments_that_are_wrong(tmp_path, capsys):
    assert cli.main(["gpu"]) == 2
    assert "name a folder for the results" in capsys.readouterr().out
    assert cli.main(["gpu", "--dry-run", "--out", str(tmp_path), "--sections", "fact"]) == 2
    out = capsys.readouterr().out
    assert "there is no section 'fact'; there are facts, tests, host, host_python" in out


def test_seven_minutes_hold_all_sections():
    """Each of which has a module, and all of whose lines fit the table."""
    assert sections.total(SECTIONS) + sections.GRACE <= 7 * 60
    assert 1 + sum(section.lines for section in SECTIONS) <= 60
    for section in SECTIONS:
        assert importlib.util.find_spec(section.module) is not None


def test_the_page_has_every_section():
    page = (ROOT / "docs" / "gpu.md").read_text("utf-8")
    for section in SECTIONS:
        assert f"| `{section.name}` | {section.limit:.0f} |" in page


@pytest.fixture
def outcomes(monkeypatch):
    """What `run` starts is looked at and not started: name, the end of its time, that of its life,
    and its environment. Each takes as long as `taking` says, by a clock that stands still."""
    now, taking, said, ran = [1000.0], {}, {}, []

    def outcome(command, limit, log, environment):
        options = dict(zip(command[4::2], command[5::2], strict=True))
        until = float(options["--until"])
        ran.append((command[3], until - 1000, now[0] + limit - 1000, environment))
        now[0] += taking.get(command[3], 0.0)
        return said.get(command[3], "passed")

    monkeypatch.setattr(run.time, "time", lambda: now[0])
    monkeypatch.setattr(run, "outcome", outcome)
    return taking, said, ran


def test_it_goes_on_after_a_failure(outcomes, tmp_path, capsys):
    """With what became of each, in the results and in the table."""
    _, said, ran = outcomes
    said |= {"facts": "FAILED, exit code 3", "host": "FAILED, killed after 24 s", "sweep": "passed"}
    chosen = [sections.named(name) for name in said]
    assert run.run(Options(tmp_path / "new" / "out", chosen)) == 1
    assert [name for name, *_ in ran] == list(said)
    lines = results.read(tmp_path / "new" / "out" / results.RESULTS)
    assert [line["outcome"] for line in lines] == list(said.values())
    out = capsys.readouterr().out
    assert all(f"{name}: {what}" in out for name, what in said.items())
    assert run.run(Options(tmp_path / "out", chosen[2:])) == 0


def test_what_a_section_leaves_goes_to_the_next(outcomes, tmp_path):
    """A section has to be done when its limit and those before it are over, whenever it starts."""
    taking, _, ran = outcomes
    taking |= {"facts": 2.0, "host": 34.0}
    chosen = [sections.named(name) for name in ("facts", "host", "conv")]
    limits = [section.limit for section in chosen]
    ends = [limits[0], sum(limits[:2]), sum(limits)]
    run.run(Options(tmp_path / "out", chosen))
    assert [until for _, until, *_ in ran] == ends
    assert [kill - until for _, until, kill, _ in ran] == [sections.GRACE] * 3
    ran.clear()
    run.run(Options(tmp_path / "out", chosen, seconds=sum(limits) / 2))
    assert ran[-1][1] - 36 == sum(limits) / 2, "of those that run, and not of all"


def test_the_library_is_hidden_from_a_section_without_it(outcomes, tmp_path, monkeypatch):
    """In its process alone, where no library lies in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/the/user's")
    *_, ran = outcomes
    run.run(Options(tmp_path / "out", [sections.named("host"), sections.named("host_python")]))
    with_library, without = (environment for *_, environment in ran)
    assert with_library["XDG_CACHE_HOME"] == "/the/user's"
    script = "from wn_kernels.backends import native; print(native.unavailable())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=without, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "it was not built" in done.stdout


FAMILY = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
if len(sys.argv) > 2:
    time.sleep(600)
"""


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("hangs", [True, False])
def test_a_whole_group_ends(hangs, tmp_path):
    """Also what a section has started, whether its time is up or it is done."""
    pid = tmp_path / "pid"
    command = [sys.executable, "-c", FAMILY, str(pid), *(["hang"] if hangs else [])]
    with open(tmp_path / "log", "w") as log:
        found = run.outcome(command, 5 if hangs else 60, log.fileno(), dict(os.environ))
    assert found == ("FAILED, killed after 5 s" if hangs else "passed")
    child = int(pid.read_text())
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.05)
    assert not is_running(child)


@pytest.mark.current
def test_every_section_runs_without_a_gpu(tmp_path):
    """A case of each kind, over the stand-in: kernels are compiled and launched, results written,
    and the table and the page made of them. Only the first three have a process each, as all have
    in a run."""
    out = tmp_path / "out"
    names = [section.name for section in SECTIONS]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}

    def python(*arguments):
        return subprocess.run(
            [sys.executable, "-m", *arguments, "--out", str(out), "--most", "1"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )

    done = python("bench", "gpu", "--dry-run", "--sections", ",".join(names[:3]))
    assert done.returncode == 0, done.stdout + done.stderr + (out / results.LOG).read_text()
    table = (out / results.TABLE).read_text()
    assert "DRY RUN" in table
    assert table == done.stdout[-len(table) - 1 : -1]
    assert len(list(out.iterdir())) == 4
    assert all(path.is_file() for path in out.iterdir())
    done = python("bench.gpu.section", ",".join(names[3:]), "--dry-run", "90")
    assert done.returncode == 0, done.stdout + done.stderr

    lines = results.read(out / results.RESULTS)
    assert not [line for line in lines if line["kind"] in ("wrong", "error")]
    for name in names:
        assert results.of(lines, name)
        (where,) = results.of(lines, name, "environment")
        assert where["settings"]["dry_run"]
        assert where["environment"]["float32"] == {"matmul": "highest", "cudnn": "ieee"}
    for name in names[:3]:
        (status,) = results.of(lines, name, "status")
        assert status["outcome"] == "passed"
    assert sum(1 for _ in (tmp_path / "cache").rglob("*.cubin")) >= 10
    assert {line["outcome"] for line in results.of(lines, "tests")} == {"passed"}
    for line in (*results.of(lines, "linear"), *results.of(lines, "conv")):
        assert {"plain", "eager", "ours"} <= line["seconds"].keys()
        expected = {"plain", "ours"} | ({"eager"} if line["case"]["norm"] == "l2" else set())
        assert line["predicted"].keys() >= expected
        assert line["kernels"]

    page = tmp_path / "page.html"
    assert cli.main(["report", str(out / results.RESULTS), "--output", str(page)]) == 0
    text = page.read_text()
    assert "measured over predicted by the cost model" in text
    assert "TFLOP/s" in text


def test_a_line_is_written_at_once(tmp_path):
    """And one that is cut off does not hide the others."""
    results.append(tmp_path, "facts", "result", fact="a", value=1.5)
    path = tmp_path / results.RESULTS
    assert json.loads(path.read_text()) == {
        "section": "facts",
        "kind": "result",
        "fact": "a",
        "value": 1.5,
    }
    with open(path, "a") as file:
        file.write('{"section": "facts", "kind": "res')
    assert len(results.read(path)) == 1
