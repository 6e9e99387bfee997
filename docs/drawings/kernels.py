"""These drawings show how the kernels work: what each program owns, reads and writes."""

from __future__ import annotations

from docs.drawings.svg import Canvas


def linear_forward() -> Canvas:
    """The one-pass forward of a linear layer: a program's rows of `V`, and its columns of `y`."""
    title = "A program owns some rows of V and walks along them once"
    c = Canvas(760, 300, title)
    c.text(24, 30, "one_pass_kernel: a program owns some rows of V", "head")
    c.text(24, 62, "x: all rows, M × K", "small quiet")
    c.box(24, 70, 260, 44)
    c.box(96, 70, 36, 44, "x tile", "cost", "small")
    c.text(24, 138, "V: N × K", "small quiet")
    c.box(24, 146, 260, 124)
    c.box(24, 180, 260, 36, kind="ours")
    c.box(96, 180, 36, 36, "V tile", "cost", "small")
    c.arrow((132, 198), (180, 198))
    c.text(186, 203, "steps along K", "small")
    c.text(24, 288, "its rows", "small quiet")
    c.arrow((78, 280), (86, 216))

    c.arrow((284, 92), (356, 128))
    c.arrow((284, 198), (356, 156))
    c.box(356, 104, 200, 88, kind="ours")
    c.text(456, 126, "for every tile", "small quiet", "middle")
    c.text(456, 150, "acc += x · Vᵀ", "code", "middle")
    c.text(456, 174, "squares += V · V", "code", "middle")
    c.arrow((456, 192), (456, 220))
    c.box(356, 220, 200, 56, kind="ours")
    c.text(456, 242, "after the loop", "small quiet", "middle")
    c.text(456, 264, "acc · g / √squares + b", "code", "middle")
    c.arrow((556, 228), (645, 214))
    c.text(590, 100, "y: M × N", "small quiet")
    c.box(590, 108, 146, 106)
    c.box(630, 108, 30, 106, kind="ours")
    c.text(576, 244, "It stores its columns of y", "small quiet")
    c.text(576, 261, "and the norms of its rows.", "small quiet")
    return c


def linear_backward() -> Canvas:
    """The one-pass gradient of a weight: two walks, and `dW` is never stored."""
    title = "The first walk sums the products of dW and V; the second writes dV"
    c = Canvas(760, 280, title)
    c.text(24, 30, "grad_one_pass_kernel: dV needs ⟨dW, V⟩ of the whole row first", "head")
    walks = (
        (24, "first walk along the row", "a += Σ dW · V", "the dot of the row"),
        (396, "second walk, over the same tiles", "s · dW − c · V", "dV, stored"),
    )
    for x, head, formula, result in walks:
        c.text(x, 62, head, "small quiet")
        c.box(x, 72, 340, 34)
        c.box(x + 110, 72, 44, 34, "tile", "cost", "small")
        c.arrow((x + 154, 89), (x + 220, 89))
        c.arrow((x + 132, 106), (x + 132, 126))
        c.box(x + 40, 126, 184, 40, "dW = dYᵀ x", "ours", "code")
        c.arrow((x + 132, 166), (x + 132, 184))
        c.box(x + 40, 184, 184, 40, formula, "ours", "code")
        c.text(x + 236, 150, "recomputed,", "small quiet")
        c.text(x + 236, 166, "never stored", "small quiet")
        c.text(x + 236, 208, result, "small quiet")
    c.arrow((156, 224), (156, 262), (376, 262), (376, 204), (436, 204))
    c.text(166, 252, "dg = a/n,  c = s·dg/n", "code")
    return c


def slices() -> Canvas:
    """Three ways of sharing slices among programs."""
    title = "A slice is held in registers, walked twice, or shared by several programs"
    c = Canvas(760, 300, title)
    columns = (
        ("held", "A slice fits registers:", "one read, one write"),
        ("walked", "Longer slices, many of them:", "two reads, the second backwards"),
        ("partial", "Few long slices:", "two launches, partial sums between"),
    )
    for i, (name, first, second) in enumerate(columns):
        x = 24 + 246 * i
        c.text(x, 32, name, "head")
        c.text(x, 54, first, "small quiet")
        c.text(x, 71, second, "small quiet")
    for i in range(4):
        c.box(24, 90 + 34 * i, 200, 26, f"program {i}", ("ours", "cost")[i % 2], "small")
    for i in range(2):
        y = 90 + 76 * i
        c.box(270, y, 200, 26, f"program {i}", ("ours", "cost")[i], "small")
        c.arrow((320, y + 38), (466, y + 38))
        c.arrow((466, y + 54), (320, y + 54))
        c.text(312, y + 42, "sum", "small quiet", "end")
        c.text(312, y + 58, "write", "small quiet", "end")
    for i in range(4):
        c.box(516 + 50 * i, 90, 50, 26, f"p {i}", ("ours", "cost")[i % 2], "small")
        c.arrow((541 + 50 * i, 116), (541 + 50 * i, 140))
        c.box(523 + 50 * i, 140, 36, 24, "Σ", "box", "small")
        c.arrow((541 + 50 * i, 164), (541 + 50 * i, 206))
    c.line([(508, 185), (724, 185)], "dash")
    for i in range(4):
        c.box(516 + 50 * i, 206, 50, 26, f"p {i}", ("ours", "cost")[i % 2], "small")
    c.text(516, 252, "Below the line is the second launch:", "small quiet")
    c.text(516, 269, "programs add all parts in order.", "small quiet")
    c.text(24, 252, "A box is a slice, or a part of one,", "small quiet")
    c.text(24, 269, "with the program that owns it.", "small quiet")
    return c


