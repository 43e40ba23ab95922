"""The command line as users have it: a process, its exit code, and what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from tests.lab.world import REPOSITORY
from tests.packets.lanes import in_enclosure

HERE = Path(__file__).parent
KUBECTL = HERE / "kubectl.yaml"
"""What `kubectl get ns,pods,netpol -A -o yaml` prints of a cluster with two nodes, without volumes and probes."""
REPOSITORY_OF_MANIFESTS = HERE / "repository.yaml"
"""Workloads, Services and a policy, as a repository has them: no pods."""
SCENARIOS = REPOSITORY / "docs" / "scenarios"
AGENT = (sys.executable, "-m", "agent")

S = TypeVar("S", bound=msgspec.Struct)


@dataclass(frozen=True)
class Done:
    """What came of a command."""

    code: int
    out: str
    err: str

    def decoded(self, kind: type[S]) -> S:
        """The JSON on standard output, as a document of the schema and with no field beside it."""
        value = msgspec.json.decode(self.out, type=kind)
        assert json.loads(msgspec.json.encode(value)) == json.loads(self.out)
        return value


@dataclass(frozen=True)
class Command:
    """A command with its input; `more` are environment variables."""

    argv: tuple[str, ...]
    text: str = ""
    more: Mapping[str, str] = field(default_factory=dict)

    def run(self) -> Done:
        """Run it here."""
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **self.more}
        done = subprocess.run(
            self.argv, input=self.text, env=env, capture_output=True, text=True, check=False, timeout=60
        )
        return Done(done.returncode, done.stdout, done.stderr)


def agent(*arguments: object, text: str = "", **more: str) -> Command:
    """netpol-agent with these arguments."""
    return Command((*AGENT, *map(str, arguments)), text, more)


def run(*arguments: object, text: str = "") -> Done:
    """Run netpol-agent here: only what touches no network, or makes an enclosure of its own."""
    return agent(*arguments, text=text).run()


def system(*argv: str) -> Command:
    """Any program."""
    return Command(argv)


def inside(*commands: Command) -> list[Done]:
    """Run one after the other in the network of one enclosure, which ends with the last."""

    def work() -> list[str]:
        return [json.dumps(asdict(command.run())) for command in commands]

    return [Done(**json.loads(line)) for line in in_enclosure(work)]


def without_rights(command: Command, *capabilities: str) -> Command:
    """The command as root, but without these capabilities."""
    taken = ",".join(f"-{name}" for name in capabilities)
    return Command(("setpriv", f"--bounding-set={taken}", f"--inh-caps={taken}", *command.argv), command.text)
