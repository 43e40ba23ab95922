"""The oracle against verdicts written by hand: upstream's cases, the scenarios, and each line of the law.

Tests named `test_line_NN` are about that line of `semantics.md`.
"""

from __future__ import annotations

import copy
import ipaddress
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import oracle, recipes, upstream, worlds
from tests.oracle import Block, Verdict, allowed, findings, isolated, parse_address, parse_cidr
from tests.upstream import Case, Object, Step, namespace, pod, policy

# ---------------------------------------------------------------- upstream's cases and the scenarios

FAMILIES = {
    "IPv4": ("10.0.{node}.{n}",),
    "IPv6": ("fd00::{node}:{n}",),
    "dual": ("10.0.{node}.{n}", "fd00::{node}:{n}"),
}
OUTSIDE_V4, OUTSIDE_V6 = "192.0.2.1", "2001:db8::1"


def _addresses(step: Step, forms: Sequence[str]) -> dict[str, list[str]]:
    given_ = {ref: [form.format(node=i % 2 + 1, n=i + 1) for form in forms] for i, ref in enumerate(step.pods)}
    given_[recipes.OUTSIDE] = [OUTSIDE_V6 if ":" in form else OUTSIDE_V4 for form in forms]
    return given_


def _differences(step: Step, forms: Sequence[str]) -> Iterator[str]:
    addresses = _addresses(step, forms)
    world = upstream.objects(step, addresses)
    for probe in step.probes:
        for src, dst, expected in probe.expected.pairs():
            for one, other in zip(addresses[src], addresses[dst]):
                protocol = "ICMPv6" if probe.protocol == "ICMP" and ":" in one else probe.protocol
                verdict = allowed(world, src=one, dst=other, protocol=protocol, port=probe.port)
                if verdict.allowed != expected:
                    yield f"{src} -> {dst} {protocol} {probe.port}: expected {expected}, got {verdict}"


