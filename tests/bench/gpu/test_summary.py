"""The table at the end, of what there is, the losing cases first."""

from bench.gpu import summary
from bench.gpu.sections import SECTIONS
from tests.bench.gpu.lines import environment, result, status


def test_losing_cases_come_first():
    lines = [environment("linear"), result("linear", "wins", 1e-5), result("linear", "loses", 4e-5)]
    text = summary.table([*lines, status("linear")])
    assert text.startswith("a GPU: torch 2, triton 3, abc")
    assert "linear: passed, 3 s, 7 kernels compiled" in text
    assert "geometric means: ours/plain 2.00, ours/eager 1.00" in text
    assert text.index("loses infer") < text.index("wins infer")
    assert "ours 40 µs (40 µs), plain 10 µs, eager 20 µs, scaled 30 µs" in text
    assert "ours 1000 GB/s, 200.0 TFLOP/s" in text


def test_means_of_other_norms():
    """They are apart from those of l2, and have the ratio to l2."""
    case = {"label": "w", "mode": "forward", "norm": "linf"}
    l1 = result("weight_norm", "w", 1e-5)
    l1 |= {"case": case, "seconds": l1["seconds"] | {"ours: l2": {"median": 2e-5}}}
    lines = [environment("weight_norm"), result("weight_norm", "w", 4e-5, mode="forward"), l1]
    text = summary.table(lines)
    assert "forward, 1 cases, geometric means: ours/plain 4.00, ours/eager 2.00\n" in text
    means = "ours/plain 1.00, ours/eager 0.50, ours/l2 0.50\n"
    assert f"forward, other norms, 1 cases, geometric means: {means}" in text
    assert "w forward norm linf: ours 10 µs" in text


def test_the_processor_of_steps():
    conditions = {"processor": {"ours": {"median": 3e-6}, "eager": {"median": 1e-5}}}
    lines = [environment("steps"), result("steps", "s", 1e-5, conditions=conditions)]
    text = summary.table(lines)
    assert "ours/eager 0.50; by the processor ours/eager 0.30\n" in text


def test_it_has_sixty_lines_at_most():
    lines = []
    for section in SECTIONS:
        name = section.name
        lines += [environment(name), status(name)]
        lines += [{"section": name, "kind": "error", "message": "x" * 500}] * 9
        if name in ("facts", "tests"):
            more = {"fact": "f", "value": 1.0, "predicted": 2.0, "outcome": "failed"}
            more |= {"test": "t", "message": "m"}
            lines += [{"section": name, "kind": "result", **more}] * 50
        elif name == "sweep":
            lines += [result(name, "s", 1e-5) | {"seconds": {"shipped": {"median": 1e-5}}}] * 50
        else:
            lines += [result(name, "c", 1e-5)] * 50
    text = summary.table(lines)
    assert text.count("\n") <= 60
    assert max(map(len, text.splitlines())) <= summary.WIDTH
    assert all(f"{section.name}: passed" in text for section in SECTIONS)


def test_of_a_run_that_was_cut_off():
    """A section without a status, and one without ours."""
    line = result("linear", "a", 1e-5)
    del line["seconds"]["ours"]
    text = summary.table([environment("linear"), line])
    assert "linear: not done" in text
    assert "a infer: plain 10 µs, eager 20 µs" in text
    assert summary.table([]) == "nothing was run\n"
