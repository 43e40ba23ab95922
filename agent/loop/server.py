"""HTTP for probes and Prometheus: the paths that are given, GET and HEAD, and nothing else."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Lock, Thread
from time import monotonic
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from agent.loop.health import Health

REQUESTS = 16
"""That are answered at the same time."""
SECONDS = 5.0
"""That a client may take in all, to say what it wants and to take the answer."""
SOFTWARE = "netpol-agent"
"""As what we answer."""


class Answer(NamedTuple):
    """HTTP's status, what the body is, and the body."""

    status: int
    type: str
    body: bytes


Paths = Mapping[str, Callable[[Mapping[str, str]], Answer]]
"""What answers to a query, by path."""


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """`HOST:PORT`, `[IPv6]:PORT`. Raises ValueError."""
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"{text!r} is not HOST:PORT")
        if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
            raise ValueError(f"{text!r} is not HOST:PORT; an IPv6 address stands in brackets")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def health_paths(health: Health, instance: str = "", why_not: Callable[[str], str] = str) -> Paths:
    """`/livez` and `/readyz`: 200 with "ok", or 503 with the reasons, a line each.

    `/readyz?instance=X` of another instance than ours tells `why_not`: two that follow each other have one address, and
    the one at work answers for the other, too."""

    def live(_: Mapping[str, str]) -> Answer:
        return _verdict([reason for reason in [health.dead()] if reason])

    def ready(query: Mapping[str, str]) -> Answer:
        asked = query.get("instance", instance)
        return _verdict(health.reasons() if asked == instance else [reason for reason in [why_not(asked)] if reason])

    return {"/livez": live, "/readyz": ready}


def metrics_path(path: str, registry: CollectorRegistry) -> Paths:
    """A registry in Prometheus's text format."""
    return {path: lambda _: Answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))}


def _verdict(reasons: list[str]) -> Answer:
    return Answer(503 if reasons else 200, "text/plain; charset=utf-8", "\n".join([*(reasons or ["ok"]), ""]).encode())


class Server(ThreadingHTTPServer):
    """Serves paths in threads until the process ends. Raises OSError when it cannot listen."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = REQUESTS

    def __init__(self, address: Address, paths: Paths) -> None:
        self.address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        self.paths = paths
        self._open: dict[socket.socket, float] = {}  # and since when, oldest first
        self._lock = Lock()
        super().__init__((address.host, address.port), _Handler)

    def start(self) -> None:
        Thread(target=self.serve_forever, name="http", daemon=True).start()

    def server_bind(self) -> None:
        """Without HTTPServer's question to DNS for our own name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "netpol-agent", self.server_address[1]

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Who comes when all places are taken gets the oldest's: an answer takes milliseconds, that one dawdles."""
        assert isinstance(request, socket.socket)
        with self._lock:
            if len(self._open) >= REQUESTS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                _hang_up(oldest)
            self._open[request] = monotonic()
        super().process_request(request, client_address)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            assert isinstance(request, socket.socket)
            with self._lock:
                self._open.pop(request, None)

    def service_actions(self) -> None:
        """Twice a second: hang up on those whose time is over."""
        with self._lock:
            for one in [one for one, since in self._open.items() if monotonic() - since > SECONDS]:
                _hang_up(one)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none of our troubles."""


def _hang_up(request: socket.socket) -> None:
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


def answers(address: Address) -> bool:
    """Whether it is a netpol-agent that listens there."""
    asking = HTTPConnection(address.host, address.port, timeout=1)
    try:
        asking.request("HEAD", "/livez")
        return (asking.getresponse().getheader("Server") or "").startswith(SOFTWARE)
    except (OSError, HTTPException):
        return False
    finally:
        asking.close()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = SOFTWARE
    sys_version = ""
    timeout = SECONDS

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        asked = urlsplit(self.path)
        made = self.server.paths.get(asked.path)
        answer = made(dict(parse_qsl(asked.query))) if made else Answer(404, "text/plain; charset=utf-8", b"not here\n")
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if body:
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""
