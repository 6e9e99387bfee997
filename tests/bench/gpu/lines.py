"""Lines of results, made up."""

import json


def environment(section, **more):
    where = {"device": "a GPU", "torch": "2", "triton": "3", "python": "3", "commit": "abc"}
    where |= {"time": "2026-01-02T03:04:05+00:00", "native": True, "driver": "580"} | more
    settings = {"dtype": "", "dry_run": False}
    return {"section": section, "kind": "environment", "environment": where, "settings": settings}


def status(section, outcome="passed"):
    return {"section": section, "kind": "status", "outcome": outcome, "seconds": 3.0, "compiled": 7}


def result(section, label, ours, eager=2e-5, plain=1e-5, mode="infer", **more):
    """A result whose `ours` is that many seconds; what else there is, besides, as `more`."""
    times = {"ours": ours, "plain": plain, "eager": eager, "ours: scaled": 3e-5}
    ratios = {f"ours/{name}": ours / t for name, t in times.items() if name != "ours"}
    case = {"label": label, "mode": mode, "bytes": 40_000_000, "operations": 8e9}
    found = {
        "section": section,
        "kind": "result",
        "case": case,
        "seconds": {name: {"median": t} for name, t in times.items()},
        "ratios": {n: {"median": r, "low": r - 0.01, "high": r + 0.01} for n, r in ratios.items()},
        "predicted": {"ours": 4e-5},
    }
    return found | more


def written(path, lines):
    """The lines in a file, whose path is returned as text."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)
