"""Python wheels: those that the lock files name, and our own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from debian import CACHE, HERE, Unavailable, sha256

PROJECT = HERE.parent.parent
PYTHON = "3.11"
GLIBC = 36
"""Debian 12 has glibc 2.36."""
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def target(arch: str) -> list[str]:
    """pip's options for wheels that run in the image, whatever runs here."""
    machine = MACHINES[arch]
    options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    options += [f"--abi={abi}" for abi in ("cp311", "abi3", "none")]
    options += [f"--platform=manylinux_2_{minor}_{machine}" for minor in range(GLIBC, 16, -1)]
    return [*options, f"--platform=manylinux2014_{machine}"]


def fetch(lock: Path, arch: str) -> list[Path]:
    """The wheels that a lock file names, from the cache or the index; pip compares their hashes with the lock's."""
    kept = CACHE / f"wheels-{arch}-{sha256(lock)[:16]}"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as place:
            wheels = Path(place) / "wheels"
            pip("download", "-q", "--no-deps", "--require-hashes", *target(arch), "-d", str(wheels), "-r", str(lock))
            wheels.replace(kept)
    return sorted(kept.glob("*.whl"))


@contextmanager
def ours(backend: list[Path]) -> Iterator[Path]:
    """Our own wheel, made by a locked build backend out of a copy: building leaves files behind in its sources."""
    with tempfile.TemporaryDirectory() as place:
        sources = Path(place) / "sources"
        shutil.copytree(PROJECT / "agent", sources / "agent", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(PROJECT / name, sources / name)
        for wheel in backend:
            with zipfile.ZipFile(wheel) as files:
                files.extractall(Path(place) / "backend")
        done = subprocess.run(
            [sys.executable, "-Sc", BUILD, place],
            cwd=sources,
            env=os.environ | {"PYTHONPATH": str(Path(place) / "backend")},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise Unavailable(f"building our wheel: {done.stderr.strip() or done.stdout.strip()}")
        yield next(Path(place).glob("*.whl"))


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(f"pip {arguments[0]}: {done.stderr.strip()}")
    return done.stdout
