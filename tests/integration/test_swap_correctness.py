"""A swapped-in expert answers exactly as a fresh engine with that expert's weights does.

A to B to A proves nothing (a stale tensor would be A's own again), so B is held against a fresh B.
Tied output heads are the hard case: vLLM's CPU build keeps a packed copy of the head by default.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from experts.errors import ArtifactError, CanaryMismatch, SwapFailed
from experts.types import Endpoint
from experts.vllm_engine import EngineSettings, SwappableEngine
from tests.integration.tiny_models import write_tiny_llama

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPTS = ("The sea is", "abc abc abc", "Once upon a time there was a very small engine.")
TOKENS = 24
SETTINGS = EngineSettings(dtype="float32", max_model_len=256, kv_cache_bytes=64 << 20)


def quiet(_note: str) -> None:
    return


async def greedy(engine: SwappableEngine, prompt: str) -> list[int]:
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    salt = uuid.uuid4().hex
    ids = engine.engine.get_tokenizer().encode(prompt)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    outputs = engine.engine.generate(tokens_input(ids, cache_salt=salt), params, salt)
    *_, last = [output async for output in outputs]
    return list(last.outputs[0].token_ids)


async def answers(engine: SwappableEngine) -> list[list[int]]:
    return [await greedy(engine, prompt) for prompt in PROMPTS]


async def fresh_answers(folder: Path, dtype: str) -> list[list[int]]:
    settings = EngineSettings(dtype=dtype, max_model_len=256, kv_cache_bytes=64 << 20)
    engine, _ = await SwappableEngine.start({"x": str(folder)}, settings, progress=quiet)
    try:
        return await answers(engine)
    finally:
        engine.shutdown()


@pytest.mark.parametrize(
    ("tied", "dtype", "held_against"),
    [(True, "bfloat16", "b"), (True, "float16", "c"), (False, "float32", "bc")],
)
async def test_after_random_swaps_each_expert_equals_its_fresh_engine(
    tmp_path: Path, tied: bool, dtype: str, held_against: str
) -> None:
    folders = {
        name: write_tiny_llama(tmp_path / name, seed=seed, tied=tied)
        for seed, name in enumerate("abc", start=1)
    }
    want = {name: await fresh_answers(folders[name], dtype) for name in held_against}
    assert len({str(answer) for answer in want.values()}) == len(want)
    # In float32 the pool holds two of the three; the third comes from disk when it is asked for.
    weights_bytes = (folders["a"] / "model.safetensors").stat().st_size
    settings = EngineSettings(
        dtype=dtype, max_model_len=256, kv_cache_bytes=64 << 20, pool_bytes=int(2.5 * weights_bytes)
    )
    engine, refused = await SwappableEngine.start(
        {name: str(folder) for name, folder in folders.items()}, settings, progress=quiet
    )
    sources: set[str] = set()
    try:
        assert refused == {}
        rng = random.Random(7)
        for name in ["b", "c", *(rng.choice("abc") for _ in range(8)), "b", "c"]:
            sources.add((await engine.make_resident(name)).source)
            if name in want:
                assert await answers(engine) == want[name]
        assert sources == ({"pool", "disk"} if dtype == "float32" else {"pool"})
    finally:
        engine.shutdown()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {
        "a": write_tiny_llama(root / "a", seed=1, tied=True),
        "b": write_tiny_llama(root / "b", seed=2, tied=True),
        "wide": write_tiny_llama(root / "wide", seed=3, tied=True, hidden=192),
        "late": write_tiny_llama(root / "late", seed=4, tied=True),
        "lacking": without_a_tensor(write_tiny_llama(root / "lacking", seed=5, tied=True)),
    }


def without_a_tensor(folder: Path) -> Path:
    """A checkpoint that opens well and lacks what the model needs."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
async def engine(tiny: dict[str, Path]) -> AsyncIterator[SwappableEngine]:
    started, refused = await SwappableEngine.start(
        {name: str(tiny[name]) for name in ("a", "b", "wide")}, SETTINGS, progress=quiet
    )
    # Another architecture is refused with the difference named; the others are in service.
    assert "hidden_size" in refused["wide"]
    assert set(started.pooled) == {"a", "b"}
    yield started
    started.shutdown()


async def test_pool_canary_cache_and_serving(
    engine: SwappableEngine, tiny: dict[str, Path]
) -> None:
    """One engine start, several facts about it: starts are what takes the time here."""
    await serving_layer_answers_under_the_experts_name(engine)
    await a_returning_expert_hits_its_blocks_and_nobody_hits_anothers(engine)
    await an_expert_is_loaded_ahead_while_another_generates(engine, tiny)
    await an_evicted_expert_comes_back_from_disk_the_same(engine)
    await weights_cut_short_fail_ahead_and_spoil_nothing(engine, tiny)
    await a_missing_folder_is_refused_and_the_resident_put_back(engine, tiny)
    await a_corrupted_entry_fails_its_canary(engine)


