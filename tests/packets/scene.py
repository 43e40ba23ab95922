"""A small lab on which single lines of the semantics are shown, on both backends and in both modes at once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

from agent.lab.fabric import Fabric
from agent.lab.lab import Lab
from agent.lab.services import ServicePort, ServiceSpec
from agent.lab.spec import Mode, family
from tests.lab.world import BACKENDS, MODES
from tests.packets import raw
from tests.packets.cases import Ask, Player, check
from tests.packets.lanes import run_lanes, said
from tests.upstream import Object, namespace, pod, policy, serving

NODE = {1: ("192.168.0.1", "fd00:1::1"), 2: ("192.168.0.2", "fd00:1::2")}
PODS = {
    "x/a": ("node-1", ("10.244.1.10", "fd44:1::a")),
    "x/b": ("node-1", ("10.244.1.11", "fd44:1::b")),
    "x/c": ("node-2", ("10.244.2.12", "fd44:2::c")),
    "x/h1": ("node-1", NODE[1]),
    "x/h2": ("node-2", NODE[2]),
}
HOST_PORT = 9100
"""What the hostNetwork pods h1 and h2 listen on."""
TRANSPORT = ("TCP", "UDP", "SCTP")
EVERY = (("TCP", 80), ("UDP", 80), ("SCTP", 80), ("ICMP", 0))

Payload = Callable[[str, str], bytes]
"""Made for the addresses of source and destination."""
Want = tuple[str, str, str, int, bool]
"""Source, destination (a key, or an address), protocol, port, and whether it arrives."""


def only(name: str) -> Object:
    """The selector of one pod."""
    return {"matchLabels": {"pod": name}}


def isolate(name: str, *, ingress: Sequence[Object] | None = None, egress: Sequence[Object] | None = None) -> Object:
    """A policy for one pod of x, or with `*` for all; a direction that is None is left alone."""
    spec: Object = {"podSelector": {} if name == "*" else only(name), "policyTypes": []}
    for kind, rules in (("Ingress", ingress), ("Egress", egress)):
        if rules is not None:
            spec["policyTypes"].append(kind)
            spec[kind.lower()] = list(rules)
    return policy(f"x/{'all' if name == '*' else name}-{'-'.join(spec['policyTypes']).lower()}", spec)


def blocks(addresses: Iterable[str]) -> list[Object]:
    """A peer for each address."""
    return [{"ipBlock": {"cidr": f"{a}/{32 if family(a) == 4 else 128}"}} for a in addresses]


class Scene:
    """Pods a and b on the first node, c on the second, each with a hostNetwork pod; namespace x."""

    def __init__(self, backend: str, mode: Mode) -> None:
        self.backend, self.mode = backend, mode
        self.wrong: list[str] = []
        self.specs: tuple[ServiceSpec, ...] = ()
        self._player = Player(PODS, backend, mode)
        self.enforce()

    @property
    def lab(self) -> Lab:
        assert self._player.lab is not None
        return self._player.lab

    @property
    def fabric(self) -> Fabric:
        return self.lab.fabric

    def enforce(self, *policies: Object) -> None:
        """These policies and no others."""
        _, self.stage = self._player.enforce([namespace("x"), *map(_pod, PODS), *policies])

    def services(self, *specs: ServiceSpec) -> None:
        """These Services and no others."""
        self.specs = specs
        self.lab.load_services(replace(self.stage, services=specs))

    def check(self, *wanted: Want, timeout: float = 0.4, judged: bool = True) -> None:
        """Send packets in each family, and compare with what is wanted; the judge has to agree, unless told not to."""
        asks = [
            Ask(src, dst, address, protocol, port, arrives)
            for src, dst, protocol, port, arrives in wanted
            for address in self.addresses(dst)
        ]
        step = self.step
        self.wrong += [f"{step}: {line}" for line in check(self.lab, asks, timeout)]
        if not judged:
            return
        judge = self.lab.expectation(replace(self.stage, services=self.specs))
        for ask in asks:
            own = next(one for one in self.addresses(ask.source) if family(one) == family(ask.address))
            says = judge.expect(own, ask.address, ask.protocol, ask.port)
            if says.reaches is not ask.expected:
                self.wrong.append(f"{step}: {ask}: the judge says {says.reaches}, {says.why}")

    def addresses(self, end: str) -> list[str]:
        """Of a key both families, of a Service its cluster's; an address is itself."""
        if end in PODS:
            return list(PODS[end][1])
        service = next((spec for spec in self.specs if spec.name == end), None)
        if service is not None:
            return list(service.cluster_ips)
        return [address for key, address in self.fabric.spec.held() if key == end] or [end]

    def gateways(self, *beginnings: str) -> list[str]:
        """The addresses of the bridges on links that begin so; routed there are none."""
        return [address for _, address in self.fabric.spec.gateways if address.startswith(beginnings)]

    def expect_raw(self, src: str, dst: str, protocol: str, make: Payload, arrives: bool) -> None:
        """Send a packet of an IP protocol, its payload made for both addresses, and see whether it gets there."""
        for own, other in zip(self.addresses(src), self.addresses(dst)):
            number = raw.NUMBERS[protocol, family(own)]
            ends = (src, own), (dst, other)
            if raw.arrives(self.fabric, *ends, number, make(own, other), expected=arrives) is not arrives:
                self.wrong.append(
                    f"{self.step}: {protocol} from {src} {own} to {dst} {other}: "
                    f"{'did not arrive' if arrives else 'arrived'}"
                )

    @property
    def step(self) -> str:
        policies = ", ".join(self.lab.cluster.policies.policies) or "no policy"
        return f"{self.backend}, {self.mode}, under {policies}"

    def tool(self, key: str, version: int, *arguments: str) -> str:
        """Run iptables of the scene's backend at an end; its output."""
        name = f"{'iptables' if version == 4 else 'ip6tables'}-{self.backend}"
        return self.run(key, name, *arguments)

    def run(self, key: str, *command: str) -> str:
        """Run a program at an end; its output."""
        with self.fabric.inside(key):
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def counted(self, key: str, version: int, table: str, chain: str, text: str) -> int:
        """The packets that rules of a chain with this text have matched."""
        listed = self.tool(key, version, "-t", table, "-L", chain, "-v", "-x", "-n")
        return sum(int(line.split()[0]) for line in listed.splitlines() if text in line)

    def close(self) -> None:
        self._player.close()


