"""Pain 1: what streaming through a cascade costs the reader in time, in virtual milliseconds."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from policies.types import StreamWindow
from tests.unit.test_service import policy, request, world

SURE = "tokens?count=12&confidence=0.95"


@settings(deadline=None, max_examples=60)
@given(
    call_ms=st.integers(0, 3_000),
    event_ms=st.integers(0, 400),
    tokens=st.integers(1, 12),
    hold_ms=st.integers(0, 2_000),
)
def test_pain_1_a_committed_stream_starts_within_the_window_and_the_expert_s_own_time(
    call_ms: int, event_ms: int, tokens: int, hold_ms: int
) -> None:
    window = StreamWindow(tokens, hold_ms)
    made = world(policy("a", "b", window=window), a=SURE, b=SURE)
    made.backends["a"].call_ms, made.backends["a"].event_ms = call_ms, event_ms

    async def first_token_ms() -> float:
        with made.service.journal("chat/completions", "r") as journal:
            async with made.service.stream(request(stream=True), journal) as answer:
                async for _ in answer.batches():
                    break
        assert journal.served is not None
        assert journal.served.expert == "a"
        assert journal.first_token_ms is not None
        return journal.first_token_ms - journal.arrived_ms

    took_ms = asyncio.run(first_token_ms())
    own_ms = call_ms + event_ms
    # The event that fills the window, or that comes when its time is over, is waited for.
    assert took_ms <= own_ms + min(tokens * event_ms, hold_ms + event_ms)
