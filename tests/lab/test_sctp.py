"""SCTP packets as bytes."""

from agent.lab.sctp import ABORT, INIT, INIT_ACK, Packet, crc32c, decode


def test_checksum_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_what_is_encoded_is_decoded() -> None:
    for packet in (
        Packet(40000, 80, 0, INIT, 7),
        Packet(80, 40000, 7, INIT_ACK, 9, b"x/a"),
        Packet(80, 40000, 7, ABORT),
    ):
        assert decode(packet.encode()) == packet
        assert len(packet.encode()) % 4 == 0


def test_damage_is_noticed() -> None:
    whole = Packet(80, 40000, 7, INIT_ACK, 9, b"x/abc").encode()
    assert decode(whole[:10]) is None
    for at in range(len(whole)):
        assert decode(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]) is None
