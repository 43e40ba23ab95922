"""Mount and process namespaces of our own, which end with this process, and with them the network namespaces that are
made inside. The machine's network is kept for the way to the API server; nothing of it is changed."""

from __future__ import annotations

import os
import subprocess
import sys

from agent.lab.namespaces import mount

UNSHARE = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def prepare() -> None:
    """Once, inside."""
    mount("tmpfs", "/run", "tmpfs")
    os.environ["XTABLES_LOCKFILE"] = "/run/xtables.lock"


def enclosed() -> bool:
    """True inside; else runs this program again inside, and False when that has ended well."""
    if os.getpid() == 1:
        prepare()
        return True
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    program = [sys.executable, "-m", _module(), *sys.argv[1:]]
    code = subprocess.run(["unshare", *user, *UNSHARE, *program], check=False).returncode
    if code:
        sys.exit(code)
    return False


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else "__main__"
