"""Asking, with real packets, who reaches whom: all probes at once, in one epoll loop.

A probe that a policy denies is dropped in silence, so silence is the answer "not reached". Each probe is a
flow of its own (its own port, or ICMP identifier): an earlier answer's conntrack entry is never met again.
"""

import select
import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence

from agent.lab.fabric import Fabric
from agent.lab.flights import Flight, Outcome, Probe, Shared, depart
from agent.lab.servers import raise_file_limit

__all__ = ["Outcome", "Probe", "probe"]


def probe(
    fabric: Fabric,
    probes: Sequence[Probe],
    *,
    timeout: float = 0.4,
    patience: float = 1.5,
    in_flight: int = 1000,
) -> list[Outcome]:
    """Ask all probes and return their outcomes in the same order. Times are in seconds.

    A probe marked as `expected` that got no answer is asked once more with `patience`. Raises KeyError for
    a source that is not in the fabric; any other trouble is an outcome. To be called where the servers
    run, or in any process that has joined the enclosure.
    """
    raise_file_limit()
    outcomes: dict[int, Outcome] = {}
    _ask(fabric, probes, range(len(probes)), timeout, in_flight, outcomes)
    silent = [n for n, asked in enumerate(probes) if asked.expected and not outcomes[n].reached]
    # Fewer at a time: a machine that was too busy for the first round is not asked for as much again.
    _ask(fabric, probes, silent, patience, max(1, in_flight // 4), outcomes)
    return [outcomes[number] for number in range(len(probes))]


def _ask(
    fabric: Fabric,
    probes: Sequence[Probe],
    numbers: Iterable[int],
    timeout: float,
    in_flight: int,
    outcomes: dict[int, Outcome],
) -> None:
    # By source, so that the namespace is changed once for each and not for each probe.
    waiting = deque(sorted(numbers, key=lambda number: probes[number].src))
    flying: dict[int, Flight] = {}
    by_file: dict[int, Flight | Shared] = {}
    poller = select.epoll()
    shared: dict[tuple[str, str, socket.AddressFamily], Shared] = {}

    def land(number: int) -> None:
        flight = flying.pop(number)
        outcomes[number] = flight.outcome or flight.give_up()
        if flight.own is not None:
            by_file.pop(flight.own.fileno(), None)
            flight.own.close()

    def launch(source: str, now: float) -> None:
        while waiting and len(flying) < in_flight and probes[waiting[0]].src == source:
            number = waiting.popleft()
            flight = depart(number, probes[number], shared, fabric, timeout)
            flying[number] = flight
            if flight.outcome is not None:
                land(number)
                continue
            handler: Flight | Shared = flight if flight.own is not None else flight.carrier
            made = handler.file
            if made.fileno() not in by_file:
                by_file[made.fileno()] = handler
                poller.register(made.fileno(), select.EPOLLIN)
            if time.monotonic() - now > 0.02:  # answers that are waiting come before further questions
                return

    try:
        while waiting or flying:
            if waiting and len(flying) < in_flight:
                with fabric.inside(probes[waiting[0]].src):
                    launch(probes[waiting[0]].src, time.monotonic())
            soonest = min((flight.deadline for flight in flying.values()), default=0.0)
            idle = 0.0 if waiting and len(flying) < in_flight else max(0.0, soonest - time.monotonic())
            events = poller.poll(idle, 4096)
            # Silence is judged after reading what had come by now, however late this loop is.
            now = time.monotonic()
            for descriptor, _ in events:
                handler = by_file.get(descriptor)
                if handler is not None:
                    for number in handler.read():
                        if number in flying:
                            land(number)
            if len(events) < 4096 and now >= soonest:
                for number in [n for n, flight in flying.items() if flight.deadline <= now]:
                    if not flying[number].extend():
                        land(number)
    finally:
        poller.close()
        for flight in flying.values():
            if flight.own is not None:
                flight.own.close()
        for carrier in shared.values():
            carrier.file.close()
