"""A server's end of HTTP/1.1, by hand: what a proper library would not send can be sent here."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from select import select
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

HEAD_BYTES = 1 << 16


def kubeconfig(url: str) -> str:
    """Of an API server there that takes any token."""
    return (
        "{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}],"
        f"clusters: [{{name: c, cluster: {{server: '{url}'}}}}], users: [{{name: u, user: {{token: t}}}}]}}"
    )


class HangUp(Exception):
    """The connection is over, whoever ended it."""


class Request(NamedTuple):
    """One request, as it came; the names of headers are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))


class Wire:
    """One connection of a client."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""

    def request(self) -> Request:
        """The next request. Raises HangUp when there is none."""
        while b"\r\n\r\n" not in self._rest:
            self._read()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        while len(self._rest) < length:
            self._read()
        body, self._rest = self._rest[:length], self._rest[length:]
        return Request(method, target, headers, body)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        """The status line and headers."""
        lines = [f"HTTP/1.1 {status} Status", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def chunk(self, data: bytes) -> None:
        if data:
            self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        """The end of a chunked body."""
        self.send(b"0\r\n\r\n")

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise HangUp from error

    def closed(self) -> bool:
        """Whether the client has hung up; it has nothing to say while it is answered."""
        try:
            if isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
                return False
            return bool(select([self.socket], [], [], 0)[0]) and not self.socket.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def _read(self) -> None:
        try:
            data = self.socket.recv(HEAD_BYTES)
        except OSError as error:
            raise HangUp from error
        if not data:
            raise HangUp
        self._rest += data


class Listener:
    """Serves each connection to a loopback port in a thread of its own, until it is closed."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.stopping = threading.Event()
        self._tls = tls
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listening.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def serve(self, wire: Wire) -> None:
        """One connection, until HangUp."""
        raise NotImplementedError

    def hang_up(self) -> None:
        """Cut every connection that there is now."""
        with self._lock:
            cut = list(self._open)
        for connection in cut:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.stopping.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listening.close()
        self.hang_up()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, plain: socket.socket) -> None:
        connection = plain
        try:
            plain.settimeout(10)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                connection = self._tls.wrap_socket(plain, server_side=True)
                with self._lock:
                    self._open.add(connection)
            wire = Wire(connection)
            while not self.stopping.is_set():
                self.serve(wire)
        except (HangUp, OSError):
            pass
        finally:
            with self._lock:
                self._open -= {plain, connection}
            connection.close()
            plain.close()


class Proxy(Listener):
    """Forwards plain requests, and tunnels at CONNECT; `asked` holds what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__()

    def serve(self, wire: Wire) -> None:
        request = wire.request()
        self.asked.append(f"{request.method} {request.target}")
        tunnel = request.method == "CONNECT"
        where = urlsplit(f"//{request.target}" if tunnel else request.target)
        with socket.create_connection((where.hostname or "", where.port or 0), timeout=10) as target:
            if tunnel:
                wire.send(b"HTTP/1.1 200 Connected\r\n\r\n")
            else:
                path = f"{where.path}?{where.query}" if where.query else where.path
                headers = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
                target.sendall(f"{request.method} {path} HTTP/1.1\r\n{headers}\r\n".encode() + request.body)
            self._pipe(wire.socket, target)
        raise HangUp

    def _pipe(self, one: socket.socket, other: socket.socket) -> None:
        while not self.stopping.is_set():
            for source in select([one, other], [], [], 0.05)[0]:
                data = source.recv(HEAD_BYTES)
                if not data:
                    return
                (other if source is one else one).sendall(data)
