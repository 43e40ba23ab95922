"""pack.py --root DIR --tag NAME:TAG --entrypoint PROGRAM --out FILE: a directory as a container image.

The archive is what `docker save` writes, with one compressed layer: `docker load`, `ctr images import`, `kind load
image-archive` and `podman load` take it. The same directory gives the same bytes: files are sorted, are root's, and
were all changed at SOURCE_DATE_EPOCH."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

MEGABYTE = 1_000_000


def pack(root: Path, out: Path, tags: list[str], arch: str, config: dict[str, Any], epoch: int = 0) -> int:
    """Bytes of the files, unpacked."""
    plain, size = _layer(root, epoch)
    layer = gzip.compress(plain, 6, mtime=0)
    description = {
        "architecture": arch,
        "os": "linux",
        "created": datetime.fromtimestamp(epoch, UTC).isoformat().replace("+00:00", "Z"),
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{_sha256(plain)}"]},
        "history": [{"created_by": "netpol-agent deploy/image/pack.py"}],
    }
    configuration = json.dumps(description, sort_keys=True).encode()
    names = {"config": f"{_sha256(configuration)}.json", "layer": f"{_sha256(layer)}.tar.gz"}
    manifest = [{"Config": names["config"], "RepoTags": tags, "Layers": [names["layer"]]}]
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in (
            (names["layer"], layer),
            (names["config"], configuration),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            _add(archive, tarfile.TarInfo(name), io.BytesIO(content), len(content), epoch)
    part.replace(out)
    return size


def _layer(root: Path, epoch: int) -> tuple[bytes, int]:
    buffer, size = io.BytesIO(), 0
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as layer:
        for path in sorted(root.rglob("*")):
            one = tarfile.TarInfo(str(path.relative_to(root)))
            status = path.lstat()
            one.mode = 0o755 if status.st_mode & 0o100 else 0o644
            if stat.S_ISLNK(status.st_mode):
                one.type, one.linkname, one.mode = tarfile.SYMTYPE, os.readlink(path), 0o777
                _add(layer, one, None, 0, epoch)
            elif stat.S_ISDIR(status.st_mode):
                one.type, one.mode = tarfile.DIRTYPE, 0o1777 if status.st_mode & stat.S_ISVTX else 0o755
                _add(layer, one, None, 0, epoch)
            elif stat.S_ISREG(status.st_mode):
                with path.open("rb") as file:
                    _add(layer, one, file, status.st_size, epoch)
                size += status.st_size
            else:
                raise SystemExit(f"pack: {path} is neither a file nor a link nor a directory")
    return buffer.getvalue(), size


def _add(archive: tarfile.TarFile, one: tarfile.TarInfo, content: IO[bytes] | None, size: int, epoch: int) -> None:
    one.mtime, one.size = epoch, size
    archive.addfile(one, content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tag", action="append", required=True, help="NAME:TAG; may be repeated")
    parser.add_argument("--arch", default="amd64")
    parser.add_argument("--entrypoint", required=True)
    parser.add_argument("--cmd", action="append", default=[], help="an argument of the entry point; may be repeated")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--label", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--user")
    given = parser.parse_args()
    config = {
        "Entrypoint": [given.entrypoint],
        "Cmd": given.cmd,
        "Env": given.env,
        "Labels": dict(one.split("=", 1) for one in given.label),
        "User": given.user,
        "WorkingDir": "/",
    }
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or 0)
    size = pack(given.root, given.out, given.tag, given.arch, {name: one for name, one in config.items() if one}, epoch)
    packed = given.out.stat().st_size
    print(f"{given.out}: {', '.join(given.tag)}; {packed / MEGABYTE:.1f} MB, {size / MEGABYTE:.1f} MB unpacked")


if __name__ == "__main__":
    main()
