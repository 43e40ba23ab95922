"""UDP servers on the nodes, for what is asked of the outside: a kernel that refuses does so once a second at most."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from threading import Thread

from tests.cluster.places import Places


@contextmanager
def echoing(places: Places, nodes: Iterable[list[str]], ports: Iterable[int]) -> Iterator[None]:
    """Every datagram to these ports of nodes is sent back; a node is its addresses, IPv4 first. Where a port is taken,
    its owner answers."""
    with ExitStack() as opened:
        poller = opened.enter_context(select.epoll())
        servers: dict[int, socket.socket] = {}
        ports = tuple(ports)
        for node in nodes:
            with places.inside(node[0]):
                for address, port in product(node, ports):
                    server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
                    opened.callback(server.close)
                    try:
                        server.bind((address, port))
                    except OSError:
                        continue
                    servers[server.fileno()] = server
                    poller.register(server.fileno(), select.EPOLLIN)
        end, stop = os.pipe()
        opened.callback(os.close, end)
        opened.callback(os.close, stop)
        poller.register(end, select.EPOLLIN)
        echoes = Thread(target=_echo, args=(poller, servers, end))
        echoes.start()
        try:
            yield
        finally:
            os.write(stop, b"!")
            echoes.join()


def _echo(poller: select.epoll, servers: dict[int, socket.socket], end: int) -> None:
    while True:
        for descriptor, _ in poller.poll():
            if descriptor == end:
                return
            data, sender = servers[descriptor].recvfrom(2048)
            servers[descriptor].sendto(data, sender)
