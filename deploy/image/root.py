"""root.py --arch ARCH DIR: the image's root file system, of locked Debian packages, locked wheels and our own.

UNLOCKED=1 takes the Debian packages that the mirror has now, and says which they are. Nothing of the image is executed
but its own Python, to compile, and that only where the machine is of its kind."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import debian
import wheels
from debian import HERE, Package, Unavailable

MERGED = ("bin", "lib", "lib64", "sbin")
"""Are links into /usr."""
PACKAGES = "usr/lib/python3/dist-packages"
DIRECTORIES = ("dev", "proc", "run", "sys", "tmp", "root", "var/lib")
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}
LINKS = {
    "var/run": "/run",
    "usr/bin/python3": "python3.11",
    "usr/lib/ssl/cert.pem": f"/{PACKAGES}/certifi/cacert.pem",  # where OpenSSL looks for authorities
}
for _family in ("iptables", "ip6tables"):  # Debian has alternatives for these
    LINKS |= {f"usr/sbin/{_family}{what}": f"{_family}-nft{what}" for what in ("", "-save", "-restore")}
ENTRY = """\
#!/usr/bin/python3
import sys

from {module} import {function}

sys.exit({function}())
"""
LOADERS = {"amd64": "usr/lib64/ld-linux-x86-64.so.2", "arm64": "usr/lib/ld-linux-aarch64.so.1"}
LIBRARIES = {"amd64": "usr/lib/x86_64-linux-gnu", "arm64": "usr/lib/aarch64-linux-gnu"}


class Root:
    """A directory that becomes the image's /. What the file `without` names never gets there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise Unavailable(f"{path} is not empty")
        path.chmod(0o755)
        for name in MERGED:
            (path / name).symlink_to(f"usr/{name}")
        for name in (*(f"usr/{name}" for name in MERGED), *DIRECTORIES):
            self._parents(PurePosixPath(name, "."))
            (path / name).mkdir(exist_ok=True)
        (path / "tmp").chmod(0o1777)
        lines = (line.strip() for line in (HERE / "without").read_text().splitlines())
        self._patterns = [(line.removeprefix("+ "), line.startswith("+ ")) for line in lines if line and line[0] != "#"]

    def write(self, name: str, content: bytes, *, program: bool = False) -> None:
        if place := self._place(name):
            place.write_bytes(content)
            place.chmod(0o755 if program else 0o644)

    def link(self, name: str, to: str) -> None:
        if place := self._place(name):
            place.symlink_to(to)

    def unpack(self, package: Path) -> None:
        """A Debian package's files. Owners are not kept: everything in an image is root's."""
        content = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(content)) as files:
            for one in files:
                name = str(PurePosixPath(one.name))
                if file := files.extractfile(one) if one.isfile() else None:
                    self.write(name, file.read(), program=bool(one.mode & 0o100))
                elif one.issym():
                    self.link(name, one.linkname)
                elif not one.isdir():
                    raise Unavailable(f"{package.name}: {name} is neither a file nor a link nor a directory")

    def install(self, wheel: Path) -> None:
        """A wheel's modules."""
        with zipfile.ZipFile(wheel) as files:
            for name in files.namelist():
                if ".data/" in name.partition("/")[0] + "/":
                    raise Unavailable(f"{wheel.name} has {name}, which is for elsewhere than beside its modules")
                if not name.endswith("/"):
                    self.write(f"{PACKAGES}/{name}", files.read(name))

    def _place(self, name: str) -> Path | None:
        head, slash, rest = name.partition("/")
        if head in MERGED:
            name = f"usr/{head}{slash}{rest}"
        for pattern, keeps in self._patterns:
            if fnmatchcase(name, pattern):
                if not keeps:
                    return None
                break
        self._parents(PurePosixPath(name))
        return self.path / name

    def _parents(self, name: PurePosixPath) -> None:
        """Whatever the umask says."""
        for parent in reversed(name.parents):
            if not (self.path / parent).is_dir():
                (self.path / parent).mkdir()
                (self.path / parent).chmod(0o755)


def debian_packages(arch: str) -> list[Package]:
    locked = debian.locked(arch)
    if not os.environ.get("UNLOCKED"):
        if [one.name for one in locked] != sorted(debian.names()):
            raise Unavailable(f"{debian.lock_file(arch).name} has other packages than `packages`: `make image-lock`")
        return locked
    now = sorted(debian.mirror(arch).newest(debian.names()))
    if changed := debian.differences(locked, now):
        print(f"image: NOT AS LOCKED, {len(changed)} of {len(now)} Debian packages:", file=sys.stderr)
        print(*(f"  {line}" for line in changed), sep="\n", file=sys.stderr)
    return now


def describe(root: Root, package: Path) -> None:
    """Where scanners look for what is installed in an image without dpkg."""
    control = subprocess.run(["dpkg-deb", "--field", package], capture_output=True, check=True).stdout
    name = control.partition(b"Package: ")[2].partition(b"\n")[0].decode()
    root.write(f"var/lib/dpkg/status.d/{name}", control)


def compile_modules(root: Root, arch: str) -> None:
    """Nobody can write compiled modules into a read-only image, and nobody need compare them with their sources."""
    environment = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    if os.uname().machine == wheels.MACHINES[arch]:
        ours = [root.path / name for name in (LOADERS[arch], LIBRARIES[arch], "usr/bin/python3.11")]
        python = [str(ours[0]), "--library-path", *map(str, ours[1:])]
        environment["PYTHONHOME"] = str(root.path / "usr")
    elif sys.version_info[:2] == (3, 11):
        python = [sys.executable]
    else:
        raise Unavailable(f"compiling for {arch} needs Python {wheels.PYTHON} here")
    subprocess.run(
        [*python, "-S", "-m", "compileall", "-q", "--invalidation-mode=unchecked-hash", "-s", root.path, "-p", "/",
         root.path / "usr/lib/python3.11", root.path / PACKAGES],
        env=environment, check=True,
    )  # fmt: skip


def assemble(path: Path, arch: str) -> None:
    root = Root(path)
    for package in debian.fetch(debian_packages(arch), arch):
        root.unpack(package)
        describe(root, package)
    for wheel in wheels.fetch(HERE / "wheels.lock", arch):
        root.install(wheel)
    with wheels.ours(wheels.fetch(HERE / "backend.lock", arch)) as wheel:
        root.install(wheel)
    for name, text in FILES.items():
        root.write(name, text.encode())
    for name, to in LINKS.items():
        root.link(name, to)
    project = tomllib.loads((wheels.PROJECT / "pyproject.toml").read_text())["project"]
    for name, entry in project["scripts"].items():
        module, _, function = entry.partition(":")
        root.write(f"usr/bin/{name}", ENTRY.format(module=module, function=function).encode(), program=True)
    compile_modules(root, arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--arch", choices=sorted(wheels.MACHINES), required=True)
    given = parser.parse_args()
    with debian.alone():
        assemble(given.root.absolute(), given.arch)


if __name__ == "__main__":
    try:
        main()
    except Unavailable as error:
        print(f"image: {error}", file=sys.stderr)
        sys.exit(3)
