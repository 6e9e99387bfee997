"""Results as rows of text: for the terminal, the page and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from bench import overhead
from bench.providers import VARIANT

# A ratio of two equal layers from one run to the next.
NOISE = 1.05


def competing(found: Iterable[str]) -> list[str]:
    """The names of providers, without those of ours by a path of its own."""
    return [name for name in found if not name.startswith(VARIANT)]


def _names(results: list[dict[str, Any]]) -> list[str]:
    """Those that compete in any of the cases."""
    return competing(dict.fromkeys(name for r in results for name in r["seconds"]))


def _time(result: dict[str, Any], name: str) -> str:
    """The median of a provider; nothing where it does not compete."""
    return time_of(result["seconds"][name]["median"]) if name in result["seconds"] else ""


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """A table's rows, the header first."""
    providers = _names(results)
    found = [["case", "mode", *providers, "ours/eager", "ours/plain", "saved, ours", "eager"]]
    for r in results:
        times = [_time(r, name) for name in providers]
        ratios = [_ratio(r["ratios"][f"ours/{name}"]) for name in ("eager", "plain")]
        saved = [_size(r["saved_bytes"].get(name)) for name in ("ours", "eager")]
        label = r["case"]["label"] + (" (noisy)" if r["noisy"] else "")
        found.append([label, r["case"]["mode"], *times, *ratios, *saved])
    return found


def case_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Returns a row for each label of a layer, with what it stands for, the header first."""
    found = {r["case"]["label"]: explained(r["case"]) for r in results if "kind" in r["case"]}
    return [["case", "what it is"], *([label, words] for label, words in found.items())]


def explained(case: dict[str, Any]) -> str:
    """Returns the layer of a case, as one would write it, and the shape of its input."""
    options = [f"{name}={value!r}" for name, value in case.get("options", {}).items()]
    options += [f"dim={case['dim']}"] if case.get("dim") != 0 else []
    options += [case["dtype"]] if case.get("dtype", "float32") != "float32" else []
    layer = f"{case['kind']}({', '.join([*map(str, case['arguments']), *options])})"
    return f"{layer}, input of shape ({', '.join(map(str, case['x_shape']))})"


def variant_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The same of ours by every path, for the cases that were timed by more than the chosen one."""
    found = [["case", "mode", "path", "time", "ours over it"]]
    for r in results:
        for name in r["seconds"]:
            if name.startswith(VARIANT):
                cells = time_of(r["seconds"][name]["median"]), _ratio(r["ratios"][f"ours/{name}"])
                path = name.removeprefix(VARIANT)
                found.append([r["case"]["label"], r["case"]["mode"], path, *cells])
    return found


def time_of(seconds: float) -> str:
    """In the unit that suits it."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def _ratio(ratio: dict[str, float]) -> str:
    """The median and its 95 % interval."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _size(size: int | None) -> str:
    return "" if size is None else f"{size / 1024:.0f} KiB"


def is_slower(result: dict[str, Any]) -> bool:
    """Whether ours is slower than eager beyond noise."""
    ratio = result["ratios"]["ours/eager"]
    return ratio["low"] > 1 and ratio["median"] > NOISE


def printed(
    title: str,
    lines: list[list[str]],
    styles: Sequence[str] = (),
    numbers: slice = slice(2, None),
) -> Table:
    """Rows for the terminal, the header first. The columns `numbers` are set to the right."""
    shown = Table(title=title)
    header, *lines = lines
    right = range(len(header))[numbers]
    for i, name in enumerate(header):
        shown.add_column(name, justify="right" if i in right else "left", no_wrap=i < right.start)
    for i, line in enumerate(lines):
        shown.add_row(*line, style=styles[i] if styles else "")
    return shown


def tables(
    suite: str, results: list[dict[str, Any]], where: dict[str, Any], dtype: str
) -> list[Table]:
    """The ratios, then what else was measured."""
    backend, device, threads = where["backend"], where["device"], where["threads"]
    title = f"{suite}, {dtype}, backend [bold]{backend}[/] on {device}, {threads} threads"
    styles = ["yellow" if is_slower(r) else "" for r in results]
    more = extra_rows(results).items()
    return [printed(title, rows(results), styles), *(printed(*table) for table in more)]


def extra_rows(results: list[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """The rows of what else was measured, by title."""
    found = {}
    if len(paths := variant_rows(results)) > 1:
        found["ours by every path"] = paths
    for condition in results[0].get("conditions", {}):
        found[condition] = _condition_rows(results, condition)
    if "peak_bytes" in results[0]:
        found["peak memory of a call"] = _peak_rows(results)
    if "predicted" in results[0]:
        found["measured over predicted by the cost model"] = _predicted_rows(results)
    counted = [r for r in results if "predicted" in r and "bytes" in r["case"]]
    if counted:
        found["bytes that have to move, and operations, per second"] = _rate_rows(counted)
    if any(r.get("kernels") for r in results):
        found["each kernel alone"] = _kernel_rows(results)
    if "microseconds" in results[0]:
        title = "microseconds of a call by place (shares by cProfile, an estimate)"
        found[title] = overhead.rows(results)
    return found


def _condition_rows(results: list[dict[str, Any]], condition: str) -> list[list[str]]:
    names = competing(results[0]["seconds"])
    lines = [["case", "mode", *names]]
    for r in results:
        found = r["conditions"][condition]
        times = (time_of(found[name]["median"]) if name in found else "" for name in names)
        lines.append([r["case"]["label"], r["case"]["mode"], *times])
    return lines


def _over(measured: float, predicted: float | None) -> str:
    """What was measured and, in parentheses, how many times the predicted that is."""
    over = f" ({measured / predicted:.2f})" if predicted else ""
    return time_of(measured) + over


def _predicted_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    names = _names(results)
    lines = [["case", "mode", *names]]
    for r in results:
        times = (
            _over(r["seconds"][name]["median"], r["predicted"].get(name))
            if name in r["seconds"]
            else ""
            for name in names
        )
        lines.append([r["case"]["label"], r["case"]["mode"], *times])
    return lines


def rates_of(result: dict[str, Any], name: str) -> str:
    """The bytes that have to move, and the operations, in a second of a provider's time."""
    case, seconds = result["case"], result["seconds"][name]["median"]
    found = f"{case['bytes'] / seconds / 1e9:.0f} GB/s"
    if "operations" in case:
        found += f", {case['operations'] / seconds / 1e12:.1f} TFLOP/s"
    return found


def _rate_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    names = _names(results)
    lines = [["case", "mode", *names]]
    for r in results:
        rates = (rates_of(r, name) if name in r["seconds"] else "" for name in names)
        lines.append([r["case"]["label"], r["case"]["mode"], *rates])
    return lines


def _kernel_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    lines = [["case", "mode", "kernel", "time (over predicted)"]]
    for r in results:
        for one in r.get("kernels", ()):
            time = _over(one["seconds"]["median"], one["predicted"])
            lines.append([r["case"]["label"], r["case"]["mode"], one["kernel"], time])
    return lines


def _peak_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    names = competing(results[0]["peak_bytes"])
    lines = [["case", "mode", *names]]
    for r in results:
        sizes = (_size(r["peak_bytes"][name]) for name in names)
        lines.append([r["case"]["label"], r["case"]["mode"], *sizes])
    return lines
