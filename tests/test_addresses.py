"""Blocks as the API server reads them, and exact arithmetic on them."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.addresses import Prefix, format_address, is_strict_subset, parse_address, parse_block, reduce_blocks


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("010.001.0.0/16", "10.1.0.0/16"),
        ("10.1.2.3/16", "10.1.0.0/16"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("10.0.0.0/08", "10.0.0.0/8"),
        ("::/0", "::/0"),
        ("2001:DB8::1/32", "2001:db8::/32"),
        ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
        ("::ffff:10.1.2.3/96", "0.0.0.0/0"),
        ("::ffff:0:0/95", "::fffe:0:0/95"),
        ("1:2:3:4:5:6:7::/112", "1:2:3:4:5:6:7:0/112"),
        ("::1.2.3.4/128", "::102:304/128"),
    ],
)
def test_blocks_are_read_as_the_api_server_reads_them(text: str, canonical: str) -> None:
    assert str(parse_block(text)) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/255.0.0.0", "10.0.0/8", "10.0.0.256/8", "10.0.0.0/-1", "",
        " 10.0.0.0/8", "10.0.0.0/8 ", "+10.0.0.0/8", "fe80::1%eth0/64", "1::2::3/64", ":::/0", "1:2:3:4:5:6:7/64",
        "1:2:3:4:5:6:7:8:9/64", "12345::/16", "::/129", "1.2.3.4:://64", "10.0.0.0/8/8", "a.b.c.d/8", "/8", "١.0.0.0/8",
    ],
)  # fmt: skip
def test_what_is_no_block(text: str) -> None:
    with pytest.raises(ValueError, match="has"):
        parse_block(text)


@given(st.ip_addresses())
def test_addresses_round_trip(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    packed = parse_address(str(address))
    mapped = getattr(address, "ipv4_mapped", None)
    assert packed == (mapped or address).packed
    assert format_address(packed) == str(mapped or address)


def prefixes(bits: int) -> st.SearchStrategy[Prefix]:
    def make(number: int, length: int) -> Prefix:
        return Prefix(4, number >> (32 - length) << (32 - length), length)

    return st.builds(make, st.integers(0, (1 << bits) - 1), st.integers(32 - bits, 32))


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Prefix, tuple[Prefix, ...]]:
    block = draw(prefixes(8))
    cuts = [cut for cut in draw(st.lists(prefixes(8), max_size=4)) if is_strict_subset(cut, block)]
    return block, tuple(cuts)


@given(st.lists(blocks(), max_size=4))
def test_a_union_of_blocks_is_exact_and_smallest(given_blocks: list[tuple[Prefix, tuple[Prefix, ...]]]) -> None:
    reduced = reduce_blocks(given_blocks)
    for number in range(256):
        address = number.to_bytes(4, "big")
        wanted = any(b.holds(address) and not any(c.holds(address) for c in cuts) for b, cuts in given_blocks)
        assert any(prefix.holds(address) for prefix in reduced) == wanted
    assert list(reduced) == sorted(set(reduced))
    networks = [ipaddress.ip_network(str(prefix)) for prefix in reduced]
    assert list(ipaddress.collapse_addresses(networks)) == networks  # type: ignore[type-var]


def test_everything_is_one_prefix() -> None:
    halves = [(parse_block("0.0.0.0/1"), ()), (parse_block("128.0.0.0/1"), ()), (parse_block("10.0.0.0/8"), ())]
    assert [str(p) for p in reduce_blocks(halves)] == ["0.0.0.0/0"]


def test_an_except_cuts_its_own_block_only() -> None:
    both = [(parse_block("10.0.0.0/8"), (parse_block("10.1.0.0/16"),)), (parse_block("10.1.2.0/24"), ())]
    reduced = reduce_blocks(both)
    assert any(p.holds(parse_address("10.1.2.3")) for p in reduced)
    assert not any(p.holds(parse_address("10.1.3.3")) for p in reduced)
