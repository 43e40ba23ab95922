"""The filter table: which backend the host uses, reading it, and atomic transactions through iptables-restore."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent.core.addresses import V4
from agent.dataplane.applied import AppliedTable, parse_save
from agent.dataplane.errors import KernelError, refused
from agent.dataplane.plan import Transaction
from agent.dataplane.render import ROOT

LOCK_SECONDS = 10
BACKENDS = ("nft", "legacy")
_UNREADABLE = "is incompatible, use 'nft' tool"


@dataclass(frozen=True)
class Backend:
    """One of the two iptables backends: `nft` or `legacy`."""

    name: str

    def tool(self, version: int, verb: str) -> str:
        """The program for a family and a verb (`save`, `restore`). Raises KernelError when it is not installed."""
        base = "iptables" if version == V4 else "ip6tables"
        exact = f"{base}-{self.name}-{verb}"
        if shutil.which(exact):
            return exact
        plain = f"{base}-{verb}"
        if shutil.which(plain) and _flavour(plain) == self.name:
            return plain
        raise KernelError(exact, "is not installed", "Install the package iptables, or choose the other --backend.")

    def check(self) -> None:
        """Legacy writers share one lock file; in a container it must be the host's. Raises KernelError without it."""
        lock = Path(os.environ.get("XTABLES_LOCKFILE", "/run/xtables.lock"))
        in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
        if self.name == "legacy" and in_pod and not lock.exists():
            raise KernelError(
                str(lock),
                "is not there",
                "Mount the host's file: writers with different locks lose updates in silence.",
            )

    def read(self, versions: Iterable[int]) -> dict[int, AppliedTable]:
        """Our part of each family's filter table. Raises KernelError."""
        return parse_tables(self.save(versions))

    def save(self, versions: Iterable[int]) -> dict[int, list[str]]:
        """The lines of each family's filter table that concern us, as `iptables-save` has them. Raises KernelError."""
        versions = list(versions)
        commands = [[self.tool(version, "save"), "-t", "filter"] for version in versions]
        found = {}
        for version, command, text in zip(versions, commands, run_all(commands)):
            if _UNREADABLE in text:  # and that is all there is, without a failure
                raise refused(" ".join(command), next(line for line in text.splitlines() if _UNREADABLE in line))
            found[version] = [line for line in text.splitlines() if "NPA-" in line or line.startswith("-A FORWARD ")]
        return found

    def readable(self, versions: Iterable[int]) -> list[int]:
        """The families whose filter table can be read without making it: reading a legacy table does."""
        names = {4: "ip_tables_names", 6: "ip6_tables_names"}
        found = []
        for version in versions:
            with suppress(KernelError):
                self.tool(version, "save")
                if self.name != "legacy" or "filter" in _listed(names[version]):
                    found.append(version)
        return found

    def is_clear(self, version: int) -> bool:
        """Whether our first chain is not there; answers for a table that cannot be read as a whole, too."""
        command = [self.tool(version, "save").removesuffix("-save"), "-S", ROOT]
        return subprocess.run(command, capture_output=True, check=False).returncode != 0

    def write(self, transactions: Sequence[Transaction]) -> list[KernelError | None]:
        """Carry out one transaction per family, side by side; answers for each its refusal, or None when it is in."""
        tools = [self.tool(transaction.family, "restore") for transaction in transactions]
        texts = [transaction.text for transaction in transactions]
        processes = [spawn([t, "--noflush", "-w", str(LOCK_SECONDS)], text) for t, text in zip(tools, texts)]
        answers: list[KernelError | None] = []
        for tool, text, process in zip(tools, texts, processes):
            _, errors = process.communicate()
            failed = process.returncode != 0
            answers.append(_refusal(tool, text, said(process, errors)) if failed else None)
        return answers


def parse_tables(saved: Mapping[int, Iterable[str]]) -> dict[int, AppliedTable]:
    """What `Backend.save` gave."""
    return {version: parse_save(lines) for version, lines in saved.items()}


