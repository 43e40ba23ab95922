"""Whatever somebody does to what is ours is told, and repaired by the next look; what is theirs stays."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest

from agent.dataplane import dataplane as module
from agent.dataplane.applied import parse_ipset_save
from agent.dataplane.inspect import drift, drift_from
from agent.dataplane.render import OPTIONS
from tests.dataplane.kernel import FAMILIES, Kernel, run
from tests.dataplane.scenes import Agent, cluster, desired, without
from tests.tracer import Unknown

pytestmark = pytest.mark.root
JUMP = "-j NPA-FORWARD"


class Damage(NamedTuple):
    """What somebody does, the words of `drift_from` that tell it, and those of `drift` (which knows the kernel only),
    None where it cannot know."""

    do: Callable[[Kernel], object]
    told: str
    told_alone: str | None


def on_both(*lines: str) -> Callable[[Kernel], None]:
    """Lines of `iptables-restore --noflush` in each family, with CLASS replaced by a class chain."""

    def do(kernel: Kernel) -> None:
        for version in FAMILIES:
            kernel.rules(version, *(line.replace("CLASS", class_of(kernel, version)) for line in lines))

    return do


def in_turn(*steps: Callable[[Kernel], object]) -> Callable[[Kernel], None]:
    def do(kernel: Kernel) -> None:
        for step in steps:
            step(kernel)

    return do


def class_of(kernel: Kernel, version: int) -> str:
    """The class chain for ingress with the most rules."""
    chains = kernel.tables(version).chains
    return max((name for name in chains if name.startswith("NPA-I-")), key=lambda name: len(chains[name]))


def altered(kernel: Kernel) -> None:
    """A rule says another port, and the same comment."""
    for version in FAMILIES:
        chain = class_of(kernel, version)
        rules = kernel.tables(version).chains[chain]
        number = next(n for n, rule in enumerate(rules, 1) if "--dport 80" in rule.text)
        rule = rules[number - 1].text.replace("--dport 80", "--dport 8000").removeprefix(f"-A {chain} ")
        kernel.rules(version, f"-R {chain} {number} {rule}")


def narrowed(kernel: Kernel) -> None:
    """A rule gets a match that has no options, which printing shows by its -m alone."""
    kernel.rules(6, "-R NPA-FORWARD 1 -m conntrack --ctstate ESTABLISHED -m eui64 -j RETURN")


def other_class(kernel: Kernel) -> None:
    """A pod is judged by the chain of another."""
    for version in FAMILIES:
        rules = kernel.tables(version).chains
        [one], [other] = rules["NPA-IB-1"], rules["NPA-IB-2"]
        swapped = one.text.replace(one.target.chain, other.target.chain).removeprefix("-A NPA-IB-1 ")
        kernel.rules(version, f"-R NPA-IB-1 1 {swapped}")


def a_set(kernel: Kernel, kind: str, version: int) -> str:
    return next(name for name in kernel.sets() if name.startswith(f"npa{version}-{kind}-"))


def on_sets(kind: str, *words: str) -> Callable[[Kernel], None]:
    """One ipset command on a set of a kind in each family, with SET, MEMBER and OTHER replaced."""

    def do(kernel: Kernel) -> None:
        for version in FAMILIES:
            name = a_set(kernel, kind, version)
            member = min(kernel.sets()[name].members)
            other = ("192.0.2.9", "2001:db8::9")[version // 6] + {"p": "", "n": ",udp:9", "b": "/31"}[kind]
            values = {"SET": name, "MEMBER": member, "OTHER": other}
            kernel.ipset(*(values.get(word, word) for word in words))

    return do


def without_rules(kernel: Kernel) -> None:
    """Our chains go, so that the sets can be destroyed."""
    for version in FAMILIES:
        ours = [name for name in kernel.tables(version).chains if name.startswith("NPA-")]
        kernel.rules(
            version,
            f"-D FORWARD {JUMP}",
            *(f"-F {name}" for name in ours),
            *(f"-X {name}" for name in ours),
        )


def recreated(kind: str, *form: str) -> Callable[[Kernel], None]:
    """The rules go, and a set is made anew in another form."""

    def do(kernel: Kernel) -> None:
        without_rules(kernel)
        for version in FAMILIES:
            name = a_set(kernel, kind, version)
            kernel.ipset("destroy", name)
            kernel.ipset("create", name, *form, "family", "inet" if version == 4 else "inet6")

    return do


def other_family(kernel: Kernel) -> None:
    without_rules(kernel)
    name = a_set(kernel, "p", 4)
    kernel.ipset("destroy", name)
    kernel.ipset("create", name, "hash:ip", "family", "inet6")
    kernel.ipset("add", name, "2001:db8::1")


def smaller_in_use(kernel: Kernel) -> None:
    """A set of another size takes the place of ours under our rules."""
    for version in FAMILIES:
        name = a_set(kernel, "p", version)
        inet = "inet" if version == 4 else "inet6"
        kernel.ipset("create", "theirs", "hash:ip", "family", inet, "maxelem", "4")
        kernel.ipset("swap", "theirs", name)
        kernel.ipset("destroy", "theirs")


def nft(*words: str) -> Callable[[Kernel], object]:
    return lambda _: run("nft", *words)


LARGE = ("maxelem", "1048576")
MISPLACED = "the jump to NPA-FORWARD is not once and first in FORWARD"
MISSING = "is missing or was changed"
CHANGED = "was changed"
TOO_MANY = "too many"
DAMAGES = {
    "one chain flushed": Damage(on_both("-F NPA-FORWARD"), f"NPA-FORWARD {MISSING}", f"NPA-FORWARD {CHANGED}"),
    "a branch flushed": Damage(on_both("-F NPA-INGRESS"), f"NPA-INGRESS {MISSING}", f"NPA-INGRESS {CHANGED}"),
    "a class flushed": Damage(on_both("-F CLASS"), MISSING, CHANGED),
    "a bucket flushed": Damage(on_both("-F NPA-IB-1"), f"NPA-IB-1 {MISSING}", "is used by no pod"),
    "an empty bucket gone": Damage(
        on_both("-D NPA-INGRESS 16", "-X NPA-IB-15"), f"NPA-IB-15 {MISSING}", "NPA-IB-15 is missing"
    ),
    "everything flushed": Damage(on_both("-F"), MISPLACED, MISPLACED),
    "a rule removed": Damage(on_both("-D NPA-FORWARD 1"), f"NPA-FORWARD {MISSING}", f"NPA-FORWARD {CHANGED}"),
    "a class rule removed": Damage(on_both("-D CLASS 1"), MISSING, CHANGED),
    "the last rule removed": Damage(on_both("-D CLASS 4"), MISSING, CHANGED),
    "rules in another order": Damage(
        on_both("-D NPA-FORWARD 1", "-A NPA-FORWARD -m conntrack --ctstate ESTABLISHED -j RETURN"),
        f"NPA-FORWARD {MISSING}",
        f"NPA-FORWARD {CHANGED}",
    ),
    "a rule added": Damage(on_both("-I CLASS -j RETURN"), MISSING, CHANGED),
    "a rule added to a bucket": Damage(on_both("-I NPA-IB-1 -j RETURN"), f"NPA-IB-1 {MISSING}", f"NPA-IB-1 {CHANGED}"),
    "a rule added to an empty bucket": Damage(
        on_both("-A NPA-IB-15 -m comment --comment x/web -j DROP"), f"NPA-IB-15 {MISSING}", f"NPA-IB-15 {CHANGED}"
    ),
    "a rule that looks like ours": Damage(
        lambda kernel: kernel.rules(4, "-A NPA-EB-3 -s 10.0.1.4 ! -d 10.0.1.4 -m comment --comment x -g NPA-IB-3"),
        f"NPA-EB-3 {MISSING}",
        f"NPA-EB-3 {CHANGED}",
    ),
    "a rule that is not even alike": Damage(
        lambda kernel: kernel.rules(4, "-A NPA-EB-3 -s 10.0.0.0/8 -m comment --comment -s -j DROP"),
        f"NPA-EB-3 {MISSING}",
        f"NPA-EB-3 {CHANGED}",
    ),
    "a chain added": Damage(on_both("-N NPA-NEW"), "NPA-NEW should not be there", "NPA-NEW should not be there"),
    "a class added": Damage(on_both("-N NPA-I-0"), "NPA-I-0 should not be there", "NPA-I-0 is used by no pod"),
    "a rule altered": Damage(altered, MISSING, None),
    "a rule narrowed": Damage(narrowed, f"NPA-FORWARD {MISSING}", f"NPA-FORWARD {CHANGED}"),
    "a pod in another's class": Damage(other_class, f"NPA-IB-1 {MISSING}", "is used by no pod"),
    "jump moved down": Damage(on_both(f"-D FORWARD {JUMP}", f"-A FORWARD {JUMP}"), MISPLACED, MISPLACED),
    "jump deleted": Damage(on_both(f"-D FORWARD {JUMP}"), MISPLACED, MISPLACED),
    "jump doubled below": Damage(on_both(f"-A FORWARD {JUMP}"), MISPLACED, MISPLACED),
    "jump doubled above": Damage(on_both(f"-I FORWARD {JUMP}"), MISPLACED, MISPLACED),
    "jump narrowed": Damage(on_both(f"-D FORWARD {JUMP}", f"-I FORWARD -p tcp {JUMP}"), MISPLACED, MISPLACED),
    "jump that goes": Damage(
        on_both(f"-D FORWARD {JUMP}", f"-I FORWARD {JUMP.replace('-j', '-g')}"), MISPLACED, MISPLACED
    ),
    "a jump into the middle": Damage(on_both("-A FORWARD -j NPA-INGRESS"), MISPLACED, MISPLACED),
    "a foreign jump above": Damage(on_both("-I FORWARD -j THEIRS"), MISPLACED, MISPLACED),
    "a foreign accept above": Damage(on_both("-I FORWARD -j ACCEPT"), MISPLACED, MISPLACED),
    "a set's member removed": Damage(on_sets("p", "del", "SET", "MEMBER"), "lacks", None),
    "a named port removed": Damage(on_sets("n", "del", "SET", "MEMBER"), "lacks", None),
    "a block removed": Damage(on_sets("b", "del", "SET", "MEMBER"), "lacks", None),
    "a member added": Damage(on_sets("p", "add", "SET", "OTHER"), TOO_MANY, None),
    "a named port added": Damage(on_sets("n", "add", "SET", "OTHER"), TOO_MANY, None),
    "a block added": Damage(on_sets("b", "add", "SET", "OTHER"), TOO_MANY, None),
    "an exception to a block": Damage(on_sets("b", "add", "SET", "OTHER", "nomatch"), "is of another form", None),
    "a block made an exception": Damage(
        in_turn(on_sets("b", "-exist", "add", "SET", "MEMBER", "nomatch")), "is of another form", None
    ),
    "a set flushed": Damage(on_sets("b", "flush", "SET"), "lacks", None),
    "all sets flushed": Damage(lambda kernel: kernel.ipset("flush"), "lacks", None),
    "a smaller set in its place": Damage(smaller_in_use, "is of another form", None),
    "a set more": Damage(
        lambda kernel: kernel.ipset("create", "npa4-p-00000000000000000000", "hash:ip"), "should not be there", None
    ),
    "rules and a set gone": Damage(in_turn(without_rules, on_sets("p", "destroy", "SET")), "is missing", None),
    "rules and sets gone": Damage(in_turn(without_rules, lambda kernel: kernel.ipset("destroy")), "is missing", None),
    "a set of another type": Damage(recreated("p", "hash:net"), "is of another form", None),
    "a named-port set of another type": Damage(recreated("n", "hash:ip"), "is of another form", None),
    "a type we do not know": Damage(recreated("p", "hash:ip,port,ip"), "is of another form", None),
    "a smaller set": Damage(recreated("p", "hash:ip", "maxelem", "4"), "is of another form", None),
    "a set with counters": Damage(recreated("p", "hash:ip", *LARGE, "counters"), "is of another form", None),
    "a set with timeouts": Damage(recreated("p", "hash:ip", *LARGE, "timeout", "60"), "is of another form", None),
    "a set of another family": Damage(other_family, "is of another form", None),
}
NFT_ONLY = {
    "nft flush ruleset": Damage(nft("flush", "ruleset"), MISSING, None),
    "nft delete table ip filter": Damage(
        nft("delete", "table", "ip", "filter"), MISSING, "IPv4: all chains are missing"
    ),
    "nft flush table ip6 filter": Damage(nft("flush", "table", "ip6", "filter"), MISSING, MISPLACED),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_found_and_repaired(backend: str, kernel: Kernel, name: str) -> None:
    find_and_repair(backend, kernel, DAMAGES[name])


@pytest.mark.parametrize("backend", ["nft"])
@pytest.mark.parametrize("name", NFT_ONLY)
def test_found_and_repaired_from_nft(backend: str, kernel: Kernel, name: str) -> None:
    find_and_repair(backend, kernel, NFT_ONLY[name])


def find_and_repair(backend: str, kernel: Kernel, damage: Damage) -> None:
    theirs(kernel)
    with Agent(backend, cluster()) as agent:
        agent.sync()
        applied = agent.dataplane.read()
        assert list(drift(applied)) == list(drift_from(agent.node, applied, OPTIONS)) == []

        whole = kernel.everything()
        damage.do(kernel)
        harmed = kernel.everything()
        assert harmed != whole
        applied = agent.dataplane.read()
        assert any(damage.told in line for line in drift_from(agent.node, applied, OPTIONS))
        alone = list(drift(applied))
        if damage.told_alone:
            assert any(damage.told_alone in line for line in alone), alone
        report = agent.resync()
        assert report.writes > 0
        assert report.attempts == 1

        assert kernel.ours() == desired(agent.node)
        assert not_ours(kernel.everything()) == not_ours(harmed)
        applied = agent.dataplane.read()
        assert list(drift(applied)) == list(drift_from(agent.node, applied, OPTIONS)) == []
        assert agent.resync().writes == 0


def theirs(kernel: Kernel) -> None:
    """What other programs have here."""
    for version in FAMILIES:
        kernel.rules(version, ":THEIRS - [0:0]", "-A FORWARD -j THEIRS", "-A THEIRS -m mark --mark 0x1 -j ACCEPT")
    kernel.ipset("create", "theirs-too", "hash:ip")
    kernel.ipset("add", "theirs-too", "192.0.2.1")


def not_ours(everything: dict[str, object]) -> dict[str, object]:
    """Without all lines and sets that name us."""
    found: dict[str, object] = {}
    for key, value in everything.items():
        if isinstance(value, dict):
            found[key] = {name: content for name, content in value.items() if not name.startswith("npa")}
        else:
            assert isinstance(value, list)
            found[key] = [line for line in value if "NPA-" not in line]
    return found


def test_policy_of_forward_is_not_ours(backend: str, kernel: Kernel) -> None:
    with Agent(backend, cluster()) as agent:
        agent.sync()
        for version in FAMILIES:
            kernel.iptables(version, "-P", "FORWARD", "DROP")
        assert agent.resync().writes == 0
        agent.dataplane.clean()
        for version in FAMILIES:
            assert ":FORWARD DROP" in kernel.save(version)


def test_found_by_a_change_that_stumbles(backend: str, kernel: Kernel) -> None:
    """Without a look for drift: a change that the kernel refuses because of it is planned anew from what is there."""
    for name in ("a class flushed", "everything flushed", "rules and sets gone", "a smaller set in its place"):
        with Agent(backend, cluster()) as agent:
            agent.resync()
            DAMAGES[name].do(kernel)
            without_web = [o for o in cluster() if o["metadata"]["name"] != "web"]
            agent.change(without_web)
            agent.resync()
            assert kernel.ours() == desired(without_web), name


def test_many_at_once(backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]) -> None:
    """Several damages in a row, in random order: one look repairs all."""
    for _ in many(5):
        with Agent(backend, cluster()) as agent:
            agent.resync()
            for name in rng.sample(sorted(DAMAGES), 4):
                try:
                    DAMAGES[name].do(kernel)
                except (AssertionError, StopIteration, ValueError, KeyError, Unknown):
                    continue  # what it would damage is gone already
            agent.resync()
            assert kernel.ours() == desired(agent.node)


def test_what_was_right_is_not_parsed_again(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until we write ourselves, or somebody else does: then all is read anew, and repaired."""
    parsed: list[str] = []
    monkeypatch.setattr(module, "parse_ipset_save", lambda lines: parsed.append("sets") or parse_ipset_save(lines))
    with Agent(kernel.backend, cluster()) as agent:
        agent.sync()
        agent.resync()
        parsed.clear()
        kernel.rules(4, ":OTHERS - [0:0]", "-A OTHERS -j RETURN")
        for _ in range(3):
            assert agent.resync().writes == 0
        assert not parsed
        name = min(name for name in kernel.sets() if name.startswith("npa4-p-"))
        kernel.ipset("add", name, "192.0.2.1")
        assert agent.resync().members_deleted == 1
        assert kernel.ours() == desired(agent.node)
        kernel.iptables(6, "-F", "NPA-INGRESS")
        assert agent.resync().writes > 0
        assert kernel.ours() == desired(agent.node)
        agent.change(without(cluster(), "Pod/friend"))
        assert agent.resync().writes == 0
        assert agent.resync().writes == 0
        parsed.clear()
        agent.change(cluster())
        kernel.ipset("del", name, kernel_member(kernel, name))
        assert agent.resync().members_added == 1
        assert parsed
        assert kernel.ours() == desired(agent.node)


def kernel_member(kernel: Kernel, name: str) -> str:
    """Any member of a set, as ipset prints it."""
    return next(line.split()[2] for line in kernel.saved_sets().splitlines() if line.startswith(f"add {name} "))
