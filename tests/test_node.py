"""What a node remembers beside its objects: addresses that changed hands, and what policies were read from."""

from __future__ import annotations

from agent.core.addresses import Address, parse_address
from agent.core.node import Node
from agent.core.policy import read_policy
from tests.nodes import apply, delete
from tests.upstream import namespace, pod, policy

SERVER = pod("x/server", {"app": "server"}, ["10.0.0.1"], node="here")
FROM_FRIENDS = policy(
    "x/friends",
    {
        "podSelector": {"matchLabels": {"app": "server"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "friend"}}}]}],
    },
)
ADDRESS = parse_address("10.0.1.2")


def friend(uid: str, *, name: str = "x/friend", app: str = "friend", node: str = "there") -> dict[str, object]:
    made = pod(name, {"app": app}, ["10.0.1.2"], node=node)
    made["metadata"]["uid"] = uid
    return made


def node_with(*objects: dict[str, object]) -> Node:
    node = Node("here")
    for obj in (namespace("x"), SERVER, FROM_FRIENDS, *objects):
        apply(node, obj)
    node.compile()
    node.journal()
    return node


def inherited(node: Node) -> set[Address]:
    node.compile()
    journal = node.journal()
    return set(journal.inherited) | set(journal.released)


def test_the_address_of_a_peer_elsewhere_that_another_pod_gets_inherits_nothing() -> None:
    node = node_with(friend("1"))
    delete(node, ("Pod", "x/friend"))
    assert inherited(node) == set(), "nobody has it yet"
    apply(node, friend("2", name="x/stranger", app="stranger"))
    assert inherited(node) == {ADDRESS}
    apply(node, friend("2", name="x/stranger", app="other"))
    assert inherited(node) == set(), "the same pod"


def test_also_in_one_batch_and_under_one_name_and_while_both_have_it() -> None:
    node = node_with(friend("1"))
    delete(node, ("Pod", "x/friend"))
    apply(node, friend("2", name="x/stranger", app="stranger"))
    assert inherited(node) == {ADDRESS}
    node = node_with(friend("1"))
    apply(node, friend("2", app="stranger"))
    assert inherited(node) == {ADDRESS}, "made anew under the same name"
    node = node_with(friend("1"), friend("2", name="x/stranger", app="stranger"))
    delete(node, ("Pod", "x/friend"))
    assert inherited(node) == {ADDRESS}


def test_who_was_no_peer_leaves_nothing() -> None:
    node = node_with(friend("1", app="stranger"))
    delete(node, ("Pod", "x/friend"))
    apply(node, friend("2"))
    assert inherited(node) == set()


def test_a_local_pod_gives_up_its_address_at_once() -> None:
    node = node_with(friend("1", node="here"))
    delete(node, ("Pod", "x/friend"))
    assert inherited(node) == {ADDRESS}


def test_a_policy_of_equal_content_is_the_newer_one() -> None:
    """Where it stands and what is wrong with it are told of the last one read."""
    node = node_with()
    manifest = {"metadata": {"namespace": "x", "name": "p"}, "spec": {"ingress": [{"ports": [{"port": 0}]}]}}
    node.apply_policy(read_policy(manifest))
    manifest["spec"] = {"ingress": [{"ports": [{"port": 70000}]}]}
    node.apply_policy(read_policy(manifest))
    assert "70000" in node.policies.policies["x/p"].findings[0].message


def test_departed_peers_are_not_remembered_for_ever() -> None:
    """What is left of their connections goes once, with the next journal, although nobody has taken the address."""
    node = node_with(friend("one"))
    delete(node, ("Pod", "x/friend"))
    assert inherited(node) == set()
    node.forget_departed()
    assert inherited(node) == {ADDRESS}
    node.forget_departed()
    assert inherited(node) == set()
    apply(node, friend("two"))
    assert inherited(node) == set()
