"""A test that launches a kernel takes `device`: a GPU does not launch on tensors of the CPU."""

import pytest


@pytest.fixture(autouse=True)
def _launches_are_on_the_device(request, monkeypatch):
    from triton.runtime.jit import KernelInterface

    from wn_kernels.backends.triton import launch

    make = launch.Launcher.__call__

    def checked(self, *tensors):
        recorded = launch._recorded is not None or not isinstance(self.kernel, KernelInterface)
        assert recorded or "device" in request.fixturenames, "a test that launches takes `device`"
        make(self, *tensors)

    monkeypatch.setattr(launch.Launcher, "__call__", checked)
