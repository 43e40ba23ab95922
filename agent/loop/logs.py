"""The log: a line for each change that matters, as text or JSON; repeats are told once a minute, with their number."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from queue import Full, Queue
from threading import Thread
from typing import Any

import msgspec

LOGGER = logging.getLogger("netpol-agent")
STDERR = 2
WAITING = 1000
"""Lines that wait to be written, at most."""
FLUSH_SECONDS = 0.5
REPEAT_SECONDS = 60.0
BURST, PER_SECOND = 200, 10
"""Lines about changes: so many at once, and so many a second for long."""
REMEMBERED = 1000
"""Different lines that are remembered, so that their repeats are held back."""


def log(level: int, message: str, **fields: object) -> None:
    """One line; `fields` are for those who read it by program."""
    LOGGER.log(level, "%s", message, extra={"fields": fields})


def flush() -> None:
    """Have what was told written, if somebody reads it."""
    for handler in LOGGER.handlers:
        handler.flush()


def configure(form: str, level: str) -> None:
    """Write the log to standard error, as `text` or `json`."""
    handler = Unhurried()
    handler.setFormatter(_Json() if form == "json" else _Text())
    handler.addFilter(Repeats())
    logging.captureWarnings(True)
    for logger in (LOGGER, logging.getLogger()):
        logger.handlers = [handler]
        logger.propagate = False
    LOGGER.setLevel(level.upper())
    logging.getLogger().setLevel(logging.ERROR)


class Unhurried(logging.Handler):
    """Writes in a thread of its own: who stops reading our log must not stop us. What does not fit is lost."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: Queue[bytes] = Queue(WAITING)
        Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Full):
            self._lines.put_nowait(f"{self.format(record)}\n".encode(errors="replace"))

    def flush(self) -> None:
        """Wait a little for what was told to be written."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            with suppress(OSError):
                while line:
                    line = line[os.write(STDERR, line) :]
            self._lines.task_done()


class Repeats(logging.Filter):
    """Lets a line through when it was not told within the last minute; the next one says how many were held back.

    Of lines that are no warnings, no more than `BURST` at once and `PER_SECOND` for long."""

    def __init__(self, seconds: float = REPEAT_SECONDS) -> None:
        super().__init__()
        self._seconds = seconds
        self._told: dict[str, tuple[float, int]] = {}
        self._left = float(BURST)
        self._counted = time.monotonic()
        self._dropped = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING and not self._has_room():
            self._dropped += 1
            return False
        if not self._is_new(record):
            return False
        if self._dropped:
            record.msg, record.args = "%s (%d lines before it left out)", (record.getMessage(), self._dropped)
            self._dropped = 0
        return True

    def _has_room(self) -> bool:
        now = time.monotonic()
        self._left = min(self._left + (now - self._counted) * PER_SECOND, BURST)
        self._counted = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def _is_new(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        now = time.monotonic()
        last, held = self._told.pop(text, (now - self._seconds, 0))
        if now - last < self._seconds:
            self._told[text] = last, held + 1
            return False
        self._told[text] = now, 0
        while len(self._told) > REMEMBERED:
            del self._told[next(iter(self._told))]
        if held:
            record.msg, record.args = "%s (and %d times more in the last minutes)", (text, held)
        return True


def _time(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return dict(getattr(record, "fields", {}))


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname:7} {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= _fields(record)
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()
