"""What can go wrong between us and the kernel."""

from __future__ import annotations


class KernelError(Exception):
    """The kernel, or the tool in front of it, refused. Enforcement is as it was before.

    `what` names the set, chain or command, `reason` is its answer, `advice` what the operator can do."""

    def __init__(self, what: str, reason: str, advice: str) -> None:
        super().__init__(f"{what}: {reason}. {advice}")
        self.what = what
        self.reason = reason
        self.advice = advice


_NATIVE = (
    "The table holds rules that only nft can read (nft list table ip filter): move them to a table of their own, "
    "or choose --backend legacy."
)
ADVICE = (
    ("Operation not permitted", "Run as root, or give the container the capability NET_ADMIN."),
    ("Permission denied", "Run as root, or give the container the capability NET_ADMIN."),
    ("you must be root", "Run as root, or give the container the capability NET_ADMIN."),
    ("can't open lock file", "Mount the host's /run/xtables.lock, writable."),
    ("xtables lock", "Another program holds it: see which (fuser -v /run/xtables.lock), and try again."),
    ("set is full", "The set holds all it can; fewer addresses must match the selector."),
    ("full", "The set holds all it can; fewer addresses must match the selector."),
    ("CHAIN_DEL failed", "A rule that is not ours leads into this chain; the next sync leaves the chain."),
    ("CHAIN_USER_DEL failed", "A rule that is not ours leads into this chain; the next sync leaves the chain."),
    ("Unknown error 4353", "The set does not take this entry."),
    ("does not exist", "Something removed what this rule needs; the next sync reads the kernel again and repairs it."),
    ("maximal number of sets", "The kernel holds no more ipsets; load ip_set with a higher max_sets."),
    ("type not supported", "Load the kernel module of this set type (ip_set_hash_ip, _ipport, _net) on the node."),
    ("Extension", "Load the kernel module of this match (modprobe xt_NAME) on the node."),
    ("No chain/target/match by that name", "Load the kernel module of this match or target (modprobe xt_NAME)."),
    ("incompatible, use 'nft' tool", _NATIVE),
    ("Parsing nftables rule failed", _NATIVE),
    ("in use", "A rule that is not ours uses it (iptables-save | grep the name): delete that rule."),
    ("name already exists", "A set of another type has its name, and is in use: delete the rules that use it."),
    ("Table does not exist", "Load the module ip_tables and iptable_filter, or choose --backend nft."),
    ("initialize", "Load the modules ip_tables and iptable_filter, or choose --backend nft."),
    ("connection table", "Load the module nf_conntrack_netlink on the node."),
)


def refused(what: str, reason: str) -> KernelError:
    """The error for a refusal, with advice where the reason is known."""
    text = " ".join(reason.split()).rstrip(".") or "refused without a reason"
    for part, advice in ADVICE:
        if part.lower() in text.lower():
            return KernelError(what, text, advice)
    return KernelError(what, text, "The kernel's log (dmesg) may tell more.")
