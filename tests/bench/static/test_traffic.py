"""What the Triton paths move, counted; and that a figure that gets worse is noticed."""

import io

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton")

from bench.static import baseline, traffic
from bench.static.traffic import Case
from wn_kernels.call import NORMS


@pytest.fixture(scope="module")
def found():
    """Traffic by layer, direction and variant."""
    cases = [
        Case("half", (16, 256), (256, 256), traffic._LINEAR),
        Case("autocast", (16, 256), (256, 256), ("one_pass", "materialize"), v_dtype=torch.float32),
        Case("depthwise", (1, 64, 6, 6), (64, 1, 3, 3), ("one_pass", "packed"), conv=traffic._EACH),
    ]
    return {record[:3]: record[3] for record in traffic.records(cases)}


def test_a_small_batch_reads_the_weight_once(found):
    """One launch, no `W`: nothing but the inputs and the results crosses the bus."""
    for layer in ("half", "autocast", "depthwise"):
        forward = found[layer, "forward", "one_pass"]
        assert forward.launches == 1
        assert forward.minimum <= forward.distinct == forward.by_launch <= 1.02 * forward.minimum
    layer = traffic._Layer(Case("", (16, 256), (256, 256), ("one_pass",)))
    written = found["half", "forward", "one_pass"].written
    assert written == layer.y.nbytes + layer.n.nbytes < layer.v.nbytes / 8


def test_the_backward_of_a_small_batch_stores_no_gradient_of_w(found):
    for layer in ("half", "autocast"):
        backward, whole = (found[layer, "backward", name] for name in ("one_pass", "materialize"))
        # Under autocast dX takes W, which is written and read in the smaller dtype.
        most = backward.minimum * 1.05 + (256 * 256 * 4 if layer == "autocast" else 256 * 16 * 4)
        assert backward.minimum <= backward.distinct <= most
        assert backward.launches < whole.launches
        assert backward.by_launch < whole.by_launch


def test_fewer_bytes_than_eager(found):
    """Eager writes `W` and reads it, under autocast twice; its kernels at their best."""
    for layer, saving in (("half", 2.5), ("autocast", 3.5)):
        ours, eager = (found[layer, "forward", name] for name in ("one_pass", "eager"))
        assert eager.by_launch > saving * ours.by_launch
        # A tile has 64 rows, and `x` 16.
        assert ours.operations == 4 * eager.operations > 0


def test_kernels_are_named(found):
    assert found["half", "forward", "one_pass"].kernels == ["one_pass_kernel"]
    scaled = ["slice_sum_kernel", "mm", "scale_kernel"]
    assert found["half", "forward", "scaled"].kernels == scaled
    assert found["half", "forward", "eager"].kernels == ["_weight_norm_interface", "addmm"]


def test_counts_of_a_product_alone():
    """Of ATen's kernels: inputs and outputs, views and allocations for nothing."""
    a, b = torch.randn(3, 8), torch.randn(5, 8)
    t = traffic.count(lambda: torch.mm(a, b.t()).view(-1))
    assert (t.launches, t.requested) == (1, 4 * (24 + 40 + 15))
    assert t.distinct == t.by_launch == t.requested
    assert (t.written, t.operations) == (4 * 15, 2 * 3 * 5 * 8)
    twice = traffic.count(lambda: torch.mm(a, a.t()))
    assert (twice.requested, twice.distinct) == (4 * (24 + 24 + 9), 4 * (24 + 9))


def test_every_norm_moves_the_same_bytes():
    """As committed, but for the ties of linf that come with a kept product, and that the parts of a
    split slice leave."""
    committed, _ = baseline.read("traffic")
    of = {
        norm: {
            key.replace(norm, "l2"): figures for key, figures in committed.items() if norm in key
        }
        for norm in NORMS
    }
    assert of["l1"] == of["l2"]
    (product,) = {key for key in of["l2"] if key.endswith("product")}
    assert of["linf"].keys() == of["l2"].keys()
    for key, figures in of["l2"].items():
        more = {name: of["linf"][key][name] - figure for name, figure in figures.items()}
        assert not more["launches"]
        assert all(not more[name] or key == product for name in figures)
        assert more["distinct"] <= 0.005 * figures["distinct"]


