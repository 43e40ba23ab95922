"""The tracer by itself, and against the kernel: random rules, sets and packets, counter by counter."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from tests.tracer import Packet, Refused, Sets, Tables, Unknown, trace

TCP = Packet("10.8.0.1", "10.9.0.5", "tcp", sport=1000, dport=80)
UDP = replace(TCP, protocol="udp", dport=53)
SCTP = replace(TCP, protocol="sctp")
PING = Packet("10.8.0.1", "10.9.0.5", "icmp", icmp_type=8)
TCP6 = Packet("fd00:8::1", "fd00:9::5", "tcp", sport=1000, dport=80)
NDP = Packet("fe80::1", "ff02::1", "ipv6-icmp", icmp_type=135, state="UNTRACKED")
OTHER = Packet("10.8.0.1", "10.9.0.5", 253)

NETS = ["10.8.0.0/24", "10.8.0.0/30 nomatch", "10.8.0.1", "10.9.0.0/24", "10.9.0.4/30 nomatch"]
SETS = Sets.of({
    "a": ("hash:ip", ["10.8.0.1"]),
    "n": ("hash:net", NETS),
    "p": ("hash:ip,port", ["10.9.0.5,tcp:80", "10.9.0.5,udp:54", "10.8.0.1,1000"]),
    "x": ("hash:ip,port,ip", ["10.9.0.5,tcp:80,10.8.0.1"]),
    "s": ("hash:ip,port", ["10.9.0.5,sctp:80"]),
    "a6": ("hash:ip", ["fd00:8::1"]),
    "n6": ("hash:net", ["fd00:9::/32", "fd00:9::4/126 nomatch"]),
    "half": ("hash:net", ["0.0.0.0/1"]),
})  # fmt: skip


def filter_text(*lines: str) -> str:
    return "\n".join(["*filter", *lines, "COMMIT", ""])


def matches(spec: str, packet: Packet) -> bool:
    tables = Tables.parse(filter_text(f"-A FORWARD {spec} -j DROP"), SETS)
    return trace(tables, SETS, packet).verdict == "DROP"


# --------------------------------------------------------------------------------------------- matches


@pytest.mark.parametrize(
    ("spec", "packet", "expected"),
    [
        ("", TCP, True),
        ("-s 10.8.0.1", TCP, True),
        ("-s 10.8.0.2", TCP, False),
        ("! -s 10.8.0.2/32", TCP, True),
        ("-s 10.8.0.0/16 ! -d 10.9.0.0/255.255.0.0", TCP, False),
        ("--source 10.8.0.0/16 --destination 10.9.0.0/16", TCP, True),
        ("-d 0.0.0.5/0.0.0.15", TCP, True),
        ("-s 0.0.0.5/0.0.0.15", TCP, False),
        ("-s 10.8.0.9/16", TCP, True),
        ("-d ::5/::f", TCP6, True),
        ("! -d ::5/::f", TCP6, False),
        ("-s fd00:8::/32", TCP6, True),
        ("-s 0.0.0.0/0", TCP, True),
        ("-p tcp", TCP, True),
        ("-p 6", TCP, True),
        ("! -p tcp", TCP, False),
        ("! -p udp", TCP, True),
        ("-p all", OTHER, True),
        ("-p 253", OTHER, True),
        ("-p ipv6-icmp", NDP, True),
        ("-p icmpv6", NDP, True),
        ("-p icmp", PING, True),
        ("-p sctp", SCTP, True),
        ("-p tcp -m tcp --dport 80", TCP, True),
        ("-p tcp --dport 80", TCP, True),
        ("-p tcp -m tcp ! --dport 80", TCP, False),
        ("-p tcp -m tcp --dport 79:80 --sport 1000", TCP, True),
        ("-p tcp -m tcp --dport 79:80 --sport 1001", TCP, False),
        ("-p tcp -m tcp --dport :79", TCP, False),
        ("-p tcp -m tcp --sport 1000:", TCP, True),
        ("-p udp -m udp --dport 53", UDP, True),
        ("-p udp -m udp ! --dport 80", TCP, False),
        ("-p sctp -m sctp --dport 80", SCTP, True),
        ("-p tcp -m multiport --dports 1,79:81", TCP, True),
        ("-p tcp -m multiport ! --dports 1,79:81", TCP, False),
        ("-p tcp -m multiport ! --dports 1,2", TCP, True),
        ("-p tcp -m multiport --sports 80,1000", TCP, True),
        ("-p tcp -m multiport --ports 80", TCP, True),
        ("-p tcp -m multiport ! --dports 1", OTHER, False),
        ("-m set --match-set a src", TCP, True),
        ("-m set --match-set a dst", TCP, False),
        ("-m set ! --match-set a dst", TCP, True),
        ("-m set --match-set n src", TCP, True),
        ("-m set --match-set n dst", TCP, False),
        ("-m set --match-set n src", replace(TCP, src="10.8.0.2"), False),
        ("-m set --match-set n src", replace(TCP, src="10.8.0.9"), True),
        ("-m set --match-set half src", TCP, True),
        ("-m set --match-set half src", replace(TCP, src="200.0.0.1"), False),
        ("-m set --match-set p dst,dst", TCP, True),
        ("-m set --match-set p dst,dst", UDP, False),
        ("-m set --match-set p dst,dst", SCTP, False),
        ("-m set --match-set p dst,dst", PING, False),
        ("-m set ! --match-set p dst,dst", OTHER, True),
        ("-m set --match-set p src,src", TCP, True),
        ("-m set --match-set p src,dst", TCP, False),
        ("-m set --match-set s dst,dst", SCTP, True),
        ("-m set --match-set x dst,dst,src", TCP, True),
        ("-m set --match-set x dst,dst,dst", TCP, False),
        ("-m set --match-set a6 src", TCP6, True),
        ("-m set --match-set n6 dst", TCP6, False),
        ("-m set --match-set n6 dst", replace(TCP6, dst="fd00:9::9"), True),
        ("-m set --match-set a src -m set ! --match-set a dst", TCP, True),
        ("-m conntrack --ctstate NEW", TCP, True),
        ("-m conntrack --ctstate ESTABLISHED,RELATED", TCP, False),
        ("-m conntrack ! --ctstate ESTABLISHED,RELATED", TCP, True),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", replace(TCP, state="RELATED"), True),
        ("-m conntrack --ctstate UNTRACKED,INVALID", NDP, True),
        ("-p ipv6-icmp -m icmp6 --icmpv6-type 135", NDP, True),
        ("-p icmpv6 -m icmp6 --icmpv6-type neighbour-solicitation", NDP, True),
        ("-p icmpv6 -m icmp6 --icmpv6-type router-advertisement", NDP, False),
        ("-p icmpv6 -m icmp6 ! --icmpv6-type 136", NDP, True),
        ("-p icmpv6 -m icmp6 --icmpv6-type 135/1", NDP, False),
        ("-p icmp -m icmp --icmp-type 8", PING, True),
        ("-p icmp -m icmp --icmp-type echo-request", PING, True),
        ("-p icmp -m icmp --icmp-type any", PING, True),
        ("-p icmp -m icmp ! --icmp-type 8/0", PING, False),
        ("-m physdev --physdev-is-bridged", TCP, False),
        ("-m physdev ! --physdev-is-bridged", TCP, True),
        ("-m physdev --physdev-is-bridged", replace(TCP, bridged=True), True),
        ("-m pkttype --pkt-type unicast", TCP, True),
        ("-m pkttype ! --pkt-type unicast", replace(TCP, pkttype="broadcast"), True),
        ('-m comment --comment "a \\"b\\" it\'s -j ACCEPT"', TCP, True),
        ("-m mark --mark 0x1/0x3", replace(TCP, mark=5), True),
        ("-m mark --mark 1", replace(TCP, mark=5), False),
        ("-m mark ! --mark 1", TCP, True),
        ("-i veth+", replace(TCP, in_iface="veth3"), True),
        ("! -i veth+", replace(TCP, in_iface="veth3"), False),
        ("-i veth", replace(TCP, in_iface="veth3"), False),
        ("-i + -o eth0", replace(TCP, out_iface="eth0"), True),
        ("! -o eth0", replace(TCP, out_iface="eth0"), False),
    ],
)
def test_match(spec: str, packet: Packet, expected: bool) -> None:
    assert matches(spec, packet) is expected


@pytest.mark.parametrize(
    "spec",
    [
        "-m statistic --mode random --probability 0.5", "-m tcp --tcp-flags SYN SYN -p tcp", "-p tcp --syn",
        "-p gre", "-m addrtype --dst-type LOCAL", "-s example.org", "-s 10.0.0.1,10.0.0.2",
        "-p tcp --dport http", "-p tcp -m multiport --dports http", "-m conntrack --ctstate DNAT",
        "-m conntrack --ctorigdst 1.1.1.1", "-m set --match-set a both",
        "-m set --match-set a src --return-nomatch", "-m set --match-set a src,src",
        "-m set --match-set p dst", "-m physdev --physdev-in eth0", "-m pkttype --pkt-type host",
        "-p icmp -m icmp --icmp-type network-unreachable", "! -i +", "-i e+h", "-m mark --mark one",
        "--dport 80", "-f", "-4", "-c 1 2", "-m mark --mark 010",
    ],
)  # fmt: skip
def test_unknown_matches(spec: str) -> None:
    with pytest.raises(Unknown):
        matches(spec, TCP)


@pytest.mark.parametrize(
    ("spec", "packet"),
    [
        ("-s 10.8.0.1", TCP6),
        ("-s fd00::1", TCP),
        ("-i eth0", TCP),
        ("-p icmp -m icmp --icmp-type 8", replace(PING, icmp_type=None)),
        ("-p tcp --sport 1", replace(TCP, sport=None)),
        ("-m set --match-set a6 src", TCP),
    ],
)
def test_what_the_packet_does_not_say(spec: str, packet: Packet) -> None:
    with pytest.raises(Unknown):
        matches(spec, packet)


def test_an_unknown_set_when_the_sets_were_not_given_to_the_tables() -> None:
    tables = Tables.parse(filter_text("-A FORWARD -m set --match-set nope src -j DROP"))
    with pytest.raises(Unknown):
        trace(tables, SETS, TCP)
    with pytest.raises(Unknown):
        trace(tables, SETS, TCP, "NPA")


@pytest.mark.parametrize(
    "wrong",
    [
        {"dport": None}, {"dst": "fd00::1"}, {"state": "SNAT"}, {"protocol": "gre"}, {"pkttype": "host"},
        {"protocol": 253}, {"src": "fe80::1%eth0"}, {"src": "pod"},
    ],
)  # fmt: skip
def test_impossible_packets(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        replace(TCP, **wrong)


# --------------------------------------------------------------------------------------------- walking


def verdict(packet: Packet, *lines: str) -> str:
    return trace(Tables.parse(filter_text(*lines), SETS), SETS, packet).verdict


def test_policy_and_path() -> None:
    tables = Tables.parse(
        filter_text(":FORWARD DROP [3:4]", ":A - [0:0]", "-A FORWARD -j A", "[1:2] -A A -j RETURN", "-A A -j ACCEPT")
    )
    result = trace(tables, SETS, TCP)
    assert (result.verdict, result.rule) == ("DROP", None)
    assert [(step.chain, step.number) for step in result.path] == [("FORWARD", 1), ("A", 1)]
    assert str(result) == "FORWARD:1 -A FORWARD -j A\nA:1 -A A -j RETURN\nDROP by the policy"
    assert trace(tables, SETS, TCP, "INPUT").verdict == "ACCEPT"


def test_goto_returns_to_the_last_jump() -> None:
    chains = [":A - [0:0]", ":B - [0:0]", ":C - [0:0]"]
    rules = [
        "-A FORWARD -j A",
        "-A FORWARD -j DROP",
        "-A A -g B",
        "-A A -j ACCEPT",
        "-A B -j C",
        "-A B -j RETURN",
    ]
    result = trace(Tables.parse(filter_text(*chains, *rules)), SETS, TCP)
    assert [(step.chain, step.number) for step in result.path] == [
        ("FORWARD", 1), ("A", 1), ("B", 1), ("B", 2), ("FORWARD", 2)
    ]  # fmt: skip
    # without RETURN the end of B is the same, and a goto from the base chain ends at the policy
    assert verdict(TCP, *chains, *rules[:-1]) == "DROP"
    assert verdict(TCP, *chains, "-A FORWARD -g A", "-A FORWARD -j DROP", "-A A -j RETURN") == "ACCEPT"
    # RETURN in the base chain is the policy too
    assert verdict(TCP, "-P FORWARD DROP", "-A FORWARD -j RETURN", "-A FORWARD -j ACCEPT") == "DROP"


def test_targets_that_go_on() -> None:
    result = trace(
        Tables.parse(
            filter_text(
                '-A FORWARD -j NFLOG --nflog-group 5 --nflog-prefix "a b"', "-A FORWARD -p tcp",
                "-A FORWARD -j MARK --set-xmark 0x4/0xff", "-A FORWARD -j MARK --or-mark 0x3",
                "-A FORWARD -j MARK --and-mark 0xfe", "-A FORWARD -j MARK --xor-mark 0x10",
                "-A FORWARD -m mark --mark 0x116 -j DROP",
            )
        ),
        SETS,
        replace(TCP, mark=0x1FF),
    )  # fmt: skip
    assert result.mark == 0x16
    assert result.verdict == "ACCEPT"
    assert len(result.path) == 6
    assert trace(Tables.parse(filter_text("-A FORWARD -j MARK --set-mark 2/3")), SETS, TCP).mark == 2


# ---------------------------------------------------------------------------------------- transactions

BASE = filter_text(
    ":FORWARD ACCEPT [0:0]",
    ":A - [0:0]",
    ":B - [0:0]",
    "-A FORWARD -j A",
    "-A A -j B",
    "-A B -s 10.8.0.1 -j DROP",
)
# (lines, refused); both backends were asked, and are again below
TRANSACTIONS: list[tuple[list[str], bool]] = [
    (["-X B"], True),
    (["-F B", "-X B", "-F A"], True),
    (["-F A", "-X B"], True),
    (["-F A", "-F B", "-X B"], False),
    ([":A - [0:0]", ":B - [0:0]", "-X B"], False),
    (["-X"], True),
    (["-F", "-X"], False),
    (["-X C"], True),
    (["-F C"], True),
    (["-A C -j DROP"], True),
    (["-A A -j C", ":C - [0:0]"], True),
    (["-A A -g C", ":C - [0:0]"], True),
    ([":C - [0:0]", "-A A -j C", "-A C -g B"], False),
    (["-A A -j FORWARD"], True),
    (["-A B -g A"], True),
    (["-A B -j A"], True),
    (["-N A"], True),
    (["-N C", "-A C -j DROP"], False),
    (["-I B 3 -j DROP"], True),
    (["-I B 2 -j DROP"], False),
    (["-I B -j ACCEPT"], False),
    (["-D B 2"], True),
    (["-D B 1"], False),
    (["-D B -s 10.8.0.2 -j DROP"], True),
    (["-D B -s 10.8.0.1/32 -j DROP"], False),
    (["-R B 1 -j ACCEPT"], False),
    (["-R B 2 -j ACCEPT"], True),
    ([":A ACCEPT [0:0]"], True),
    (["-P FORWARD DROP"], False),
    ([":FORWARD DROP [0:0]"], False),
    ([":FORWARD - [0:0]"], False),
    ([f":{'c' * 28} - [0:0]"], False),
    ([f":{'c' * 29} - [0:0]"], True),
    (["-A A -m tcp --dport 80"], True),
    (["-A A ! -p tcp -m tcp --dport 80"], True),
    (["-A A -m multiport --dports 80"], True),
    (["-A A -p tcp -m tcp --dport 80:70"], True),
    (["-A A -p tcp -m multiport --dports 80:70"], True),
    (["-A A -p tcp -m multiport --dports 1,2,3,4,5,6,7,8,9,10,11,12,13,14:15"], False),
    (["-A A -p tcp -m multiport --dports 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15:16"], True),
    (["-A A -s 10.8.0.1 -s 10.8.0.2"], True),
    (["-A A -j DROP -j DROP"], True),
    (["-A A -m set --match-set nope src"], True),
    (["-A A -m conntrack"], True),
    (["-A A ! -p all"], True),
    (["-A A ! -s 0.0.0.0/0"], True),
    (["-A A -m udp --dport 53 -p udp"], False),
    (["-A A ! -m comment --comment x"], True),
    (["-A A -m comment ! --comment x"], True),
    (['-A A -m comment --comment ""'], False),
    (["-A A -m comment --comment a\\b"], False),
    (["-A A -j MARK"], True),
    (["-A A -p tcp -m tcp --dport 65536"], True),
    (["-A A -j DROP", "-A A -j NOWHERE"], True),
]


@pytest.mark.parametrize(("lines", "refused"), TRANSACTIONS, ids=lambda value: str(value)[:60])
def test_transaction(lines: list[str], refused: bool) -> None:
    tables = Tables.parse(BASE, Sets())
    before = tables.copy()
    if refused:
        with pytest.raises(Refused):
            tables.apply(filter_text(":NEW - [0:0]", *lines))
        assert tables == before
    else:
        tables.apply(filter_text(*lines))


@pytest.mark.parametrize(
    "text",
    [
        filter_text("-A FORWARD -j REJECT"), filter_text("-A FORWARD -j LOG --log-prefix x"),
        filter_text("-C A -j DROP"), filter_text("-E A B"), filter_text("-P FORWARD QUEUE"),
        filter_text("-A FORWARD -j DROP --nflog-group 1"), filter_text("-A FORWARD -j NFLOG --nflog-what 1"),
        filter_text(":LOG - [0:0]"), filter_text("foo"),
    ],
)  # fmt: skip
def test_unknown_text(text: str) -> None:
    with pytest.raises(Unknown, match="line 2"):
        Tables.parse(text)


@pytest.mark.parametrize("text", ["*filter\n-A FORWARD -j DROP\n", "-A FORWARD -j DROP\n", "*filter\n*nat\nCOMMIT\n"])
def test_text_out_of_order(text: str) -> None:
    with pytest.raises(Refused):
        Tables.parse(text)


@pytest.mark.parametrize(
    "lines",
    [
        [f'-A A -m comment --comment "{"x" * 256}"'],
        [f"-A A -j NFLOG --nflog-prefix {'x' * 64}"],
        ["-N DROP"],
        ['-A A -m comment --comment "open'],
        [f":C{n} - [0:0]" for n in range(14)]
        + ["-A B -j C0", *(f"-A C{n} -{'jg'[n % 2]} C{n + 1}" for n in range(13))],
    ],
)
def test_refused_though_a_backend_takes_it(lines: list[str]) -> None:
    with pytest.raises(Refused):
        Tables.parse(BASE).apply(filter_text(*lines))


def test_each_commit_by_itself() -> None:
    tables = Tables.parse(BASE)
    with pytest.raises(Refused, match="line 6"):
        tables.apply(filter_text("-P INPUT DROP") + "*filter\n-P OUTPUT DROP\n-X A\nCOMMIT\n" + filter_text("-F"))
    assert tables.policies == {"INPUT": "DROP", "FORWARD": "ACCEPT", "OUTPUT": "ACCEPT"}
    tables.apply("*nat\n:WHAT EVER\n-A THIS -j THAT\nCOMMIT\n" + filter_text("-P OUTPUT DROP"))
    assert tables.policies["OUTPUT"] == "DROP"
    assert len(tables.chains["FORWARD"]) == 1


def test_comment_of_a_rule() -> None:
    tables = Tables.parse(filter_text(r'-A FORWARD -m comment --comment "it\'s \"a\" \\ b" -j DROP'))
    assert tables.chains["FORWARD"][0].comment == r"""it's "a" \ b"""


