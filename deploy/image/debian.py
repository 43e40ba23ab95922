"""Debian packages of one architecture: which versions a lock file names, and where the mirror has them.

apt works in directories of its own, so this needs no root and works for other architectures than the machine's. Which
mirrors there are, and whose keys they sign with, it reads from the machine's /etc/apt."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "netpol-agent" / "image"
CONFIGURATION = """\
APT::Architecture "{arch}";
APT::Architectures {{ "{arch}"; }};
APT::Sandbox::User "";
Dir::State "{home}/state";
Dir::State::status "/dev/null";
Dir::Cache "{home}/cache";
Acquire::Languages "none";
#clear APT::Update;
#clear DPkg::Post-Invoke;
"""
"""The hooks that are cleared would work on the machine's own directories."""


class Unavailable(Exception):
    """What was locked, or what makes use of it, is not to be had; the text says what to do."""


class Package(NamedTuple):
    name: str
    version: str
    sha256: str


def names() -> list[str]:
    """The packages that the image is made of, from the file `packages`."""
    lines = (line.partition("#")[0].strip() for line in (HERE / "packages").read_text().splitlines())
    return [line for line in lines if line]


def lock_file(arch: str) -> Path:
    return HERE / f"debian-{arch}.lock"


def locked(arch: str) -> list[Package]:
    path = lock_file(arch)
    if not path.exists():
        raise Unavailable(f"there is no {path.name}: no image for {arch}; `make image-lock ARCH={arch}` makes one")
    rows = (line.split() for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return [Package(*row) for row in rows]


def fetch(packages: Sequence[Package], arch: str) -> list[Path]:
    """A file for each, from the cache or the mirror. Raises Unavailable with every package that is not to be had."""
    kept = CACHE / "debs"
    missing = [one for one in packages if not (kept / one.sha256).exists()]
    if missing:
        kept.mkdir(parents=True, exist_ok=True)
        apt = mirror(arch)
        offers = apt.offers([one.name for one in missing])
        if gone := [one for one in missing if one not in offers]:
            raise Unavailable(_gone(gone, offers, len(packages), arch))
        apt.download(missing, kept)
    return [kept / one.sha256 for one in packages]


def differences(packages: Iterable[Package], now: Iterable[Package]) -> list[str]:
    """What differs between what is locked and what there is, in words."""
    before = {one.name: one for one in packages}
    after = {one.name: one for one in now}
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            lines.append(f"{name}: locked {_version(before.get(name))}, available {_version(after.get(name))}")
    return lines


@cache
def mirror(arch: str) -> Apt:
    """As it is now, for one process."""
    return Apt(arch)


@contextmanager
def alone() -> Iterator[None]:
    """One process at a time works in the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Apt:
    """The mirror's lists for one architecture, read anew."""

    def __init__(self, arch: str) -> None:
        home = CACHE / f"apt-{arch}"
        for part in ("state/lists/partial", "cache/archives/partial"):
            (home / part).mkdir(parents=True, exist_ok=True)
        self._configuration = home / "apt.conf"
        self._configuration.write_text(CONFIGURATION.format(arch=arch, home=home))
        self._updated = self._run("apt-get", "update", "-q")

    def offers(self, wanted: Sequence[str]) -> list[Package]:
        """All versions that the mirror has, for each package the newest first."""
        answer = self._run("apt-cache", "show", *wanted).stdout
        stanzas = (dict(_fields(stanza)) for stanza in answer.split("\n\n") if stanza.strip())
        offers = [Package(one["Package"], one["Version"], one["SHA256"]) for one in stanzas]
        if not offers:
            raise Unavailable(f"apt has no package list; `apt-get update` says: {_last(self._updated)}")
        return offers

    def newest(self, wanted: Sequence[str]) -> list[Package]:
        """The version of each that would be installed now."""
        offers: dict[str, Package] = {}
        for one in self.offers(wanted):
            offers.setdefault(one.name, one)
        if unknown := [name for name in wanted if name not in offers]:
            raise Unavailable(f"the mirror has no package {', '.join(unknown)}")
        return [offers[name] for name in wanted]

    def download(self, packages: Sequence[Package], to: Path) -> None:
        """Into files that are named after their SHA-256, which is looked at."""
        with tempfile.TemporaryDirectory(dir=to.parent) as place:
            done = self._run("apt-get", "download", "-q", *(f"{one.name}={one.version}" for one in packages), cwd=place)
            if done.returncode != 0:
                raise Unavailable(f"apt-get download: {_last(done)}")
            files = {sha256(path): path for path in Path(place).glob("*.deb")}
            for one in packages:
                if one.sha256 not in files:
                    raise Unavailable(
                        f"what the mirror sent for {one.name} {one.version} has another SHA-256 than said"
                    )
            for one in packages:
                files[one.sha256].replace(to / one.sha256)

    def _run(self, *command: str, cwd: str | None = None) -> subprocess.CompletedProcess[str]:
        program, *arguments = command
        try:
            return subprocess.run(
                [program, "-c", str(self._configuration), *arguments],
                capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | {"LC_ALL": "C.UTF-8"},
            )  # fmt: skip
        except FileNotFoundError as error:
            raise Unavailable(f"{program} is not installed: the image is made of Debian packages, on Debian") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fields(stanza: str) -> Iterable[tuple[str, str]]:
    for line in stanza.splitlines():
        if not line.startswith(" "):
            name, _, value = line.partition(":")
            yield name, value.strip()


def _version(package: Package | None) -> str:
    return f"{package.version} ({package.sha256[:12]}…)" if package else "none"


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit {done.returncode}"


def _gone(gone: Sequence[Package], offers: Sequence[Package], of: int, arch: str) -> str:
    newest: dict[str, Package] = {}
    for one in offers:
        newest.setdefault(one.name, one)
    lines = differences(gone, [newest[one.name] for one in gone if one.name in newest])
    return "\n".join([
        f"the Debian mirror has {len(gone)} of {of} locked packages for {arch} no more:",
        *(f"  {line}" for line in lines),
        "`make image-lock` locks what it has now; `make image UNLOCKED=1` builds with that, without changing the lock",
    ])  # fmt: skip
