"""What of this host keeps packets from the FORWARD hook, so that they cannot be judged there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from agent.core.addresses import FAMILIES, Address, format_address
from agent.core.node import Node

_SWITCH = {4: "bridge-nf-call-iptables", 6: "bridge-nf-call-ip6tables"}


def problems(node: Node | None = None) -> tuple[str, ...]:
    """One sentence for each, with what to do; () when everything that is forwarded can be judged.

    With a node, a bridge counts only when it carries pods of the node."""
    found = []
    with IPRoute() as netlink:
        links = {link["index"]: link for link in netlink.get_links()}
        if any(link.get_attr("IFLA_IFNAME") == "kube-ipvs0" for link in links.values()):
            found.append(
                "kube-proxy runs in IPVS mode (kube-ipvs0): traffic to Services passes by FORWARD and is not judged; "
                "set kube-proxy's mode to iptables or nftables"
            )
        bridges = {index: link.get_attr("IFLA_IFNAME") for index, link in links.items() if _is_bridge(link)}
        if node is not None and bridges:
            used = {_outgoing(netlink, address) for address in node.cluster.judged}
            bridges = {index: name for index, name in bridges.items() if index in used}
    for version in FAMILIES if bridges else ():
        if not _is_on(_SWITCH[version]):
            found.append(
                f"IPv{version} between pods on the bridge {_listed(bridges.values())} passes by iptables and is not "
                f"judged; run: modprobe br_netfilter; sysctl -w net.bridge.{_SWITCH[version]}=1"
            )
    return tuple(found)


def _is_bridge(link: Any) -> bool:
    info = link.get_attr("IFLA_LINKINFO")
    return info is not None and info.get_attr("IFLA_INFO_KIND") == "bridge"


def _outgoing(netlink: Any, address: Address) -> int | None:
    """The index of the interface through which the address is reached."""
    try:
        routes = netlink.route("get", dst=format_address(address))
    except NetlinkError:
        return None
    return next((route.get_attr("RTA_OIF") for route in routes), None)


def _is_on(switch: str) -> bool:
    try:
        return Path("/proc/sys/net/bridge", switch).read_text().strip() == "1"
    except OSError:
        return False


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
