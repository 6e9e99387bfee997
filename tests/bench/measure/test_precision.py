"""Float32 products are taken in float32, unless a benchmark says otherwise. It is recorded."""

import warnings

import torch

from bench import suite
from bench.measure import precision
from tests.bench.layers import CPU


def test_the_suite_takes_no_tf32():
    """As cuDNN would by default: its error is above the bound of a float32 comparison."""
    assert precision.settings() == {"matmul": "highest", "cudnn": "ieee"}
    assert not torch.backends.cudnn.allow_tf32


def test_tf32_is_allowed_inside_a_block():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with precision.tf32():
            assert precision.settings() == {"matmul": "high", "cudnn": "tf32"}
        assert precision.settings() == {"matmul": "highest", "cudnn": "ieee"}


def test_results_record_it():
    assert suite.environment(CPU)["float32"] == {"matmul": "highest", "cudnn": "ieee"}
