"""Nodes, pods and the host outside as network namespaces of this machine, joined so that packets flow.

    pod ── veth ── node ── veth ── fabric bridge ── outside

The namespaces are bound to /run/netns under readable names, so `ip netns exec` works on them, and their
files stay open here. Only in an enclosure (see `enclosure`), never in the machine's own network.
"""

import contextlib
import hashlib
import os
import subprocess
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from agent.lab import addressing
from agent.lab.enclosure import LabUnavailable, is_inside
from agent.lab.namespaces import CLONE_NEWNET, MS_BIND, mount, setns, unmount, unshare
from agent.lab.spec import OUTSIDE, FabricSpec, NodeSpec, PodSpec, node_key, plain

_NETNS = "/run/netns"
_MY_NETWORK = "/proc/thread-self/ns/net"
_FABRIC = "fabric"

# In this order: `all` before the interfaces exist, so that they start with it.
_QUIET = {
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/dad_transmits": "0",
    "net/ipv6/conf/all/accept_ra": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/ip_forward": "0",
    # Probes are told at once of a closed port, however many there are.
    "net/ipv4/icmp_ratelimit": "0",
    "net/ipv6/icmp/ratelimit": "0",
}
_FORWARDING = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv6/conf/default/forwarding": "1",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
}
_BRIDGED = {"net/bridge/bridge-nf-call-iptables": "1", "net/bridge/bridge-nf-call-ip6tables": "1"}
_SWITCHED_ONLY = {"net/bridge/bridge-nf-call-iptables": "0", "net/bridge/bridge-nf-call-ip6tables": "0"}


