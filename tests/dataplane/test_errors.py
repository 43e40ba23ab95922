"""What the tools of several versions say, and what is said about it."""

from __future__ import annotations

import pytest

from agent.dataplane.errors import refused

WORDS = {
    "iptables/1.8.7 Failed to initialize nft: Protocol not supported": "nf_tables",
    "iptables-nft-save v1.8.9 (nf_tables): Could not fetch rule set generation id: Invalid argument": "nf_tables",
    "Could not fetch rule set generation id: Permission denied (you must be root)": "NET_ADMIN",
    "iptables: can't initialize iptables table `filter': Table does not exist (do you need to insmod?)": "ip_tables",
    "iptables-restore v1.8.9 (legacy): iptables-restore: unable to initialize table 'filter'": "iptable_filter",
    "Fatal: can't open lock file /run/xtables.lock: Read-only file system": "Mount",
    "Another app is currently holding the xtables lock. Stopped waiting after 10s.": "fuser",
    "# Table `filter' is incompatible, use 'nft' tool.": "only nft can read",
    "Error: unknown ipv4 meta key; iptables: Parsing nftables rule failed": "only nft can read",
    "ipset v7.17: Error in line 3: Hash is full, cannot add more elements": "fewer addresses",
    "ipset v7.17: Error in line 1: Kernel error received: set type not supported": "ip_set_hash",
    "ipset v7.17: Error in line 1: Kernel error received: maximal number of sets reached": "max_sets",
    "ipset v7.17: Set cannot be destroyed: it is in use by a kernel component": "delete that rule",
    "Warning: Extension physdev revision 0 not supported, missing kernel module?; line 9: RULE_APPEND": "modprobe",
    "iptables: No chain/target/match by that name.": "modprobe",
    "Set npa4-p-0 doesn't exist.": "next sync",
    "ipset v7.17: Error in line 1: The set with the given name does not exist": "next sync",
    "Invalid argument (reading the connection table)": "nf_conntrack_netlink",
    "line 4: CHAIN_DEL failed (Device or resource busy): chain NPA-I-0": "leads into this chain",
    "Unknown error 4353": "does not take this entry",
    "something that nobody has heard of": "dmesg",
}


@pytest.mark.parametrize("words", WORDS)
def test_advice(words: str) -> None:
    error = refused("set npa4-p-0", words)
    assert WORDS[words] in error.advice
    assert str(error) == f"set npa4-p-0: {words.rstrip('.')}. {error.advice}"


def test_many_lines() -> None:
    """Of the tools, and none at all."""
    assert refused("iptables", "one\n\n  two.\n").reason == "one two"
    assert refused("iptables", "\n").reason == "refused without a reason"