# ------------------------------------------------------------------------------------------------ sets


def test_ipset_restore() -> None:
    sets = Sets()
    sets.apply_restore(
        """create a hash:ip family inet hashsize 64 maxelem 65536 bucketsize 12 initval 0x12 comment timeout 0
create b hash:net family inet6 hashsize 64 maxelem 9
create c hash:ip,port -exist
add a 10.0.0.1 timeout 5 comment "two words"
add a 10.0.1.0/30
add b fd00::5/64
add b fd00::/80 nomatch
add b fd00::7
add c 10.0.0.1,80
add c 10.0.0.1,udp:53-54
add c 10.0.0.1,udp:53 -exist
del a 10.0.1.3
"""
    )
    assert sets["a"].members == {"10.0.0.1", "10.0.1.0", "10.0.1.1", "10.0.1.2"}
    assert sets["b"].members == {"fd00::/64", "fd00::/80 nomatch", "fd00::7"}
    assert sets["c"].members == {"10.0.0.1,tcp:80", "10.0.0.1,udp:53", "10.0.0.1,udp:54"}
    assert "10.0.0.1,tcp:80" in sets["c"]
    assert "10.0.0.1,tcp:81" not in sets["c"]
    before = sets.copy()
    sets.apply_restore("create d hash:ip,port\nadd d 10.0.0.2,sctp:1\nswap c d\ndestroy d\nflush a\nCOMMIT\n")
    assert {name: one.members for name, one in sets.items()} == {
        "a": frozenset(),
        "b": before["b"].members,
        "c": {"10.0.0.2,sctp:1"},
    }
    assert len(before["a"].members) == 4
    sets.apply_restore("destroy")
    assert sets == {}


