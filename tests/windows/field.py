"""A node under flood, with counters before and after its judgement; and the tally of what it let through and lost."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

from agent.lab.addressing import GATEWAY_MAC
from agent.lab.fabric import build
from agent.lab.spec import OUTSIDE, FabricSpec, NodeSpec, PodSpec, node_key
from tests.windows.flood import SLOTS, Flood
from tests.windows.frames import Probe

NODE = "node-1"
_SOURCE = PodSpec("flood", "source", NODE, ("172.30.0.2", "fd99::2"))
_FABRIC = FabricSpec((NodeSpec(NODE, ("192.168.0.1", "fd00:1::1")),), (_SOURCE,), ("203.0.113.5", "2001:db8:ff::5"))
_SETTINGS = {
    "nf_conntrack_checksum": "0",
    "nf_conntrack_udp_timeout": "2",
    "nf_conntrack_tcp_timeout_syn_sent": "2",
    "nf_conntrack_sctp_timeout_cookie_wait": "2",
    "nf_conntrack_icmp_timeout": "2",
    "nf_conntrack_icmpv6_timeout": "2",
}

# Right before and right after the table `filter` of either backend, in the same hook: what is in the first set and
# not in the second was dropped there, and nowhere else.
_COUNTERS = """
table inet count {
  set before { typeof @th,64,32; flags dynamic; size 1000000; }
  set after { typeof @th,64,32; flags dynamic; size 1000000; }
  counter total { }
  chain before {
    type filter hook forward priority -10; policy accept;
    counter name total
    update @before { @th,64,32 counter }
  }
  chain after {
    type filter hook forward priority 10; policy accept;
    update @after { @th,64,32 counter }
  }
}
"""
_ARRIVALS = """
table inet count {
  counter total { }
  chain arrivals {
    type filter hook prerouting priority -300; policy accept;
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, mld2-listener-report } accept
    counter name total drop
  }
}
"""


@dataclass(frozen=True)
class Asked:
    """A probe in one epoch: whether some end denies it in all the worlds there are meanwhile, or all allow it."""

    probe: Probe
    shut: bool
    open: bool


@dataclass
class Tally:
    """What was counted. `denied` and `allowed` are packets sent that must not and that must pass."""

    changes: int = 0
    packets: int = 0
    denied: int = 0
    allowed: int = 0
    leaks: int = 0
    losses: int = 0
    arrived: int = 0
    passed: int = 0
    unseen: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.changes} changes, {self.packets:,} packets in {self.seconds:.1f} s: {self.leaks} leaks of "
            f"{self.denied:,} denied by old and new, {self.losses} losses of {self.allowed:,} allowed by both"
        )


class Field(AbstractContextManager["Field"]):
    """One node in an enclosure; every frame of the flood is forwarded by it, from the pod `source` to outside.

    The addresses in the frames are those of the cluster that is played, which has no interface here."""

    def __init__(self) -> None:
        self.fabric = build(_FABRIC)
        self.tally = Tally()
        self._epoch = 0
        self._asked: dict[int, Sequence[Asked]] = {}
        self._titles: dict[int, str] = {}
        self._arrived = 0
        with self.fabric.inside(node_key(NODE)):
            _run("nft", "-f", "-", text=_COUNTERS)
            for name, value in _SETTINGS.items():
                Path("/proc/sys/net/netfilter", name).write_text(value)
        with self.fabric.inside(OUTSIDE):
            _run("nft", "-f", "-", text=_ARRIVALS)
        self.flood = Flood(self.fabric, _SOURCE.key, bytes.fromhex(GATEWAY_MAC.replace(":", "")))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flood.__exit__(kind, error, trace)
        self.fabric.close()

    def under_flood(self, title: str, asked: Iterable[Asked], change: Callable[[], object]) -> None:
        """Make a change in the node while these probes are sent."""
        asked = list(asked)
        self._epoch += 1
        self._asked[self._epoch], self._titles[self._epoch] = asked, title
        self.flood.show(self._epoch, [one.probe for one in asked])
        begin = perf_counter()
        with self.fabric.inside(node_key(NODE)):
            change()
        self.tally.seconds += perf_counter() - begin
        self.tally.changes += 1
        self.tally.kinds[title] += 1
        if len(self._asked) >= 200:
            self.count()

    def count(self) -> Tally:
        """Pause, add what was counted since the last time to the tally, and answer with it."""
        self.flood.pause()
        with self.fabric.inside(node_key(NODE)):
            before, after, total = _read("before"), _read("after"), _total()
            _run("nft", "flush set inet count before; flush set inet count after; reset counters table inet count")
        with self.fabric.inside(OUTSIDE):
            arrived = _total()
        tally = self.tally
        tally.packets += total
        tally.unseen += total - sum(before.values())
        tally.passed += sum(after.values())
        tally.arrived = arrived
        for epoch, several in self._asked.items():
            for slot, asked in enumerate(several):
                sent, passed = before.get(epoch * SLOTS + slot, 0), after.get(epoch * SLOTS + slot, 0)
                if asked.shut:
                    tally.denied += sent
                    tally.leaks += passed
                if asked.open:
                    tally.allowed += sent
                    tally.losses += sent - passed
                if (asked.shut and passed) or (asked.open and passed < sent):
                    what = "leaked" if asked.shut else "were lost"
                    number = passed if asked.shut else sent - passed
                    tally.examples.append(f"{number} of {sent} {asked.probe} {what} in: {self._titles[epoch]}")
        self._asked.clear()
        self._titles.clear()
        return tally

    def expect_clean(self) -> None:
        """After `count`: nothing was found, and it was looked for."""
        tally = self.tally
        print(tally)
        assert tally.unseen == 0, "the counters missed packets"
        assert tally.arrived == tally.passed, "packets were lost behind the judgement"
        assert (tally.leaks, tally.losses) == (0, 0), "\n".join([str(tally), *tally.examples])
        assert min(tally.denied, tally.allowed) > 1000, str(tally)


def _run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _listed(*what: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(_run("nft", "-j", "list", *what))["nftables"]
    return found


def _read(name: str) -> dict[int, int]:
    """The packets of each mark."""
    elements = next(item["set"] for item in _listed("set", "inet", "count", name) if "set" in item).get("elem", [])
    return {int(e["elem"]["val"]): e["elem"]["counter"]["packets"] for e in elements}


def _total() -> int:
    listed = _listed("counter", "inet", "count", "total")
    return int(next(item["counter"]["packets"] for item in listed if "counter" in item))
