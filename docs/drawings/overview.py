"""These drawings show what the package does, and the way of a call through it."""

from __future__ import annotations

from docs.drawings.svg import Canvas


def one_pass() -> Canvas:
    """Weight norm as two steps with `W` in memory, and as one pass over `V`."""
    title = "PyTorch forms W in memory and then multiplies; one pass reads V once and forms no W"
    c = Canvas(760, 336, title)
    c.text(24, 32, "PyTorch: W is formed in memory, then multiplied", "head")
    c.box(24, 56, 80, 64, "V", "box", "code")
    c.arrow((104, 88), (160, 88))
    c.box(160, 56, 150, 64, ["norms n = ‖V‖", "W = (g / n) · V"], "box", "code")
    c.arrow((310, 88), (366, 88))
    c.box(366, 56, 80, 64, "W", "cost", "code")
    c.arrow((446, 88), (502, 88))
    c.box(502, 56, 130, 64, "y = x Wᵀ + b", "box", "code")
    c.arrow((632, 88), (680, 88))
    c.box(680, 64, 56, 48, "y", "box", "code")
    for x, word in ((132, "read"), (338, "write"), (474, "read")):
        c.text(x, 76, word, "small quiet", "middle")
    c.text(24, 146, "Data of the weight's size move three times, and W takes memory.", "quiet")

    c.line([(24, 166), (736, 166)], "dash")
    c.text(24, 194, "wn_kernels: one pass over V", "head")
    c.box(24, 232, 80, 64, "V", "box", "code")
    c.arrow((104, 264), (160, 264))
    c.text(132, 252, "read", "small quiet", "middle")
    c.box(160, 212, 472, 104, kind="ours")
    c.text(176, 234, "one kernel", "small quiet")
    c.box(176, 246, 66, 36, "tile", "box", "code")
    c.arrow((242, 258), (286, 244))
    c.arrow((242, 270), (286, 286))
    c.box(286, 224, 166, 34, "acc += x · tileᵀ", "box", "code")
    c.box(286, 270, 166, 34, "squares += tile²", "box", "code")
    c.arrow((452, 241), (492, 256))
    c.arrow((452, 287), (492, 272))
    c.box(492, 236, 126, 56, ["acc · g / √squares", "+ b"], "box", "small")
    c.arrow((632, 264), (680, 264))
    c.box(680, 240, 56, 48, "y", "box", "code")
    return c


def call() -> Canvas:
    """The way of `WNLinear.forward(x)` down to a backend."""
    c = Canvas(
        760, 420, "A call of a layer goes to the native library or to Python, then a backend"
    )
    c.box(270, 16, 220, 40, "WNLinear.forward(x)", "box", "code")
    c.arrow((380, 56), (380, 76))
    c.box(220, 76, 320, 40, "functional.wn_linear(x, v, g, bias)", "box", "code")

    columns = (
        (16, "on a CPU, with the library"),
        (266, "on a GPU"),
        (516, "anything else"),
    )
    for (x, head), start in zip(columns, (300, 380, 460), strict=True):
        c.arrow((start, 116), (start, 128), (x + 114, 128), (x + 114, 144))
        c.text(x + 114, 164, head, "head", "middle")
    steps = (
        (
            ("library.computed", "library.cpp"),
            ("planned()", "the plan by shapes and options"),
            ("linear_forward", "linear.h"),
            ("Linear", "the node of the graph"),
        ),
        (
            ("library.launched", "launched.h"),
            ("prepared()", "the launches by dtypes and layouts"),
            ("a Pass", "addresses in, kernels launched"),
            ("Launched", "the node of the graph"),
        ),
        (
            ("functional._run", "who records the call?"),
            ("prepare.prepare", "checks, Call and Plan"),
            ("autograd.layer", "where a gradient is needed"),
            ("operators.layer", "the call into aten or triton"),
        ),
    )
    for (x, _), rows in zip(columns, steps, strict=True):
        for i, (name, what) in enumerate(rows):
            y = 176 + 60 * i
            c.box(x, y, 228, 46, kind="ours" if i == 1 else "box")
            c.text(x + 114, y + 19, name, "code", "middle")
            c.text(x + 114, y + 36, what, "small quiet", "middle")
            if i:
                c.arrow((x + 114, y - 14), (x + 114, y))
    return c
