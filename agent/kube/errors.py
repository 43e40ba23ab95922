"""What can go wrong between us and the API server, each with what to do about it.

ApiError
├── Unreachable     no answer: refused, timed out, TLS; nothing is known about what we have seen
├── Refused         an answer with a status that is none of success
│   └── Gone        410: the version that we know is compacted; list again
├── Broken          an answer that cannot be read, was cut, or went silent
├── Defect          a mistake of ours in the handling of an answer
└── NoConfiguration nothing says where the API server is
"""

from __future__ import annotations


class ApiError(Exception):
    """`kind` is a short, stable word for the metric; `retry_after` what the server asked for, in seconds."""

    kind = "error"
    retry_after: float | None = None


class NoConfiguration(ApiError):
    """Neither a kubeconfig nor a service account."""

    kind = "configuration"


class Unreachable(ApiError):
    """The API server did not answer."""

    kind = "unreachable"


class Defect(ApiError):
    """We failed ourselves; said with its trace, and tried again from a new list."""

    kind = "defect"


class Broken(ApiError):
    """The answer cannot be used."""

    kind = "broken"


class Silent(Broken):
    """A connection on which nothing whole arrives any more."""

    kind = "silent"


class Refused(ApiError):
    """The API server's answer was an error; `status` is HTTP's number."""

    kind = "refused"

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{message} (HTTP {status})" if message else f"HTTP {status}")
        self.status = status
        self.retry_after = retry_after


class Gone(Refused):
    """The version is too old, or a list's continue token is."""

    kind = "gone"