@pytest.mark.parametrize("forms", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("case", upstream.CASES, ids=lambda case: f"{case.number}: {case.title}")
def test_upstream_case(case: Case, forms: Sequence[str]) -> None:
    """Every pair of every step is as the suite expects it."""
    for step in case.steps:
        assert list(_differences(step, forms)) == []


@pytest.mark.parametrize("forms", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    "case", (*recipes.RECIPES, *recipes.SCENARIOS), ids=lambda case: f"{case.number}: {case.title}"
)
def test_recipe_and_scenario(case: Case, forms: Sequence[str]) -> None:
    """Every pair of every step is as the tutorial says."""
    for step in case.steps:
        assert list(_differences(step, forms)) == []


def test_the_data_is_complete() -> None:
    """All cases, all recipes, and no fault in any of them."""
    assert [case.number for case in upstream.CASES] == list(range(1, 49))
    assert [case.number for case in recipes.RECIPES] == list(range(1, 15))
    for case in (*upstream.CASES, *recipes.RECIPES, *recipes.SCENARIOS):
        for step in case.steps:
            assert not findings(upstream.objects(step, _addresses(step, FAMILIES["dual"])))
            assert step.probes
            for probe in step.probes:
                assert probe.protocol == "ICMP" or probe.port in step.ports
            assert set(step.probes[0].expected.endpoints) - {recipes.OUTSIDE} == set(step.pods)


# ---------------------------------------------------------------- a small world for the lines

A, B, C, D, E = "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.1.4", "10.0.2.5"
A6, B6 = "fd00::1", "fd00::2"

WORLD = (
    namespace("x", {"team": "x"}),
    namespace("y", {"team": "y", "empty": ""}),
    namespace("z"),
    pod("x/a", {"app": "a"}, [A, A6], containers=upstream.serving(80, 81)),
    pod("x/b", {"app": "b"}, [B, B6], containers=upstream.serving(80, 81)),
    pod("x/c", {"app": "c", "empty": ""}, [C], containers=upstream.serving(80, 81)),
    pod("y/d", {"app": "b"}, [D], node="node-2", containers=upstream.serving(80, 81)),
    pod("z/e", {}, [E], node="node-2", containers=upstream.serving(80, 81)),
)
EVERYONE = {A, B, C, D, E, OUTSIDE_V4}


def _ask(
    spec: Any, src: str, dst: str, protocol: str = "TCP", port: int | None = 80, *more: Object, **options: Any
) -> Verdict:
    """The verdict in the small world with one policy of x."""
    return allowed([*WORLD, policy("x/p", spec), *more], src=src, dst=dst, protocol=protocol, port=port, **options)


def _sources(spec: Any, *more: Object, dst: str = A) -> set[str]:
    """Which IPv4 addresses reach the destination on TCP 80."""
    return {src for src in EVERYONE - {dst} if _ask(spec, src, dst, "TCP", 80, *more).allowed}


def _destinations(spec: Any, *more: Object, src: str = A) -> set[str]:
    """Which IPv4 addresses the source reaches on TCP 80."""
    return {dst for dst in EVERYONE - {src} if _ask(spec, src, dst, "TCP", 80, *more).allowed}


def _from(*peers: Any, **rest: Any) -> Object:
    """Ingress to x/a from these peers."""
    return {"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"from": list(peers), **rest}]}


def _to(*peers: Any, **rest: Any) -> Object:
    """Egress of x/a to these peers."""
    rule = {"to": list(peers), **rest}
    return {"podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": ["Egress"], "egress": [rule]}


def _block(cidr: str, *excepts: str) -> Object:
    return {"ipBlock": {"cidr": cidr, "except": list(excepts)}}


def _ports(*entries: Object) -> Object:
    """Ingress to x/a on these ports."""
    return {"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"ports": list(entries)}]}


def _open_ports(
    entry: Object,
    *candidates: tuple[str, int],
    pods: Sequence[Object] = (),
    dst: str = A,
) -> set[tuple[str, int]]:
    """Which of the candidates an ingress rule with one port entry opens."""
    spec = {"podSelector": {}, "ingress": [{"ports": [entry]}]}
    return {(proto, port) for proto, port in candidates if _ask(spec, B, dst, proto, port, *pods).allowed}


# ---------------------------------------------------------------- 1-8: selection and isolation


@pytest.mark.parametrize("selector", [{"podSelector": {}}, {}, {"podSelector": None}])
def test_line_01_an_empty_selector_selects_the_namespace(selector: Object) -> None:
    world = [*WORLD, policy("x/p", selector)]
    assert {a for a in (A, A6, B, C, D, E) if isolated(world, a, "ingress")} == {A, A6, B, C}


@pytest.mark.parametrize("rules", [{}, {"ingress": []}, {"ingress": None}])
def test_line_02_isolated_without_rules_allows_nothing(rules: Object) -> None:
    assert _sources({"policyTypes": ["Ingress"], **rules}) == set()
    assert _destinations({"policyTypes": ["Egress"], "egress": rules.get("ingress")}) == set()


def test_line_02_an_empty_rule_allows_everything() -> None:
    assert _sources({"ingress": [{}]}) == EVERYONE - {A}
    assert _destinations({"policyTypes": ["Egress"], "egress": [{}]}) == EVERYONE - {A}
    assert _ask({"ingress": [{}]}, OUTSIDE_V6, A6, "ICMPv6", None).allowed
    assert isolated([*WORLD, policy("x/p", {"ingress": [{}]})], A, "ingress")


@pytest.mark.parametrize(
    "spec, ingress, egress",
    [
        ({}, True, False),
        ({"policyTypes": None}, True, False),
        ({"policyTypes": []}, True, False),
        ({"egress": []}, True, False),
        ({"egress": None}, True, False),
        ({"egress": [{}]}, True, True),
        ({"egress": [{"to": [{}]}]}, True, True),
        ({"policyTypes": [], "egress": [{}]}, True, True),
        ({"policyTypes": ["Ingress"], "egress": [{}]}, True, False),
        ({"policyTypes": ["Egress"]}, False, True),
        ({"policyTypes": ["Egress", "Ingress"]}, True, True),
    ],
)
def test_line_03_default_policy_types(spec: Object, ingress: bool, egress: bool) -> None:
    world = [*WORLD, policy("x/p", spec)]
    assert (isolated(world, A, "ingress"), isolated(world, A, "egress")) == (ingress, egress)


def test_line_04_rules_of_an_absent_direction_are_ignored() -> None:
    egress_only = {"policyTypes": ["Egress"], "ingress": []}
    assert _ask(egress_only, B, A) == Verdict(egress=False, ingress=True)
    ingress_only = {"policyTypes": ["Ingress"], "egress": [{"to": [{"podSelector": {}}]}], "ingress": [{}]}
    assert _ask(ingress_only, A, OUTSIDE_V4).allowed


def test_line_05_policies_add_up() -> None:
    deny = policy("x/deny", {})
    assert _sources(_from({"podSelector": {"matchLabels": {"app": "b"}}}), deny) == {B}
    more = policy("x/more", _from({"podSelector": {"matchLabels": {"app": "c"}}}))
    assert _sources(_from({"podSelector": {"matchLabels": {"app": "b"}}}), deny, more) == {B, C}
    assert _sources({"ingress": [{}]}, deny) == EVERYONE - {A}


def test_line_06_both_directions_must_allow() -> None:
    from_b = _from({"podSelector": {"matchLabels": {"app": "b"}}})
    b_goes_nowhere = policy(
        "x/q", {"podSelector": {"matchLabels": {"app": "b"}}, "policyTypes": ["Egress"], "egress": []}
    )
    assert _ask(from_b, B, A, "TCP", 80, b_goes_nowhere) == Verdict(egress=False, ingress=True)
    assert _ask(from_b, C, A, "TCP", 80, b_goes_nowhere) == Verdict(egress=True, ingress=False)
    assert not Verdict(egress=True, ingress=False).allowed
    assert Verdict(egress=True, ingress=True).allowed


def test_line_07_a_new_connection_is_judged_though_its_reverse_is_allowed() -> None:
    assert _ask({"ingress": []}, A, D).allowed
    assert _ask({"ingress": []}, D, A) == Verdict(egress=True, ingress=False)


@pytest.mark.parametrize("protocol", ["TCP", "UDP", "SCTP", "ICMP", "ICMPv6", "GRE", "ESP"])
def test_line_08_isolation_covers_every_protocol(protocol: str) -> None:
    port = 80 if protocol in ("TCP", "UDP", "SCTP") else None
    assert not _ask({}, D, A, protocol, port).ingress
    assert _ask({"ingress": [{}]}, D, A, protocol, port).ingress
    assert _ask(_from({"namespaceSelector": {}}), D, A, protocol, port).ingress


# ---------------------------------------------------------------- 9-26: peers


@pytest.mark.parametrize("peers", [{}, {"from": []}, {"from": None}])
def test_line_09_no_peers_are_everyone(peers: Object) -> None:
    assert _sources({"ingress": [{**peers, "ports": [{"port": 80}]}]}) == EVERYONE - {A}
    to = {"to": peers.get("from")}
    assert _destinations({"policyTypes": ["Egress"], "egress": [to]}) == EVERYONE - {A}


def test_line_10_pod_selector_alone_is_the_own_namespace() -> None:
    assert _sources(_from({"podSelector": {}})) == {B, C}
    assert _sources(_from({"podSelector": {"matchLabels": {"app": "b"}}})) == {B}
    assert _destinations(_to({"podSelector": {"matchLabels": {"app": "b"}}})) == {B}


def test_line_11_one_peer_is_and_two_peers_are_or() -> None:
    of_y, app_b = {"matchLabels": {"team": "y"}}, {"matchLabels": {"app": "b"}}
    assert _sources(_from({"namespaceSelector": of_y, "podSelector": app_b})) == {D}
    assert _sources(_from({"namespaceSelector": of_y}, {"podSelector": app_b})) == {D, B}
    of_x = {"matchLabels": {"team": "x"}}
    assert _sources(_from({"namespaceSelector": of_x, "podSelector": {"matchLabels": {"app": "c"}}})) == {C}


def test_line_12_the_empty_namespace_selector_is_every_pod() -> None:
    assert _sources(_from({"namespaceSelector": {}})) == EVERYONE - {A, OUTSIDE_V4}
    assert _destinations(_to({"namespaceSelector": {}})) == EVERYONE - {A, OUTSIDE_V4}


def _expressions(*items: tuple[str, str, list[str]]) -> Object:
    return {"matchExpressions": [{"key": k, "operator": o, "values": v} for k, o, v in items]}


@pytest.mark.parametrize(
    "selector, matched",
    [
        (_expressions(("app", "In", ["b", "c"])), {B, C, D}),
        (_expressions(("app", "NotIn", ["b"])), {C, E}),
        (_expressions(("app", "Exists", [])), {B, C, D}),
        (_expressions(("app", "DoesNotExist", [])), {E}),
        (_expressions(("app", "In", ["b", "c"]), ("app", "NotIn", ["b"])), {C}),
        (_expressions(("app", "In", ["b"]), ("app", "In", ["c"])), set()),
        ({"matchLabels": {"app": "b"}, **_expressions(("app", "NotIn", ["b"]))}, set()),
        ({"matchLabels": {"app": "c", "empty": "x"}}, set()),
        ({"matchLabels": {"empty": ""}}, {C}),
        (_expressions(("empty", "In", [""])), {C}),
        (_expressions(("empty", "NotIn", [""])), {B, D, E}),
        (_expressions(("missing", "In", [""])), set()),
    ],
)
def test_line_13_selectors(selector: Object, matched: set[str]) -> None:
    assert _sources(_from({"namespaceSelector": {}, "podSelector": selector})) == matched


def test_line_13_in_namespace_selectors() -> None:
    assert _sources(_from({"namespaceSelector": _expressions(("team", "NotIn", ["x"]))})) == {D, E}
    assert _sources(_from({"namespaceSelector": {"matchLabels": {"empty": ""}}})) == {D}


def test_line_14_the_name_label_is_always_the_name() -> None:
    def peer(name: str) -> Object:
        return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}

    assert _sources(_from(peer("z"))) == {E}
    lying = namespace("z", {"kubernetes.io/metadata.name": "y"})
    assert _sources(_from(peer("z")), lying) == {E}
    assert _sources(_from(peer("y")), lying) == {D}


def test_line_15_negating_selectors_match_only_pods() -> None:
    absent = _expressions(("app", "DoesNotExist", []))
    assert OUTSIDE_V4 not in _sources(_from({"podSelector": absent, "namespaceSelector": {}}))
    assert _sources(_from({"namespaceSelector": _expressions(("team", "NotIn", ["x"]))})) == {D, E}
    assert _sources(_from({"podSelector": absent})) == set()


def test_line_16_relabelling_moves_both_sides() -> None:
    spec = _from({"podSelector": {"matchLabels": {"app": "b"}}})
    assert _sources(spec) == {B}
    as_b = pod("x/c", {"app": "b"}, [C])
    assert _sources(spec, as_b) == {B, C}
    as_a = pod("x/c", {"app": "a"}, [C])
    assert _sources(spec, dst=C) == EVERYONE - {C}
    assert _sources(spec, as_a, dst=C) == {B}
    of_y = _from({"namespaceSelector": {"matchLabels": {"team": "y"}}})
    assert _sources(of_y, namespace("y"), namespace("z", {"team": "y"})) == {E}


def test_line_17_a_block_matches_pods_too() -> None:
    assert _sources(_from(_block("10.0.0.0/24"))) == {B, C}
    assert _sources(_from(_block("0.0.0.0/0"))) == EVERYONE - {A}
    assert _destinations(_to(_block(f"{D}/32"))) == {D}
    assert _destinations(_to(_block("192.0.2.0/24"))) == {OUTSIDE_V4}


def test_line_18_except_cuts_from_its_own_block_only() -> None:
    assert _sources(_from(_block("10.0.0.0/8", "10.0.0.0/24"))) == {D, E}
    assert _sources(_from(_block("10.0.0.0/8", "10.0.0.0/24", "10.0.1.4/32"))) == {E}
    assert _sources(_from(_block("10.0.0.0/8", "10.0.0.0/24"), _block("10.0.0.2/32"))) == {B, D, E}
    pods_of_x: Object = {"podSelector": {}}
    assert _sources(_from(_block("10.0.0.0/8", "10.0.0.0/24"), pods_of_x)) == {B, C, D, E}


@pytest.mark.parametrize(
    "text, block",
    [
        ("10.1.2.3/16", "10.1.0.0/16"),
        ("010.001.0.0/16", "10.1.0.0/16"),
        ("0010.08.09.0/24", "10.8.9.0/24"),
        ("10.0.0.0/08", "10.0.0.0/8"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("255.255.255.255/0", "0.0.0.0/0"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::FFFF:a00:1/128", "10.0.0.1/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::ffff:10.0.0.1/95", "::fffe:0:0/95"),
        ("0:0:0:0:0:ffff:010.0.0.1/128", "10.0.0.1/32"),
        ("fd00::1/64", "fd00::/64"),
        ("00fd::/0016", "fd::/16"),
        ("000fd00::/16", "fd00::/16"),
        ("64:ff9b::1.2.3.4/96", "64:ff9b::/96"),
        ("1:2:3:4:5:6:1.2.3.4/128", "1:2:3:4:5:6:102:304/128"),
        ("1:2:3:4:5:6:7::/112", "1:2:3:4:5:6:7:0/112"),
        ("::/0", "::/0"),
    ],
)
def test_line_19_blocks_are_read_as_the_server_reads_them(text: str, block: str) -> None:
    """The right column is in the plain form that Python's own parser reads."""
    plain = ipaddress.ip_network(block)
    assert parse_cidr(text) == Block(plain.version, int(plain.network_address), plain.prefixlen)


@pytest.mark.parametrize(
    "text",
    """10.0.0.1|10.0.0.0/|10.0.0.0/33|10.0.0.0/-1|10.0.0.0/+8|10.0.0.0/8 | 10.0.0.0/8|10.0.0.0 /8
    |10.0.0.0/255.0.0.0|10.0.0/8|10.0.0.0.0/8|10.0.0.256/8|10..0.0/8|0x0a.0.0.0/8|10.0.0.0/8/8|/8||/|fd00::
    |fe80::1%eth0/64|fd00::/129|::ffff:10.0.0.0/129|fd00:/16|:fd00::/16|fd00:::/16|1::2::3/64|12345::/16
    |1:2:3:4:5:6:7:8::/64|1:2:3:4:5:6:7::8/64|1:2:3:4:5:6:7/64|1.2.3.4::/64|::1.2.3/96|[fd00::]/16
    |10.0.0.0/٨|١٠.0.0.0/8""".replace("\n    ", "").split("|"),
)
def test_line_19_bad_blocks(text: str) -> None:
    assert parse_cidr(text) is None
    assert _sources(_from(_block(text))) == set()


def test_line_19_in_verdicts() -> None:
    assert _sources(_from(_block("010.0.000.002/32"))) == {B}
    assert _sources(_from(_block("::ffff:10.0.0.0/120", "10.0.0.3/32"))) == {B}
    assert _sources(_from(_block("10.0.1.99/24"))) == {D}
    assert parse_address("::ffff:10.0.0.1") == parse_address("010.0.0.1") == parse_address(A)


def test_line_20_the_whole_of_a_family() -> None:
    assert _ask(_from(_block("0.0.0.0/0")), OUTSIDE_V4, A).allowed
    assert _ask(_from(_block("::/0")), OUTSIDE_V6, A6).allowed
    assert _sources(_from(_block("0.0.0.0/0", "128.0.0.0/1"))) == EVERYONE - {A, OUTSIDE_V4}


def test_line_21_families_do_not_mix() -> None:
    assert not _ask(_from(_block("0.0.0.0/0")), B6, A6).allowed
    assert not _ask(_from(_block("::/0")), B, A).allowed
    assert not _ask(_from(_block("::ffff:0:0/96")), B6, A6).allowed
    assert _ask(_from(_block("::ffff:0:0/96")), B, A).allowed


@pytest.mark.parametrize(
    "status, held",
    [
        ({"podIP": B, "podIPs": [{"ip": B}, {"ip": B6}]}, {B, B6}),
        ({"podIP": B}, {B}),
        ({"podIP": B, "podIPs": []}, {B}),
        ({"podIP": B, "podIPs": None}, {B}),
        ({"podIP": B, "podIPs": [{"ip": D}, {"ip": B6}]}, {B}),
        ({"podIPs": [{"ip": B}, {"ip": B6}]}, {B, B6}),
        ({}, set()),
    ],
)
def test_line_21_the_addresses_of_a_pod(status: Object, held: set[str]) -> None:
    one = {**pod("x/one"), "status": {"phase": "Running", **status}}
    world = [namespace("x"), one, policy("x/p", {})]
    assert {a for a in (B, B6, D) if isolated(world, a, "ingress")} == held


def test_line_22_host_network_pods_are_their_node() -> None:
    node = "172.16.0.1"
    host = pod("x/host", {"app": "b"}, [node])
    host["spec"]["hostNetwork"] = True
    from_b = _from({"podSelector": {}}, {"namespaceSelector": {}})
    assert not isolated([*WORLD, policy("x/p", {}), host], node, "ingress")
    assert not _ask(from_b, node, A, "TCP", 80, host).allowed
    assert _ask(_from(_block("172.16.0.0/16")), node, A, "TCP", 80, host).allowed
    assert _ask({"ingress": []}, A, node, "TCP", 80, host).allowed


@pytest.mark.parametrize(
    "phase, live",
    [
        ("Running", True),
        ("Pending", True),
        ("Unknown", True),
        (None, True),
        ("Succeeded", False),
        ("Failed", False),
    ],
)
def test_line_23_live_pods(phase: str | None, live: bool) -> None:
    one = pod("x/b", {"app": "b"}, [B])
    one["status"]["phase"] = phase
    one["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert (B in _sources(_from({"podSelector": {}}), one)) is live
    assert isolated([*WORLD, one, policy("x/p", {})], B, "ingress") is live


def test_line_24_a_shared_address_is_judged_by_all_policies() -> None:
    twin = pod("y/twin", {"app": "twin"}, [A], node="node-2", containers=upstream.serving(8080))
    of_twin = policy("y/q", {"podSelector": {"matchLabels": {"app": "twin"}}, "ingress": []})
    assert _sources({"policyTypes": ["Egress"]}, twin, of_twin) == set()
    from_c = policy("y/r", {"ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": "x"}}}]}]})
    assert _sources(_from({"namespaceSelector": {"matchLabels": {"team": "y"}}}), twin, from_c) >= {B, C, D}
    goes_to_twin = policy(
        "z/s",
        {
            "policyTypes": ["Egress"],
            "egress": [{"to": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "twin"}}}]}],
        },
    )
    assert _ask({"policyTypes": ["Egress"]}, E, A, "TCP", 80, twin, goes_to_twin).allowed
    assert _ask({"policyTypes": ["Egress"]}, E, B, "TCP", 80, twin, goes_to_twin).egress is False
    named = {"ingress": [{"ports": [{"port": "serve-8080-tcp"}, {"port": "serve-80-tcp"}]}]}
    assert _ask(named, C, A, "TCP", 8080, twin).allowed
    assert _ask(named, C, A, "TCP", 80, twin).allowed
    assert not _ask(named, C, A, "TCP", 81, twin).allowed


