"""The tiles of a convolution on a GPU, and their steps."""

import itertools

import pytest

from wn_kernels.backends import tiles

SMS = 132


def steps_of(m, o, r, taps, rest=1, itemsize=2, ieee=False):
    return tiles.product(m, o, r, taps, rest, itemsize, ieee, SMS)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_every_size_has_a_tile(itemsize):
    for m, o, r, taps in itertools.product(
        (1, 17, 300, 70000), (1, 20, 512), (1, 40, 512), (1, 16)
    ):
        tile = steps_of(m, o, r, taps, itemsize=itemsize)
        sides = tile.BLOCK_M, tile.BLOCK_O, tile.BLOCK_R
        assert all(side >= 16 and side & (side - 1) == 0 for side in sides)
        programs = tiles.blocks(m, tile.BLOCK_M) * tiles.blocks(o, tile.BLOCK_O)
        assert tile.splits == 1 or programs * tile.splits <= 2 * SMS
        # The steps of all programs cover the product.
        walked = tile.steps * tile.splits * min(SMS, programs) * tile.BLOCK_R
        assert walked >= min(1, programs / SMS) * taps * r


def test_few_programs_share_the_steps():
    """Two tiles of outputs over many channels and taps, and none where programs are many."""
    few = steps_of(32, 80, 512, 7)
    assert few.splits > 1
    assert few.steps < 10
    assert steps_of(2**16, 256, 256, 9).splits == 1
    assert steps_of(32, 512, 16, 3).splits == 1  # too few steps


def test_a_phase_without_pixels_or_channels_of_a_few():
    assert steps_of(0, 64, 64, 3).splits >= 1
    assert steps_of(2**16, 64, 3, 25).steps < steps_of(2**16, 64, 3, 250).steps


def test_parts_of_a_sum():
    assert tiles.parts(0, 1, SMS) == tiles.parts(4, 1, SMS) == 1  # less than the addition costs
    assert tiles.parts(8, 1, SMS) == 4
    assert tiles.parts(144, 18, SMS) == 29
    assert tiles.parts(144, 10**6, SMS) == 1
