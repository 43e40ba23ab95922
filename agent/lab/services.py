"""Services, translated in each node as kube-proxy would: to a random endpoint, by rules of the nat table.

ClusterIPs and NodePorts of TCP, UDP and SCTP; a pod that reaches itself through a Service is masqueraded,
NodePort traffic too; a Service without endpoints rejects. All chains begin with LAB-, and the jumps to them
are appended to what is there already.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from agent.lab.fabric import Fabric, run_here
from agent.lab.spec import family

Backend = Literal["nft", "legacy"]

_MARK = "0x4000/0x4000"  # kube-proxy's own: a policy agent has to live with it
_HOOKS = {
    "nat": {"PREROUTING": "LAB-SERVICES", "OUTPUT": "LAB-SERVICES", "POSTROUTING": "LAB-POSTROUTING"},
    "filter": {"FORWARD": "LAB-REJECT", "OUTPUT": "LAB-REJECT", "INPUT": "LAB-REJECT"},
}


@dataclass(frozen=True)
class ServicePort:
    """A port of a Service; endpoints are (address, port) of either family."""

    protocol: Literal["TCP", "UDP", "SCTP"]
    port: int
    node_port: int | None = None
    endpoints: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class ServiceSpec:
    """A Service with its cluster addresses (none for a headless one)."""

    namespace: str
    name: str
    cluster_ips: tuple[str, ...]
    ports: tuple[ServicePort, ...]

    @property
    def key(self) -> str:
        """`svc/NAMESPACE/NAME`."""
        return f"svc/{self.namespace}/{self.name}"


def rules(services: Sequence[ServiceSpec], node_addresses: Sequence[str], version: int, *, hooks: bool = True) -> str:
    """The text for `iptables-restore --noflush` of one family (version 4 or 6) in one node.

    It replaces what an earlier text of this function put into the same chains. With `hooks` the chains are
    also called from the built-in ones; exactly once is right. `load` sees to it.
    """
    nat: list[str] = []
    chains = ["LAB-SERVICES", "LAB-NODEPORTS", "LAB-MASQUERADE", "LAB-POSTROUTING"]
    reject: list[str] = []
    own = [address for address in node_addresses if family(address) == version]
    for service, port in _ports(services):
        protocol = port.protocol.lower()
        name = f"{service.namespace}/{service.name}:{port.port}/{protocol}"
        said = f'-m comment --comment "{name}"'
        endpoints = [endpoint for endpoint in port.endpoints if family(endpoint[0]) == version]
        places = [
            f"-d {address} -p {protocol} -m {protocol} --dport {port.port}"
            for address in service.cluster_ips
            if family(address) == version
        ]
        node_place = f"-p {protocol} -m {protocol} --dport {port.node_port}"
        if not endpoints:
            if port.node_port is not None:
                places += [f"-d {address} {node_place}" for address in own]
            reject += [f"-A LAB-REJECT {place} {said} -j REJECT" for place in places]
            continue
        chain = _chain("SVC", name)
        chains.append(chain)
        nat += [f"-A LAB-SERVICES {place} {said} -j {chain}" for place in places]
        if port.node_port is not None:
            # Marked for every client: an endpoint on another node has to answer by way of this one.
            nat += [
                f"-A LAB-NODEPORTS {node_place} {said} -j LAB-MASQUERADE",
                f"-A LAB-NODEPORTS {node_place} {said} -j {chain}",
            ]
        for number, (address, to) in enumerate(endpoints):
            end = _chain("SEP", f"{name} {address} {to}")
            chains.append(end)
            left = len(endpoints) - number
            chance = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
            target = f"{address}:{to}" if version == 4 else f"[{address}]:{to}"
            nat += [
                f"-A {chain} {chance}{said} -j {end}",
                f"-A {end} -s {address} {said} -j LAB-MASQUERADE",
                f"-A {end} -p {protocol} {said} -j DNAT --to-destination {target}",
            ]
    # NodePorts come last: an address of the node's that is also a Service's belongs to the Service.
    nat += [f"-A LAB-SERVICES -d {address} -j LAB-NODEPORTS" for address in own]
    nat += [
        f"-A LAB-MASQUERADE -j MARK --set-xmark {_MARK}",
        f"-A LAB-POSTROUTING -m mark ! --mark {_MARK} -j RETURN",
        f"-A LAB-POSTROUTING -j MARK --set-xmark {_MARK.partition('/')[0]}/0",
        "-A LAB-POSTROUTING -j MASQUERADE --random-fully",
    ]
    calls = {
        table: [f"-A {hook} -j {chain}" for hook, chain in called.items()] if hooks else []
        for table, called in _HOOKS.items()
    }
    lines = ["*nat", *(f":{chain} - [0:0]" for chain in chains), *nat, *calls["nat"], "COMMIT"]
    lines += ["*filter", ":LAB-REJECT - [0:0]", *reject, *calls["filter"], "COMMIT"]
    return "\n".join(lines) + "\n"


def load(fabric: Fabric, services: Sequence[ServiceSpec], backend: Backend) -> None:
    """Program all nodes of a fabric with these Services, in place of those loaded before.

    Raises LabUnavailable with the complaint of iptables when a node's kernel refuses.
    """
    for node in fabric.spec.nodes:
        with fabric.inside(node.key):
            for version, tool in ((4, "iptables"), (6, "ip6tables")):
                what = f"the Services of {node.key}"
                saved = run_here([f"{tool}-{backend}-save", "-t", "nat"], "", what)
                text = rules(services, node.addresses, version, hooks="-j LAB-SERVICES" not in saved)
                old = set(re.findall(r"^:(LAB-\S+)", saved, re.MULTILINE))
                kept = set(re.findall(r"^:(LAB-\S+)", text, re.MULTILINE))
                run_here([f"{tool}-{backend}-restore", "--noflush", "-w"], text + _removal(old - kept), what)


def _removal(chains: set[str]) -> str:
    """The text that deletes chains to which no rule leads any more but their own."""
    if not chains:
        return ""
    ordered = sorted(chains)
    flush = [f":{chain} - [0:0]" for chain in ordered]
    return "\n".join(["*nat", *flush, *(f"-X {chain}" for chain in ordered), "COMMIT"]) + "\n"


def _ports(services: Sequence[ServiceSpec]) -> Iterator[tuple[ServiceSpec, ServicePort]]:
    return ((service, port) for service in services for port in service.ports)


def _chain(kind: str, name: str) -> str:
    return f"LAB-{kind}-{hashlib.sha256(name.encode()).hexdigest()[:16].upper()}"
