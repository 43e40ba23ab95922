"""A home whose server takes its friends' connections: what may change while pods connect all the time."""

from __future__ import annotations

from tests.cluster.load import Load
from tests.cluster.prober import Question, probe
from tests.cluster.stage import Stage
from tests.upstream import Case, Probe, Reachability, Step, policy

PODS = {"home/server": {"app": "server"}, "home/friend": {"friend": "yes"}, "home/stranger": {}, "away/guest": {}}
FRIENDS = {"matchLabels": {"friend": "yes"}}
POLICIES = (
    policy(
        "home/friends-only",
        {
            "podSelector": {"matchLabels": {"app": "server"}},
            "ingress": [{"from": [{"podSelector": FRIENDS}, {"namespaceSelector": FRIENDS}]}],
        },
    ),
    policy("away/nobody-comes", {"podSelector": {}, "policyTypes": ["Ingress"]}),
)
EXPECTED = (
    Reachability(tuple(PODS))
    .expect_all_ingress("home/server", False)
    .expect("home/friend", "home/server", True)
    .expect_all_ingress("away/guest", False)
)
STEP = Step(POLICIES, (Probe("TCP", 80, EXPECTED),), {"home": {}, "away": {}}, PODS, (80,))
LIFE = Case(1, "friends only", "TCP", (STEP,))
SERVER, FRIEND, STRANGER, GUEST = PODS


class Home(Stage):
    """The server takes its friends' connections; a stranger and the guest of another namespace are none."""

    def reaches(self, source: str, target: str = SERVER, *, patience: float = 0.3) -> set[bool]:
        """Whether connections are made now, of both families."""
        asks = [Question(self.addresses[source][0], to, "TCP", 80, True) for to in self.addresses[target]]
        return set(probe(self._places, asks, least=0.05, most=patience))

    def load(self, source: str) -> Load:
        return Load(self._places, self.addresses[source][0], self.addresses[SERVER])

    def is_as_written(self) -> None:
        self.play(LIFE)
