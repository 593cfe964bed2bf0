"""The decoder gives the same payloads wherever the network cuts the bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.event_stream import EventTooLarge, SseDecoder
from gateway.sse import framed

STREAM = (
    b": a comment\n\n"
    b'data: {"a": "\xc3\xa9"}\n\n'
    b"event: x\nid: 1\ndata: one\ndata:two\n\n"
    b"retry: 5\n\n"
    b"data\n\n"
    b"data: [DONE]\n\n"
)
PAYLOADS = [b'{"a": "\xc3\xa9"}', b"one\ntwo", b"", b"[DONE]"]


@given(
    cuts=st.lists(st.integers(0, 200), max_size=12),
    line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
)
def test_any_cut_and_any_line_end_decode_alike(cuts: list[int], line_end: bytes) -> None:
    raw = STREAM.replace(b"\n", line_end)
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    decoder = SseDecoder()
    got = [
        payload
        for start, end in itertools.pairwise(edges)
        for payload in decoder.feed(raw[start:end])
    ]
    assert got == PAYLOADS
    assert not decoder.pending


@given(st.lists(st.binary().filter(lambda b: b"\r" not in b)))
def test_what_is_framed_is_decoded_again(payloads: list[bytes]) -> None:
    assert SseDecoder().feed(framed(payloads)) == payloads


def test_an_event_without_end_is_refused_at_the_bound() -> None:
    decoder = SseDecoder(event_bytes_max=100)
    decoder.feed(b"data: " + b"x" * 80)
    assert decoder.pending
    with pytest.raises(EventTooLarge):
        decoder.feed(b"x" * 80)
