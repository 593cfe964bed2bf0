"""Where no second model can be built on the host, vLLM reloads experts into the engine itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts import vllm_engine
from experts.errors import SwapFailed
from experts.vllm_engine import EngineSettings, SwappableEngine
from tests.integration.test_swap_correctness import answers, fresh_answers, without_a_tensor
from tests.integration.tiny_models import write_tiny_llama

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


async def test_reloaded_experts_answer_as_fresh_engines_do_and_bad_ones_spoil_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {
        name: write_tiny_llama(tmp_path / name, seed=seed, tied=True)
        for seed, name in enumerate(("a", "b", "c", "lacking", "partly", "bent"), start=1)
    }
    without_a_tensor(folders["lacking"])
    change(folders["partly"], "model.layers.1.self_attn.k_proj.weight", shape=None)
    change(folders["bent"], "model.layers.1.self_attn.o_proj.weight", shape=(64, 64))
    want = await fresh_answers(folders["b"], "float32")
    monkeypatch.setattr(vllm_engine, "_EXTENSION", "tests.integration.no_staging.NoStaging")
    weights_bytes = (folders["a"] / "model.safetensors").stat().st_size
    settings = EngineSettings(
        dtype="float32",
        max_model_len=256,
        kv_cache_bytes=64 << 20,
        pool_bytes=int(2.5 * weights_bytes),
    )
    notes: list[str] = []
    engine, refused = await SwappableEngine.start(
        {name: str(folder) for name, folder in folders.items()},
        settings,
        progress=notes.append,
        lazy=True,
    )
    try:
        assert refused == {}
        assert any("no loading in the background" in note for note in notes)
        assert not await engine.prefetch("b", ()), "nothing is loaded while the engine runs"
        first = await answers(engine)
        assert first != want
        for bad, reason in (
            ("lacking", "without numbers"),
            ("partly", "without numbers"),
            ("bent", "."),
        ):
            with pytest.raises(SwapFailed, match=reason):
                await engine.make_resident(bad)
            assert engine.resident is None
            assert (await engine.make_resident("a")).source == "pool"
            assert await answers(engine) == first
        sources = []
        for name in ("b", "c", "b", "a", "b"):  # the pool holds two of the three
            sources.append((await engine.make_resident(name)).source)
            if name == "b":
                assert await answers(engine) == want
        assert await engine_answers_of(engine, "a") == first
        assert "disk" in sources[2:], sources
    finally:
        engine.shutdown()


async def engine_answers_of(engine: SwappableEngine, expert: str) -> list[list[int]]:
    await engine.make_resident(expert)
    return await answers(engine)


def change(folder: Path, name: str, *, shape: tuple[int, ...] | None) -> None:
    """Take a tensor out of a checkpoint, or give it another shape."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