def _refusal(tool: str, text: str, errors: str) -> KernelError:
    """The tool's answer, with the line that it names."""
    numbers = re.findall(r"line:? (\d+)", errors)
    lines = text.splitlines()
    line = lines[int(numbers[-1]) - 1] if numbers and 0 < int(numbers[-1]) <= len(lines) else ""
    where = f": {line}" if line.startswith("-") else ""  # what the kernel refuses is the line of COMMIT to legacy
    kept = [line for line in errors.splitlines() if line and "Try `" not in line and "Error occurred" not in line]
    return refused(f"{tool}{where}", "; ".join(kept) or errors)


def spawn(command: Sequence[str], text: str = "") -> subprocess.Popen[bytes]:
    """A tool that is given a text. Raises KernelError when it cannot be started.

    The text is a file: a pipe could end in the middle of a line, if we are killed, and half an address is another."""
    pipe = subprocess.PIPE
    try:
        with open(os.memfd_create("text"), "w+b") as given:
            given.write(text.encode())
            given.seek(0)
            return subprocess.Popen(command, stdin=given, stdout=pipe, stderr=pipe)
    except FileNotFoundError as error:
        name = command[0]
        package = "ipset" if name == "ipset" else "iptables"
        raise KernelError(name, "is not installed", f"Install the package {package}, or correct PATH.") from error
    except OSError as error:
        raise refused(command[0], str(error)) from error


def said(process: subprocess.Popen[bytes], errors: bytes) -> str:
    """Why a tool failed, in its words."""
    text = errors.decode(errors="replace").strip()
    return text or f"ended with {process.returncode}" + " (killed)" * (process.returncode < 0)


def run_all(commands: Sequence[Sequence[str]]) -> list[str]:
    """Run reading commands side by side; their outputs. Raises KernelError for the first that fails."""
    processes = [spawn(command) for command in commands]
    results = [process.communicate() for process in processes]
    for command, process, (_, errors) in zip(commands, processes, results):
        if process.returncode != 0:
            raise refused(" ".join(command), said(process, errors))
    return [output.decode() for output, _ in results]


def _flavour(program: str) -> str:
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return "nft" if "nf_tables" in answer else "legacy"


def detect(*, programmed: bool = False) -> Backend:
    """The backend that kubelet and kube-proxy use on this host, else the one with more rules, else nft; of what is
    `programmed` already, the one that holds our chains.

    Kubelet leaves the chain KUBE-IPTABLES-HINT (1.24 and later) or KUBE-KUBELET-CANARY in the table mangle."""
    text = {}
    for name in BACKENDS:
        if name == "legacy" and not _legacy_tables():
            continue
        texts = [_quiet_save(f"{base}-{name}-save") for base in ("iptables", "ip6tables")]
        if any(texts):
            text[name] = "".join(texts)
    kubelet, ours, proxy = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"), ("NPA-FORWARD",), ("KUBE-",)
    for marks in (ours, kubelet, proxy) if programmed else (kubelet, ours, proxy):
        for name in BACKENDS:
            if any(f"\n:{mark}" in text.get(name, "") for mark in marks):
                return Backend(name)
    counts = {name: text.get(name, "").count("\n-A ") for name in BACKENDS}
    if counts["legacy"] > counts["nft"] or not shutil.which("iptables-nft-restore"):
        plain = shutil.which("iptables-restore")
        return Backend(_flavour(plain) if plain and not shutil.which("iptables-legacy-restore") else "legacy")
    return Backend("nft")


def _legacy_tables() -> bool:
    """Whether legacy tables exist here; asking iptables-legacy-save would make them."""
    return any(_listed(name) for name in ("ip_tables_names", "ip6_tables_names"))


def _listed(name: str) -> list[str]:
    try:
        return Path("/proc/net", name).read_text().split()
    except OSError:
        return []


def _quiet_save(program: str) -> str:
    if not shutil.which(program):
        return ""
    return subprocess.run([program], capture_output=True, text=True, check=False).stdout
