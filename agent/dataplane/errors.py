"""What can go wrong between us and the kernel."""

from __future__ import annotations


class KernelError(Exception):
    """The kernel, or the tool in front of it, refused. Enforcement is as it was before.

    `what` names the set, chain or command, `reason` is its answer, `advice` what the operator can do; `stage` is the
    part of a sync that it ended, "" outside of one."""

    def __init__(self, what: str, reason: str, advice: str) -> None:
        super().__init__(f"{what}: {reason}. {advice}")
        self.what = what
        self.reason = reason
        self.advice = advice
        self.stage = ""


_NATIVE = (
    "The table holds rules that only nft can read (nft list table ip filter): move them to a table of their own, "
    "or choose --backend legacy."
)
_MODULES = "Load the modules ip_tables and iptable_filter, or choose --backend nft."
_REPAIRED = "Something removed what this needs; the next sync reads the kernel again and repairs it."
ADVICE = (
    ("Operation not permitted", "Run as root, or give the container the capability NET_ADMIN."),
    ("Permission denied", "Run as root, or give the container the capability NET_ADMIN."),
    ("you must be root", "Run as root, or give the container the capability NET_ADMIN."),
    ("can't open lock file", "Mount the host's /run/xtables.lock, writable."),
    ("xtables lock", "Another program holds it: see which (fuser -v /run/xtables.lock), and try again."),
    ("CHAIN_DEL failed", "A rule that is not ours leads into this chain; the next sync leaves the chain."),
    ("CHAIN_USER_DEL failed", "A rule that is not ours leads into this chain; the next sync leaves the chain."),
    ("Unknown error 4353", "The set does not take this entry."),
    ("full", "The set holds all it can; fewer addresses must match the selector."),
    ("maximal number of sets", "The kernel holds no more ipsets; load ip_set with a higher max_sets."),
    ("type not supported", "Load the kernel module of this set type (ip_set_hash_ip, _ipport, _net) on the node."),
    ("Extension", "Load the kernel module of this match (modprobe xt_NAME) on the node."),
    ("No chain/target/match by that name", "Load the kernel module of this match or target (modprobe xt_NAME)."),
    ("incompatible, use 'nft' tool", _NATIVE),
    ("Parsing nftables rule failed", _NATIVE),
    ("in use", "A rule uses it (iptables-save | grep the name): delete that rule."),
    ("name already exists", "A set of another type has its name, and is in use: delete the rules that use it."),
    ("initialize nft", "Load the module nf_tables, or choose --backend legacy."),
    ("fetch rule set generation", "Load the module nf_tables, or choose --backend legacy."),
    ("initialize", _MODULES),
    ("Table does not exist", _MODULES),
    ("does not exist", _REPAIRED),
    ("doesn't exist", _REPAIRED),
    ("connection table", "Load the module nf_conntrack_netlink on the node."),
)


def refused(what: str, reason: str) -> KernelError:
    """The error for a refusal, with advice where the reason is known."""
    text = " ".join(reason.split()).rstrip(".") or "refused without a reason"
    for part, advice in ADVICE:
        if part.lower() in text.lower():
            return KernelError(what, text, advice)
    return KernelError(what, text, "The kernel's log (dmesg) may tell more.")
