"""Fit a cascade's calibration on a real engine, and show what the threshold then does.

The drafting expert answers arithmetic prompts with checkable answers (the quickstart's held-out
word problems, and plain sums that a small generalist can do); the token log-probabilities of each
answer are fitted to right and wrong, by their mean alone and by all features that a gateway reads
(``policies.calibration_fit``), in cross-validation for the quality figures and on everything for
the numbers that go into a policy. The expert it escalates to answers the same prompts, so that the
cascade can be compared with either expert alone.

    python bench/cascade_calibration.py [--json FILE] [--prompts 120]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "quickstart"))
import numpy as np

from bench import _report
from bench.swap import _folders, quiet, say
from policies.calibration_fit import fit_calibration
from policies.types import Calibration, Evidence

FOLDS = 5
MAX_TOKENS = 120
CONCURRENCY = 16


async def main() -> int:
    options = _options()
    prompts = _prompts(options.prompts, random.Random(options.seed))
    answers = await _answers(prompts, (options.draft, options.final))
    logprobs = [a["logprobs"] for a in answers[options.draft]]
    right = {name: np.array([a["right"] for a in rows]) for name, rows in answers.items()}
    result = {
        "draft": options.draft,
        "final": options.final,
        "prompts": len(prompts),
        **_report_of(logprobs, right[options.draft], right[options.final]),
    }
    for key, value in result.items():
        print(f"{key:28} {value}", file=sys.stderr)
    _report.write(result, options.json)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="result file; - for standard output")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--draft", default="general")
    parser.add_argument("--final", default="math")
    parser.add_argument("--seed", type=int, default=11)
    return parser.parse_args()


def _prompts(count: int, rng: random.Random) -> list[Any]:
    """Half word problems of the held-out split, half sums of two small numbers."""
    from tasks import TASKS
    from tasks.task import Example, user_turn

    problems = TASKS["math"].generate(rng, "heldout", count // 2)
    sums = []
    for _ in range(count - len(problems)):
        a, b = rng.randint(2, 40), rng.randint(2, 40)
        text = rng.choice(("What is {} + {}?", "Add {} and {}.", "{} plus {} is how many?"))
        sums.append(Example(user_turn(text.format(a, b)), f"Answer: {a + b}", {"answer": a + b}))
    return [*problems, *sums]


async def _answers(prompts: list[Any], experts: tuple[str, str]) -> dict[str, list[Any]]:
    from experts.vllm_engine import EngineSettings, SwappableEngine

    folders = _folders(",".join(experts))
    say("starting the engine")
    engine, refused = await SwappableEngine.start(folders, EngineSettings(), progress=quiet)
    if refused:
        sys.exit(f"could not be pooled: {refused}")
    try:
        found = {}
        for expert in experts:
            say(f"{expert} answers {len(prompts)} prompts")
            await engine.make_resident(expert)
            found[expert] = await _ask_all(engine, expert, prompts)
        return found
    finally:
        engine.shutdown()


async def _ask_all(engine: Any, expert: str, prompts: list[Any]) -> list[dict[str, Any]]:
    room = asyncio.Semaphore(CONCURRENCY)

    async def ask(number: int, example: Any) -> dict[str, Any]:
        from experts.types import Endpoint

        body = {
            "messages": list(example.messages),
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "logprobs": True,
        }
        async with room:
            reply = await engine.serve(expert, Endpoint.CHAT, body, request_id=f"c{number}")
        choice = reply["choices"][0]
        tokens = [t["logprob"] for t in choice["logprobs"]["content"]]
        return {
            "logprobs": tokens,
            "right": _is_right(example, choice["message"]["content"]),
        }

    return list(await asyncio.gather(*(ask(n, e) for n, e in enumerate(prompts))))


def _is_right(example: Any, text: str) -> bool:
    """The last number of the answer: neither expert is asked for a fixed form here."""
    import re

    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    wanted = re.findall(r"-?\d+(?:\.\d+)?", example.target)[-1]
    return bool(numbers) and float(numbers[-1]) == float(wanted)


def _report_of(logprobs: list[list[float]], draft: np.ndarray, final: np.ndarray) -> dict[str, Any]:
    """Both fits of the draft, and the cascade at the shipped threshold, all out of fold."""
    threshold = _shipped_threshold()
    return {
        "min_confidence": threshold,
        "base_rate_brier": round(float(draft.mean() * (1 - draft.mean())), 3),
        "draft_accuracy": round(float(draft.mean()), 3),
        "final_accuracy": round(float(final.mean()), 3),
        "mean": _with_features(logprobs, draft, final, threshold, mean_only=True),
        "all_features": _with_features(logprobs, draft, final, threshold, mean_only=False),
    }


def _with_features(
    logprobs: list[list[float]],
    draft: np.ndarray,
    final: np.ndarray,
    threshold: float,
    *,
    mean_only: bool,
) -> dict[str, Any]:
    fitted, confidence = _fitted(logprobs, draft, mean_only=mean_only)
    accepted = confidence >= threshold
    return {
        **fitted,
        "confidence_sd": round(float(confidence.std()), 3),
        "cascade_accuracy": round(float(np.where(accepted, draft, final).mean()), 3),
        "accepted_share": round(float(accepted.mean()), 3),
        "accepted_accuracy": round(float(draft[accepted].mean()), 3) if accepted.any() else None,
    }


def _shipped_threshold() -> float:
    from policies.loader import load_policy

    shipped = Path(__file__).resolve().parent.parent / "policies" / "cascade.yaml"
    return load_policy(shipped, None).min_confidence


def _fitted(
    logprobs: list[list[float]], right: np.ndarray, *, mean_only: bool
) -> tuple[dict[str, Any], np.ndarray]:
    """What goes into a policy, from all rows; quality, and each row's confidence, out of fold."""
    from sklearn.metrics import brier_score_loss, roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    if not FOLDS <= int(right.sum()) <= len(right) - FOLDS:
        sys.exit(f"{int(right.sum())} of {len(right)} drafts are right: nothing to calibrate on")
    confidence = np.zeros(len(right))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    for rest, held in folds.split(right, right):
        seen = [logprobs[row] for row in rest]
        model = fit_calibration(seen, right[rest].tolist(), mean_only=mean_only)
        confidence[held] = [_confidence(model, logprobs[row]) for row in held]
    model = fit_calibration(logprobs, right.tolist(), mean_only=mean_only)
    fitted = {
        "calibration": {name: round(value, 2) for name, value in asdict(model).items() if value},
        "auroc": round(float(roc_auc_score(right, confidence)), 3),
        "brier": round(float(brier_score_loss(right, confidence)), 3),
    }
    return fitted, confidence


def _confidence(model: Calibration, tokens: list[float]) -> float:
    """As a gateway computes it for a whole answer."""
    found = model.confidence(Evidence(sum(tokens), len(tokens), True, 0.0, tuple(tokens)))
    assert found is not None
    return found


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
