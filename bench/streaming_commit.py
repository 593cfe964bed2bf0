"""How much of a draft must be held back before a streaming cascade can commit to it?

The generalist drafts every question of a mixed held-out set (four tasks and general knowledge);
the question's own expert is what a cascade would escalate to; all on the real engine. For each
window of N tokens a calibrated model (mean, least and first log-probability of the first N tokens)
predicts whether the whole draft is right, and the cascade commits or escalates by it; ``whole``
waits for the last token. Reported by N: how well the window predicts (AUROC, of the generalist over
the mix and of every specialist within its task, and the same with the mean and the largest entropy
of the tokens' alternatives added), and what a cascade with that window gains: accuracy, mean time
to first token, cost. All predictions and thresholds are out of fold.

Times are not of every request: time to the n-th token is fitted (a + b n) on answers made alone,
the swap is the median measured. Costs follow the quickstart's price list; an aborted draft is paid.

    python bench/streaming_commit.py [--json FILE] [--per-task 40]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402
from sklearn.model_selection import StratifiedKFold  # noqa: E402

from bench import _report  # noqa: E402
from bench.composition.verify_words import mentions  # noqa: E402
from bench.swap import _folders, quiet, say  # noqa: E402
from examples.quickstart.tasks import TASKS  # noqa: E402
from policies.answer_features import ENTROPY_TOP, truncated_entropy  # noqa: E402

WINDOWS: Final = (8, 16, 32, 64, 10_000)
WHOLE: Final = 10_000
FOLDS: Final = 5
CONCURRENCY: Final = 16
MAX_TOKENS: Final = 160
TIMED: Final = 12
DRAFT: Final = "general"
CONFIG = ROOT / "examples" / "quickstart" / "coe.yaml"
GENERAL_QUESTIONS = ROOT / "bench" / "composition" / "data" / "general.jsonl"


@dataclass(frozen=True)
class Item:
    """A question, the expert it belongs to, and how its answer is checked."""

    expert: str
    messages: list[dict[str, str]]
    is_right: Any


@dataclass(frozen=True)
class Answer:
    right: bool
    logprobs: np.ndarray  # [tokens]
    entropies: np.ndarray  # [tokens], nats
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        return len(self.logprobs)


@dataclass(frozen=True)
class Pace:
    """Milliseconds to the n-th token of an answer made alone: ``first + each * n``."""

    first: float
    each: float

    def until(self, tokens: np.ndarray | int) -> Any:
        return self.first + self.each * tokens


async def main() -> int:
    options = _options()
    items = _items(options.per_task, options.seed)
    answers, paces, swap_ms = await _measured(items)
    final = [answers[item.expert][n] for n, item in enumerate(items)]
    drafts = [answers[DRAFT][n] for n in range(len(items))]
    prices = _prices()
    windows = {
        _name(window): _window(items, drafts, final, window, paces, swap_ms, prices)
        for window in WINDOWS
    }
    result = {
        "items": len(items),
        "swap_ms": round(swap_ms, 1),
        "draft_accuracy": _share(a.right for a in drafts),
        "final_accuracy": _share(a.right for a in final),
        "final_ttft_ms": round(statistics.mean(paces[i.expert].until(1) for i in items), 1),
        "final_cost_micro_usd": round(_mean_cost(items, final, prices), 2),
        "windows": windows,
        "specialist_auroc": _within_tasks(items, final, entropy=False),
        "specialist_auroc_with_entropy": _within_tasks(items, final, entropy=True),
        "default_window_tokens": _default(windows),
    }
    _print(result)
    _report.write(result, options.json)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="result file; - for standard output")
    parser.add_argument("--per-task", type=int, default=40)
    parser.add_argument("--seed", type=int, default=23)
    return parser.parse_args()


def _items(per_task: int, seed: int) -> list[Item]:
    items = []
    for name, task in TASKS.items():
        for example in task.generate(Random(f"{name}-commit-{seed}"), "heldout", per_task):
            check = lambda text, e=example, t=task: t.verify(e, text)  # noqa: E731
            items.append(Item(name, list(example.messages), check))
    for line in GENERAL_QUESTIONS.read_text().splitlines():
        row = json.loads(line)
        check = lambda text, accepted=row["accept"]: mentions(text, accepted)  # noqa: E731
        items.append(Item(DRAFT, [{"role": "user", "content": row["prompt"]}], check))
    return items


def _name(window: int) -> str:
    return "whole" if window == WHOLE else str(window)


def _share(flags: Any) -> float:
    return round(statistics.mean(map(float, flags)), 3)


# --- the engine ----------------------------------------------------------------------------------


async def _measured(
    items: Sequence[Item],
) -> tuple[dict[str, dict[int, Answer]], dict[str, Pace], float]:
    """Answers by expert and item number (the draft of every item), paces, and the median swap."""
    from experts.vllm_engine import EngineSettings, SwappableEngine

    experts = (DRAFT, *TASKS)
    say("starting the engine")
    folders = _folders(",".join(experts))
    engine, refused = await SwappableEngine.start(folders, EngineSettings(), progress=quiet)
    if refused:
        sys.exit(f"could not be pooled: {refused}")
    answers: dict[str, dict[int, Answer]] = {}
    paces: dict[str, Pace] = {}
    swaps_ms = []
    try:
        for expert in experts:
            numbers = [n for n, i in enumerate(items) if expert in (DRAFT, i.expert)]
            started = time.perf_counter()
            await engine.make_resident(expert)
            swaps_ms.append((time.perf_counter() - started) * 1000.0)
            say(f"{expert} answers {len(numbers)} questions")
            answers[expert] = await _ask_all(engine, expert, items, numbers)
            paces[expert] = await _pace(engine, expert, [items[n] for n in numbers[-TIMED:]])
    finally:
        engine.shutdown()
    return answers, paces, statistics.median(swaps_ms)


async def _ask_all(
    engine: Any, expert: str, items: Sequence[Item], numbers: Sequence[int]
) -> dict[int, Answer]:
    room = asyncio.Semaphore(CONCURRENCY)

    async def ask(number: int) -> tuple[int, Answer]:
        async with room:
            return number, await _ask(engine, expert, items[number], f"{expert}-{number}")

    return dict(await asyncio.gather(*map(ask, numbers)))


async def _ask(engine: Any, expert: str, item: Item, request_id: str) -> Answer:
    from experts.types import Endpoint

    body = {
        "messages": item.messages,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "logprobs": True,
        "top_logprobs": ENTROPY_TOP,
    }
    reply = await engine.serve(expert, Endpoint.CHAT, body, request_id=request_id)
    choice = reply["choices"][0]
    return Answer(
        right=bool(item.is_right(choice["message"]["content"])),
        logprobs=np.array([t["logprob"] for t in choice["logprobs"]["content"]]),
        entropies=np.array([_entropy(t) for t in choice["logprobs"]["content"]]),
        prompt_tokens=reply["usage"]["prompt_tokens"],
    )


def _entropy(token: dict[str, Any]) -> float:
    found = truncated_entropy(top["logprob"] for top in token["top_logprobs"])
    assert found is not None, "the engine gives as many alternatives as it is asked for"
    return found


async def _pace(engine: Any, expert: str, items: Sequence[Item]) -> Pace:
    """Least-squares line through (tokens, milliseconds) of answers made one after another."""
    tokens, took = [], []
    for number, item in enumerate(items):
        started = time.perf_counter()
        answer = await _ask(engine, expert, item, f"{expert}-pace-{number}")
        took.append((time.perf_counter() - started) * 1000.0)
        tokens.append(answer.tokens)
    if len(set(tokens)) < 2:
        return Pace(0.0, statistics.mean(took) / tokens[0])
    each, first = np.polyfit(tokens, took, 1)
    return Pace(max(0.0, float(first)), float(each))


# --- what a window is worth ----------------------------------------------------------------------


def _features(answers: Sequence[Answer], window: int, entropy: bool) -> np.ndarray:
    """[n, 3]: mean, least and first log-probability of the first ``window`` tokens.

    With ``entropy`` [n, 5]: their mean and largest entropy as well.
    """
    heads = [a.logprobs[:window] for a in answers]
    features = np.array([[h.mean(), h.min(), h[0]] for h in heads])
    if not entropy:
        return features
    doubts = [a.entropies[:window] for a in answers]
    return np.hstack([features, np.array([[h.mean(), h.max()] for h in doubts])])


def _predicted(
    answers: Sequence[Answer], window: int, *, entropy: bool = False
) -> np.ndarray | None:
    """P(right) [n], out of fold; None where right or wrong answers are too few to fit."""
    right = np.array([a.right for a in answers])
    if not FOLDS <= int(right.sum()) <= len(right) - FOLDS:
        return None
    features = _features(answers, window, entropy)
    confidence = np.zeros(len(right))
    for rest, held in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, right):
        model = LogisticRegression(C=10.0, max_iter=1000).fit(features[rest], right[rest])
        confidence[held] = model.predict_proba(features[held])[:, 1]
    return confidence


def _auroc(answers: Sequence[Answer], window: int, *, entropy: bool = False) -> float | None:
    confidence = _predicted(answers, window, entropy=entropy)
    if confidence is None:
        return None
    return round(float(roc_auc_score([a.right for a in answers], confidence)), 3)


def _window(
    items: Sequence[Item],
    drafts: Sequence[Answer],
    final: Sequence[Answer],
    window: int,
    paces: dict[str, Pace],
    swap_ms: float,
    prices: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    """The cascade with this window; the threshold of each fold is chosen on the other folds."""
    confidence = _predicted(drafts, window)
    if confidence is None:
        sys.exit("the generalist is right (or wrong) on nearly everything: nothing to predict")
    accepted = _accepted(confidence, drafts, final)
    held = np.array([min(window, a.tokens) for a in drafts])
    ttft = np.asarray(paces[DRAFT].until(held), dtype=float)
    second = np.array([paces[i.expert].until(1) + swap_ms * (i.expert != DRAFT) for i in items])
    draft_cost = np.array(
        [_cost(DRAFT, a.prompt_tokens, a.tokens if ok else n, prices)
         for a, n, ok in zip(drafts, held, accepted, strict=True)]
    )  # fmt: skip
    final_cost = np.array(
        [_cost(i.expert, a.prompt_tokens, a.tokens, prices)
         for i, a in zip(items, final, strict=True)]
    )  # fmt: skip
    right = np.where(accepted, [a.right for a in drafts], [a.right for a in final])
    return {
        "auroc": round(float(roc_auc_score([a.right for a in drafts], confidence)), 3),
        "auroc_with_entropy": _auroc(drafts, window, entropy=True),
        "accepted_share": round(float(accepted.mean()), 3),
        "accuracy": round(float(right.mean()), 3),
        "mean_ttft_ms": round(float((ttft + ~accepted * second).mean()), 1),
        "committed_ttft_ms": round(float(ttft[accepted].mean()), 1) if accepted.any() else None,
        "mean_cost_micro_usd": round(float((draft_cost + ~accepted * final_cost).mean()), 2),
    }


def _accepted(
    confidence: np.ndarray, drafts: Sequence[Answer], final: Sequence[Answer]
) -> np.ndarray:
    """Commit above the threshold with the most right answers elsewhere; the most commits of those.

    Folds are the same as in ``_predicted``, so no row's own outcome chooses its threshold.
    """
    right = np.array([a.right for a in drafts])
    fallback = np.array([a.right for a in final])
    accepted = np.zeros(len(right), dtype=bool)
    for rest, held in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(right, right):
        candidates = [*np.unique(confidence[rest]), 1.1]
        score = [
            np.where(confidence[rest] >= t, right[rest], fallback[rest]).mean() for t in candidates
        ]
        accepted[held] = confidence[held] >= candidates[int(np.argmax(score))]
    return accepted


def _within_tasks(
    items: Sequence[Item], final: Sequence[Answer], *, entropy: bool
) -> dict[str, Any]:
    """AUROC of each specialist's own windows on its own task."""
    found: dict[str, Any] = {}
    for name in TASKS:
        mine = [a for i, a in zip(items, final, strict=True) if i.expert == name]
        found[name] = {_name(w): _auroc(mine, w, entropy=entropy) for w in WINDOWS}
    return found