def test_line_25_a_pod_without_an_address_is_in_no_set() -> None:
    waiting = pod("x/b", {"app": "b"})
    assert _sources(_from({"podSelector": {}}), waiting) == {C}
    assert not isolated([*WORLD, waiting, policy("x/p", {})], B, "ingress")


def test_line_26_a_namespace_that_is_not_seen() -> None:
    unseen = [obj for obj in WORLD if obj["kind"] != "Namespace"]

    def reaches(peer: Object, objects: Sequence[Any] = unseen) -> bool:
        world = [*objects, policy("x/p", _from(peer))]
        return allowed(world, src=B, dst=A, protocol="TCP", port=80).allowed

    assert isolated([*unseen, policy("x/p", {})], A, "ingress")
    assert reaches({"podSelector": {}})
    assert not reaches({"namespaceSelector": {}})
    assert not reaches({"namespaceSelector": _expressions(("team", "DoesNotExist", []))})
    assert not reaches({"namespaceSelector": {}, "podSelector": {}})
    assert reaches({"namespaceSelector": {}}, oracle.as_file(unseen))
    assert reaches({"namespaceSelector": {"matchLabels": {oracle.NAME_LABEL: "x"}}}, oracle.as_file(unseen))


# ---------------------------------------------------------------- 27-33: ports