@pytest.mark.parametrize(
    "line",
    [
        "create a hash:ip", "create a hash:ip -exist maxelem 5", "create a hash:net -exist", "add a 10.0.0.1",
        "add a 0.0.0.0", "add a fd00::1", "add a 10.0.0.2,80", "add a 10.0.0.9 nomatch",
        "add a 10.0.0.9 timeout 5", "add a 10.0.0.9 comment x", "add a 10.0.0.9 packets 1", "add n 0.0.0.0/0",
        "add n 10.0.0.0/33", "add p 10.0.0.1,tcp:65536", "add p 10.0.0.1", "del a 10.0.0.2",
        "add nope 10.0.0.1", "del nope 10.0.0.1", "swap a nope", "swap a n", "swap a a6", "destroy nope",
        "destroy a", "destroy", "flush nope", "create a hash:ip family", "add full 10.0.0.2",
        f"create {'s' * 32} hash:ip",
    ],
)  # fmt: skip
def test_ipset_refuses(line: str) -> None:
    sets = Sets.of({"a": ("hash:ip", ["10.0.0.1"]), "n": ("hash:net", []), "p": ("hash:ip,port", [])})
    sets.apply_restore("create a6 hash:ip family inet6\ncreate full hash:ip maxelem 1\nadd full 10.0.0.1")
    tables = Tables.parse(filter_text("-A FORWARD -m set --match-set a src -j DROP"), sets)
    with pytest.raises(Refused):
        sets.apply_restore(line, tables)


