import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradcodec.errors import CodecError
from gradcodec.frame import HEADER_BYTES, Frame, has_context, pack, unpack

FRAME = Frame(b"code", b"layo", 0.5, (b"first", b"", b"the rest"))
GOLDEN_V1 = bytes.fromhex("c601636f64656c61796f0038c29e0416056669727374007468652072657374")


def test_golden_bytes_of_wire_version_1() -> None:
    assert pack(FRAME) == GOLDEN_V1
    assert unpack(GOLDEN_V1, 3) == FRAME


def test_golden_bytes_of_a_frame_with_a_context() -> None:
    """The context costs no byte; it changes the checksum alone."""
    payload = pack(FRAME, b"run/3/1")
    assert payload == GOLDEN_V1[:12] + bytes.fromhex("5826c1bf") + GOLDEN_V1[16:]
    assert unpack(payload, 3, b"run/3/1") == FRAME


def test_a_payload_counts_in_its_own_context_alone() -> None:
    payload = pack(FRAME, b"run/3/1")
    for other in (b"", b"run/3/2", b"run/2/1", b"other/3/1"):
        with pytest.raises(CodecError, match="checksum"):
            unpack(payload, 3, other)
        assert not has_context(payload, other)
    assert has_context(payload, b"run/3/1"), "a payload that is foreign can be told from a damaged one"
    assert not has_context(payload[:-1], b"run/3/1")
    assert not has_context(b"short", b"run/3/1")


@given(
    st.binary(min_size=4, max_size=4),
    st.binary(min_size=4, max_size=4),
    st.floats(width=16, allow_nan=False, allow_infinity=False),
    st.lists(st.binary(max_size=300), min_size=1, max_size=5),
)
def test_unpack_is_the_inverse_of_pack(codec: bytes, layout: bytes, gain: float, streams: list[bytes]) -> None:
    frame = Frame(codec, layout, gain, tuple(streams))
    assert unpack(pack(frame), len(streams)) == frame


@given(st.binary(max_size=200), st.integers(1, 5))
def test_any_bytes_parse_or_raise_codec_error(payload: bytes, num_streams: int) -> None:
    try:
        unpack(payload, num_streams)
    except CodecError:
        return
    pytest.fail("random bytes of under 200 passed a CRC-32")


@given(st.binary(max_size=200), st.integers(1, 5))
def test_any_body_with_a_right_checksum_parses_or_raises_codec_error(body: bytes, num_streams: int) -> None:
    fields = GOLDEN_V1[: HEADER_BYTES - 4]
    payload = fields + struct.pack("<I", zlib.crc32(body, zlib.crc32(fields))) + body
    try:
        frame = unpack(payload, num_streams)
    except CodecError:
        return
    assert len(frame.codes) == num_streams
    assert sum(map(len, frame.codes)) <= len(body)


@given(st.integers(0, 8 * len(GOLDEN_V1) - 1))
def test_every_flipped_bit_is_noticed(bit: int) -> None:
    damaged = bytearray(GOLDEN_V1)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CodecError):
        unpack(bytes(damaged), 3)


@pytest.mark.parametrize("length", range(len(GOLDEN_V1)))
def test_every_truncation_is_noticed(length: int) -> None:
    with pytest.raises(CodecError):
        unpack(GOLDEN_V1[:length], 3)


def test_another_version_is_refused_and_says_what_to_do() -> None:
    with pytest.raises(CodecError, match="upgrade"):
        unpack(GOLDEN_V1[:1] + b"\x02" + GOLDEN_V1[2:], 3)


def test_a_gain_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CodecError, match="finite"):
        unpack(pack(Frame(b"code", b"layo", float("nan"), (b"",))), 1)
