"""One writer in a network namespace, whatever the file systems."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from agent.dataplane.errors import KernelError
from agent.dataplane.lock import only_writer

pytestmark = pytest.mark.root
HOLD = (
    "import sys, time; from agent.dataplane.lock import only_writer\n"
    "with only_writer(0, print): print('held', flush=True); time.sleep(60)"
)


def holder(*prefix: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([*prefix, sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_the_second_waits_and_says_for_whom() -> None:
    first = holder()
    waited: list[str] = []
    with pytest.raises(KernelError, match=f"process {first.pid}: .*only_writer.* Stop that one first"):  # noqa: SIM117
        with only_writer(0.2, waited.append):
            raise AssertionError("two writers")
    assert len(waited) == 1
    assert f"process {first.pid}" in waited[0]
    end(first)
    with only_writer(5, waited.append):
        pass
    assert len(waited) == 1, "the lock went with its process, however that ended"


def test_it_is_taken_over_when_the_first_ends() -> None:
    first = holder()
    pid = os.fork()
    if pid == 0:
        time.sleep(0.3)
        os.kill(first.pid, signal.SIGKILL)
        os._exit(0)
    with only_writer(20, print):
        pass
    os.waitpid(pid, 0)
    first.communicate()


def test_another_network_namespace_has_its_own() -> None:
    first = holder("unshare", "--net")
    with only_writer(0, print):
        pass
    end(first)
