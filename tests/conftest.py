"""What all tests share: those marked `root` are skipped, and say so, where they cannot run."""

from __future__ import annotations

import os

import pytest

from agent.lab.namespaces import may_administer


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and (os.geteuid() != 0 or not may_administer()):
        pytest.skip("needs root with CAP_SYS_ADMIN and CAP_NET_ADMIN: it makes network namespaces")
