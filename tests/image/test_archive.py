"""What is in the archive: an image that every loader takes, and in it what the agent needs and no more."""

from __future__ import annotations

import gzip
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.image.built import RECIPE, VERSION, Image, build, run, sha256

pytestmark = pytest.mark.xdist_group("image")

PACKED, UNPACKED = 25_000_000, 80_000_000
"""Bytes that the archive and its files may have."""
BACKENDS = ("nft", "legacy")
PROGRAMS = {
    "netpol-agent",
    "kubectl-netpol",
    "python3",
    "python3.11",
    "ipset",
    "ipset-translate",
    "conntrack",
    "xtables-legacy-multi",
    "xtables-nft-multi",
    "xtables-monitor",
    *(
        f"{v}tables{b}{what}"
        for v in ("ip", "ip6")
        for b in ("", "-nft", "-legacy")
        for what in ("", "-save", "-restore")
    ),
    *(f"{v}tables{what}-translate" for v in ("ip", "ip6") for what in ("", "-restore")),
}


def test_archive(image: Image) -> None:
    """A docker archive whose hashes are right; its names are those that pods ask for."""
    assert image.manifest["RepoTags"] == ["netpol-agent:dev", f"netpol-agent:{VERSION}"]
    assert image.manifest["Config"] == sha256(image.files[image.manifest["Config"]]) + ".json"
    assert len(image.manifest["Layers"]) == 1
    assert image.description["rootfs"]["diff_ids"] == [f"sha256:{sha256(gzip.decompress(image.layer))}"]
    assert image.description["os"] == "linux"
    assert image.description["config"]["Entrypoint"] == ["/usr/bin/netpol-agent"]


def test_as_locked(image: Image) -> None:
    if image.stale:
        pytest.skip(f"the lock is stale, `make image-lock` renews it: {image.stale}")


def test_size(image: Image) -> None:
    """Both are told by the build."""
    unpacked = sum(one.size for one in image.members.values())
    assert image.archive.stat().st_size < PACKED
    assert unpacked < UNPACKED
    assert f"{image.archive.stat().st_size / 1e6:.1f} MB, {unpacked / 1e6:.1f} MB unpacked" in image.output


def test_same_bytes_again(image: Image, tmp_path: Path) -> None:
    """Whatever the umask, the time and the place."""
    before = os.umask(0o077)
    try:
        again = build(tmp_path)
    finally:
        os.umask(before)
    assert sha256(again.archive.read_bytes()) == sha256(image.archive.read_bytes())


def test_files(image: Image) -> None:
    """Nothing but files, links and directories, of root; none gains rights by who runs it, none but /tmp is open."""
    for name, one in image.members.items():
        assert one.isfile() or one.issym() or one.isdir(), name
        assert (one.uid, one.gid, one.mtime) == (0, 0, 0), name
        assert one.issym() or one.mode == (0o1777 if name == "tmp" else 0o755 if one.mode & stat.S_IXUSR else 0o644), (
            name
        )
        assert not name.startswith(("/", "../"))


def test_programs(image: Image) -> None:
    """No shell, no package manager, no perl: an allow-list, so that nothing comes in unnoticed."""
    found = {Path(name).name for name, one in image.members.items() if Path(name).parent.name in ("bin", "sbin")}
    assert found == PROGRAMS
    elsewhere = {name for name, one in image.members.items() if one.isfile() and one.mode & stat.S_IXUSR}
    assert {name for name in elsewhere if not name.startswith(("usr/bin/", "usr/sbin/"))} <= {
        name for name in elsewhere if ".so" in name or name.endswith(".py")
    }


def test_links_lead_somewhere(image: Image) -> None:
    for path in image.root.rglob("*"):
        if path.is_symlink():
            to = os.readlink(path)
            assert (image.root / to[1:] if to.startswith("/") else path.parent / to).exists(), f"{path} -> {to}"


def test_libraries_find_theirs(image: Image) -> None:
    """What each program and library is linked to is in the image: the list of packages is written by hand."""
    (loader,) = image.root.glob("usr/lib*/ld-linux-*")
    (libraries,) = image.root.glob("usr/lib/*-linux-gnu")
    binaries = [path for path in image.root.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x7fELF"]
    assert len(binaries) > 100
    for path in binaries:
        command = [loader, "--library-path", libraries, "--list", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "not found" not in done.stdout + done.stderr, f"{path}: {done.stdout}{done.stderr}"
        assert done.returncode == 0 or "statically linked" in done.stdout + done.stderr, f"{path}: {done.stderr}"


def test_compiled(image: Image) -> None:
    """Each module that can be imported, and so that the source is not looked at: byte 4 has the bits of PEP 552."""
    for path in image.root.glob("usr/lib/python3*/**/*.py"):
        compiled = path.parent / "__pycache__" / f"{path.stem}.cpython-311.pyc"
        assert compiled.read_bytes()[4:8] == b"\x01\0\0\0", path


def test_licences(image: Image) -> None:
    """Of every package that is in it, and what scanners read."""
    for line in (RECIPE / "debian-amd64.lock").read_text().splitlines():
        if not line.startswith("#"):
            name = line.split()[0]
            assert (image.root / "var/lib/dpkg/status.d" / name).read_text().startswith("Package: ")
            assert (image.root / "usr/share/doc" / name / "copyright").exists(), name
    assert 'VERSION_ID="12"' in (image.root / "etc/os-release").read_text()


def test_pack_makes_other_images(tmp_path: Path) -> None:
    """Its options, each in its place of the configuration."""
    root, out = tmp_path / "root", tmp_path / "out.tar"
    root.mkdir()
    (root / "program").write_text("x")
    (root / "program").chmod(0o700)
    options = [
        "--entrypoint",
        "/program",
        "--cmd",
        "a",
        "--cmd=--b",
        "--env",
        "A=B=C",
        "--label",
        "l=m",
        "--user",
        "65534",
    ]
    done = run(
        "python3", RECIPE / "pack.py", "--root", root, "--out", out, "--tag", "other:1", "--arch", "arm64", *options
    )
    assert done.returncode == 0, done.stderr
    image = Image(out, root, done.stdout, "")
    assert image.manifest["RepoTags"] == ["other:1"]
    assert image.description["architecture"] == "arm64"
    assert image.description["created"] == "1970-01-01T00:00:00Z"
    assert image.description["config"] == {
        "Entrypoint": ["/program"],
        "Cmd": ["a", "--b"],
        "Env": ["A=B=C"],
        "Labels": {"l": "m"},
        "User": "65534",
        "WorkingDir": "/",
    }
    assert {name: one.mode for name, one in image.members.items()} == {"program": 0o755}