@pytest.mark.parametrize("ports", [{}, {"ports": []}, {"ports": None}])
def test_line_27_no_ports_are_everything(ports: Object) -> None:
    spec = {"ingress": [{"from": [{"podSelector": {}}], **ports}]}
    for protocol, port in (("TCP", 1), ("UDP", 65535), ("SCTP", 80), ("ICMP", None), ("GRE", None)):
        assert _ask(spec, B, A, protocol, port).allowed


@pytest.mark.parametrize("protocol", ["ICMP", "ICMPv6", "GRE"])
def test_line_27_ports_never_match_another_protocol(protocol: str) -> None:
    entries: tuple[Object, ...] = ({}, {"protocol": "TCP"}, {"protocol": "UDP"}, {"protocol": "SCTP"}, {"port": 80})
    assert not _ask(_ports(*entries), B, A, protocol, None).allowed


@pytest.mark.parametrize(
    "entry, opened",
    [
        ({}, {("TCP", 80), ("TCP", 81)}),
        ({"protocol": None, "port": None, "endPort": None}, {("TCP", 80), ("TCP", 81)}),
        ({"protocol": "UDP"}, {("UDP", 80)}),
        ({"port": 80}, {("TCP", 80)}),
        ({"port": 80, "protocol": "UDP"}, {("UDP", 80)}),
        ({"protocol": "SCTP"}, {("SCTP", 80)}),
    ],
)
def test_line_28_port_defaults(entry: Object, opened: set[tuple[str, int]]) -> None:
    assert _open_ports(entry, ("TCP", 80), ("TCP", 81), ("UDP", 80), ("SCTP", 80)) == opened


