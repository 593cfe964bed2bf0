"""The evidence in a draft: its choices' tokens, their log-probabilities and alternatives. Pure.

A request for several choices gets all of them or none, so the weakest one decides: a long, sure
choice must not cover up for a doubtful one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experts.answer_shape import decode_chunk
from policies.agreement import agreement_with
from policies.answer_features import truncated_entropy
from policies.types import Evidence

__all__ = ["ChoiceLogprobs"]


@dataclass(slots=True)
class _Choice:
    values: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    total: float = 0.0
    finished: bool = False

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return self.total / self.count


@dataclass(slots=True)
class ChoiceLogprobs:
    """Collects; ``choices`` is how many the stream will have (a whole answer shows its own)."""

    choices: int = 1
    _by_index: dict[int, _Choice] = field(default_factory=dict)

    def add_payloads(self, payloads: Iterable[bytes]) -> None:
        """Chunks of a stream. Raises OddAnswer."""
        for payload in payloads:
            self.add(decode_chunk(payload))

    def add(self, body: Mapping[str, Any]) -> None:
        """A whole body, or a chunk of either endpoint, checked by ``experts.answer_shape``."""
        for position, choice in enumerate(body.get("choices") or ()):
            one = self._by_index.setdefault(choice.get("index", position), _Choice())
            one.finished = one.finished or choice.get("finish_reason") is not None
            logprobs = choice.get("logprobs")
            if isinstance(logprobs, dict):
                values = [t.get("logprob") for t in logprobs.get("content") or ()]  # chat
                values += logprobs.get("token_logprobs") or ()  # completions; null if echoed
                numbers = [v for v in values if isinstance(v, int | float)]
                one.total += sum(numbers)
                one.values += numbers
                one.entropies += _entropies(logprobs)
            if isinstance(text := _text(choice), str):
                one.text.append(text)

    def weakest(self) -> tuple[float, int]:
        """Sum and count at the weakest choice's mean; (0, 0) while a choice has said nothing.

        The count is that of the shortest choice that still runs: the window is full when it is full
        for each of them.
        """
        seen = self._by_index.values()
        if not seen or len(seen) < self.choices or any(not one.count for one in seen):
            return 0.0, 0
        running = [one.count for one in seen if not one.finished]
        count = min(running) if running else max(one.count for one in seen)
        weakest = min(seen, key=lambda one: one.mean)
        # Of a single choice, its very sum: dividing and multiplying would change the last digit.
        return (weakest.total if weakest.count == count else weakest.mean * count), count

    @property
    def text(self) -> str | None:
        """What a single choice has said; None of several choices, or of one without words."""
        if len(self._by_index) != 1 or self.choices > 1:
            return None
        (one,) = self._by_index.values()
        return "".join(one.text) or None

    def evidence(
        self, *, finished: bool, elapsed_ms: float, earlier: Sequence[str] = ()
    ) -> Evidence:
        """What a cascade judges by, at this point.

        ``earlier`` are whole answers of earlier stages; only a whole answer is compared with them.
        """
        total, count = self.weakest()
        if not count:
            return Evidence(0.0, 0, finished, elapsed_ms)
        weakest = min(self._by_index.values(), key=lambda one: one.mean)
        known = len(weakest.entropies) == len(weakest.values)
        text = self.text if finished and earlier else None
        return Evidence(
            total,
            count,
            finished,
            elapsed_ms,
            tuple(weakest.values),
            entropies=tuple(weakest.entropies) if known else (),
            agreement=agreement_with(text, earlier) if text is not None else None,
        )


def _text(choice: Mapping[str, Any]) -> Any:
    """Of a whole message, a delta, or a completion; None where there is none."""
    message = choice.get("message") or choice.get("delta")
    return message.get("content") if isinstance(message, Mapping) else choice.get("text")


def _entropies(logprobs: Mapping[str, Any]) -> list[float]:
    """One a token that came with enough alternatives; what is not of OpenAI's shape has none."""
    chat = [token.get("top_logprobs") for token in logprobs.get("content") or ()]
    found = (truncated_entropy(_numbers(top)) for top in chat or _top_of_completion(logprobs))
    return [entropy for entropy in found if entropy is not None]


def _top_of_completion(logprobs: Mapping[str, Any]) -> Sequence[Any]:
    top = logprobs.get("top_logprobs")
    return top if isinstance(top, list) else ()


def _numbers(top: Any) -> list[float]:
    """Log-probabilities of a chat's list of alternatives, or of a completion's object."""
    if isinstance(top, Mapping):
        values = list(top.values())
    else:
        values = [one.get("logprob") for one in top or () if isinstance(one, Mapping)]
    return [float(value) for value in values if isinstance(value, int | float)]
