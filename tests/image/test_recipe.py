"""How the image is made: what is locked, what happens when the mirror has moved on, and the Dockerfile."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.image.built import DEBIAN, RECIPE, REPOSITORY, Image, run

pytestmark = pytest.mark.xdist_group("image")

ARCHITECTURES = ("amd64", "arm64")
MACHINES = {"amd64": 62, "arm64": 183}
"""As ELF numbers them."""
OUR_WHEEL = """
import wheels
with wheels.ours(wheels.fetch(wheels.HERE / 'backend.lock', 'amd64')) as wheel:
    print(wheel.name)
"""
LOCKED = re.compile(r"[a-z0-9.+-]+ \S+ [0-9a-f]{64}")


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, in order."""
    text = re.sub(r"\\\n", "", (REPOSITORY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def pinned(lock: Path) -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each requirement."""
    text = lock.read_text().replace("\\\n", "")
    rows = (line.split() for line in text.splitlines() if line and not line.startswith("#"))
    named = ((row[0].partition("=="), row[1:]) for row in rows)
    return {normal(name): (version, len(hashes)) for (name, _, version), hashes in named}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_dockerfile_has_the_same_configuration(image: Image) -> None:
    """What `docker build` would write is what `make image` writes."""
    final = instructions()
    final = final[max(i for i, (word, _) in enumerate(final) if word == "FROM") :]
    assert final[0] == ("FROM", "scratch")
    config = {
        "Entrypoint": json.loads(dict(final)["ENTRYPOINT"]),
        "Env": [rest for word, rest in final if word == "ENV"],
        "Labels": dict(shlex.split(rest)[0].split("=", 1) for word, rest in final if word == "LABEL"),
        "WorkingDir": dict(final)["WORKDIR"],
    }
    assert config == image.description["config"]
    assert {word for word, _ in final} <= {"FROM", "COPY", "ENV", "LABEL", "WORKDIR", "ENTRYPOINT"}


def test_dockerfile_has_the_same_steps() -> None:
    """The root file system is made by the script that `make image` uses, and comes whole into the last stage."""
    found = instructions()
    assert found[0] == ("ARG", "BASE=debian:bookworm-slim")
    assert found[1] == ("FROM", "${BASE} AS build")
    (script,) = (rest for word, rest in found if word == "RUN" and "deploy/image" in rest)
    assert "deploy/image/root.py --arch " in script
    place = script.split()[-1]
    assert ("COPY", f"--from=build {place}/ /") in found
    assert "deploy/image/root.py --arch " in (RECIPE / "build").read_text()


def test_dockerfile_copies_what_the_script_needs(tmp_path: Path) -> None:
    """With no more than the Dockerfile copies, and .dockerignore lets through, our wheel can be built."""
    copied = [rest.split() for word, rest in instructions() if word == "COPY" and not rest.startswith("--from")]
    sources = [source for *many, _ in copied for source in many]
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == set(sources)
    for source in sources:
        target = tmp_path / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / source).is_dir():
            shutil.copytree(REPOSITORY / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / source, target)
    more = {"PYTHONPATH": str(tmp_path / "deploy/image"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = run(sys.executable, "-c", OUR_WHEEL, **more)
    assert done.stdout.startswith("netpol_agent-"), done.stderr


def test_debian_lock() -> None:
    """Of the same packages for each architecture: those of `packages`, with versions and hashes."""
    wanted = {line.partition("#")[0].strip() for line in (RECIPE / "packages").read_text().splitlines()} - {""}
    for arch in ARCHITECTURES:
        lines = (RECIPE / f"debian-{arch}.lock").read_text().splitlines()[1:]
        assert all(LOCKED.fullmatch(line) for line in lines)
        assert {line.split()[0] for line in lines} == wanted
        assert lines == sorted(lines)


def test_wheel_lock() -> None:
    """All that we require, and what that requires, in the versions that are tested here; nothing else but by intent."""
    lock = pinned(RECIPE / "wheels.lock")
    constraints = (REPOSITORY / "deploy" / "constraints.txt").read_text().split()
    tested = {normal(name): version for name, _, version in (line.partition("==") for line in constraints)}
    assert {name: version for name, (version, _) in lock.items()} == {name: tested[name] for name in lock}
    assert all(hashes >= 1 for _, hashes in lock.values())
    assert " ".join(sorted(required("netpol-agent") - set(lock))) == (
        "aiohappyeyeballs aiohttp aiohttp-retry aiosignal attrs frozenlist multidict propcache yarl"
    )
    assert set(lock) <= required("netpol-agent")


def required(name: str) -> set[str]:
    """All that a distribution of this environment requires, without extras."""
    known: set[str] = set()
    todo = [name]
    while todo:
        for one in distribution(todo.pop()).requires or ():
            asked, _, marker = one.partition(";")
            dependency = normal(re.match(r"[A-Za-z0-9._-]+", asked)[0])  # type: ignore[index]
            if not marker and dependency not in known:
                known.add(dependency)
                todo.append(dependency)
    return known


def test_backend_lock() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    (version, hashes) = pinned(RECIPE / "backend.lock")["setuptools"]
    assert project["build-system"]["requires"] == ["setuptools>=77"]
    assert int(version.partition(".")[0]) >= 77
    assert hashes == 1


class TestMirrorThatMovedOn:
    """Played by an apt that has another version of one package."""

    @pytest.fixture
    def moved(self, tmp_path: Path) -> dict[str, str]:
        """The environment of a build: its apt, and an empty cache."""
        programs = tmp_path / "programs"
        programs.mkdir()
        stanzas = []
        for line in (RECIPE / "debian-amd64.lock").read_text().splitlines()[1:]:
            name, version, digest = line.split()
            if name == "ipset":
                version, digest = "99-1", "f" * 64
            stanzas.append(f"Package: {name}\nVersion: {version}\nDescription: x\n Y: z\nSHA256: {digest}\n")
        (tmp_path / "offers").write_text("\n".join(stanzas))
        scripts = {"apt-get": "echo E: no way to download >&2; [ $3 = update ]", "apt-cache": f"cat {tmp_path}/offers"}
        for program, does in scripts.items():
            (programs / program).write_text(f"#!/bin/sh\n{does}\n")
            (programs / program).chmod(0o755)
        return {"PATH": f"{programs}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def root(self, place: Path, **more: str) -> subprocess.CompletedProcess[str]:
        return run(sys.executable, RECIPE / "root.py", "--arch", "amd64", place / "root", **more)

    def test_names_the_package_and_what_to_do(self, moved: dict[str, str], tmp_path: Path) -> None:
        done = self.root(tmp_path, **moved)
        assert done.returncode == 3
        first, package, advice = done.stderr.splitlines()
        assert re.fullmatch(r"image: the Debian mirror has 1 of \d+ locked packages for amd64 no more:", first)
        assert re.fullmatch(r"  ipset: locked \S+ \([0-9a-f]{12}…\), available 99-1 \(f{12}…\)", package)
        assert "make image-lock" in advice
        assert "UNLOCKED=1" in advice

    def test_unlocked_says_what_differs(self, moved: dict[str, str], tmp_path: Path) -> None:
        done = self.root(tmp_path, UNLOCKED="1", **moved)
        assert "image: NOT AS LOCKED, 1 of" in done.stderr
        assert "available 99-1" in done.stderr
        assert done.stderr.endswith("image: apt-get download: E: no way to download\n")

    def test_without_apt(self, tmp_path: Path) -> None:
        done = self.root(tmp_path, PATH="/nonexistent", XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 3
        assert "apt-get is not installed" in done.stderr


@pytest.mark.skipif(not DEBIAN, reason="needs apt-get and dpkg-deb: the image is made of Debian packages")
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="compiles for another machine with this Python, 3.11 only")
def test_another_architecture(image: Image, tmp_path: Path) -> None:
    """Is assembled here without running any of it, and holds no program or library of this one."""
    other = "amd64" if image.description["architecture"] == "arm64" else "arm64"
    unlocked = "1" if image.stale else ""
    done = run(sys.executable, RECIPE / "root.py", "--arch", other, tmp_path / "root", UNLOCKED=unlocked)
    assert done.returncode == 0, done.stderr
    found = {path: path.read_bytes()[:20] for path in (tmp_path / "root").rglob("*") if path.is_file()}
    machines = {path: head[18] for path, head in found.items() if head[:4] == b"\x7fELF"}
    assert len(machines) > 100
    assert {path for path, machine in machines.items() if machine != MACHINES[other]} == set()


def test_kubernetes_of_the_image(image: Image) -> None:
    """Every way to authenticate, as tests/kube has them, with the image's packages in front of this environment's."""
    packages = image.root / "usr/lib/python3/dist-packages"
    check = f"import kubernetes; assert kubernetes.__path__ == [{str(packages / 'kubernetes')!r}]"
    for command in (["-c", check], ["-m", "pytest", "-p", "no:cacheprovider", "tests/kube/test_connection.py"]):
        done = run(sys.executable, *command, PYTHONPATH=str(packages), PYTEST_ADDOPTS="", PYTEST_XDIST_WORKER="")
        assert done.returncode == 0, done.stdout + done.stderr