def implicit_product() -> Canvas:
    """A convolution of three taps as one product whose left factor is never built."""
    title = "Rows are pixels; the reduction runs over taps, and over channels under each"
    c = Canvas(760, 316, title)
    c.text(24, 30, "A convolution with three taps, as a product", "head")
    c.text(24, 62, "the left factor, which is loaded tile by tile from x", "small quiet")
    for tap in range(3):
        c.text(149 + 116 * tap, 84, f"tap {tap}", "small", "middle")
        c.text(149 + 116 * tap, 100, "all channels", "small quiet", "middle")
        for row in range(4):
            pixel = 4 + row + tap - 1
            kind = "cost" if pixel == 6 else "box"
            c.box(92 + 116 * tap, 110 + 34 * row, 114, 30, f"x[{pixel}, :]", kind, "code")
    for row in range(4):
        c.text(84, 130 + 34 * row, f"pixel {4 + row}", "small", "end")
    c.text(
        24, 270, "One pixel of x stands in several rows. It is contiguous in memory", "small quiet"
    )
    c.text(24, 287, "(channels last), so every row is read in wide loads.", "small quiet")
    c.text(470, 180, "×", "head", "middle")
    c.text(490, 84, "packed W", "small")
    for tap in range(3):
        c.box(490, 110 + 46 * tap, 100, 42, [f"W[:, :, {tap}]ᵀ"], "ours", "code")
    c.text(612, 180, "=", "head", "middle")
    c.text(634, 84, "y", "small")
    for row in range(4):
        c.box(634, 110 + 34 * row, 102, 30, f"y[{4 + row}, :]", "box", "code")
    return c


def phases() -> Canvas:
    """Which taps reach which pixels of a transposed convolution of kernel 4 and stride 2."""
    title = "With kernel 4 and stride 2 each output pixel sees two taps, by its phase"
    c = Canvas(760, 300, title)
    c.text(24, 30, "A transposed convolution: kernel 4, stride 2, padding 1", "head")
    pitch, left = 74, 104
    c.text(24, 83, "input", "small quiet")
    c.text(24, 223, "output", "small quiet")
    inputs = [left + pitch * (2 * y + 0.5) for y in range(4)]
    for y, x in enumerate(inputs):
        c.box(x, 62, 54, 34, str(y), "box", "code")
    for out in range(8):
        phase = (out + 1) % 2
        x = left + pitch * out
        c.box(x, 202, 54, 34, str(out), ("ours", "cost")[phase], "code")
        taps = [t for t in range(4) if (out + 1 - t) % 2 == 0]
        for tap in taps:
            y = (out + 1 - tap) // 2
            if 0 <= y < len(inputs):
                c.arrow((inputs[y] + 27, 96), (x + 27, 202))
        c.text(x + 27, 254, "taps " + ", ".join(map(str, taps)), "small", "middle")
    c.text(
        24,
        284,
        "A program works on pixels of one colour. So no tap is multiplied by zero.",
        "small quiet",
    )
    return c


def unfolded() -> Canvas:
    """The product for few pixels on a CPU: `V` as it lies, and `U` laid out for its reader."""
    title = "Rows of V are read as they lie, and multiplied with what their taps see"
    c = Canvas(760, 250, title)
    c.text(24, 30, "Few pixels on a CPU: V is read once, as it lies", "head")
    c.text(24, 64, "V: a row for each output channel", "small quiet")
    for i in range(3):
        c.box(24, 76 + 42 * i, 330, 34, kind="ours" if i == 1 else "box")
    for i in range(5):
        c.box(24 + 66 * i, 118, 66, 34, f"vector {i}", "ours", "small")
    c.text(24, 222, "length: channels · taps", "small quiet")
    c.text(378, 140, "×", "head", "middle")
    c.text(402, 64, "U: what each tap sees at each pixel", "small quiet")
    for i in range(5):
        for j in range(2):
            c.box(402 + 62 * j, 76 + 26 * i, 58, 22, f"{i}, p {j}", "box", "small")
    c.text(402, 222, "panels of pixels", "small quiet")
    c.text(552, 140, "=", "head", "middle")
    c.box(576, 118, 160, 34, "y of that channel", "ours", "small")
    c.text(576, 172, "The row's squares are", "small quiet")
    c.text(576, 189, "summed beside the product.", "small quiet")
    return c
