"""Counts are cheap where they cannot matter and exact where they can."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from experts.types import ExpertSpec, Price, SourceKind
from gateway.tokens import PromptCounter, estimate_tokens


def expert(name: str, folder: Path, context_tokens: int) -> ExpertSpec:
    return ExpertSpec(name, SourceKind.WEIGHTS, str(folder), Price(), context_tokens, frozenset())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer that makes one token of each word."""
    tokenizer = Tokenizer(models.WordLevel({"word": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


async def count(counter: PromptCounter, spec: ExpertSpec, text: str) -> int:
    return await counter.count([spec], [text], messages=1, ids=0, output_tokens=10)


async def test_a_short_prompt_is_estimated_without_opening_a_tokenizer(tmp_path: Path) -> None:
    spec = expert("a", tmp_path / "nothing here", 4_096)
    text = "word " * 20
    assert await count(PromptCounter(), spec, text) == estimate_tokens([text], messages=1)


async def test_a_prompt_near_the_bound_is_counted(folder: Path) -> None:
    spec = expert("a", folder, 1_024)
    counted = await count(PromptCounter(), spec, "word " * 600)
    assert counted == 600 + 8 + 32
    assert estimate_tokens(["word " * 600], messages=1) > 1_000, "the estimate would have refused"


async def test_without_a_tokenizer_the_estimate_decides(tmp_path: Path) -> None:
    spec = expert("a", tmp_path, 1_024)
    text = "word " * 600
    assert await count(PromptCounter(), spec, text) == estimate_tokens([text], messages=1)


@pytest.mark.parametrize("text", ["", "abc", "日本語の文章です", "naïve café", "🎉" * 30])
def test_the_estimate_is_never_below_a_token_per_cjk_character(text: str) -> None:
    wide = sum(ord(character) > 0x2E80 for character in text)
    assert estimate_tokens([text]) >= wide
    assert estimate_tokens([text, text]) >= estimate_tokens([text])
