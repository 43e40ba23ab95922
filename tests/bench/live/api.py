"""Writing to the API server as fast as it accepts: one connection for each thread, kept open."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import Any, TypeVar
from urllib.parse import urlsplit

from agent.kube.connection import configuration_source
from agent.kube.errors import ApiError

JSON = "application/json"
MERGE = "application/merge-patch+json"
PAGE = 2000
TRIES = 40
"""How often a request is tried that the server cannot carry out just now."""

T = TypeVar("T")


class ApiRefused(Exception):
    """The server said no; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """For any number of threads."""

    def __init__(self) -> None:
        configuration = configuration_source(None, None)()
        url = urlsplit(configuration.host)
        self.host, self.port = url.hostname or "", url.port or 443
        self._headers = {"Accept": JSON, "User-Agent": "netpol-bench"}
        self._headers |= {a["key"]: a["value"] for a in configuration.auth_settings().values() if a["in"] == "header"}
        self._tls = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
        if not configuration.verify_ssl:
            self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE
        if configuration.cert_file:
            self._tls.load_cert_chain(configuration.cert_file, configuration.key_file)
        self._mine = threading.local()

    def ask(self, method: str, path: str, body: Any = None, kind: str = JSON) -> bytes:
        """The answer's body. Raises ApiRefused; a connection that the server has closed is made anew."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {**self._headers, "Content-Type": kind} if data is not None else self._headers
        for again in (True, False):
            connection = getattr(self._mine, "connection", None)
            if connection is None:
                connection = http.client.HTTPSConnection(self.host, self.port, timeout=60, context=self._tls)
                self._mine.connection = connection
            try:
                connection.request(method, path, data, headers)
                response = connection.getresponse()
                answer = bytes(response.read())
                break
            except (OSError, http.client.HTTPException):
                connection.close()
                self._mine.connection = None
                if not again:
                    raise
        if response.status >= 300:
            raise ApiRefused(response.status, answer[:500].decode(errors="replace"))
        return answer

    def insist(self, method: str, path: str, body: Any = None, kind: str = JSON, *, fine: Iterable[int] = ()) -> None:
        """Until it is done. `fine` are refusals that say that it is; 403, 409, 429 and 5xx are waited for."""
        for left in range(TRIES, -1, -1):
            try:
                self.ask(method, path, body, kind)
                return
            except ApiRefused as error:
                if error.status in fine:
                    return
                if not left or not (error.status in (403, 409, 429) or error.status >= 500):
                    raise
            sleep(0.25)

    def list(self, path: str) -> list[Any]:
        """All objects of a list, page by page."""
        found: list[Any] = []
        token = ""
        while True:
            page = json.loads(self.ask("GET", f"{path}?limit={PAGE}" + (f"&continue={token}" if token else "")))
            found += page["items"]
            token = page["metadata"].get("continue", "")
            if not token:
                return found


def parallel(work: Callable[[T], None], items: Iterable[T], threads: int = 8) -> None:
    """All of it; the first failure is raised."""
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, items):
            pass


def unavailable() -> str:
    """Why there is no API server to measure with; "" when there is one."""
    if "KUBECONFIG" not in os.environ:
        return "it needs an API server, and KUBECONFIG is not set"
    try:
        Api().ask("GET", "/readyz")
    except (ApiRefused, ApiError, OSError) as error:
        return f"the API server that KUBECONFIG names does not answer: {error}"
    return ""