def _named(ref: str, address: str, *ports: Object, **spec: Any) -> Object:
    made = pod(ref, {"app": ref[-1]}, [address], containers=[{"name": "main", "ports": list(ports)}])
    made["spec"] |= spec
    return made


def test_line_29_named_ports_resolve_on_the_destination() -> None:
    web_80 = {"name": "web", "containerPort": 80}
    web_81 = {"name": "web", "containerPort": 81}
    udp = {"name": "web", "containerPort": 53, "protocol": "UDP"}
    pods = (_named("x/a", A, web_80, udp), _named("x/b", B, web_81))
    candidates = (("TCP", 80), ("TCP", 81), ("TCP", 53), ("UDP", 53), ("UDP", 80))
    assert _open_ports({"port": "web"}, *candidates, pods=pods) == {("TCP", 80)}
    assert _open_ports({"port": "web", "protocol": "UDP"}, *candidates, pods=pods) == {("UDP", 53)}
    egress = {
        "podSelector": {"matchLabels": {"app": "c"}},
        "policyTypes": ["Egress"],
        "egress": [{"ports": [{"port": "web"}]}],
    }
    reached = {(d, n) for d in (A, B) for n in (80, 81) if _ask(egress, C, d, "TCP", n, *pods).allowed}
    assert reached == {(A, 80), (B, 81)}