class Fabric:
    """The namespaces of a FabricSpec. Keys: pods `NAMESPACE/NAME`, nodes `node:NAME`, and `outside`."""

    def __init__(self, spec: FabricSpec) -> None:
        """An empty one; use `build` or `attach`."""
        self._spec = addressing.with_gateways(spec)
        self._files: dict[str, int] = {}
        self._indices: dict[str, int] = {}
        self._next_index = 0
        self._owners: dict[str, str] | None = None

    @property
    def spec(self) -> FabricSpec:
        """What there is now, added and removed pods accounted for."""
        return self._spec

    def sources(self) -> list[str]:
        """All that can be a source: nodes, pods, outside."""
        return [node.key for node in self._spec.nodes] + [pod.key for pod in self._spec.pods] + [OUTSIDE]

    def owner(self, address: str) -> str | None:
        """The key of whoever has an address , None when nobody has."""
        if self._owners is None:
            self._owners = {plain(address): key for key, address in self._spec.held()}
        return self._owners.get(plain(address))

    def home(self, key: str) -> str:
        """The key of the namespace that a node, pod or outside lives in: a hostNetwork pod's is its node's.

        Raises KeyError for a key that is not in the lab.
        """
        if key in self._files:
            return key
        for pod in self._spec.pods:
            if pod.key == key and pod.host_network:
                return node_key(pod.node)
        raise KeyError(f"{key} is not in the lab")

    def path(self, key: str) -> str:
        """The file of the namespace, for other programs (`nsenter --net=FILE`). Raises KeyError."""
        return f"{_NETNS}/{_file_name(self.home(key))}"

    @contextlib.contextmanager
    def inside(self, key: str) -> Iterator[None]:
        """The calling thread (and what it forks) is in that namespace meanwhile. Raises KeyError."""
        target = self._files[self.home(key)]
        back = os.open(_MY_NETWORK, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(target, CLONE_NEWNET)
            yield
        finally:
            setns(back, CLONE_NEWNET)
            os.close(back)

    def add_pod(self, pod: PodSpec) -> None:
        """Start a pod. Raises ValueError when its name or an address is taken or cannot be used."""
        grown = replace(self._spec, pods=(*self._spec.pods, pod))
        grown.check()
        self._check_bridge(pod)
        before = self._spec
        self._set(grown)
        grown = self._spec
        if pod.host_network:
            return
        self._make(pod.key, {})
        node = next(node for node in grown.nodes if node.name == pod.node)
        if grown.mode == "bridged":
            known = set(addressing.prefixes(addressing.local_pods(before, node.name)))
            fresh = [p for p in addressing.prefixes([pod]) if p not in known]
            self._ip(node.key, [addressing.bridge_address(grown, prefix) for prefix in fresh])
        self._ip(node.key, self._local_pod_lines(pod))
        self._ip(pod.key, self._pod_lines(pod))
        for other in grown.nodes:
            if other is not node:
                self._ip(other.key, addressing.remote_pod_lines(grown, pod, other))
        self._ip(OUTSIDE, addressing.remote_pod_lines(grown, pod, None))
        self._adapt(before)
        if grown.mode == "bridged":
            self._announce(pod)

    def remove_pod(self, key: str) -> None:
        """End a pod: its interface at once, its namespace with the last socket in it. Raises KeyError."""
        pod = next((pod for pod in self._spec.pods if pod.key == key), None)
        if pod is None:
            raise KeyError(f"{key} is not in the lab")
        before = self._spec
        self._set(replace(before, pods=tuple(other for other in before.pods if other.key != key)))
        if pod.host_network:
            return
        self._ip(node_key(pod.node), [f"link del dev pod{self._indices.pop(key)}"])
        for other in before.nodes:
            if other.name != pod.node:
                self._ip(other.key, addressing.remote_pod_lines(before, pod, other, "del"))
        self._ip(OUTSIDE, addressing.remote_pod_lines(before, pod, None, "del"))
        self._drop(key)
        self._adapt(before)

    def to_json(self) -> dict[str, Any]:
        """What another process of the same enclosure needs for `attach`."""
        return {"spec": self._spec.to_json(), "indices": dict(self._indices), "next": self._next_index}

    def close(self) -> None:
        """Let go of all namespaces; those in which nothing runs any more vanish."""
        for key in list(self._files):
            self._drop(key)

    def _build(self) -> None:
        spec = self._spec
        pods = [pod for pod in spec.pods if not pod.host_network]
        for pod in pods:
            self._check_bridge(pod)
        bridged = {} if spec.mode == "routed" else _BRIDGED
        self._make(_FABRIC, _SWITCHED_ONLY if os.path.exists("/proc/sys/net/bridge") else {})
        self._make(OUTSIDE, {})
        for node in spec.nodes:
            self._make(node.key, {**_FORWARDING, **bridged})
        for pod in pods:
            self._make(pod.key, {})
        node_files = [_file_name(node.key) for node in spec.nodes]
        self._ip(_FABRIC, addressing.fabric_lines(node_files, _file_name(OUTSIDE)))
        self._ip(OUTSIDE, addressing.outside_lines(spec))
        with ThreadPoolExecutor(max_workers=4) as workers:
            list(workers.map(self._build_node, spec.nodes))
            list(workers.map(lambda pod: self._ip(pod.key, self._pod_lines(pod)), pods))

    def _build_node(self, node: NodeSpec) -> None:
        lines = addressing.node_lines(self._spec, node)
        for pod in addressing.local_pods(self._spec, node.name):
            lines += self._local_pod_lines(pod)
            if addressing.is_crowded(self._spec):
                lines += addressing.neighbour_lines(pod, self._index(pod), "cbr0")
        self._ip(node.key, lines)

    def _local_pod_lines(self, pod: PodSpec) -> list[str]:
        return addressing.local_pod_lines(self._spec, pod, self._index(pod), _file_name(pod.key))

    def _pod_lines(self, pod: PodSpec) -> list[str]:
        extra = sorted(addressing.pod_routes(self._spec, pod))
        lines = addressing.pod_lines(self._spec, pod) + [f"route add {line}" for line in extra]
        if addressing.is_crowded(self._spec):
            lines += addressing.gateway_lines(self._spec, pod)
            for other in self._beside(pod):
                lines += addressing.neighbour_lines(other, self._index(other), "eth0")
        return lines

    def _beside(self, pod: PodSpec) -> list[PodSpec]:
        """The other pods of its node."""
        return [other for other in addressing.local_pods(self._spec, pod.node) if other.key != pod.key]

    def _adapt(self, before: FabricSpec) -> None:
        """Bridged: pods that were there get the routes that a change of pods asks for."""
        if self._spec.mode == "routed":
            return
        for pod in before.pods:
            if pod.host_network or pod.key not in self._files:
                continue
            old, new = addressing.pod_routes(before, pod), addressing.pod_routes(self._spec, pod)
            lines = [f"route add {line}" for line in new - old]
            self._ip(pod.key, lines + [f"route del {line}" for line in old - new])

    def _announce(self, pod: PodSpec) -> None:
        """Nobody on the bridge keeps the hardware address of who had these addresses before: CNI plugins announce a
        pod, here the others forget, or are told."""
        forget = [f"neigh flush to {address}" for address in pod.addresses]
        crowded = addressing.is_crowded(self._spec)
        for key, device in [(node_key(pod.node), "cbr0"), *((other.key, "eth0") for other in self._beside(pod))]:
            self._ip(key, addressing.neighbour_lines(pod, self._index(pod), device) if crowded else forget)

    def _check_bridge(self, pod: PodSpec) -> None:
        if self._spec.mode == "routed" or pod.host_network:
            return
        gateways = {plain(address) for _, address in self._spec.gateways}
        for address in pod.addresses:
            addressing.prefix_of(address)
            if plain(address) in gateways:
                raise ValueError(f"{address} of pod {pod.key} is the address of its node's bridge")

    def _set(self, spec: FabricSpec) -> None:
        self._spec = addressing.with_gateways(spec)
        self._owners = None

    def _index(self, pod: PodSpec) -> int:
        if pod.key not in self._indices:
            self._indices[pod.key] = self._next_index
            self._next_index += 1
        return self._indices[pod.key]

    def _make(self, key: str, settings: dict[str, str]) -> None:
        name = f"{_NETNS}/{_file_name(key)}"
        back = os.open(_MY_NETWORK, os.O_RDONLY | os.O_CLOEXEC)
        try:
            unshare(CLONE_NEWNET)
            with open(name, "x", encoding="ascii"):
                pass
            mount(_MY_NETWORK, name, flags=MS_BIND)
            self._files[key] = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            for setting, value in {**_QUIET, **settings}.items():
                # /proc/sys/net shows the namespace of the thread that opens it.
                with open(f"/proc/sys/{setting}", "w", encoding="ascii") as file:
                    file.write(value)
        except OSError as trouble:
            raise LabUnavailable(f"the namespace of {key} cannot be made: {trouble}") from trouble
        finally:
            setns(back, CLONE_NEWNET)
            os.close(back)

    def _drop(self, key: str) -> None:
        os.close(self._files.pop(key))
        name = f"{_NETNS}/{_file_name(key)}"
        with contextlib.suppress(OSError):
            unmount(name)
            os.unlink(name)

    def _ip(self, key: str, lines: Iterable[str]) -> None:
        batch = "\n".join(lines)
        if not batch:
            return
        with self.inside(key):
            run_here(["ip", "-batch", "-"], batch, f"the network of {key}")


def build(spec: FabricSpec) -> Fabric:
    """Make all of it. Raises ValueError for a bad spec, LabUnavailable when the machine does not let us.

    Only in an enclosure: anywhere else it raises RuntimeError and touches nothing.
    """
    if not is_inside() or threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a fabric is built in an enclosure only, and by its main thread")
    spec.check()
    if spec.mode == "bridged" and not os.path.exists("/proc/sys/net/bridge"):
        raise LabUnavailable("bridged pods need the kernel module br_netfilter: run `modprobe br_netfilter` as root")
    fabric = Fabric(spec)
    try:
        fabric._build()
    except BaseException:
        fabric.close()
        raise
    return fabric


def attach(document: dict[str, Any]) -> Fabric:
    """The fabric that another process of this enclosure built, from its `to_json`. Raises OSError if gone."""
    fabric = Fabric(FabricSpec.from_json(document["spec"]))
    fabric._indices = dict(document["indices"])
    fabric._next_index = document["next"]
    pods = [pod.key for pod in fabric.spec.pods if not pod.host_network]
    for key in [_FABRIC, OUTSIDE, *(node.key for node in fabric.spec.nodes), *pods]:
        fabric._files[key] = os.open(f"{_NETNS}/{_file_name(key)}", os.O_RDONLY | os.O_CLOEXEC)
    return fabric


def run_here(command: list[str], text: str, what: str) -> str:
    """Run a program of the system with `text` as its input, in the thread's namespace; returns its output.

    Raises LabUnavailable with its complaint when it fails or is not installed; `what` names the object.
    """
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LabUnavailable(
            f"{command[0]} is not installed: the lab needs the packages iproute2, iptables and ipset"
        ) from None
    if done.returncode:
        raise LabUnavailable(f"{what}: {' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def _file_name(key: str) -> str:
    """The namespace's name for `ip netns`: readable, and short enough for a file."""
    name = key.replace(":", ".") if key.startswith("node:") else key.replace("/", ".")
    if "/" in key:
        name = f"pod.{name}"
    return name if len(name) <= 200 else f"{name[:180]}.{hashlib.sha256(key.encode()).hexdigest()[:16]}"
