"""The connection to the API server: where it is, who we are, and requests on it.

Configuration, authentication and transport are the `kubernetes` package's; its models and its `Watch` are not used.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import IncompleteRead
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlencode

import msgspec
import urllib3
from kubernetes import client, config
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError
from yaml import YAMLError

from agent import __version__
from agent.kube.errors import ApiError, Broken, Gone, NoConfiguration, Refused, Silent, Unreachable

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
CHUNK = 1 << 16
"""Bytes that one read takes at most."""
STATUS_BYTES = 1 << 16
"""Bytes that are read of an error's body."""
LONGEST_WAIT = 300.0
"""Seconds that a server can make us wait."""


class Timeouts(NamedTuple):
    """In seconds. `silence` is how long a stream may go without one whole line: on a quiet kind the API server may send
    nothing for that long, so it must not be short, and ends a stream that resumes where it was. It is also how long one
    page of a list may take as a whole."""

    connect: float = 5.0
    answer: float = 30.0
    silence: float = 90.0


class _Status(msgspec.Struct):
    message: str | None = None


class Source(Protocol):
    """Where a configuration comes from; called again when credentials were refused."""

    def __call__(self) -> client.Configuration: ...


def configuration_source(kubeconfig: str | None, context: str | None) -> Source:
    """`--kubeconfig`, else $KUBECONFIG, else the pod's service account, else ~/.kube/config."""
    path = kubeconfig or os.environ.get("KUBECONFIG") or None
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ and SERVICE_ACCOUNT.exists()

    def load() -> client.Configuration:
        configuration = client.Configuration()
        try:
            if path is None and context is None and in_pod:
                config.load_incluster_config(client_configuration=configuration)
            else:
                config.load_kube_config(path, context, client_configuration=configuration, persist_config=False)
        except (ConfigException, OSError, ValueError, TypeError, AttributeError, YAMLError) as error:
            where = path or "~/.kube/config"
            words = " ".join(str(error).split())
            raise NoConfiguration(
                f"{where}: {words}; give --kubeconfig FILE, or run in a pod of the cluster"
            ) from error
        return configuration

    return load


class Connection:
    """Requests to one API server. For several threads: each request has a connection of its own from the pool."""

    def __init__(self, source: Source, timeouts: Timeouts = Timeouts()) -> None:  # noqa: B008
        self.timeouts = timeouts
        self._source = source
        self._lock = threading.Lock()
        self._client = self._connect()

    @property
    def host(self) -> str:
        return str(self._client.configuration.host)

    @contextmanager
    def stream(self, path: str, query: Mapping[str, str | int]) -> Iterator[Iterator[bytes]]:
        """The lines of a stream as they arrive, until the server ends it. Raises ApiError."""
        with closing(self._ask("GET", path, query, read=self.timeouts.silence)) as response:
            yield _split(_chunks(response), self.timeouts.silence)

    def get(self, path: str, query: Mapping[str, str | int]) -> bytes:
        """A whole answer. Raises ApiError."""
        with closing(self._ask("GET", path, query, read=self.timeouts.answer)) as response:
            return _whole(response, self.timeouts.silence)

    def post(self, path: str, body: Any) -> None:
        """Create an object. Raises ApiError."""
        with closing(self._ask("POST", path, {}, read=self.timeouts.answer, body=body)) as response:
            _whole(response, self.timeouts.silence)

    def renew(self) -> None:
        """Read the configuration again: a token, a certificate or an authority may have been replaced."""
        with self._lock:
            before, self._client = self._client, self._connect()
        before.rest_client.close()

    def _connect(self) -> client.ApiClient:
        configuration = self._source()
        configuration.retries = False  # what to try again, and when, is the reflector's to decide
        configuration.keep_alive = True
        connected = client.ApiClient(configuration)
        connected.user_agent = f"netpol-agent/{__version__}"
        return connected

    def _ask(
        self, method: str, path: str, query: Mapping[str, str | int], *, read: float, body: Any = None
    ) -> urllib3.BaseHTTPResponse:
        connected = self._client
        headers = {"Accept": "application/json", "User-Agent": connected.user_agent}
        if body is not None:
            headers["Content-Type"] = "application/json"
        url = connected.configuration.host.rstrip("/") + path + (f"?{urlencode(query)}" if query else "")
        timeouts = (self.timeouts.connect, read)
        try:
            connected.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
            headers = {name: value.strip() for name, value in headers.items()}  # a token's file may end with a new line
            if not all(value.isascii() and value.isprintable() for value in headers.values()):
                raise Unreachable(f"{self.host}: our token has characters that no token has")
            answer = connected.rest_client.request(method, url, headers=headers, body=body, _request_timeout=timeouts)
        except (HTTPError, OSError, ConfigException, client.ApiException) as error:
            raise Unreachable(f"{self.host}: {_words(error)}") from error
        response: urllib3.BaseHTTPResponse = answer.response
        if not 200 <= response.status < 300:
            with closing(response):
                raise _refusal(response)
        return response


def _chunks(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """What arrives, as it arrives. Raises Silent, Broken."""
    try:
        while data := response.read1(CHUNK):
            yield data
    except urllib3.exceptions.ReadTimeoutError as error:
        raise Silent("nothing arrives any more") from error
    except (HTTPError, OSError, ValueError) as error:
        raise Broken(_words(error)) from error


def _split(chunks: Iterator[bytes], silence: float) -> Iterator[bytes]:
    """Whole lines. A trickle without the end of one is as good as silence."""
    rest: list[bytes] = []
    whole = monotonic()
    for chunk in chunks:
        head, newline, tail = chunk.partition(b"\n")
        rest.append(head)
        if not newline:
            if monotonic() - whole > silence:
                raise Silent(f"no whole object within {silence:.0f} s")
            continue
        yield b"".join(rest)
        *lines, last = tail.split(b"\n")
        yield from lines
        rest = [last]
        whole = monotonic()
    if any(rest):
        raise Broken("cut in the middle of an object")


def _whole(response: urllib3.BaseHTTPResponse, silence: float) -> bytes:
    """All of an answer. A trickle without an end is as good as silence."""
    begin = monotonic()
    parts = []
    for chunk in _chunks(response):
        parts.append(chunk)
        if monotonic() - begin > silence:
            raise Silent(f"no whole answer within {silence:.0f} s")
    return b"".join(parts)


def _refusal(response: urllib3.BaseHTTPResponse) -> ApiError:
    try:
        body = response.read(STATUS_BYTES)
    except (HTTPError, OSError, ValueError):
        body = b""
    try:
        message = msgspec.json.decode(body, type=_Status).message or ""
    except (msgspec.DecodeError, UnicodeDecodeError):
        message = body[:200].decode(errors="replace").strip()
    kind = Gone if response.status == 410 else Refused
    return kind(response.status, message or str(response.reason or ""), _seconds(response.headers.get("Retry-After")))


def _seconds(text: str | None) -> float | None:
    return min(float(text), LONGEST_WAIT) if text is not None and text.isdecimal() else None


def _words(error: BaseException) -> str:
    """The innermost reason: what the system said comes wrapped several times."""
    if isinstance(error, client.ApiException) and error.__context__ is not None:
        error = error.__context__
    while (inner := _inner(error)) is not None:
        error = inner
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, IncompleteRead):
        return "the answer was cut"
    text = str(error).partition(": ")[2] or str(error)
    return " ".join(text.split()) or type(error).__name__


def _inner(error: BaseException) -> BaseException | None:
    found = (getattr(error, "reason", None), *error.args)
    return next((one for one in found if isinstance(one, BaseException)), None)
