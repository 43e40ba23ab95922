"""Which backend the host uses, told from what kubelet, kube-proxy and others have left; asking changes nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from agent.dataplane.iptables import detect
from tests.dataplane.kernel import BACKENDS, BASE, FAMILIES, Kernel, run
from tests.dataplane.scenes import applied, cluster

pytestmark = pytest.mark.root
KUBELET = {
    "since 1.24": (":KUBE-IPTABLES-HINT - [0:0]", ":KUBE-KUBELET-CANARY - [0:0]"),
    "hint only": (":KUBE-IPTABLES-HINT - [0:0]",),
    "before": (":KUBE-KUBELET-CANARY - [0:0]",),
}


def other(backend: str) -> Kernel:
    [name] = {*BACKENDS} - {backend}
    return Kernel(name)


def kube_proxy(kernel: Kernel, services: int = 30) -> None:
    """Its chains, as it writes them in filter and nat."""
    for version in FAMILIES:
        kernel.rules(
            version,
            ":KUBE-FORWARD - [0:0]",
            ":KUBE-PROXY-CANARY - [0:0]",
            "-A FORWARD -j KUBE-FORWARD",
            "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
        )
        lines = [":KUBE-SERVICES - [0:0]", "-A PREROUTING -j KUBE-SERVICES"]
        for number in range(services):
            lines += [f":KUBE-SVC-{number} - [0:0]", f"-A KUBE-SERVICES -p tcp --dport {number} -j KUBE-SVC-{number}"]
        kernel.rules(version, *lines, table="nat")


def rules(kernel: Kernel, number: int, version: int = 4) -> None:
    """Of somebody else, without a meaning for us."""
    kernel.rules(version, *(f"-A INPUT -p tcp --dport {n} -j ACCEPT" for n in range(1, number + 1)))


def test_empty() -> None:
    """Nothing tells: nft; and no legacy table has been made by asking."""
    assert detect().name == "nft"
    assert Path("/proc/net/ip_tables_names").read_text() == ""
    assert Path("/proc/net/ip6_tables_names").read_text() == ""
    assert run("nft", "list", "ruleset") == ""


@pytest.mark.parametrize("form", KUBELET)
def test_kubelet(backend: str, kernel: Kernel, form: str) -> None:
    """Kubelet's chain in mangle tells, whatever else there is on the other side: kube-proxy's, ours, more rules."""
    kernel.rules(4, *KUBELET[form], table="mangle")
    assert detect().name == backend
    rules(other(backend), 50)
    assert detect().name == backend
    applied(other(backend).backend, cluster())
    assert detect().name == backend


def test_kubelet_of_one_family(backend: str, kernel: Kernel) -> None:
    kernel.rules(6, *KUBELET["since 1.24"], table="mangle")
    rules(other(backend), 50)
    assert detect().name == backend


def test_kube_proxy(backend: str, kernel: Kernel) -> None:
    """Where kubelet leaves no sign, kube-proxy's chains tell, in whatever table."""
    kernel.rules(4, ":KUBE-SERVICES - [0:0]", table="nat")
    rules(other(backend), 50)
    assert detect().name == backend


def test_as_a_node(backend: str, kernel: Kernel) -> None:
    """Kubelet and kube-proxy on one side, docker's or a firewall's rules on the other."""
    kernel.rules(4, *KUBELET["since 1.24"], table="mangle")
    kube_proxy(kernel)
    for version in FAMILIES:
        rules(other(backend), 200, version)
    before = [kernel.everything(), other(backend).everything()]
    assert detect().name == backend
    assert [kernel.everything(), other(backend).everything()] == before


def test_ours(backend: str) -> None:
    """Where no kubelet is: where we have been, so that a restart does not change sides."""
    applied(backend, cluster())
    rules(other(backend), 500)
    assert detect().name == backend


def test_more_rules(backend: str, kernel: Kernel) -> None:
    rules(kernel, 5)
    rules(other(backend), 3)
    assert detect().name == backend


def test_chains_that_sound_alike(backend: str, kernel: Kernel) -> None:
    """A jump, a comment or a chain of another name is no sign."""
    kernel.rules(
        4, ":MY-KUBE-IPTABLES-HINT - [0:0]", '-A INPUT -m comment --comment ":KUBE-IPTABLES-HINT"', table="mangle"
    )
    rules(other(backend), 3)
    assert detect().name == other(backend).backend


def test_unreadable_tables(backend: str, kernel: Kernel) -> None:
    """Rules that only nft can read do not hide kubelet's sign in another table."""
    run("nft", "add table ip filter; add chain ip filter a; add rule ip filter a tcp dport 22 reject")
    kernel.rules(4, *KUBELET["since 1.24"], table="mangle")
    assert detect().name == backend


def test_only_one_is_installed(backend: str, tmp_path: Path) -> None:
    """It is the one, whatever the other has left in the kernel."""
    applied(other(backend).backend, cluster())
    only_with(
        tmp_path, {f"{base}-{backend}{verb}": f"{base}-{backend}{verb}" for base in BASE.values() for verb in VERBS}
    )
    assert detect().name == backend


def test_plain_names(backend: str, tmp_path: Path) -> None:
    """Tools without a backend in their names."""
    only_with(tmp_path, {f"{base}{verb}": f"{base}-{backend}{verb}" for base in BASE.values() for verb in VERBS})
    assert detect().name == backend


VERBS = ("", "-save", "-restore")


def only_with(folder: Path, names: dict[str, str]) -> None:
    """Leave only these programs in PATH: the name, and the tool that it starts."""
    for name, tool in names.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {shutil.which(tool)} "$@"\n')
        (folder / name).chmod(0o755)
    os.environ["PATH"] = str(folder)


def test_what_is_programmed(backend: str, kernel: Kernel) -> None:
    """Where our chains are, not where they would be written now."""
    applied(backend, cluster())
    other(backend).rules(4, *KUBELET["since 1.24"], table="mangle")
    assert detect().name == other(backend).backend
    assert detect(programmed=True).name == backend == kernel.backend
