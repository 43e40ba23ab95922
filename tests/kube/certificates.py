"""An authority, and what it has signed, made by openssl."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")


class Authority:
    """`ca`, `server` and `client`: a .crt and a .key of each in the directory. The server is 127.0.0.1."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self._openssl("req", "-x509", *KEY, *self._files("ca"), "-days", "2", "-subj", "/CN=authority")
        for name, subject in (("server", "/CN=server"), ("client", "/CN=agent")):
            signer = ("-CA", str(self.crt("ca")), "-CAkey", str(directory / "ca.key"))
            alternative = ("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE")
            self._openssl(
                "req", "-x509", *KEY, *self._files(name), "-days", "2", "-subj", subject, *signer, *alternative
            )

    def crt(self, name: str) -> Path:
        return self.directory / f"{name}.crt"

    def context(self, *, wants_client: bool = False) -> ssl.SSLContext:
        """The server's side; with a client's certificate demanded, if so."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.crt("server"), self.directory / "server.key")
        context.load_verify_locations(self.crt("ca"))
        if wants_client:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _files(self, name: str) -> tuple[str, ...]:
        return "-keyout", str(self.directory / f"{name}.key"), "-out", str(self.crt(name))

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)