@pytest.mark.parametrize(
    "line",
    [
        "create b list:set", "create b hash:ip netmask 24", "create b hash:ip forceadd",
        "create b hash:ip family inet5", "create b hash:ip maxelem many", "add a 10.0.0.1-10.0.0.9",
        "add a host", "add a 10.0.0.0/8", "add p 10.0.0.1,icmp:8/0", "add p 10.0.0.1,http",
        "add a 10.0.0.9 skbmark 1", "rename a b", "test a 10.0.0.1", "add a", "-A a 10.0.0.1",
    ],
)  # fmt: skip
def test_ipset_unknown(line: str) -> None:
    sets = Sets.of({"a": ("hash:ip", []), "p": ("hash:ip,port", [])})
    with pytest.raises(Unknown, match="line 2"):
        sets.apply_restore("# comment\n" + line)


def test_restore_is_not_atomic_and_exist_is_lenient() -> None:
    sets = Sets.of({"a": ("hash:ip", ["10.0.0.1"])})
    with pytest.raises(Refused, match="line 2"):
        sets.apply_restore("add a 10.0.0.2\nadd a 10.0.0.1\nadd a 10.0.0.3\n")
    assert sets["a"].members == {"10.0.0.1", "10.0.0.2"}
    sets.apply_restore("create a hash:ip\nadd a 10.0.0.1\ndel a 10.0.0.9\n", exist=True)
    sets.create("n", "hash:net")
    sets.add("n", "10.0.0.0/8")
    sets.add("n", "10.0.0.0/8", exist=True, nomatch=True)
    assert sets["n"].members == {"10.0.0.0/8 nomatch"}
    sets.delete("n", "10.0.0.0/8")
    sets.destroy("n")
    assert list(sets) == ["a"]


