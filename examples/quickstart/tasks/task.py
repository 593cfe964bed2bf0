"""What a specialist is trained on: a seeded generator of examples and a verifier of answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

Split = Literal["train", "heldout"]
"""The two splits share no schema or subject, no literal value and no phrasing."""

DATA = Path(__file__).with_name("data")

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A chat prompt, the answer to learn, and what the verifier needs (JSON-serialisable)."""

    messages: tuple[Message, ...]
    target: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """``generate(rng, split, n)`` draws only from ``rng``; ``verify`` takes any right answer."""

    name: str
    summary: str
    generate: Callable[[Random, Split, int], list[Example]]
    verify: Callable[[Example, str], bool]
    max_new_tokens: int
    train_steps: int


def user_turn(prompt: str) -> tuple[Message, ...]:
    """A conversation of one user message: the model's default system prompt applies."""
    return ({"role": "user", "content": prompt},)
