"""Each test here that is marked `root` runs its body in an enclosure: namespaces of its own that vanish with it."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest

from agent.lab import enclosure, namespaces
from tests.dataplane.kernel import BACKENDS, Kernel

SCALE = float(os.environ.get("NETPOL_TEST_SCALE", "1"))
"""Multiplies the sizes of random samples: 10 for a long run."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not pyfuncitem.get_closest_marker("root"):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    outcome, text = _enclosed(pyfuncitem, lambda: pyfuncitem.obj(**arguments))
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


def _enclosed(item: pytest.Function, body: Callable[[], Any]) -> tuple[str, str]:
    """The outcome of a test's body, and why. Whatever ends this process ends all that the body has started."""
    answer = os.memfd_create("outcome")

    def work() -> int:
        outcome = "passed", ""
        try:
            body()
        except pytest.skip.Exception as skipped:
            outcome = "skipped", str(skipped)
        except BaseException:
            error: pytest.ExceptionInfo[BaseException] = pytest.ExceptionInfo.from_current()
            outcome = "failed", str(item.repr_failure(error))
        os.write(answer, json.dumps(outcome).encode())
        return 0

    alive, life = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(life)
        namespaces.die_with_parent(alive)
        code = 3
        try:
            code = enclosure.run(work)
        finally:
            os._exit(code)
    try:
        os.close(alive)
        _, status = os.waitpid(child, 0)
    except BaseException:  # the time-out of the test, or Ctrl-C
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(life)
    with open(answer, "rb") as told:
        told.seek(0)
        text = told.read()
    if not text:
        return "failed", f"the enclosure ended with status {os.waitstatus_to_exitcode(status)}; see standard error"
    outcome, why = json.loads(text)
    return outcome, why


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every test that asks for it runs on both."""
    return str(request.param)


@pytest.fixture
def kernel(backend: str) -> Kernel:
    """The test's own network namespace, looked at with iptables, ipset and nft and without the agent."""
    return Kernel(backend)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """The same numbers for the same test at each run; NETPOL_TEST_SEED gives others."""
    return random.Random(f"{request.node.name} {os.environ.get('NETPOL_TEST_SEED', '')}")


@pytest.fixture
def many() -> Callable[[int], range]:
    """As many turns as asked for, times NETPOL_TEST_SCALE."""
    return lambda number: range(max(1, round(number * SCALE)))
