"""Tests here that are marked `root` run in an enclosure of their own, as those of the dataplane do."""

from tests.dataplane.conftest import backend, kernel, pytest_pyfunc_call

__all__ = ["backend", "kernel", "pytest_pyfunc_call"]
