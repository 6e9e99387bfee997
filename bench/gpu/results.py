"""A run leaves one flat folder of few files.

    results.jsonl   a line of JSON for every case, written as soon as it is done
    tests.xml       what became of every test, as JUnit has it
    log.txt         what the sections printed
    table.txt       the table at the end

A line names its `section` and its `kind`: "environment" (once a section), "result", "wrong" (a
provider whose values are), "error" (a case that raised), "left out" (cases that the time did not
reach) and "status" (what became of the section).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS, JUNIT, LOG, TABLE = "results.jsonl", "tests.xml", "log.txt", "table.txt"

# Sections whose results are those of a suite.
TIMED = ("host", "host_python", "models", "linear", "weight_norm", "steps", "conv", "random")

# Names of facts.
COPY, READ, PRODUCT = "copy, bytes/s", "read, bytes/s", " product, operations/s"

Line = dict[str, Any]


def append(folder: Path, section: str, kind: str, **fields: Any) -> None:
    """Writes a line at once, so that nothing that happens to the process later touches it."""
    text = json.dumps({"section": section, "kind": kind, **fields}, default=str)
    with open(folder / RESULTS, "a", encoding="utf-8") as file:
        file.write(text + "\n")


def read(path: Path) -> list[Line]:
    """Returns the lines of a run, in order, without one that was cut off."""
    lines = []
    for text in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the process was killed while it wrote
            continue
    return lines


def of(lines: list[Line], section: str, kind: str = "result") -> list[Line]:
    """Returns the lines of a section and a kind."""
    return [line for line in lines if line["section"] == section and line["kind"] == kind]


def median(line: Line, name: str) -> float:
    """Returns the seconds of a provider in a result."""
    return line["seconds"][name]["median"]


def words_of(case: dict[str, Any]) -> list[str]:
    """Returns a case in a few words, without its mode: its label, and its dtype, precision, layout
    and norm if these are not the usual ones or in the label."""
    words = [case["label"]]
    for name in ("dtype", "precision"):
        word = case.get(name, "own")
        words += [word] if word not in ("own", "") and word not in case["label"] else []
    words += ["channels last"] if case.get("channels_last") else []
    return words + (["norm " + case["norm"]] if is_other_norm(case) else [])


def is_other_norm(case: dict[str, Any]) -> bool:
    """Returns whether a case has another norm than l2."""
    return case.get("norm", "l2") != "l2"


def mode_of(case: dict[str, Any]) -> str:
    """Returns what geometric means are taken over: a mode, and apart from it that of other norms,
    whose eager layer is not PyTorch's."""
    return case["mode"] + (", other norms" if is_other_norm(case) else "")


def reports(path: Path) -> list[dict[str, Any]]:
    """Returns each section's results as `bench report` takes those of a suite: one report for each
    dtype, precision and layout, of the cases whose ratios to both PyTorch's layers are there."""
    from bench.suite import geometric_means

    lines = read(path)
    found = []
    for name in TIMED:
        groups: dict[str, list[Line]] = {}
        for line in of(lines, name):
            if line["ratios"].keys() >= {"ours/eager", "ours/plain"}:
                groups.setdefault(_kind(line["case"]), []).append(line)
        for kind, group in groups.items():
            (where, *_) = of(lines, name, "environment")
            report = {
                "suite": name,
                "environment": where["environment"],
                "settings": where["settings"] | {"dtype": kind},
                "results": group,
                "means": geometric_means(group),
                "ceilings": _ceilings(lines, kind),
            }
            found.append(report)
    return found


def _kind(case: dict[str, Any]) -> str:
    """Returns the dtype of a case, with its precision and its layout if they are not the usual
    ones."""
    words = [case.get("dtype", "float32")]
    words += [case["precision"]] if case.get("precision", "own") != "own" else []
    words += ["channels last"] if case.get("channels_last") else []
    words += [case["norm"]] if is_other_norm(case) else []
    return ", ".join(words)


def _ceilings(lines: list[Line], kind: str) -> dict[str, float]:
    """Returns what was measured of the device for products of a kind, or nothing if it was not."""
    values = {line["fact"]: line["value"] for line in of(lines, "facts")}
    multiplied = {"float32, tf32": "TF32", "float32, autocast": "bfloat16"}
    product = multiplied.get(kind, kind.partition(",")[0])
    bandwidth, rate = (values.get(name) for name in (COPY, product + PRODUCT))
    return {"bandwidth": bandwidth, "rate": rate} if bandwidth and rate else {}
