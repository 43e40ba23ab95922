"""Real packets between nodes, pods and the host outside."""

import subprocess
from dataclasses import replace

import pytest

from agent.lab import enclosure
from agent.lab.fabric import Fabric, attach, build
from agent.lab.probes import Probe, probe
from agent.lab.servers import Servers
from agent.lab.spec import FabricSpec, Mode, NodeSpec, PodSpec
from tests.lab.world import ALL, BACKENDS, MODES, PROTOCOLS, address, in_lab, needs_root, pod, small

pytestmark = needs_root


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("version", (4, 6))
@pytest.mark.parametrize("mode", MODES)
def test_everyone_reaches_everyone(mode: Mode, version: int, protocol: str) -> None:
    def body(fabric: Fabric) -> None:
        targets = ["x/a", "x/b", "x/c", "outside"]
        pairs = [(src, dst) for src in fabric.sources() for dst in targets]
        probes = [Probe(s, address(fabric, d, version), protocol, 80, expected=True) for s, d in pairs]
        for (src, dst), outcome in zip(pairs, probe(fabric, probes)):
            assert (outcome.reached, outcome.who, outcome.detail) == (True, dst, "answered"), (src, dst, outcome)

    in_lab(mode, body)


@pytest.mark.parametrize("version", (4, 6))
@pytest.mark.parametrize("mode", MODES)
def test_who_answers_at_a_nodes_address(mode: Mode, version: int) -> None:
    def body(fabric: Fabric) -> None:
        node = address(fabric, "node:n2", version)
        ports = (("TCP", 10250), ("TCP", 9100), ("SCTP", 9100))
        asked = [Probe("x/a", node, protocol, port, True) for protocol, port in ports]
        assert [outcome.who for outcome in probe(fabric, asked)] == ["node:n2", "x/h", "x/h"]
        to_a = probe(fabric, [Probe("x/h", address(fabric, "x/a", version), "TCP", 80, True)])[0]
        assert to_a.who == "x/a"

    in_lab(mode, body)


@pytest.mark.parametrize("protocol", ("TCP", "UDP", "SCTP"))
@pytest.mark.parametrize("version", (4, 6))
def test_a_closed_port_is_refused_not_silent(version: int, protocol: str) -> None:
    def body(fabric: Fabric) -> None:
        (outcome,) = probe(fabric, [Probe("x/a", address(fabric, "x/c", version), protocol, 4444, True)])
        assert (outcome.reached, outcome.who, outcome.detail) == (True, None, "refused")

    in_lab("routed", body)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("version", (4, 6))
def test_second_address_of_the_source(version: int, protocol: str) -> None:
    second = {4: "203.0.113.6", 6: "2001:db8::6"}[version]

    def body(fabric: Fabric) -> None:
        tool = "iptables-nft" if version == 4 else "ip6tables-nft"
        with fabric.inside("node:n1"):
            subprocess.run([tool, "-A", "FORWARD", "-s", second, "-j", "DROP"], check=True)
        to = address(fabric, "x/a", version)
        asked = [Probe("outside", to, protocol, 80, True), Probe("outside", to, protocol, 80, source_address=second)]
        assert [outcome.reached for outcome in probe(fabric, asked, timeout=0.2)] == [True, False]
        # And back: a server of several addresses answers from the one that was asked.
        (outcome,) = probe(fabric, [Probe("x/c", second, protocol, 80, True)])
        assert outcome.who == "outside"

    in_lab("routed", body)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("version", (4, 6))
@pytest.mark.parametrize("mode", MODES)
def test_a_drop_in_forward_is_silence(mode: Mode, version: int, backend: str) -> None:
    """Both pods are on the same node: bridged, this only works through br_netfilter."""

    def body(fabric: Fabric) -> None:
        tool = ("iptables-" if version == 4 else "ip6tables-") + backend
        victim = address(fabric, "x/b", version)
        with fabric.inside("node:n1"):
            subprocess.run([tool, "-A", "FORWARD", "-d", victim, "-j", "DROP"], check=True)
        sources = ["x/a", "x/c", "outside"]
        denied = [Probe(src, victim, protocol, 80) for src in sources for protocol in PROTOCOLS]
        for asked, outcome in zip(denied, probe(fabric, denied, timeout=0.3)):
            assert (outcome.reached, outcome.detail) == (False, "timeout"), (asked, outcome)
            assert outcome.milliseconds >= 300
        own = address(fabric, "x/a", version)
        allowed = [Probe("x/b", victim, "TCP", 80, True), Probe("node:n1", victim, "TCP", 80, True)]
        allowed += [Probe("x/c", own, protocol, 80, True) for protocol in PROTOCOLS]
        assert all(outcome.who for outcome in probe(fabric, allowed))

    in_lab(mode, body)


@pytest.mark.parametrize("mode", MODES)
def test_a_reject_on_the_way_is_told_from_a_closed_port(mode: Mode) -> None:
    def body(fabric: Fabric) -> None:
        victim = address(fabric, "x/c", 4)
        with fabric.inside("node:n1"):
            subprocess.run(["iptables-nft", "-A", "FORWARD", "-d", victim, "-j", "REJECT"], check=True)
        for outcome in probe(fabric, [Probe("x/a", victim, protocol, 80, True) for protocol in PROTOCOLS]):
            assert not outcome.reached
            assert outcome.detail.startswith("rejected by ")

    in_lab(mode, body)