# ------------------------------------------------------------------------------------------ the kernel

TOOLS = [
    "ip",
    "ipset",
    *(f"{ip}-{kind}-restore" for ip in ("iptables", "ip6tables") for kind in ("nft", "legacy")),
]
MISSING = [tool for tool in TOOLS if not shutil.which(tool)]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="not root: no network namespace of its own")
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
CLONE_NEWNET = 0x40000000


@pytest.fixture
def in_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Runs a function in a thread that has a network namespace of its own, and so have the processes it
    starts. The namespace ends with the thread: nothing is left behind, whatever happens."""
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))

    def enter() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            pytest.skip(f"no network namespace: {os.strerror(ctypes.get_errno())}")
        seen = subprocess.run(["readlink", "/proc/self/ns/net"], check=True, capture_output=True, text=True).stdout
        assert seen.strip() != os.readlink("/proc/self/ns/net"), "not in a namespace of its own"

    with ThreadPoolExecutor(1) as pool:
        pool.submit(enter).result()
        yield lambda work: pool.submit(work).result()


def run(command: str, text: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command.split(), input=text, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}\n{text}\n{done.stderr}"
    return done


@pytest.mark.root
@needs_root
@needs_tools
def test_the_backends_refuse_the_same(in_namespace: Callable[[Callable[[], None]], None]) -> None:
    def work() -> None:
        for lines, refused in TRANSACTIONS:
            taken = []
            for kind in ("nft", "legacy"):
                run(f"iptables-{kind}-restore", BASE)
                done = run(f"iptables-{kind}-restore --noflush", filter_text(*lines), check=False)
                taken.append(done.returncode == 0)
                if not refused:
                    tables = Tables.parse(BASE)
                    tables.apply(filter_text(*lines))
                    saved = Tables.parse(run(f"iptables-{kind}-save").stdout)
                    assert saved == tables, (kind, lines)
            assert all(taken) is not refused, (lines, taken)

    in_namespace(work)


@pytest.mark.root
@needs_root
@needs_tools
def test_ipset_does_the_same(in_namespace: Callable[[Callable[[], None]], None]) -> None:
    def element(kind: str, rng: random.Random) -> str:
        address = f"10.0.0.{rng.randrange(1, 5)}"
        if kind == "hash:net":
            return f"10.0.0.0/{rng.randrange(0, 33)}" if rng.random() < 0.6 else address
        if kind == "hash:ip":
            return rng.choice([address, "0.0.0.0", "10.0.0.4/31"])
        port = rng.choice(["80", "tcp:80", "udp:80-81", "sctp:0", "tcp:65535"])
        return f"{address},{port}" + f",10.0.0.{rng.randrange(1, 3)}" * (kind == "hash:ip,port,ip")

    def work() -> None:
        rng = random.Random(1)
        sets = Sets()
        kinds = {"a": "hash:ip", "b": "hash:net", "c": "hash:ip,port", "d": "hash:ip,port,ip", "e": "hash:ip"}
        outcomes: Counter[tuple[str, bool]] = Counter()
        for _ in range(400):
            name = rng.choice("abcde")
            exist = rng.choice(["", " -exist"])
            command = rng.choice(["create"] * 3 + ["add"] * 8 + ["del"] * 4 + ["flush", "swap", "destroy"])
            line = f"{command} {name}"
            if command == "create":
                line += f" {kinds[name]} maxelem {rng.choice([4, 4, 5])}{exist}"
            elif command == "add":
                line += f" {element(kinds[name], rng)}{rng.choice(['', '', ' nomatch'])}{exist}"
            elif command == "del":
                line += f" {element(kinds[name], rng)}{exist}"
            elif command == "swap":
                line += f" {rng.choice(sorted(sets) or ['a'])}"
            before = sets.copy()
            done = run("ipset restore", line + "\n", check=False)
            try:
                sets.apply_restore(line)
                taken = True
            except Refused:
                taken = False
            assert taken is (done.returncode == 0), (line, before, done.stderr)
            saved = Sets()
            saved.apply_restore(run("ipset save").stdout)
            assert saved == sets, line
            outcomes[command, taken] += 1
        assert len(outcomes) >= 10, outcomes

    in_namespace(work)


# Packets are put as raw frames into the far ends of veths, and forwarded or bridged by the namespace:
#   v0 → v1 [router] v2 → v3   and back;   p0 → p1 [br0] p3 → p2
CLIENT_MAC, ROUTER_MAC, ELSEWHERE_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:99"
COMMENTS = ["plain", "two words", "it's", r"a \\ b", r"\"c\""]
FRAME_MACS = {"unicast": ELSEWHERE_MAC, "broadcast": "ff:ff:ff:ff:ff:ff", "multicast": "01:00:5e:01:02:03"}
SETUP = """link set lo up
link add v0 type veth peer name v1 address 02:00:00:00:00:02
link add v3 type veth peer name v2 address 02:00:00:00:00:02
link add p0 type veth peer name p1
link add p2 type veth peer name p3
link add br0 type bridge
link set p1 master br0
link set p3 master br0
link set v1 arp off
link set v2 arp off
"""
SYSCTLS = {
    "ipv4/ip_forward": 1,
    "ipv6/conf/all/forwarding": 1,
    "ipv4/conf/all/rp_filter": 0,
    "ipv4/conf/default/rp_filter": 0,
    "netfilter/nf_conntrack_checksum": 0,
    "netfilter/nf_conntrack_tcp_be_liberal": 1,
    "netfilter/nf_conntrack_udp_timeout": 600,
    "bridge/bridge-nf-call-iptables": 1,
    "bridge/bridge-nf-call-ip6tables": 1,
}


def sysctl(name: str, value: int) -> None:
    Path("/proc/sys/net", name).write_text(str(value))


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def datagram(packet: Packet, inner: bytes | None = None, flags: int = 2) -> bytes:
    """The bytes of a packet; `inner` is what an ICMP error quotes, `flags` are TCP's (2 is SYN)."""
    ports = struct.pack("!HH", packet.sport or 0, packet.dport or 0)
    if packet.number == 6:
        body = ports + struct.pack("!IIBBHHH", 1, 1, 5 << 4, flags, 1000, 0, 0)
    elif packet.number == 17:
        body = ports + struct.pack("!HH", 8, 0)
    elif packet.number == 132:
        body = ports + struct.pack("!II", 0, 0) + struct.pack("!BBHIIHHI", 1, 0, 20, 7, 1000, 1, 1, 1)
    elif packet.icmp_type is not None:
        body = struct.pack("!BBHI", packet.icmp_type, packet.icmp_code, 0, 0) + (inner or bytes(24))
    else:
        body = bytes(8)
    src, dst = ip_address(packet.src).packed, ip_address(packet.dst).packed
    if packet.version == 6:
        return struct.pack("!IHBB", 6 << 28, len(body), packet.number, 64) + src + dst + body
    head = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(body), 1, 0, 64, packet.number)
    return head + struct.pack("!H", checksum(head + bytes(2) + src + dst)) + src + dst + body


