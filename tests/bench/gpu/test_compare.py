"""Two runs on a GPU: what changed, the losing cases first."""

import pytest

from bench import cli
from tests.bench.gpu.lines import environment, result, written


def of(path, *lines, **where):
    return written(path, [environment("linear", **where), *lines])


@pytest.fixture
def compare(tmp_path, capsys):
    """Compares two lists of results; the exit code, and what was printed."""

    def run(before, after, **where):
        paths = of(tmp_path / "a.jsonl", *before), of(tmp_path / "b.jsonl", *after, **where)
        return cli.main(["compare", *paths]), capsys.readouterr().out

    return run


def test_every_case_is_there(compare):
    """Before and after with the others beside it, and means of both; the losing case is first."""
    before = [result("linear", "wins", 2e-5), result("linear", "loses", 4e-5)]
    after = [result("linear", "wins", 1e-5), result("linear", "loses", 3e-5)]
    code, out = compare(before, after)
    assert code == 0
    loses, wins = (next(x for x in out.splitlines() if name in x) for name in ("loses", "wins"))
    assert out.index("loses") < out.index("wins")
    for text in ("40 µs", "30 µs", "0.75", "10 µs", "20 µs", "4.00 → 3.00", "2.00 → 1.50"):
        assert text in loses
    for text in ("20 µs", "10 µs", "0.50", "1.00 → 0.50"):
        assert text in wins
    assert "2 cases: ours after/before 0.61" in out
    assert "ours/eager 1.41 → 0.87, 1 slower than eager" in out
    assert "0 cases are slower than before, and 0 are gone" in out


@pytest.mark.parametrize(
    ("ours", "eager", "code"),
    [
        (1.04e-5, 2e-5, 0),  # within noise
        (1.5e-5, 3e-5, 0),  # the device is slower, PyTorch's layer is as well
        (1.5e-5, 2e-5, 1),
    ],
)
def test_a_case_that_got_slower(ours, eager, code, compare):
    found, out = compare(
        [result("linear", "a", 1e-5)], [result("linear", "a", ours, eager, mode="infer")]
    )
    assert found == code
    assert ("slower: linear a infer" in out) == code


def test_cases_that_only_one_run_has(compare):
    """One that is gone counts, one that is new does not, and a section that was not run is left."""
    before = [result("linear", "old", 1e-5), result("linear", "both", 1e-5)]
    after = [result("linear", "both", 1e-5), result("linear", "new", 1e-5)]
    code, out = compare([*before, result("conv", "c", 1e-5)], after)
    assert code == 1
    assert "gone: linear old infer" in out
    assert "only after: new infer" in out
    assert "1 are gone" in out


def test_a_wrong_provider_is_a_case_that_is_gone(compare):
    wrong = result("linear", "a", 1e-5)
    del wrong["seconds"]["ours"]
    assert compare([result("linear", "a", 1e-5)], [wrong, result("linear", "b", 1e-5)])[0] == 1


def test_kinds_of_a_case_are_told_apart(compare):
    """Dtype, precision and layout belong to the case."""
    last = result("linear", "a", 4e-5)
    last["case"] |= {"channels_last": True, "dtype": "bfloat16", "precision": "tf32"}
    lines = [result("linear", "a", 1e-5), last]
    code, out = compare(lines, lines)
    assert code == 0
    assert "a bfloat16 tf32 channels last" in out
    assert "2 cases" in out


def test_what_differs_of_the_runs(compare):
    lines = [result("linear", "a", 1e-5)]
    _, out = compare(lines, lines, driver="590", commit="def")
    assert "driver: 580, now 590" in out
    assert "commit: abc, now def" in out
    assert "torch" not in out
