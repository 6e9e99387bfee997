"""Triton's interpreter takes a loop's bounds from scalars that NumPy no longer converts."""

import importlib.util
import types

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


@pytest.mark.current
def test_a_scalar_of_one_dimension_becomes_an_index():
    from triton.runtime import interpreter as tritons

    from bench.stand_in import interpreter

    interpreter.mend()
    patched = tritons._patch_lang_tensor
    interpreter.mend()
    assert tritons._patch_lang_tensor is patched, "mended twice"

    class Scalar:
        def __init__(self, value):
            self.handle = types.SimpleNamespace(data=np.array([value]))

    patched(Scalar, types.SimpleNamespace(set_attr=setattr))
    assert list(range(Scalar(3))) == [0, 1, 2]
