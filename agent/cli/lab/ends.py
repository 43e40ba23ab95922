"""Who is meant by an end on the command line, and what is asked of a pair."""

from __future__ import annotations

from collections.abc import Sequence

import click

from agent.lab.lab import Lab
from agent.lab.matrix import Question
from agent.lab.spec import family, node_key, plain
from agent.lab.staging import Port, Stage


def parse_port(text: str) -> Port:
    """`80`, `53/udp`, `icmp`."""
    number, _, protocol = text.partition("/")
    if text.lower() in ("icmp", "ping"):
        return "ICMP", 0
    protocol = (protocol or "TCP").upper()
    if not number.isdigit() or not 1 <= int(number) <= 65535 or protocol not in ("TCP", "UDP", "SCTP"):
        raise click.UsageError(f"{text!r} is no port: write 80, 53/udp, 9999/sctp or icmp")
    return protocol, int(number)


def end_key(running: Lab, text: str) -> str:
    """The fabric's key of `ns/pod`, a pod's bare name, `node/NAME` or `outside`."""
    kind, _, name = text.partition("/")
    if kind == "node" and node_key(name) in running.fabric.sources():
        return node_key(name)
    if text in running.fabric.sources():
        return text
    alike = [key for key in running.pods() if key.partition("/")[2] == text]
    if len(alike) == 1:
        return alike[0]
    there = ", ".join(sorted(running.pods())[:8])
    raise click.UsageError(f"{text!r} is not in the lab; there are outside, {there}")


def resolve(running: Lab, staged: Stage, text: str, ports: Sequence[Port] | None) -> tuple[str, list[str], list[Port]]:
    """(key, addresses, ports) of an end; an address of nobody is a key of its own."""
    kind, _, rest = text.partition("/")
    if kind == "svc":
        for service in staged.services:
            if rest in (service.key.removeprefix("svc/"), service.name):
                if not service.cluster_ips:
                    raise click.UsageError(f"{text!r} is headless: it has no address; ask its pods")
                return service.key, list(service.cluster_ips), [(p.protocol, p.port) for p in service.ports]
        raise click.UsageError(f"{text!r} is no Service of the input")
    try:
        version = family(text)
    except ValueError:
        version = 0
    if version:
        owner = running.fabric.owner(text)
        if owner is None and not has_address(running, staged, text):
            raise click.UsageError(f"nobody in the lab has {text}; the host outside gets it by: --outside {text}")
        return owner or text, [text], list(staged.ports.get(owner or "", ()))
    key = end_key(running, text)
    addresses = [address for holder, address in running.fabric.spec.held() if holder == key]
    pod = running.pods().get(key)
    return key, addresses or list(pod.addresses if pod else ()), list(staged.ports.get(key, ports or ()))


def has_address(running: Lab, staged: Stage, address: str) -> bool:
    """Whether an address that is no pod's, node's or outside is a Service's or a bridge's."""
    others = [a for service in staged.services for a in service.cluster_ips]
    others += [a for _, a in running.fabric.spec.gateways]
    return plain(address) in map(plain, others)


def pair(running: Lab, staged: Stage, source: str, destination: str, asked: Sequence[Port]) -> list[Question]:
    """The questions of one pair, in each family that both ends have."""
    key, own, _ = resolve(running, staged, source, None)
    if key not in running.fabric.sources():
        raise click.UsageError(f"{source!r} cannot send: give a pod, node/NAME or outside")
    other_key, others, ports = resolve(running, staged, destination, None)
    return [
        Question(key, a, other_key, b, protocol, port)
        for protocol, port in (asked or ports or [("TCP", 80)])
        for version in (4, 6)
        for a in [x for x in own if family(x) == version][:1]
        for b in [x for x in others if family(x) == version][:1]
    ]
