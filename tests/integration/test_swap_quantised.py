"""Quantised checkpoints: swapped where kernels read tensors, refused where they hide them."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts.errors import ArtifactError
from experts.vllm_engine import EngineSettings, SwappableEngine
from tests.integration.test_swap_correctness import answers, fresh_answers, quiet
from tests.integration.tiny_models import quantise, write_tiny_llama

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SETTINGS = EngineSettings(dtype="bfloat16", max_model_len=256, kv_cache_bytes=64 << 20)


async def test_four_bit_experts_answer_as_fresh_engines_do(tmp_path: Path) -> None:
    """vLLM repacks these weights after loading; what is pooled is the repacked form."""
    folders = {
        name: quantise(write_tiny_llama(tmp_path / name, seed=seed, tied=True), bits=4)
        for seed, name in enumerate("ab", start=1)
    }
    want = await fresh_answers(folders["b"], "bfloat16")
    notes: list[str] = []
    engine, refused = await SwappableEngine.start(
        {name: str(folder) for name, folder in folders.items()}, SETTINGS, progress=notes.append
    )
    try:
        assert refused == {}
        assert not [note for note in notes if "no loading in the background" in note]
        other = await answers(engine)
        assert other != want
        for _ in range(2):
            assert (await engine.make_resident("b")).source == "pool"
            assert await answers(engine) == want
            await engine.make_resident("a")
            assert await answers(engine) == other
    finally:
        engine.shutdown()


async def test_weights_in_an_opaque_kernel_handle_are_refused_with_the_reason(
    tmp_path: Path,
) -> None:
    import torch

    if torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor's 8-bit kernels keep their weights in tensors")
    folder = quantise(write_tiny_llama(tmp_path / "a", seed=1, tied=True), bits=8)
    with pytest.raises(ArtifactError, match="kernel handle that cannot be overwritten"):
        await SwappableEngine.start({"a": str(folder)}, SETTINGS, progress=quiet)