class Host:
    """The namespace of one backend and family, and what the tracer has to know about its packets."""

    def __init__(self, kind: str, version: int, seed: int) -> None:
        self.version = version
        self.rng = random.Random(seed)
        self.tool = f"{'iptables' if version == 4 else 'ip6tables'}-{kind}"
        self.used: set[Packet] = set()
        for line in SETUP.splitlines():
            run(f"ip {line}")
        for name in ("v0", "v3", "p0", "p1", "p2", "p3", "br0"):
            sysctl(f"ipv6/conf/{name}/disable_ipv6", 1)
        for name in ("v0", "v1", "v2", "v3", "p0", "p1", "p2", "p3", "br0"):
            run(f"ip link set {name} up")
        # conntrack comes with the first rule that asks for it
        run(f"{self.tool}-restore", self.frame_rules())
        for name, value in SYSCTLS.items():
            sysctl(name, value)
        for net, device in ((8, "v1"), (9, "v2")):
            prefix = f"10.{net}.0.0/24" if version == 4 else f"fd00:{net}::/64"
            run(f"ip -{version} route add {prefix} dev {device}")
        self.sockets = {}
        for name in ("v0", "v3", "p0"):
            self.sockets[name] = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self.sockets[name].bind((name, 0))

    def close(self) -> None:
        for one in self.sockets.values():
            one.close()

    def frame_rules(self) -> str:
        """Rules around the filter table: a mark by destination before it, a count of what passes it."""
        mark = "0.0.0.8/0.0.0.8" if self.version == 4 else "::8/::8"
        own = "10.0.0.0/8" if self.version == 4 else "fd00::/8"
        return (
            f"*mangle\n-A PREROUTING -d {mark} -j MARK --set-mark 0x10\n"
            "-A PREROUTING -m conntrack --ctstate NEW\n"
            f"-A POSTROUTING -s {own} -d {own}\nCOMMIT\n"
        )

    def address(self, side: int, number: int | None = None) -> str:
        number = number or self.rng.randrange(1, 15)
        return f"10.{side}.0.{number}" if self.version == 4 else f"fd00:{side}::{number:x}"

    def send(self, packet: Packet, inner: bytes | None = None, flags: int = 2) -> None:
        device = "p0" if packet.bridged else {"v1": "v0", "v2": "v3"}[packet.in_iface or ""]
        mac = FRAME_MACS[packet.pkttype] if packet.bridged else ROUTER_MAC
        kind = 0x0800 if self.version == 4 else 0x86DD
        head = bytes.fromhex((mac + CLIENT_MAC).replace(":", "")) + struct.pack("!H", kind)
        self.sockets[device].send(head + datagram(packet, inner, flags))

    def mark(self, dst: str) -> int:
        return 0x10 if int(ip_address(dst)) & 8 else 0

    def packet(self, src: str, dst: str, protocol: str | int, back: bool = False, **more: Any) -> Packet:
        """Of a client's packet to a server, or of a server's `back`; the mark is that of `frame_rules`."""
        devices = {"in_iface": "v2", "out_iface": "v1"} if back else {"in_iface": "v1", "out_iface": "v2"}
        return Packet(src, dst, protocol, mark=self.mark(dst), **{**devices, **more})

    def flows(self) -> None:
        """Connections that stand while the rules change."""
        self.open: list[tuple[Packet, Packet]] = []
        for number, protocol in enumerate(["udp", "udp", "tcp", "tcp"]):
            src, dst = self.address(8), self.address(9)
            there = self.packet(src, dst, protocol, sport=2000 + number, dport=80 + number, state="ESTABLISHED")
            back = replace(there, src=dst, dst=src, sport=there.dport, dport=there.sport)
            back = replace(back, in_iface="v2", out_iface="v1", mark=self.mark(src))
            self.send(there)
            self.send(back, flags=0x12)
            self.send(there, flags=0x10)
            self.open.append((there, back))

    def random_packet(self) -> tuple[Packet, Callable[[], None]]:
        """A packet, and how to send it."""
        rng = self.rng
        icmp, echo, error = ("icmp", 8, 3) if self.version == 4 else ("icmpv6", 128, 1)
        kind = rng.random()
        if kind < 0.15:
            packet = rng.choice(rng.choice(self.open))
            return packet, partial(self.send, packet, flags=0x10)
        if kind < 0.22:
            there, _ = rng.choice(self.open[:2])
            packet = self.packet(there.dst, there.src, icmp, back=True, icmp_type=error, icmp_code=1, state="RELATED")
            return packet, partial(self.send, packet, inner=datagram(there))
        more: dict[str, Any] = {}
        if rng.random() < 0.25:
            more = {
                "in_iface": "br0",
                "out_iface": "br0",
                "bridged": True,
                "pkttype": rng.choice(list(FRAME_MACS)),
            }
        src, dst = self.address(8), self.address(9)
        if kind < 0.3:
            packet = self.packet(src, dst, "tcp", sport=3000, dport=80, state="INVALID", **more)
            return packet, partial(self.send, packet, flags=0)
        if kind < 0.4 and self.version == 6:
            number = rng.randrange(133, 138)
            # a redirect is to conntrack an error about a flow, and no flow of ours is in it
            state = "INVALID" if number == 137 else "UNTRACKED"
            packet = self.packet(src, dst, icmp, icmp_type=number, state=state, **more)
            return packet, partial(self.send, packet)
        while True:
            protocol: Any = rng.choice(["tcp", "tcp", "udp", "udp", "sctp", icmp, 253])
            src, dst = self.address(8), self.address(9)
            if protocol in ("tcp", "udp", "sctp"):
                ports = {"sport": rng.randrange(1000, 1006), "dport": rng.randrange(80, 86)}
                packet = self.packet(src, dst, protocol, **{**more, **ports})
            elif protocol == icmp:
                packet = self.packet(src, dst, icmp, icmp_type=echo, **more)
            else:
                packet = self.packet(src, dst, protocol, **more)
            # what was let through once is known to conntrack, and would not be new for the bridge's far end
            tuple_ = replace(packet, in_iface=None, out_iface=None, bridged=False, pkttype="unicast")
            if tuple_ not in self.used:
                self.used.add(tuple_)
                return packet, partial(self.send, packet)

    def random_sets(self, prefix: str) -> str:
        rng = self.rng
        family = "inet" if self.version == 4 else "inet6"
        lines = []

        def any_address() -> str:
            return self.address(rng.choice([8, 9]))

        for name, kind in (
            ("i", "hash:ip"),
            ("n", "hash:net"),
            ("p", "hash:ip,port"),
            ("x", "hash:ip,port,ip"),
        ):
            lines.append(f"create {prefix}{name} {kind} family {family} hashsize 64")
            for _ in range({"i": 8, "n": 8, "p": 60, "x": 250}[name]):
                port = f"{rng.choice(['tcp', 'udp', 'sctp'])}:{rng.choice([*range(80, 84), 1000, 1001])}"
                if name == "i":
                    element = any_address()
                elif name == "n":
                    bits = 32 if self.version == 4 else 128
                    length = rng.choice([1, 8, 16, bits - 4, bits - 3, bits - 2, bits - 1, bits])
                    element = f"{any_address()}/{length}" + rng.choice(["", " nomatch"])
                elif name == "p":
                    element = f"{any_address()},{port}"
                else:
                    element = f"{any_address()},{port},{any_address()}"
                lines.append(f"add {prefix}{name} {element} -exist")
        return "\n".join(lines) + "\n"

    def random_rule(self, later: list[str], prefix: str) -> str:
        rng = self.rng
        no = rng.choice(["", "", "! "])
        width = (32, "0.0.0") if self.version == 4 else (128, "::")
        icmp = ("icmp", "icmp", "--icmp-type", [0, 3, 8, "8/0", "3/1", "3/0", "echo-request"])
        if self.version == 6:
            icmp = (
                "ipv6-icmp",
                "icmp6",
                "--icmpv6-type",
                [1, 128, 133, 135, "1/1", "1/0", "redirect", "router-advertisement"],
            )
        spec = []
        if rng.random() < 0.3:
            side, net = rng.choice([("-s", 8), ("-d", 9), ("-s", 9), ("-d", 8)])
            spec.append(f"{no}{side} {self.address(net)}/{width[0] - rng.choice([0, 1, 2, 3, 3, 64, 100]) % width[0]}")
        elif rng.random() < 0.2:
            number, mask = rng.randrange(16), rng.choice([1, 3, 15, 10])
            text = f"0.0.0.{number}/0.0.0.{mask}" if self.version == 4 else f"::{number:x}/::{mask:x}"
            spec.append(f"{no}{rng.choice(['-s', '-d'])} {text}")
        if rng.random() < 0.1:
            spec.append(rng.choice(["-i v1", "! -i v1", "-i v+", "-o v2", "! -o v+", "-i br0", "-o b+", "-o +"]))
        protocol = rng.choice(["", "", "", "tcp", "udp", "sctp", icmp[0], "253"])
        no = rng.choice(["", "", "! "])
        port = rng.choice(["80", "81:82", "83:", ":80", "84"])
        if protocol in ("tcp", "udp", "sctp"):
            spec.append(f"-p {protocol}")
            if rng.random() < 0.4:
                spec.append(f"-m {protocol} {no}--dport {port}")
                spec += ["! --sport 1003:1004"] * (rng.random() < 0.3)
            elif rng.random() < 0.5:
                ports = rng.choice(["--dports 80,82:83", "--sports 1000,1002", "--dports 81", "--ports 80,1001:1003"])
                spec.append(f"-m multiport {no}{ports}")
        elif protocol == icmp[0]:
            spec.append(f"-p {protocol} -m {icmp[1]} {no}{icmp[2]} {rng.choice(icmp[3])}")
        elif protocol:
            spec.append(f"{no}-p {protocol}")
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            name = rng.choice("innpx")
            ways = {"i": 1, "n": 1, "p": 2, "x": 3}[name]
            sides = ",".join(rng.choice(["src", "dst"]) for _ in range(ways))
            spec.append(f"-m set {rng.choice(['', '', '! '])}--match-set {prefix}{name} {sides}")
        other = {
            0: f"-m conntrack {no}--ctstate {','.join(rng.sample(['NEW', 'ESTABLISHED', 'RELATED'], 2))}",
            1: f"-m conntrack {no}--ctstate {rng.choice(['INVALID', 'UNTRACKED', 'INVALID,UNTRACKED'])}",
            2: f"-m physdev {no}--physdev-is-bridged",
            3: f"-m pkttype {no}--pkt-type {rng.choice(['unicast', 'broadcast', 'multicast'])}",
            4: f"-m mark {no}--mark {rng.choice(['0x10', '0x1/0x3', '0/0x20', '0x10/0x10', '1/0x1'])}",
            5: f'-m comment --comment "{rng.choice(COMMENTS)}"',
        }.get(rng.choice([*range(5), *range(14)]))
        spec += [other] if other else []
        targets = ["-j ACCEPT", "-j DROP", "-j RETURN", "-j RETURN", ""]
        marks = ["--set-mark 1", "--set-mark 0x31/0x1", "--set-xmark 0x2/0x3", "--or-mark 0x20"]
        targets += [f"-j MARK {mark}" for mark in [*marks, "--and-mark 0xf0", "--xor-mark 0x11"]]
        targets += ["-j NFLOG --nflog-group 9 --nflog-prefix x"]
        targets += [f"-{rng.choice('jjg')} {rng.choice(later)}" for _ in range(16) if later]
        spec = spec[: rng.choice([1, 9, 9])]
        return " ".join([*spec, rng.choice(targets)]).strip()

    def random_rules(self, prefix: str) -> list[str]:
        """Two transactions: the second edits what the first made."""
        rng = self.rng
        names = ["FORWARD", *(f"C{number}" for number in range(6))]
        lines = [f":FORWARD {rng.choice(['ACCEPT', 'ACCEPT', 'DROP'])} [0:0]"]
        lines += [f":{name} - [0:0]" for name in names[1:]]
        for index, name in enumerate(names):
            for _ in range(rng.randrange(4, 8) if not index else rng.randrange(1, 5)):
                lines.append(f"-A {name} {self.random_rule(names[index + 1 :], prefix)}")
        edits = [f":{name} - [0:0]" for name in rng.sample(names[1:], 1)]
        edits += [":D - [0:0]", f"-A D {self.random_rule([], prefix)}"]
        for index, name in enumerate(names[:4]):
            edits.append(f"-I {name} {self.random_rule([*names[index + 1 :], 'D'], prefix)}")
        edits.append("-D FORWARD 3")
        edits.append(rng.choice([line for line in lines if line.startswith("-A FORWARD")]).replace("-A", "-D", 1))
        edits.append(f"-I FORWARD 2 {self.random_rule(names[1:], prefix)}")
        return [filter_text(*lines), filter_text(*edits)]

    def counters(self, saved: str) -> tuple[Counter[tuple[str, int]], int]:
        """How often each rule of the filter table matched, and how many packets passed it."""
        found: Counter[tuple[str, int]] = Counter()
        passed, table = 0, ""
        numbers: Counter[str] = Counter()
        for line in saved.splitlines():
            table = line if line.startswith("*") else table
            if hit := re.match(r"\[(\d+):\d+\] -A (\S+)", line):
                if table == "*filter":
                    numbers[hit[2]] += 1
                    found[hit[2], numbers[hit[2]]] = int(hit[1])
                elif hit[2] == "POSTROUTING":
                    passed = int(hit[1])
        return +found, passed


