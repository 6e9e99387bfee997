"""A test that launches a kernel takes `device`: a GPU does not launch on tensors of the CPU."""

import sys

import pytest

PACKAGE = "wn_kernels.backends.triton."


@pytest.fixture(autouse=True)
def _launches_are_on_the_device(request, monkeypatch):
    from wn_kernels.backends.triton import launch

    make = launch.launch

    def checked(*arguments, **options):
        recorded = launch._recorded is not None
        assert recorded or "device" in request.fixturenames, "a test that launches takes `device`"
        make(*arguments, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith(PACKAGE) and getattr(module, "launch", None) is make:
            monkeypatch.setattr(module, "launch", checked)