def test_line_30_where_a_name_is_searched() -> None:
    def containers(**spec: Any) -> Object:
        return {**_named("x/a", A), "spec": {"nodeName": "node-1", **spec}}

    def one(number: int, protocol: str | None = None) -> Object:
        return {"ports": [{"name": "web", "containerPort": number, "protocol": protocol}]}

    candidates = tuple(("TCP", n) for n in (1, 2, 3, 4))
    entry = {"port": "web"}
    init_and_sidecar = [one(1), {**one(2), "restartPolicy": "Always"}]
    sidecar = containers(initContainers=init_and_sidecar, containers=[one(4, "UDP")])
    assert _open_ports(entry, *candidates, pods=[sidecar]) == {("TCP", 2)}
    main_first = containers(initContainers=init_and_sidecar, containers=[one(3), one(4)])
    assert _open_ports(entry, *candidates, pods=[main_first]) == {("TCP", 3)}
    init_only = containers(initContainers=[one(1)], containers=[{"ports": None}])
    assert _open_ports(entry, *candidates, pods=[init_only]) == set()
    host = containers(containers=[one(3)], hostNetwork=True)
    to_host = {"policyTypes": ["Egress"], "egress": [{"ports": [entry]}]}
    assert not _ask(to_host, B, A, "TCP", 3, host).allowed


def test_line_31_named_ports_of_egress() -> None:
    named = {"ports": [{"port": "serve-80-tcp"}]}
    assert _destinations(_to(**named)) == EVERYONE - {A, OUTSIDE_V4}
    assert _destinations(_to(_block("10.0.0.0/24"), **named)) == {B, C}
    assert _destinations(_to(_block("0.0.0.0/0", "10.0.0.0/24"), **named)) == {D, E}
    assert not _ask(_to(**named), A, B, "TCP", 81).allowed


@pytest.mark.parametrize(
    "entry, opened",
    [
        ({"port": 80, "endPort": 82}, {80, 81, 82}),
        ({"port": 80, "endPort": 80}, {80}),
        ({"port": 80, "endPort": None}, {80}),
        ({"port": 1, "endPort": 65535}, {1, 79, 80, 81, 82, 83, 65535}),
        ({"port": 83, "endPort": 65535}, {83, 65535}),
    ],
)
def test_line_32_end_port_is_inclusive(entry: Object, opened: set[int]) -> None:
    candidates = tuple(("TCP", n) for n in (1, 79, 80, 81, 82, 83, 65535))
    assert {port for _, port in _open_ports(entry, *candidates)} == opened
    assert _open_ports(entry, ("UDP", 80)) == set()


@pytest.mark.parametrize("protocol", ["UDP", "SCTP"])
def test_line_33_other_protocols_isolate_tcp(protocol: str) -> None:
    spec = _ports({"protocol": protocol, "port": 80})
    assert not _ask(spec, B, A, "TCP", 80).allowed
    assert _ask(spec, B, A, protocol, 80).allowed


def test_line_37_a_pod_reaches_itself() -> None:
    deny = {"policyTypes": ["Ingress", "Egress"]}
    assert _ask(deny, A, A) == Verdict(egress=True, ingress=True)
    assert _ask(deny, A6, "FD00:0::1", "ICMPv6", None).allowed
    assert not _ask(deny, A, B).allowed


# ---------------------------------------------------------------- 48-53: bad input


@pytest.mark.parametrize(
    "peer",
    [
        {},
        {"podSelector": None},
        {"ipBlock": {"cidr": "0.0.0.0/0"}, "podSelector": {}},
        {"ipBlock": {"cidr": "0.0.0.0/0"}, "namespaceSelector": {}},
        {"ipBlock": {}},
        _block(""),
        _block("10.0.0.2"),
        _block("10.0.0.0/8", "10.0.0.0/8"),
        _block("10.0.0.0/8", "0.0.0.0/0"),
        _block("10.0.0.0/8", "11.0.0.0/16"),
        _block("10.0.0.0/8", "fd00::/16"),
        _block("10.0.0.0/8", "10.0.0.3"),
        _block("10.0.0.0/8", "192.168.0.0/16", "10.0.0.3/32"),
        {"podSelector": _expressions(("app", "In", []))},
        {"podSelector": _expressions(("app", "NotIn", []))},
        {"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": None}]}},
        {"podSelector": _expressions(("app", "Exists", ["b"]))},
        {"podSelector": _expressions(("none", "DoesNotExist", ["b"]))},
        {"podSelector": _expressions(("app", "in", ["b"]))},
        {"podSelector": {"matchExpressions": [{"key": "app"}]}},
        {"podSelector": _expressions(("", "DoesNotExist", []))},
        {"podSelector": _expressions(("-x", "DoesNotExist", []))},
        {"podSelector": _expressions(("a/b/c", "DoesNotExist", []))},
        {"podSelector": _expressions(("/b", "DoesNotExist", []))},
        {"podSelector": _expressions(("UP.com/b", "DoesNotExist", []))},
        {"podSelector": _expressions(("a" * 64, "DoesNotExist", []))},
        {"namespaceSelector": {"matchLabels": {"team!": "x"}}},
        {"namespaceSelector": {}, "podSelector": _expressions(("app", "Equals", ["b"]))},
    ],
)
def test_line_48_a_faulty_peer_voids_its_rule(peer: Object) -> None:
    rest = {"from": [{"podSelector": {"matchLabels": {"app": "c"}}}]}
    spec = _from({"podSelector": {}}, peer)
    assert _sources(spec) == set()
    assert findings([policy("x/p", spec)]) == {("x/p", "spec.ingress[0]")}
    spec["ingress"].append(rest)
    assert _sources(spec) == {C}
    assert _destinations(_to({"podSelector": {}}, peer)) == set()


