"""lock.py [ARCH…]: write into the lock files beside this script which versions the image is made of from now on."""

from __future__ import annotations

import json
import sys
import tempfile
import tomllib

import wheels
from debian import HERE, Unavailable, alone, lock_file, mirror, names

AIO = "aiohttp aiohttp-retry aiohappyeyeballs aiosignal attrs frozenlist multidict propcache yarl"
"""What `kubernetes` requires for its `aio` package only, which the image leaves out."""
HEADER = "# Written by `make image-lock`.\n"


def debian_lock(arch: str) -> str:
    packages = sorted(mirror(arch).newest(names()))
    return HEADER + "".join(f"{one.name} {one.version} {one.sha256}\n" for one in packages)


def wheel_lock(requirements: list[str], *options: str) -> str:
    """Requirements with all that they require, and the hashes of their wheels for every architecture."""
    hashes: dict[str, set[str]] = {}
    for arch in wheels.MACHINES:
        with tempfile.TemporaryDirectory() as place:
            answer = wheels.pip(
                "install", "-q", "--dry-run", "--ignore-installed", "--report=-", f"--target={place}",
                *wheels.target(arch), *options, *requirements,
            )  # fmt: skip
        for one in json.loads(answer)["install"]:
            name, version = one["metadata"]["name"], one["metadata"]["version"]
            if name.lower() not in AIO.split():
                pinned = hashes.setdefault(f"{name}=={version}", set())
                pinned.add(one["download_info"]["archive_info"]["hashes"]["sha256"])
    lines = (
        " \\\n    ".join([pinned, *(f"--hash=sha256:{digest}" for digest in sorted(hashes[pinned]))])
        for pinned in sorted(hashes, key=str.lower)
    )
    return HEADER + "".join(f"{line}\n" for line in lines)


def main() -> None:
    project = tomllib.loads((wheels.PROJECT / "pyproject.toml").read_text())
    versions = f"--constraint={wheels.PROJECT / 'deploy' / 'constraints.txt'}"
    texts = {lock_file(arch): debian_lock(arch) for arch in sys.argv[1:] or wheels.MACHINES}
    texts[HERE / "wheels.lock"] = wheel_lock(project["project"]["dependencies"], versions)
    texts[HERE / "backend.lock"] = wheel_lock(project["build-system"]["requires"])
    for path, text in texts.items():
        same = path.exists() and path.read_text() == text
        path.write_text(text)
        print(f"{path.relative_to(wheels.PROJECT)}: {'as it was' if same else 'written'}")


if __name__ == "__main__":
    try:
        with alone():
            main()
    except Unavailable as error:
        sys.exit(f"image-lock: {error}")
