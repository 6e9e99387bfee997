"""This diagram shows the imports of the package, as its code has them.

An arrow from one module to another means that the first imports the second. Where a longer way
between two modules exists, their direct arrow is left out, so that the storeys can be seen.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from docs.drawings.svg import Canvas

PACKAGE = Path(__file__).parent.parent.parent / "wn_kernels"


def imports_of(path: Path) -> list[str]:
    """Returns the modules that a file of the package imports, as dotted paths from its root."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            found += [".".join((*module, alias.name)) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def edges() -> dict[str, set[str]]:
    """Returns which modules and subpackages each one imports."""
    own: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name != "__init__":
            own.setdefault(name, []).append(path)
    found = {}
    for name, paths in own.items():
        targets = [target for path in paths for target in imports_of(path)]
        if PACKAGE.name in targets:  # a module that imports the package imports all that it exports
            targets += imports_of(PACKAGE / "__init__.py")
        parts = [target.split(".") for target in targets]
        inside = {p[1] for p in parts if p[0] == PACKAGE.name and len(p) > 1}
        found[name] = (inside & own.keys()) - {name}
    return found


def diagram() -> Canvas:
    """Draws each module above all that it imports."""
    graph = edges()

    @cache
    def depth(name: str) -> int:
        return 1 + max((depth(target) for target in graph[name]), default=-1)

    @cache
    def reach(name: str) -> frozenset[str]:
        return graph[name] | frozenset().union(*(reach(target) for target in graph[name]))

    rows: list[list[str]] = [[] for _ in range(1 + max(map(depth, graph)))]
    for name in sorted(graph):
        rows[depth(name)].append(name)
    rows.reverse()
    height = 66 * len(rows) + 22
    c = Canvas(
        760, height, "The modules of wn_kernels; arrows run from a module to what it imports"
    )
    places = {}
    for i, row in enumerate(rows):
        pitch = 760 / (len(row) + 1)
        for j, name in enumerate(row):
            places[name] = (pitch * (j + 1), 22 + 66 * i)
    for name, targets in sorted(graph.items()):
        x0, y0 = places[name]
        for target in sorted(targets):
            if not any(target in reach(other) for other in targets - {target}):
                x1, y1 = places[target]
                if y1 - y0 > 2 * 66:  # around the modules between them
                    side = (c.width - 30, y0 + 15), (c.width - 30, y1 + 15)
                    c.arrow((x0 + 62, y0 + 15), *side, (x1 + 62, y1 + 15))
                else:
                    c.arrow((x0, y0 + 30), (x1, y1))
    for name, (x, y) in places.items():
        label = name + "/" * (PACKAGE / name).is_dir()
        c.box(x - 62, y, 124, 30, label, "ours" if "/" in label else "box", "code")
    return c