@pytest.mark.parametrize(
    "entry",
    [
        {"port": 0},
        {"port": 65536},
        {"port": -80},
        {"port": "80"},
        {"port": ""},
        {"port": "HTTP"},
        {"port": "a--b"},
        {"port": "-a"},
        {"port": "a-"},
        {"port": "a_b"},
        {"port": "sixteen-letters-"},
        {"port": "sixteen-letterss"},
        {"endPort": 80},
        {"port": "serve-80-tcp", "endPort": 80},
        {"port": 80, "endPort": 79},
        {"port": 80, "endPort": 65536},
        {"protocol": "tcp", "port": 80},
        {"protocol": "", "port": 80},
        {"protocol": "ICMP"},
    ],
)
def test_line_48_a_faulty_port_voids_its_rule(entry: Object) -> None:
    spec = _ports({"port": 80}, entry)
    assert _sources(spec) == set()
    assert isolated([*WORLD, policy("x/p", spec)], A, "ingress")
    assert findings([policy("x/p", spec)]) == {("x/p", "spec.ingress[0]")}
    spec["ingress"].append({"ports": [{"port": 80}]})
    assert _sources(spec) == EVERYONE - {A}


def test_line_48_good_names_and_keys_are_no_fault() -> None:
    good_key = "Some.prefix".lower() + "/Na_me.1-x"
    spec = _from(
        {"podSelector": _expressions((good_key, "DoesNotExist", []), ("a" * 63, "DoesNotExist", []))},
        ports=[{"port": "fifteen-letters"}, {"port": "1a"}, {"port": "a"}, {"port": 80}],
    )
    assert not findings([policy("x/p", spec)])
    assert _sources(spec) == {B, C}


def test_line_48_findings_name_every_rule() -> None:
    spec = {"ingress": [{}, {"from": [{}]}], "egress": [{"ports": [{"port": 0}]}, {}], "policyTypes": ["Egress"]}
    assert findings([policy("x/p", spec)]) == {("x/p", "spec.ingress[1]"), ("x/p", "spec.egress[0]")}


@pytest.mark.parametrize(
    "selector",
    [
        _expressions(("app", "In", [])),
        _expressions(("app", "Is", ["b"])),
        {"matchLabels": {"-app": "b"}},
        {"matchLabel": {"app": "b"}},
    ],
)
def test_line_49_a_faulty_pod_selector(selector: Object) -> None:
    spec = {"podSelector": selector, "ingress": [{}]}
    assert _sources(spec) == set()
    world = [*WORLD, policy("x/p", spec)]
    assert {a for a in (A, B, C, D) if isolated(world, a, "ingress")} == {A, B, C}
    assert not isolated(world, A, "egress")
    assert findings(world) == {("x/p", "spec.podSelector")}
    spec["egress"] = [{"to": [{}]}]
    assert isolated([*WORLD, policy("x/p", spec)], A, "egress")


@pytest.mark.parametrize("types", [["ingress"], ["Ingress", "egress"], [""], ["Egress", "Any"]])
def test_line_49_faulty_policy_types(types: list[str]) -> None:
    spec = {**_from({"podSelector": {}}), "policyTypes": types}
    world = [*WORLD, policy("x/p", spec)]
    assert isolated(world, A, "ingress")
    assert isolated(world, A, "egress")
    assert not isolated(world, B, "ingress")
    assert _sources(spec) == {B, C}
    assert _destinations(spec) == set()
    assert findings(world) == {("x/p", "spec.policyTypes")}


@pytest.mark.parametrize(
    "rule",
    [
        {"form": [{"podSelector": {}}]},
        {"to": [{"podSelector": {}}]},
        {"form": None},
        {"from": [{"podSelector": {}, "serviceSelector": {}}]},
        {"from": [{"podSelector": {"matchLabel": {}}}]},
        {"from": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "DoesNotExist", "x": 1}]}}]},
        {"from": [{"ipBlock": {"cidr": "0.0.0.0/0", "excepts": ["10.0.0.0/8"]}}]},
        {"ports": [{"port": 80, "endport": 81}]},
    ],
)
def test_line_50_an_unknown_field_voids_the_rule(rule: Object) -> None:
    spec = {"ingress": [rule]}
    assert _sources(spec) == set()
    assert findings([policy("x/p", spec)]) == {("x/p", "spec.ingress[0]")}
    assert _sources({"ingress": [rule, {}]}) == EVERYONE - {A}


def test_line_50_an_unknown_field_in_spec_closes_both_directions() -> None:
    spec = {**_from({"podSelector": {}}), "policyTypes": ["Ingress"], "Egress": []}
    world = [*WORLD, policy("x/p", spec)]
    assert isolated(world, A, "ingress")
    assert isolated(world, A, "egress")
    assert not isolated(world, B, "ingress")
    assert _sources(spec) == set()
    assert _destinations(spec) == set()
    assert findings(world) == {("x/p", "spec")}


