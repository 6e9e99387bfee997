"""Device functions that several kernels share."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a b`. Triton's interpreter multiplies the bits of bfloat16 as integers; there the
    factors are widened first, which changes no product."""
    if INTERPRETED:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def finished(acc, steps, WAITS: tl.constexpr):
    """`acc` itself, inside a loop of `steps` > 0. With WAITS, its product ends in the same step.

    A Hopper's product still reads its factors while the next step is on its way, so Triton gives
    their loads one buffer more than others. It does not where such a load is used elsewhere as well
    (triton 3.6 and 3.7, pull request 7110 of its repository): the factor would be overwritten while
    it is read. A use of the sum in the loop has Triton wait for it. The condition is that of the
    loop itself, so the use costs nothing.
    """
    if WAITS:
        acc = tl.where(steps > 0, acc, 0.0)
    return acc


@triton.jit
def cast(x, TYPE: tl.constexpr):
    """`x` as TYPE. Triton's interpreter takes the wrong bits of a float64 for a bfloat16; float32
    lies between the two anyway."""
    if x.dtype == tl.float64 and tl.float64 != TYPE:
        x = x.to(tl.float32)
    return x.to(TYPE)


@triton.jit
def offsets(block, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The indices of a block, in 64 bits where a product with a stride may leave 32 (`WIDE`)."""
    first = block * BLOCK
    if WIDE:
        first = (block + tl.zeros((BLOCK,), tl.int64)) * BLOCK
    return first + tl.arange(0, BLOCK)


@triton.jit
def as_norm(squares, EPS: tl.constexpr):
    """The norm from a sum of squares; `+inf` for zero, so that the scale `g / n` is zero."""
    n = tl.sqrt(squares)
    n = tl.where(n <= EPS, EPS, n)  # a NaN passes
    return tl.where(n == 0, float("inf"), n)


@triton.jit
def dot_coefficient(g, n, dg, EPS: tl.constexpr):
    """`c = s · dg / n` with `s = g / n`; zero where `n` was clamped: there it is a constant."""
    return tl.where(n <= EPS, 0.0, g / n * (dg / n))