async def serving_layer_answers_under_the_experts_name(engine: SwappableEngine) -> None:
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": True,
    }
    for expert in ("a", "b"):
        await engine.make_resident(expert)
        reply = await engine.serve(expert, Endpoint.CHAT, body, request_id="same-id")
        assert isinstance(reply, dict)
        assert reply["model"] == expert
        assert (
            len(reply["choices"][0]["logprobs"]["content"]) == reply["usage"]["completion_tokens"]
        )


async def a_returning_expert_hits_its_blocks_and_nobody_hits_anothers(
    engine: SwappableEngine,
) -> None:
    """By the engine's own count of prompt tokens that it found in its cache."""
    body = {"prompt": "x" * 200, "max_tokens": 8, "temperature": 0}
    texts: dict[str, list[Any]] = {"a": [], "b": []}
    cached: dict[str, list[int]] = {"a": [], "b": []}
    for expert in ("a", "b", "a", "b"):
        await engine.make_resident(expert)
        reply = await engine.serve(expert, Endpoint.COMPLETIONS, body, request_id="r")
        assert isinstance(reply, dict)
        texts[expert].append(reply["choices"][0]["text"])
        details = reply["usage"]["prompt_tokens_details"] or {}
        cached[expert].append(details.get("cached_tokens") or 0)
    for expert in ("a", "b"):
        first, second = cached[expert]
        assert first == 0, "the other expert's blocks, for an equal prompt"
        assert second >= 128, "one block at least, over two swaps"
    assert texts["a"][0] == texts["a"][1]
    assert texts["b"][0] == texts["b"][1]
    assert texts["a"][0] != texts["b"][0]


async def an_expert_is_loaded_ahead_while_another_generates(
    engine: SwappableEngine, tiny: dict[str, Path]
) -> None:
    """From disk to pool beside a running generation, whose answer stays what it was."""
    await engine.make_resident("a")
    undisturbed = await greedy(engine, PROMPTS[2])
    engine.add("late", str(tiny["late"]))
    generating = asyncio.create_task(greedy(engine, PROMPTS[2]))
    assert await engine.prefetch("late")
    assert await generating == undisturbed
    assert "late" in engine.in_pool
    assert engine.resident == "a"
    assert not await engine.prefetch("late"), "it is there already"
    assert (await engine.make_resident("late")).source == "pool"
    late = await answers(engine)
    await engine.make_resident("a")
    await engine.make_resident("late")
    assert await answers(engine) == late
    assert late != undisturbed


async def an_evicted_expert_comes_back_from_disk_the_same(engine: SwappableEngine) -> None:
    """Its memory is let go of while another generates; nobody's answers change."""
    await engine.make_resident("b")
    before = await answers(engine)
    await engine.make_resident("a")
    undisturbed = await greedy(engine, PROMPTS[2])
    generating = asyncio.create_task(greedy(engine, PROMPTS[2]))
    await engine.evict("b")
    await engine.evict("b")  # nothing is left to let go of
    assert await generating == undisturbed
    assert "b" not in engine.in_pool
    assert engine.entry_bytes > 0
    assert (await engine.make_resident("b")).source == "disk"
    assert engine.load_ms is not None
    assert engine.load_ms > 0.0
    assert await answers(engine) == before


async def weights_cut_short_fail_ahead_and_spoil_nothing(
    engine: SwappableEngine, tiny: dict[str, Path]
) -> None:
    await engine.make_resident("a")
    before = await answers(engine)
    engine.add("lacking", str(tiny["lacking"]))
    with pytest.raises(SwapFailed, match="lacking"):
        await engine.prefetch("lacking")
    assert await answers(engine) == before
    with pytest.raises(SwapFailed):
        await engine.make_resident("lacking")
    await engine.make_resident("a")
    assert await answers(engine) == before


async def a_missing_folder_is_refused_and_the_resident_put_back(
    engine: SwappableEngine, tiny: dict[str, Path]
) -> None:
    await engine.make_resident("a")
    before = await greedy(engine, PROMPTS[0])
    damaged = tiny["a"].parent / "damaged"
    damaged.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (damaged / name).write_bytes((tiny["a"] / name).read_bytes())
    (damaged / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ArtifactError, match="damaged"):
        await engine.pool("d", str(damaged))
    assert await greedy(engine, PROMPTS[0]) == before
    with pytest.raises(SwapFailed, match="not in the weight pool"):
        await engine.make_resident("d")


async def a_corrupted_entry_fails_its_canary(engine: SwappableEngine) -> None:
    await engine.make_resident("a")
    await engine.corrupt_for_test("b")
    with pytest.raises(CanaryMismatch):
        await engine.make_resident("b")
    assert engine.resident is None
    await engine.make_resident("a")
    assert engine.resident == "a"
