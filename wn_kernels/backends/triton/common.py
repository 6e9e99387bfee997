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
def finished(acc, first, end, WAITS: tl.constexpr):
    """`acc` itself, inside a loop from `first` to `end`. With WAITS, its product ends in the same
    step.

    A Hopper's product still reads its factors while the next step is on its way, so Triton gives
    their loads one buffer more than others. It does not where such a load is used elsewhere as well
    (triton 3.6 and 3.7, pull request 7110 of its repository): the factor would be overwritten while
    it is read. A use of the sum in the loop has Triton wait for it. The condition is that of the
    loop itself, so the use costs nothing.
    """
    if WAITS:
        acc = tl.where(first < end, acc, 0.0)
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
def multiple(x, UNIT: tl.constexpr):
    """`x`, a multiple of UNIT, such that the compiler finds that out, and loads UNIT elements at a
    time. It finds out by itself about multiples of 16."""
    if UNIT > 1 and UNIT < 16:
        x = x // UNIT * UNIT
    return x


# --- norms of slices and their slopes ----------------------------------------------------------

# NORM is one of `call.NORMS`. A part of a slice has a *partial*: the sum of its squares (l2) or of
# its magnitudes (l1), or the largest magnitude (linf). The slope of the norm `n` is `u / d`:
#
#     l2  v / n          l1  sign(v) / 1          linf  v [|v| = n] / (n · ties)
#
# The ties are the elements with `|v| = n`, which share the slope. That comparison is exact: `v` was
# converted to the dtype of the norm, and `n` is not rounded.


@triton.jit
def partial_of(v, NORM: tl.constexpr):
    """The partial of each element by itself."""
    if NORM == "l2":
        return v * v
    else:
        return tl.abs(v)


@triton.jit
def bits(magnitudes):
    """The bits of magnitudes, which have their order. Those of a NaN are the largest."""
    TYPE: tl.constexpr = tl.int64 if magnitudes.dtype == tl.float64 else tl.int32
    return magnitudes.to(TYPE, bitcast=True)


@triton.jit
def merged(a, b, NORM: tl.constexpr):
    """The partial of two parts together, a NaN if one is."""
    if NORM == "linf":
        if a.dtype == tl.float64:  # of which no GPU has such a maximum
            return tl.maximum(bits(a), bits(b)).to(a.dtype, bitcast=True)
        else:
            return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        return a + b


@triton.jit
def merged_along(partials, axis: tl.constexpr, NORM: tl.constexpr):
    """The partial of all parts along an axis, a NaN if one is. Without a NORM, their sum."""
    if NORM == "linf":
        return tl.max(bits(partials), axis=axis).to(partials.dtype, bitcast=True)  # drops no NaN
    else:
        return tl.sum(partials, axis=axis)


@triton.jit
def as_norm(partial, EPS: tl.constexpr, NORM: tl.constexpr):
    """The norm of a slice from its partial; `+inf` for zero, so that the scale `g / n` is zero."""
    n = tl.sqrt(partial) if NORM == "l2" else partial
    n = tl.where(n <= EPS, EPS, n)  # a NaN passes
    return tl.where(n == 0, float("inf"), n)


@triton.jit
def tied(v, n):
    """One for an element that is a tie of its slice with the norm `n`, else zero."""
    return tl.where(tl.abs(v) == n, 1.0, 0.0).to(v.dtype)


@triton.jit
def merged_ties(partial, ties, other, other_ties):
    """The ties of two parts together, of linf. Those of a smaller maximum are dropped."""
    largest = merged(partial, other, "linf")
    ties = tl.where(partial == largest, ties, 0.0)
    return (ties + tl.where(other == largest, other_ties, 0.0)).to(partial.dtype)


@triton.jit
def ties_along(partials, ties, axis: tl.constexpr):
    """The ties of all parts along an axis, of linf."""
    largest = tl.expand_dims(merged_along(partials, axis, "linf"), axis)
    return tl.sum(tl.where(partials == largest, ties, 0.0), axis=axis)


@triton.jit
def slope(v, n, NORM: tl.constexpr):
    """`u`: the slope but for the divisor, which is one for the whole slice."""
    if NORM == "l2":
        return v
    elif NORM == "l1":
        return tl.where(v > 0, 1.0, tl.where(v < 0, -1.0, 0.0)).to(v.dtype)
    else:
        return tl.where(tl.abs(v) == n, v, 0.0)


@triton.jit
def slope_coefficient(g, n, dg, ties, EPS: tl.constexpr, NORM: tl.constexpr):
    """`c = s · dg / d` with `s = g / n`, for `dV = s ⊙ dW - c ⊙ u`. It is zero where `n` was
    clamped: there it is a constant. Only linf takes `ties`."""
    if NORM == "l1":
        c = g / n * dg
    else:
        c = g / n * (dg / n)
        if NORM == "linf":
            c /= tl.maximum(ties, 1.0)  # a slice of zeros has none
    return tl.where(n <= EPS, 0.0, c)
