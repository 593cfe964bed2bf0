"""Two architectures on one host: two real engines that take turns by vLLM's own sleep calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts.engine_group import EngineGroup
from experts.engine_states import EngineState
from experts.types import Endpoint
from experts.vllm_engine import EngineSettings
from tests.integration.tiny_models import write_tiny_llama

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

BODY = {"prompt": "The sea is", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


async def say(group: EngineGroup, expert: str) -> str:
    reply = await group.serve(expert, Endpoint.COMPLETIONS, BODY, request_id="r")
    assert isinstance(reply, dict)
    assert reply["model"] == expert
    return str(reply["choices"][0]["text"])


async def test_engines_take_turns_and_experts_keep_their_voices(tmp_path: Path) -> None:
    folders = {
        name: str(write_tiny_llama(tmp_path / name, seed=seed, tied=True, hidden=hidden))
        for seed, (name, hidden) in enumerate(
            [("a", 128), ("wide", 192), ("b", 128), ("wider", 192)], start=1
        )
    }
    group, refused = await EngineGroup.start(
        folders,
        EngineSettings(dtype="float32", max_model_len=256, kv_cache_bytes=64 << 20),
        engines_max=2,
        progress=lambda _note: None,
    )
    try:
        assert refused == {}
        assert group.states == {"a": EngineState.AWAKE, "wide": EngineState.ASLEEP}
        voices: dict[str, set[str]] = {}
        ways = []
        for expert in ("a", "b", "wide", "wider", "b", "a", "wider", "a", "wide"):
            report = await group.make_resident(expert)
            ways.append(report.way)
            assert group.resident == expert
            assert list(group.states.values()).count(EngineState.AWAKE) == 1
            voices.setdefault(expert, set()).add(await say(group, expert))
        assert ways == [
            *("in_place", "in_place", "wake", "in_place", "wake", "in_place"),
            *("wake", "wake", "wake"),
        ]
        assert all(len(said) == 1 for said in voices.values()), voices
        assert len(set.union(*voices.values())) == len(folders)
    finally:
        group.shutdown()
