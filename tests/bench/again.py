"""A process that starts anew on objects in the files it inherits, and says how much it had to write."""

from __future__ import annotations

import os
import sys

from agent.core.node import Node
from agent.dataplane.dataplane import Dataplane
from agent.dataplane.iptables import Backend
from tests.bench.world import APPLY, LOCAL


def main() -> None:
    backend, *files = sys.argv[1:]
    node = Node(LOCAL)
    for kind, number in zip(("namespaces", "pods", "policies"), files):
        with open(int(number), "rb") as lines:
            lines.seek(0)
            for line in lines:
                APPLY[kind](node, line)
    node.compile()
    dataplane = Dataplane(Backend(backend))
    print(dataplane.sync(node).writes, flush=True)
    os._exit(0)


main()
