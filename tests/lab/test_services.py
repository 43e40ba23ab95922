"""Services as kube-proxy translates them, with packets."""

import subprocess

import pytest

from agent.lab import services
from agent.lab.fabric import Fabric
from agent.lab.probes import Probe, probe
from agent.lab.services import ServicePort, ServiceSpec
from agent.lab.spec import Mode
from tests.lab.world import BACKENDS, MODES, address, in_lab, needs_root

CLUSTER_IP = {4: "10.96.0.1", 6: "fd00:96::1"}
PORTS = ("TCP", "UDP", "SCTP")


def both(fabric: Fabric, *keys: str) -> tuple[tuple[str, int], ...]:
    return tuple((address(fabric, key, version), 80) for key in keys for version in (4, 6))


def service(fabric: Fabric, *keys: str) -> ServiceSpec:
    ends = both(fabric, *keys)
    ports = tuple(ServicePort(protocol, 8080, 30080, ends) for protocol in PORTS)
    return ServiceSpec("x", "web", tuple(CLUSTER_IP.values()), ports)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("version", (4, 6))
@pytest.mark.parametrize("mode", MODES)
class TestTranslated:
    pytestmark = needs_root

    def test_cluster_ip_reaches_every_endpoint(self, mode: Mode, version: int, backend: services.Backend) -> None:
        def body(fabric: Fabric) -> None:
            services.load(fabric, [service(fabric, "x/b", "x/c")], backend)
            sources = ["x/a", "x/c", "x/h", "node:n1"]
            for protocol in PORTS:
                asked = [Probe(s, CLUSTER_IP[version], protocol, 8080, True) for s in sources for _ in range(30)]
                outcomes = probe(fabric, asked)
                assert {outcome.who for outcome in outcomes} == {"x/b", "x/c"}, (protocol, outcomes)

        in_lab(mode, body)

    def test_a_pod_reaches_itself_through_its_service(
        self, mode: Mode, version: int, backend: services.Backend
    ) -> None:
        def body(fabric: Fabric) -> None:
            services.load(fabric, [service(fabric, "x/a")], backend)
            for protocol in PORTS:
                (outcome,) = probe(fabric, [Probe("x/a", CLUSTER_IP[version], protocol, 8080, True)])
                assert outcome.who == "x/a", (protocol, outcome)

        in_lab(mode, body)

    def test_node_port(self, mode: Mode, version: int, backend: services.Backend) -> None:
        def body(fabric: Fabric) -> None:
            services.load(fabric, [service(fabric, "x/a")], backend)
            for src in ("outside", "x/b", "x/c", "x/a", "node:n1", "node:n2"):
                for node in ("node:n1", "node:n2"):
                    asked = [Probe(src, address(fabric, node, version), protocol, 30080, True) for protocol in PORTS]
                    outcomes = probe(fabric, asked)
                    assert [outcome.who for outcome in outcomes] == ["x/a"] * 3, (src, node, outcomes)

        in_lab(mode, body)

    def test_without_endpoints_it_rejects(self, mode: Mode, version: int, backend: services.Backend) -> None:
        def body(fabric: Fabric) -> None:
            services.load(fabric, [service(fabric)], backend)
            ends = [(src, CLUSTER_IP[version], 8080) for src in ("x/a", "x/h")]
            ends.append(("outside", address(fabric, "node:n1", version), 30080))
            asked = [Probe(src, to, protocol, port, True) for src, to, port in ends for protocol in PORTS]
            for outcome in probe(fabric, asked):
                # On the way; at the node itself; or as an error of the call, on the node that asks.
                assert outcome.detail.startswith(("rejected by", "refused", "Operation not permitted")), outcome
                assert outcome.who is None

        in_lab(mode, body)


@pytest.mark.parametrize("backend", BACKENDS)
class TestLoading:
    pytestmark = needs_root

    def test_loading_again_replaces(self, backend: services.Backend) -> None:
        def body(fabric: Fabric) -> None:
            first = service(fabric, "x/b")
            services.load(fabric, [first, ServiceSpec("x", "other", ("10.96.0.2",), first.ports)], backend)
            services.load(fabric, [service(fabric, "x/c")], backend)
            services.load(fabric, [service(fabric, "x/c")], backend)
            (outcome,) = probe(fabric, [Probe("x/a", "10.96.0.1", "TCP", 8080, True)])
            assert outcome.who == "x/c"
            with fabric.inside("node:n1"):
                saved = subprocess.run([f"iptables-{backend}-save"], check=True, capture_output=True, text=True).stdout
            assert saved.count("-j LAB-SERVICES") == 2
            assert saved.count("-j LAB-REJECT") == 3
            assert "x/other" not in saved
            assert saved.count(":LAB-SVC-") == 3

        in_lab("routed", body)

    def test_it_comes_after_what_is_there(self, backend: services.Backend) -> None:
        def body(fabric: Fabric) -> None:
            tool = f"iptables-{backend}"
            with fabric.inside("node:n1"):
                subprocess.run([tool, "-A", "FORWARD", "-m", "comment", "--comment", "first"], check=True)
            services.load(fabric, [service(fabric)], backend)
            with fabric.inside("node:n1"):
                shown = subprocess.run([tool, "-S", "FORWARD"], check=True, capture_output=True, text=True).stdout
            assert [line.split()[-1] for line in shown.splitlines()[1:]] == ["first", "LAB-REJECT"]

        in_lab("routed", body)


def test_text_shares_endpoints_evenly() -> None:
    ends = tuple((f"10.0.0.{number}", 80) for number in (1, 2, 3, 4))
    made = services.rules([ServiceSpec("x", "web", ("10.96.0.1",), (ServicePort("TCP", 80, None, ends),))], (), 4)
    chances = [line.split("--probability ")[1].split()[0] for line in made.splitlines() if "--probability" in line]
    assert chances == ["0.2500000000", "0.3333333333", "0.5000000000"]
    assert "10.96.0.1" not in services.rules([], (), 4)
