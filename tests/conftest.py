"""What all tests share: those marked `root` are skipped, and say so, where they cannot run."""

from __future__ import annotations

import os

import pytest

from agent.lab.namespaces import may_administer


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`make e2e` is asked to try everything: what it could not, because something is not here, is no success."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if "E2E" not in os.environ or reporter is None:
        return
    skipped = {str(report.longrepr[2]) for report in reporter.stats.get("skipped", ())}
    lacking = sorted(reason for reason in skipped if "needs " in reason)
    if lacking or not reporter.stats.get("passed"):
        print("\ne2e: NOT ALL WAS RUN:", *(lacking or ["no test passed"]), sep="\n  ")
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and (os.geteuid() != 0 or not may_administer()):
        pytest.skip("needs root with CAP_SYS_ADMIN and CAP_NET_ADMIN: it makes network namespaces")
