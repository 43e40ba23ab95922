"""One release for all tests here, from the first that needs it to the end; then nothing of it may be left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.conftest import places
from tests.cluster.kube import NODES, left_on
from tests.e2e.release import IMAGE, Release, load_image

__all__ = ["places"]


@pytest.fixture(scope="session")
def release() -> Iterator[Release]:
    load_image(IMAGE)
    made = Release()
    try:
        made.install()
        yield made
    finally:
        if made.is_there():
            made.uninstall()
    assert {node: left_on(node) for node in NODES} == {node: [] for node in NODES}


@pytest.fixture(scope="module")
def agents(release: Release) -> dict[str, Release]:
    """As the tests of scenarios ask for them: the agents are the release's pods."""
    return dict.fromkeys(NODES, release)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    release = getattr(item, "funcargs", {}).get("release")
    if report.failed and isinstance(release, Release):
        report.sections.append(("the release", release.troubles()))
    return report
