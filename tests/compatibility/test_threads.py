"""Concurrent threads and forked workers. Processes that tune at once are in test_tuning.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.comparison import assert_same_bits
from tests.compatibility.layers import LAYERS, assert_right, gradients, made


@pytest.mark.parametrize("name", LAYERS)
def test_threads(name):
    """Forwards and backwards of one layer from several threads at once."""
    layer, x = made(name)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: gradients(layer, x), range(16)))
    for y, grads in results:  # a thread may split sums as another does not
        assert_right(y, grads, layer, x)


class Embedded(Dataset):
    """A dataset that runs a layer in its worker."""

    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(self.x) + index


def test_forked_workers():
    layer, x = made("conv1d")
    right = layer(x).detach()
    loader = DataLoader(Embedded(layer, x), num_workers=2, multiprocessing_context="fork")
    for index, y in enumerate(loader):
        assert_same_bits(y[0], right + index)