def _pod(ref: str) -> Object:
    node, addresses = PODS[ref]
    made = pod(ref, {"pod": ref.partition("/")[2]}, addresses, node=node, containers=serving(80, 8080))
    if ref[2] == "h":
        made["spec"] |= {"hostNetwork": True, "containers": [{"name": "h", "ports": [{"containerPort": HOST_PORT}]}]}
    return made


def service(name: str, number: int, *endpoints: str, node_port: int | None = None) -> ServiceSpec:
    """A Service of TCP, UDP and SCTP: port 8080, or the node port, to port 80 of the endpoints."""
    ends = tuple((address, 80) for key in endpoints for address in PODS[key][1])
    ports = tuple(ServicePort(protocol, 8080, node_port, ends) for protocol in TRANSPORT)  # type: ignore[arg-type]
    return ServiceSpec("x", name, (f"10.96.1.{number}", f"fd96::1:{number}"), ports)


def everywhere(body: Callable[[Scene], None], modes: Sequence[Mode] = MODES) -> None:
    """Show the body on each backend in each mode, all at once; what went wrong fails the test."""
    wrong = run_lanes([partial(_show, body, backend, mode) for backend, mode in product(BACKENDS, modes)])
    assert not wrong, said(wrong)


def _show(body: Callable[[Scene], None], backend: str, mode: Mode) -> list[str]:
    scene = Scene(backend, mode)
    body(scene)
    scene.close()
    return scene.wrong