def _default(windows: dict[str, dict[str, Any]]) -> int | str:
    """The shortest window within one point of the best accuracy: waiting longer buys nothing."""
    best = max(w["accuracy"] for w in windows.values())
    name = next(n for n, w in windows.items() if w["accuracy"] >= best - 0.01)
    return name if name == "whole" else int(name)


# --- money ---------------------------------------------------------------------------------------


def _prices() -> dict[str, tuple[float, float]]:
    """Micro-dollars a token, (input, output), by expert: dollars a million tokens are just that."""
    import yaml

    experts = yaml.safe_load(CONFIG.read_text())["experts"]
    return {
        name: (e["price"]["input_usd_per_mtok"], e["price"]["output_usd_per_mtok"])
        for name, e in experts.items()
    }


def _cost(expert: str, prompt: int, tokens: int, prices: dict[str, tuple[float, float]]) -> float:
    return prompt * prices[expert][0] + tokens * prices[expert][1]


def _mean_cost(
    items: Sequence[Item], final: Sequence[Answer], prices: dict[str, tuple[float, float]]
) -> float:
    return statistics.mean(
        _cost(i.expert, a.prompt_tokens, a.tokens, prices)
        for i, a in zip(items, final, strict=True)
    )


def _print(result: dict[str, Any]) -> None:
    print(f"{'window':>8} {'auroc':>7} {'commit':>7} {'right':>7} {'ttft ms':>8}", file=sys.stderr)
    for name, w in result["windows"].items():
        print(
            f"{name:>8} {w['auroc']:7.3f} {w['accepted_share']:7.3f} {w['accuracy']:7.3f} "
            f"{w['mean_ttft_ms']:8.1f}",
            file=sys.stderr,
        )
    print(f"default window: {result['default_window_tokens']}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