def test_ties_that_are_kept_move_few_bytes():
    """Beside l1, by the forward that counts them, whoever shares a slice."""
    from wn_kernels.backends.triton import configs, linear

    x, v, g = torch.randn(4, 128), torch.randn(32, 128), torch.rand(32, 1)
    config = configs.SplitConfig(16, 16, 32, 4, 2)
    for variant, splits in (("one_pass", 1), ("one_pass", 2), ("scaled", 1)):
        found = {}
        for norm in ("l1", "linf"):
            options = {"norm": norm, "config": config._replace(splits=splits)}
            found[norm] = traffic.count(
                lambda variant=variant, options=options: linear(
                    *(x, v, g, None, 0, 0.0, variant, True), **options
                )
            )
        assert found["linf"].launches == found["l1"].launches
        assert 0 < found["linf"].written - found["l1"].written <= (1 + splits) * 4 * 32


# --- baselines -----------------------------------------------------------------------------------


def test_the_baseline_holds_every_path():
    committed, _ = baseline.read("traffic")
    expected = {
        f"{case.label}, {direction}, {variant}"
        for case in traffic.CASES
        for direction in ("forward", "backward")
        for variant in traffic._of(case, direction)
    } | {
        f"{traffic._Group.label}, {direction}, {variant}"
        for direction in ("forward", "backward")
        for variant in ("grouped", "each by itself")
    }
    assert committed.keys() == expected


def test_what_is_worse_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "FOLDER", tmp_path)
    before = {"a": {"bytes": 100, "launches": 1}, "b": {"bytes": 50, "launches": 2}}
    baseline.write("x", before)
    assert baseline.worse("x", before) == []
    assert baseline.worse("x", {**before, "a": {"bytes": 102, "launches": 1}}) == []
    assert baseline.worse("x", {**before, "a": {"bytes": 90, "launches": 1}}) == []
    found = {"a": {"bytes": 103, "launches": 1}, "c": {"bytes": 1, "launches": 1}}
    assert baseline.worse("x", found) == [
        "a: bytes is 103, was 100",
        "b is gone",
        "c is not in the baseline",
    ]
    assert baseline.worse("x", found, complete=False) == [
        "a: bytes is 103, was 100",
        "c is not in the baseline",
    ]


@pytest.mark.parametrize("compiler", ["triton 1", None])
def test_a_baseline_belongs_to_its_compiler(compiler, tmp_path, monkeypatch):
    """Under another, nothing is compared with it; the hard limits hold under each."""
    monkeypatch.setattr(baseline, "FOLDER", tmp_path)
    console = Console(file=io.StringIO(), width=200)
    before, found = {"a": {"registers": 100}}, {"a": {"registers": 110}}
    assert baseline.settle(console, "x", before, True, compiler=compiler) == 0
    assert baseline.read("x") == (before, compiler)
    assert baseline.settle(console, "x", found, False, compiler=compiler) == 1
    assert baseline.settle(console, "x", before, False, compiler=compiler) == 0
    assert baseline.settle(console, "x", found, False, compiler="triton 2") == 0
    assert "the baseline is" in console.file.getvalue()


def test_a_group_is_one_launch():
    """With the bytes of its weights, and those of its table."""
    found = {record[1:3]: record[3] for record in traffic.group_records()}
    for direction in ("forward", "backward"):
        grouped, each = found[direction, "grouped"], found[direction, "each by itself"]
        assert (grouped.launches, each.launches) == (1, len(traffic.GROUP))
        table = 4 * 20 * len(traffic.GROUP) + 8 * 6 * len(traffic.GROUP) + 2**13
        assert each.distinct == grouped.minimum < grouped.distinct <= grouped.minimum + table
