"""What pods, nodes and the host outside answer with: each probe learns who it has reached.

TCP: one line with the server's key, then the end of the stream. UDP: that line and the datagram. SCTP: an
INIT ACK whose cookie is the key; where nobody listens, an ABORT. ICMP echo is the kernel's.

All sockets of all namespaces are served by one thread with one epoll: a socket stays in the namespace in
which it was made.
"""

import contextlib
import errno
import functools
import os
import resource
import select
import socket
import struct
import threading
from collections.abc import Callable

from agent.lab import sctp
from agent.lab.fabric import Fabric
from agent.lab.spec import OUTSIDE, Listen

_PKTINFO = socket.CMSG_SPACE(20)
_IP_PKTINFO = 8
_IPV6_RECVPKTINFO = 49
_IPV6_PKTINFO = 50


def raise_file_limit() -> None:
    """Let this process have as many open files as the machine allows: a lab has several for each pod."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Servers:
    """The servers of a fabric. Started by `start`, ended by `stop`; also a context manager."""

    def __init__(self, fabric: Fabric) -> None:
        """Opens every socket. Raises OSError when two hostNetwork pods of a node want the same port."""
        raise_file_limit()
        self._fabric = fabric
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._sockets: dict[str, list[socket.socket]] = {}
        self._talking: dict[int, socket.socket] = {}
        # By the namespace's key, since hostNetwork pods share their node's: which SCTP port is whose.
        self._sctp_ports: dict[str, dict[int, str]] = {}
        self._wake, self._woken = os.pipe()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread: threading.Thread | None = None
        spec = fabric.spec
        self.add(OUTSIDE, spec.outside_listen)
        for node in spec.nodes:
            self.add(node.key, node.listen)
        for pod in spec.pods:
            self.add(pod.key, pod.listen)

    def start(self) -> "Servers":
        """Serve from a thread of its own."""
        self._thread = threading.Thread(target=self._serve, name="lab-servers", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread and close every socket."""
        os.write(self._woken, b"!")
        if self._thread is not None:
            self._thread.join()
        for key in list(self._sockets):
            self.remove(key)
        for talk in list(self._talking.values()):
            talk.close()
        self._epoll.close()
        os.close(self._wake)
        os.close(self._woken)

    def __enter__(self) -> "Servers":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add(self, key: str, listen: Listen) -> None:
        """Listen in a pod (or node, or outside). Raises OSError for a port that is taken, KeyError."""
        home = self._fabric.home(key)
        made = self._sockets.setdefault(key, [])
        with self._fabric.inside(key):
            if home not in self._sctp_ports:
                self._sctp_ports[home] = {}
                owner = self._sockets.setdefault(home, [])
                for version in (socket.AF_INET, socket.AF_INET6):
                    owner.append(self._sctp(home, version))
            for protocol, port in listen:
                if protocol == "SCTP":
                    self._sctp_ports[home][port] = key
                elif protocol == "TCP":
                    made.append(self._tcp(key, port))
                else:
                    made.append(self._udp(key, port))

    def remove(self, key: str) -> None:
        """Close what listens for a pod (or node, or outside); nothing happens when nothing does."""
        for made in self._sockets.pop(key, []):
            self._forget(made)
        self._sctp_ports.pop(key, None)
        for ports in self._sctp_ports.values():
            for port in [port for port, owner in ports.items() if owner == key]:
                del ports[port]

    def _serve(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                if descriptor == self._wake:
                    return
                handler = self._handlers.get(descriptor)
                if handler is not None:
                    # A peer that has gone meanwhile, or a route to it: no answer then.
                    with contextlib.suppress(OSError):
                        handler()

    def _watch(self, made: socket.socket, handler: Callable[[], None]) -> None:
        self._handlers[made.fileno()] = handler
        self._epoll.register(made.fileno(), select.EPOLLIN)

    def _forget(self, made: socket.socket) -> None:
        descriptor = made.fileno()
        if descriptor >= 0:
            self._handlers.pop(descriptor, None)
            self._talking.pop(descriptor, None)
            made.close()

    def _tcp(self, key: str, port: int) -> socket.socket:
        listener = _dual_stack(socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(listener, key, "TCP", port)
        listener.listen(4096)
        greeting = f"{key}\n".encode()

        def accept() -> None:
            while True:
                try:
                    talk, _ = listener.accept()
                except BlockingIOError:
                    return
                talk.setblocking(False)
                talk.send(greeting)
                # Closed only after the peer: closing with unread data would reset, and lose the greeting.
                talk.shutdown(socket.SHUT_WR)
                self._talking[talk.fileno()] = talk
                self._watch(talk, functools.partial(drain, talk))

        def drain(talk: socket.socket) -> None:
            try:
                while talk.recv(65536):
                    pass
            except BlockingIOError:
                return
            except OSError:
                pass
            self._forget(talk)

        self._watch(listener, accept)
        return listener

    def _udp(self, key: str, port: int) -> socket.socket:
        server = _dual_stack(socket.SOCK_DGRAM)
        server.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        _bind(server, key, "UDP", port)
        greeting = f"{key}\n".encode()

        def answer() -> None:
            while True:
                try:
                    data, extra, _, peer = server.recvmsg(65536, _PKTINFO)
                except BlockingIOError:
                    return
                # From the address that was asked, which need not be the one the route would choose.
                server.sendmsg([greeting, data[:60000]], [_from_asked(item) for item in extra], 0, peer)

        self._watch(server, answer)
        return server

    def _sctp(self, home: str, version: socket.AddressFamily) -> socket.socket:
        raw = socket.socket(version, socket.SOCK_RAW | socket.SOCK_NONBLOCK, sctp.PROTOCOL)
        if version == socket.AF_INET6:
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
        else:
            raw.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        ports = self._sctp_ports[home]

        def answer() -> None:
            while True:
                try:
                    data, extra, _, peer = raw.recvmsg(65536, _PKTINFO)
                except BlockingIOError:
                    return
                if version == socket.AF_INET:
                    data = data[(data[0] & 15) * 4 :]
                asked = sctp.decode(data)
                if asked is None or asked.kind != sctp.INIT:
                    continue
                owner = ports.get(asked.port)
                if owner is None:
                    reply = sctp.Packet(asked.port, asked.source_port, asked.tag, sctp.ABORT)
                else:
                    tag = int.from_bytes(os.urandom(4), "big") | 1
                    reply = sctp.Packet(asked.port, asked.source_port, asked.tag, sctp.INIT_ACK, tag, owner.encode())
                back = (peer[0], 0, *peer[2:])
                raw.sendmsg([reply.encode()], [_from_asked(item) for item in extra], 0, back)

        self._watch(raw, answer)
        return raw


def _dual_stack(kind: socket.SocketKind) -> socket.socket:
    made = socket.socket(socket.AF_INET6, kind | socket.SOCK_NONBLOCK)
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return made


def _bind(made: socket.socket, key: str, protocol: str, port: int) -> None:
    try:
        made.bind(("::", port))
    except OSError as trouble:
        made.close()
        reason = "the port is taken" if trouble.errno == errno.EADDRINUSE else trouble.strerror
        raise OSError(trouble.errno, f"{key} cannot listen on {protocol} {port}: {reason}") from None


def _from_asked(item: tuple[int, int, bytes]) -> tuple[int, int, bytes]:
    """The control message that makes an answer leave from the address at which its question came in."""
    level, kind, data = item
    if level == socket.IPPROTO_IP:
        return level, kind, struct.pack("=i4s4s", 0, data[8:12], data[8:12])
    # A link-local address needs its interface, any other finds its own way.
    scope = data[16:20] if data[0] == 0xFE and data[1] & 0xC0 == 0x80 else bytes(4)
    return level, kind, data[:16] + scope