def test_line_51_an_invalid_label_value_is_compared_as_it_is() -> None:
    odd = "not a value!"
    spec = _from({"podSelector": _expressions(("app", "NotIn", [odd, "b"]))})
    assert _sources(spec) == {C}
    assert not findings([policy("x/p", spec)])
    assert _sources(_from({"podSelector": {"matchLabels": {"app": odd}}})) == set()
    assert _sources(_from({"podSelector": {"matchLabels": {"app": odd}}}), pod("x/c", {"app": odd}, [C])) == {C}


@pytest.mark.parametrize("obj", [policy("x/p"), {**policy("x/p"), "spec": None}, policy("x/p", {})])
def test_line_52_no_spec_isolates_for_ingress(obj: Object) -> None:
    world = [*WORLD, obj]
    assert {a for a in (A, B, D) if isolated(world, a, "ingress")} == {A, B}
    assert not isolated(world, A, "egress")
    assert not findings(world)


def test_line_52_null_is_absent() -> None:
    nulls: Mapping[str, Any] = {"podSelector": None, "namespaceSelector": None, "ipBlock": None}
    assert _sources(_from({**nulls, "podSelector": {}})) == {B, C}
    assert _sources(_from({**nulls, "namespaceSelector": {}})) == {B, C, D, E}
    assert _sources(_from({**nulls, "ipBlock": {"cidr": "10.0.0.0/24", "except": None}})) == {B, C}
    assert _sources(_from(dict(nulls))) == set()
    assert _sources(_from({"podSelector": {"matchLabels": None, "matchExpressions": None}})) == {B, C}
    assert _sources(_from({"podSelector": {"matchLabels": {"empty": None}}})) == {C}
    assert _sources({"policyTypes": None, "ingress": [{"from": None, "ports": None}]}) == EVERYONE - {A}


@pytest.mark.parametrize("rule", [None, {"from": [None]}, {"ports": [None]}])
def test_line_52_a_null_item_allows_nothing(rule: Any) -> None:
    assert _sources({"ingress": [rule]}) == set()


def test_line_53_last_of_a_name_wins_and_the_default_namespace() -> None:
    assert _sources({"ingress": []}, policy("x/p", {"ingress": [{}]})) == EVERYONE - {A}
    nameless = policy("/p", {})
    del nameless["metadata"]["namespace"]
    assert isolated([pod("default/one", {}, [A]), nameless], A, "ingress")
    with pytest.raises(ValueError, match="another apiVersion"):
        findings([{**policy("x/p", {}), "apiVersion": "extensions/v1beta1"}])


# ---------------------------------------------------------------- the node, and the questions themselves


def test_a_node_judges_only_its_own_pods() -> None:
    both = {"policyTypes": ["Ingress", "Egress"]}
    of_y = policy("y/q", both)
    closed, half_a, half_d = (False, False), (False, True), (True, False)
    assert tuple(_ask(both, A, D, "TCP", 80, of_y)) == closed
    assert tuple(_ask(both, A, D, "TCP", 80, of_y, node="node-1")) == half_a
    assert tuple(_ask(both, A, D, "TCP", 80, of_y, node="node-2")) == half_d
    assert _ask(both, A, D, "TCP", 80, of_y, node="node-3").allowed


def test_a_question_without_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="no IP address"):
        allowed([], src="10.0.0.1/32", dst=A, protocol="TCP", port=80)


# ---------------------------------------------------------------- the worlds


@pytest.mark.parametrize("name", worlds.FAULTS)
def test_every_fault_is_found(name: str) -> None:
    """And a policy without one has none."""
    for seed in range(20):
        chooser = worlds.Chooser(random.Random(seed).randint)
        made = worlds.make_policy(chooser, "x", "p")
        made["spec"] = made["spec"] or {}
        assert not findings([made])
        worlds.FAULTS[name](chooser, made["spec"])
        assert findings([made])


def test_random_worlds_are_dense() -> None:
    """Every verdict and every event comes often, and nothing changes a world that was given."""
    verdicts: list[Verdict] = []
    names: set[str] = set()
    for seed in range(100):
        rng = random.Random(seed)
        world = worlds.random_world(rng, faults=0.2)
        for _ in range(5):
            before = copy.deepcopy(world)
            name, after = worlds.random_event(rng, world, faults=0.1)
            assert world == before
            names.add(name)
            world = after
        for src, dst, protocol, port in worlds.interesting_probes(world, rng, 20):
            verdicts.append(allowed(world, src=src, dst=dst, protocol=protocol, port=port))
    assert names == set(worlds.EVENTS)
    for verdict in ((True, True), (True, False), (False, True), (False, False)):
        assert verdicts.count(Verdict(*verdict)) > 20


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_strategies_make_worlds_that_can_be_judged(data: st.DataObject) -> None:
    history = data.draw(worlds.histories(faults=0.2))
    _, world = history[-1]
    src, dst, protocol, port = data.draw(worlds.probes(world))
    verdict = allowed(world, src=src, dst=dst, protocol=protocol, port=port)
    if not isolated(world, src, "egress"):
        assert verdict.egress
    if not isolated(world, dst, "ingress"):
        assert verdict.ingress
    data.draw(worlds.events(world))


@given(worlds.worlds(), worlds.policies(faults=0.5), worlds.pods(), worlds.namespaces())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_strategies_for_parts(world: list[Object], one_policy: Object, one_pod: Object, one_namespace: Object) -> None:
    assert not findings(world)
    findings([*world, one_policy, one_pod, one_namespace])