@pytest.mark.parametrize("version", (4, 6))
@pytest.mark.parametrize("mode", MODES)
def test_pods_come_and_go(mode: Mode, version: int) -> None:
    def work() -> int:
        fabric = build(small(mode))
        with Servers(fabric) as servers:
            # d has an address of n1's range but lives on n2; e brings a range of its own.
            added = [
                PodSpec("x", "d", "n2", ("10.244.1.77", "fd00:244:0:1::77"), ALL),
                PodSpec("x", "e", "n1", ("10.9.8.7", "fd00:9::7"), ALL),
            ]
            for new in added:
                fabric.add_pod(new)
                servers.add(new.key, new.listen)
            keys = ["x/a", "x/b", "x/c", "x/d", "x/e", "outside"]
            pairs = [(src, dst) for src in keys for dst in keys]
            asked = [Probe(s, address(fabric, d, version), "TCP", 80, True) for s, d in pairs]
            for (src, dst), outcome in zip(pairs, probe(fabric, asked)):
                assert outcome.who == dst, (src, dst, outcome)
            gone = [address(fabric, key, version) for key in ("x/d", "x/e")]
            for new in added:
                servers.remove(new.key)
                fabric.remove_pod(new.key)
            silent = [Probe(src, to, "TCP", 80) for src in ("x/a", "x/c", "outside") for to in gone]
            assert not any(outcome.reached for outcome in probe(fabric, silent))
            # The address is given to another pod, on the other node; then to a third one at once.
            for name in ("f", "g"):
                other = replace(added[0], name=name, node="n1")
                fabric.add_pod(other)
                servers.add(other.key, other.listen)
                again = [Probe(src, gone[0], "TCP", 80, True) for src in ("x/a", "x/c", "outside")]
                assert [outcome.who for outcome in probe(fabric, again)] == [other.key] * 3
                same = attach(fabric.to_json())
                assert probe(same, again[:1])[0].who == other.key
                servers.remove(other.key)
                fabric.remove_pod(other.key)
        return 0

    assert enclosure.run(work) == 0


@pytest.mark.parametrize("mode", MODES)
def test_one_family_only(mode: Mode) -> None:
    def work() -> int:
        nodes = (NodeSpec("n1", ("fd00:1::1",)), NodeSpec("n2", ("fd00:1::2",)))
        pods = (PodSpec("x", "a", "n1", ("10.0.1.5",), ALL), PodSpec("x", "b", "n2", ("10.0.2.5",), ALL))
        fabric = build(FabricSpec(nodes, pods, ("2001:db8::5",), mode))
        with Servers(fabric):
            assert probe(fabric, [Probe("x/a", "10.0.2.5", "TCP", 80, True)])[0].who == "x/b"
        return 0

    assert enclosure.run(work) == 0


def test_what_cannot_be_built_is_said() -> None:
    spec = small("bridged")
    for pods, said in (
        ((*spec.pods, pod("a", "n1", 20)), "x/a is there twice"),
        ((*spec.pods, pod("z", "n3", 20)), "'n3', which is not in the lab"),
        ((*spec.pods, pod("z", "n1", 10)), "same address"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(spec, pods=pods).check()
    with pytest.raises(RuntimeError, match="enclosure"):
        build(spec)


@pytest.mark.parametrize("mode", MODES)
def test_a_hundred_pods(mode: Mode) -> None:
    """Bridged, they have more neighbours than the kernel keeps for all namespaces together."""

    def work() -> int:
        pods = tuple(pod(f"p{number}", f"n{number % 2 + 1}", number + 10) for number in range(100))
        fabric = build(replace(small(mode), pods=pods))
        with Servers(fabric) as servers:
            new = replace(pods[0], name="new", addresses=("10.244.1.200", "fd00:244:0:1::200"))
            fabric.add_pod(new)
            servers.add(new.key, new.listen)
            keys = [new.key, *(one.key for one in pods[:60])]
            pairs = [(src, dst) for src in keys for dst in keys]
            asked = [Probe(src, address(fabric, dst, 6), "TCP", 80, True) for src, dst in pairs]
            assert [outcome.who for outcome in probe(fabric, asked)] == [dst for _, dst in pairs]
        return 0

    assert enclosure.run(work) == 0


def test_a_bridge_keeps_its_address_when_the_link_changes_hands() -> None:
    """The first address of a link was a pod's, then nobody's; the last pod of a link goes, and another comes."""

    def work() -> int:
        nodes = (NodeSpec("n1", ("192.168.0.1",)), NodeSpec("n2", ("192.168.0.2",)))
        first = PodSpec("x", "first", "n1", ("10.0.1.1",), ALL)
        pods = (first, PodSpec("x", "a", "n1", ("10.0.1.5",), ALL), PodSpec("x", "b", "n2", ("10.0.2.5",), ALL))
        fabric = build(FabricSpec(nodes, pods, ("203.0.113.5",), "bridged"))
        with Servers(fabric) as servers:
            for key in ("x/first", "x/b"):
                servers.remove(key)
                fabric.remove_pod(key)
            with pytest.raises(ValueError, match=r"10\.0\.2\.1 of pod x/c is the address of its node's bridge"):
                fabric.add_pod(PodSpec("x", "c", "n1", ("10.0.2.1",)))
            for new in (PodSpec("x", "c", "n1", ("10.0.1.9",), ALL), PodSpec("x", "d", "n2", ("10.0.2.9",), ALL)):
                fabric.add_pod(new)
                servers.add(new.key, new.listen)
            keys = ("x/a", "x/c", "x/d", "outside")
            pairs = [(src, dst) for src in keys for dst in keys]
            asked = [Probe(src, address(fabric, dst, 4), "TCP", 80, True) for src, dst in pairs]
            assert [outcome.who for outcome in probe(fabric, asked)] == [dst for _, dst in pairs]
        return 0

    assert enclosure.run(work) == 0
