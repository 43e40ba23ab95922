"""What the tests of a live cluster share: places, agents on both nodes, and their logs when a test fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.kube import NODES, agent
from tests.cluster.live import Agents, Running, node_addresses
from tests.cluster.places import Places

HERE = Path(__file__).parent
LINES = 60
"""Of a log that are shown."""
_running: list[Running] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed and item.path.parent == HERE:
        for one in _running:
            lines = one.all_said().splitlines()[-LINES:]
            report.sections.append((f"netpol-agent run on {one.node}", "\n".join(lines)))
    return report


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    """Open files of the nodes' and pods' network namespaces."""
    made = Places()
    try:
        made.open(*(node_addresses(node)[0] for node in NODES))
    except LookupError as error:
        pytest.skip(f"needs nodes whose processes are seen from here: {error}")
    yield made
    made.close()


@contextmanager
def running(places: Places, logs: Path, *options: str) -> Iterator[Agents]:
    """Agents for both nodes, not yet started; at the end they are stopped, and nothing is left."""
    made = {node: Running(node, logs / f"{node}.log", places, *options) for node in NODES}
    _running.extend(made.values())
    try:
        yield made
        for one in made.values():
            if one.runs:
                print(f"{one.node} ended {one.terminate():.2f} s after SIGTERM")
    finally:
        for one in made.values():
            one.kill()
            agent(one.node, "clean")
            _running.remove(one)


@pytest.fixture(scope="module")
def agents(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    """Both at work."""
    with running(places, tmp_path_factory.mktemp("agents")) as made:
        for one in made.values():
            one.start()
        for one in made.values():
            one.wait_ready()
        yield made


@pytest.fixture
def fresh(places: Places, tmp_path: Path) -> Iterator[Callable[..., Agents]]:
    """Agents of one test alone, started with the options that it gives."""
    stack = []

    def start(*options: str, ready: bool = True) -> Agents:
        context = running(places, tmp_path, *options)
        made = context.__enter__()
        stack.append(context)
        for one in made.values():
            one.start()
        for one in made.values() if ready else ():
            one.wait_ready()
        return made

    yield start
    while stack:
        stack.pop().__exit__(None, None, None)
