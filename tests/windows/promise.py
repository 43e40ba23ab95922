"""What no packet may meet while objects change: the promise of semantics.md line 44, by the oracle."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from tests import oracle, worlds
from tests.nodes import key_of
from tests.windows.field import NODE, Asked
from tests.windows.frames import Probe

Object = dict[str, Any]
Objects = list[Object]


@dataclass(frozen=True)
class Step:
    """A change, and what is asked meanwhile. `restart`: another process makes it."""

    title: str
    after: Objects
    asked: tuple[Asked, ...]
    restart: bool = False


def promised(probe: Probe, states: Iterable[Objects]) -> Asked:
    """Whether, in all these worlds, one end denies the packet or both allow it. Each end is judged by itself."""
    source, destination, protocol, port = probe
    seen = [oracle.allowed(w, src=source, dst=destination, protocol=protocol, port=port, node=NODE) for w in states]
    shut = not any(v.egress for v in seen) or not any(v.ingress for v in seen)
    return Asked(probe, shut, all(v.allowed for v in seen))


def meanwhile(several: Sequence[Objects]) -> list[Objects]:
    """What a packet may be judged by while one world becomes the next, and that the next.

    Each world by itself where only policies differ, else every mixture of their objects."""
    versions = [{key_of(o): o for o in world} for world in several]
    keys = list(dict.fromkeys(key for version in versions for key in version))
    choices = {key: _distinct([version.get(key) for version in versions]) for key in keys}
    if all(kind == "NetworkPolicy" or len(choices[kind, name]) == 1 for kind, name in keys):
        return list(several)
    return [[o for o in mixture if o is not None] for mixture in product(*choices.values())]


def _distinct(objects: Iterable[Object | None]) -> list[Object | None]:
    found: list[Object | None] = []
    for one in objects:
        if one not in found:
            found.append(one)
    return found


def asked(before: Objects, after: Objects, probes: Iterable[Probe]) -> tuple[Asked, ...]:
    """The promise for each probe while one world becomes the other."""
    states = meanwhile([before, after])
    return tuple(promised(probe, states) for probe in probes)


def random_walk(rng: random.Random, changes: int) -> list[Step]:
    """A world and its changes: of every kind, alone and several at once, and restarts."""
    world = worlds.random_world(rng, pods=10, nodes=2, policies=6)
    steps = [Step("start", world, ())]
    while len(steps) <= changes:
        before, titles = world, []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            title, grown = worlds.random_event(rng, world)
            if len(meanwhile([before, grown])) > 16:
                break
            titles.append(title)
            world = grown
        chosen = asked(before, world, telling(before, world, rng))
        steps.append(Step(", ".join(titles), world, chosen, restart=rng.random() < 0.1))
    return steps


def telling(before: Objects, after: Objects, rng: random.Random) -> list[Probe]:
    """Probes of which many are denied, and most others go to or come from an isolated pod."""
    candidates = [*worlds.interesting_probes(before, rng, 30), *worlds.interesting_probes(after, rng, 30)]
    shut, judged, others = [], [], []
    for probe in dict.fromkeys(candidates):
        verdict = promised(probe, (before, after))
        ends = ((probe[0], "egress"), (probe[1], "ingress"))
        isolated = any(oracle.isolated(after, address, direction) for address, direction in ends)
        (shut if verdict.shut else judged if isolated else others).append(probe)
    return [*shut[:12], *judged[:12], *others[:4]]


def tour(worlds_in_turn: Sequence[Objects], probes: Sequence[Probe], title: str, changes: int) -> list[Step]:
    """The same few worlds again and again."""
    count = len(worlds_in_turn)
    pairs = [(worlds_in_turn[i], worlds_in_turn[(i + 1) % count]) for i in range(count)]
    steps = [Step(title, after, asked(before, after, probes)) for before, after in pairs]
    return [Step("start", worlds_in_turn[0], ()), *(steps[number % count] for number in range(changes))]