def compare(kind: str, version: int, rounds: int, seen: Counter[str]) -> None:
    host = Host(kind, version, seed=version)
    try:
        host.flows()
        passed = 0
        for number in range(rounds):
            sets = Sets()
            text = host.random_sets(f"s{number}-")
            run("ipset restore", text)
            sets.apply_restore(text)
            first, second = host.random_rules(f"s{number}-")
            tables = Tables(sets=sets)
            run(f"{host.tool}-restore", first)
            tables.apply(first)
            done = run(f"{host.tool}-restore --noflush", second, check=False)
            with suppress(Refused):  # the rule that -D names may be the one that went by its number
                tables.apply(second)
                seen["edited"] += 1
                assert done.returncode == 0, f"{second}\n{done.stderr}"
            save = run(f"{host.tool}-save -c").stdout
            saved = Tables.parse(save, sets)
            assert (saved.policies, saved.chains.keys()) == (tables.policies, tables.chains.keys())
            for name, rules in tables.chains.items():
                for one, other in zip_longest(saved.chains[name], rules):
                    assert one == other, f"{name}: {one} | {other}"
            _, passed = host.counters(save)
            expected: Counter[tuple[str, int]] = Counter()
            packets = []
            for _ in range(16):
                packet, send = host.random_packet()
                result = trace(tables, sets, packet)
                expected.update((step.chain, step.number) for step in result.path)
                passed += result.verdict == "ACCEPT"
                packets.append(f"{packet}\n{result}")
                seen.update([packet.state, result.verdict, f"bridged {packet.bridged}"])
                seen.update(re.findall(r" (?:-[jgsdpio]|-m \w+|--match-set s\d+-\w) ", str(result)))
                send()
            for _ in range(1000):
                found = host.counters(run(f"{host.tool}-save -c").stdout)
                if found == (+expected, passed):
                    break
                time.sleep(0.01)
            else:
                both = {key: (found[0][key], expected[key]) for key in found[0] | expected}
                wrong = {key: pair for key, pair in both.items() if pair[0] != pair[1]}
                pytest.fail(
                    f"{host.tool}, round {number}: kernel, tracer: {wrong}, passed {found[1]}, {passed}\n"
                    + "\n".join([first, second, text, *packets])
                )
    finally:
        host.close()


@pytest.mark.root
@needs_root
@needs_tools
@pytest.mark.skipif(not Path("/proc/sys/net/bridge").exists(), reason="no br_netfilter")
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_packets(in_namespace: Callable[[Callable[[], None]], None], kind: str, version: int) -> None:
    seen: Counter[str] = Counter()
    in_namespace(partial(compare, kind, version, 50, seen))
    states = {"NEW", "ESTABLISHED", "RELATED", "INVALID"} | ({"UNTRACKED"} if version == 6 else set())
    assert states | {"ACCEPT", "DROP", "bridged True", "bridged False"} <= seen.keys()
