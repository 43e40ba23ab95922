"""The image as `make image` builds it, once for all tests here, and what is in the archive."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "deploy" / "image"
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
DEBIAN = all(shutil.which(program) for program in ("apt-get", "dpkg-deb"))


def run(*command: object, **more: str) -> subprocess.CompletedProcess[str]:
    """A command of the recipe, in the repository."""
    words = [str(word) for word in command]
    environment = {**os.environ, "PYTHON": sys.executable, **more}
    return subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Image:
    """`root` is the archive's layer, unpacked; `stale` says how the mirror differs from the lock, or nothing."""

    archive: Path
    root: Path
    output: str
    stale: str

    @cached_property
    def files(self) -> dict[str, bytes]:
        """What the archive holds."""
        with tarfile.open(self.archive) as archive:
            return {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]

    @cached_property
    def manifest(self) -> dict[str, Any]:
        (manifest,) = json.loads(self.files["manifest.json"])
        return dict(manifest)

    @cached_property
    def description(self) -> dict[str, Any]:
        return dict(json.loads(self.files[self.manifest["Config"]]))

    @cached_property
    def layer(self) -> bytes:
        return self.files[self.manifest["Layers"][0]]

    @cached_property
    def members(self) -> dict[str, tarfile.TarInfo]:
        with tarfile.open(fileobj=io.BytesIO(self.layer)) as layer:
            return {one.name: one for one in layer}


def build(place: Path) -> Image:
    """As it is locked; where the mirror no longer has that, as CI does it: of what the mirror has now."""
    archive, root, stale = place / "image.tar", place / "root", ""
    done = run(RECIPE / "build", OUT=str(archive))
    if done.returncode == 3 and "UNLOCKED=1" in done.stderr:
        stale = done.stderr
        done = run(RECIPE / "build", OUT=str(archive), UNLOCKED="1")
    assert done.returncode == 0, done.stderr
    image = Image(archive, root, done.stdout, stale)
    root.mkdir()
    subprocess.run(["tar", "-xz", "-C", root], input=image.layer, check=True)
    return image


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
