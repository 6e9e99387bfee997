"""The cost model's picks for random layers, beside every path as it was timed on an H200.

The constants were found by these layers, so the shares are no prediction for others:
docs/notes/measurements.md has what the model picked for layers that it had not seen.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from bench.cases import Case
from bench.gpu import predict
from bench.providers import VARIANT
from wn_kernels import plan
from wn_kernels.plan import costs, devices

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "gpu-h200"
FILES = ("random-second.jsonl", "results.jsonl")
FIELDS = {field.name for field in dataclasses.fields(Case)}
GOOD, SHARE = 1.05, 0.88
# The slowest pick, of those that PyTorch's own weight norm beats.
SLOWEST = 1.04


@pytest.fixture(autouse=True)
def _h200(monkeypatch):
    for module in (costs, devices):
        monkeypatch.setattr(module, "gpu", lambda *_: devices.GPUS["H200"])


def tuples(values):
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


def measured():
    """The layers, and the seconds of every provider and path by its name."""
    for name in FILES:
        for line in map(json.loads, (RESULTS / name).read_text("utf-8").splitlines()):
            if line["kind"] == "result" and line["section"] == "random" and "chosen" in line:
                fields = {k: v for k, v in line["case"].items() if k in FIELDS}
                fields["arguments"] = tuples(fields["arguments"])
                fields["options"] = dict(
                    zip(fields["options"], tuples(fields["options"].values()), strict=True)
                )
                seconds = {name: s["median"] for name, s in line["seconds"].items()}
                yield Case(**fields), line["chosen"], seconds


def estimates(case, chosen):
    """The model's seconds of the paths that were timed, by their names in the results: those of the
    forward, or of the backward after the forward that was chosen then."""
    call, forward = case.call(), chosen.partition("/")[0]
    found = costs.costs(call, "triton")
    if case.mode == "infer":
        return {
            "ours" if name == forward else VARIANT + name: found.seconds(stages)
            for name, stages in found.forward.items()
        }
    return {
        "ours" if str(choice) == chosen else VARIANT + str(choice).partition("/")[2]: (
            found.seconds(predict.stages(found, choice, "train"))
        )
        for choice in plan.choices(call, "triton")
        if choice.forward == forward
    }


def test_picks():
    good, slower, count = 0, [], 0
    for case, chosen, seconds in measured():
        found = {k: s for k, s in estimates(case, chosen).items() if k in seconds}
        if "eager" not in seconds or not found:
            continue  # what was wrong was not timed
        pick = min(found, key=found.get)
        best = min(seconds[name] for name in found)
        good += seconds[pick] <= GOOD * best
        count += 1
        if seconds[pick] > SLOWEST * seconds["eager"]:
            slower.append((case.label, case.mode, case.dtype, pick))
    assert count > 250
    assert good >= SHARE * count, (good, count)
    assert slower == []
