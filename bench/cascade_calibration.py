"""Fit a cascade's calibration on a real engine, and show what the threshold then does.

The drafting expert answers arithmetic prompts with checkable answers (the quickstart's held-out
word problems, and plain sums that a small generalist can do). What its answers say of themselves is
fitted to right and wrong (``policies.calibration_fit``), by the mean log-probability alone and with
each group of features that a gateway reads added: other statistics of the tokens, the entropy of
their alternatives, length. Quality is out of fold, numbers that go into a policy are fitted on
everything, for whole answers and for the first tokens that a stream is judged by. The expert it
escalates to answers the same prompts, so that the cascade can be compared with either expert alone.
Its answers are looked at as well (``final_told``), as if it were judged in its turn: how well do
its own features tell right from wrong, does a window need a calibration of its own
(``window_by_whole``), and does agreement with the draft tell what its own tokens do not?

    python bench/cascade_calibration.py [--json FILE] [--prompts 120]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "quickstart"))
import numpy as np

from bench import _report
from bench.swap import _folders, quiet, say
from policies.agreement import pair_agreement
from policies.answer_features import ENTROPY_TOP, truncated_entropy
from policies.calibration_fit import Group, fit_calibration
from policies.types import Calibration, Evidence, Policy

FOLDS = 5
FITS: dict[str, tuple[Group, ...]] = {
    "mean": (),
    "mean_doubt": ("doubt",),
    "tokens": ("tokens",),
    "entropy": ("entropy",),
    "tokens_entropy": ("tokens", "entropy"),
    "tokens_entropy_length": ("tokens", "entropy", "length"),
}
MAX_TOKENS = 120
CONCURRENCY = 16


async def main() -> int:
    options = _options()
    prompts = _prompts(options.prompts, random.Random(options.seed))
    answers = await _answers(prompts, (options.draft, options.final))
    right = {name: np.array([a["right"] for a in rows]) for name, rows in answers.items()}
    result = {
        "draft": options.draft,
        "final": options.final,
        "prompts": len(prompts),
        **_report_of(answers[options.draft], right[options.draft], right[options.final]),
        "final_told": _told(answers[options.final], right[options.final]),
        "agreement": _agreement(answers[options.draft], answers[options.final]),
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
            "top_logprobs": ENTROPY_TOP,
        }
        async with room:
            reply = await engine.serve(expert, Endpoint.CHAT, body, request_id=f"c{number}")
        choice = reply["choices"][0]
        tokens = choice["logprobs"]["content"]
        tops = [[top["logprob"] for top in token["top_logprobs"]] for token in tokens]
        return {
            "logprobs": [token["logprob"] for token in tokens],
            "entropies": [truncated_entropy(top) for top in tops],
            "text": choice["message"]["content"],
            "right": _is_right(example, choice["message"]["content"]),
        }

    return list(await asyncio.gather(*(ask(n, e) for n, e in enumerate(prompts))))


def _is_right(example: Any, text: str) -> bool:
    """The last number of the answer: neither expert is asked for a fixed form here."""
    import re

    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    wanted = re.findall(r"-?\d+(?:\.\d+)?", example.target)[-1]
    return bool(numbers) and float(numbers[-1]) == float(wanted)


def _report_of(drafts: list[Any], draft: np.ndarray, final: np.ndarray) -> dict[str, Any]:
    """Every fit of the draft, and the cascade at the shipped threshold, all out of fold."""
    policy = _shipped()
    whole = [_evidence(one) for one in drafts]
    begun = [_evidence(one, policy.window.tokens) for one in drafts]
    threshold = policy.min_confidence
    return {
        "min_confidence": threshold,
        "base_rate_brier": round(float(draft.mean() * (1 - draft.mean())), 3),
        "draft_accuracy": round(float(draft.mean()), 3),
        "final_accuracy": round(float(final.mean()), 3),
        "whole": {name: _measured(whole, draft, final, threshold, FITS[name]) for name in FITS},
        "window_tokens": policy.window.tokens,
        "window": {
            name: _measured(begun, draft, final, threshold, FITS[name])
            for name in FITS
            if "length" not in FITS[name]
        },
    }


def _evidence(answer: dict[str, Any], tokens: int | None = None) -> Evidence:
    """Of a whole answer, or of its first ``tokens``, as a gateway collects it."""
    values, entropies = answer["logprobs"][:tokens], answer["entropies"][:tokens]
    known = () if None in entropies else tuple(entropies)
    whole = tokens is None or len(answer["logprobs"]) <= tokens
    return Evidence(sum(values), len(values), whole, 0.0, tuple(values), entropies=known)


def _told(answers: list[Any], right: np.ndarray) -> dict[str, Any]:
    """Every fit of one expert's answers, whole and begun, out of fold."""
    tokens = _shipped().window.tokens
    whole = [_evidence(one) for one in answers]
    begun = [_evidence(one, tokens) for one in answers]
    short = {name: groups for name, groups in FITS.items() if "length" not in groups}
    return {
        "whole": {name: _fitted(whole, right, groups)[0] for name, groups in FITS.items()},
        "window": {name: _fitted(begun, right, groups)[0] for name, groups in short.items()},
        "window_by_whole": {
            name: _fitted(whole, right, groups, told=begun)[0] for name, groups in short.items()
        },
    }


def _agreement(drafts: list[Any], finals: list[Any]) -> dict[str, Any]:
    """How well the second expert's answers are told right from wrong, with the draft and without.

    As if it were judged in its turn, because a third expert could follow.
    """
    right = np.array([one["right"] for one in finals])
    agreed = [pair_agreement(a["text"], b["text"]) for a, b in zip(drafts, finals, strict=True)]
    evidence = [
        replace(_evidence(one), agreement=value) for one, value in zip(finals, agreed, strict=True)
    ]
    known = ("tokens", "entropy")
    return {
        "mean": round(float(np.mean(agreed)), 3),
        "mean_where_right": round(float(np.mean(np.array(agreed)[right])), 3),
        "without": _fitted(evidence, right, known)[0],
        "with": _fitted(evidence, right, (*known, "agreement"))[0],
    }


def _measured(
    answers: list[Evidence],
    draft: np.ndarray,
    final: np.ndarray,
    threshold: float,
    groups: tuple[Group, ...],
) -> dict[str, Any]:
    fitted, confidence = _fitted(answers, draft, groups)
    accepted = confidence >= threshold
    spread = float(confidence.std())
    moves = float(((confidence - confidence.mean()) * final).mean()) / max(spread, 1e-9)
    return {
        **fitted,
        "confidence_sd": round(spread, 3),
        "confidence_moves_final": round(moves, 3),
        "cascade_accuracy": round(float(np.where(accepted, draft, final).mean()), 3),
        "accepted_share": round(float(accepted.mean()), 3),
        "accepted_accuracy": round(float(draft[accepted].mean()), 3) if accepted.any() else None,
    }


def _shipped() -> Policy:
    from policies.loader import load_policy

    return load_policy(Path(__file__).resolve().parent.parent / "policies" / "cascade.yaml", None)


def _fitted(
    answers: list[Evidence],
    right: np.ndarray,
    groups: tuple[Group, ...],
    told: list[Evidence] | None = None,
) -> tuple[dict[str, Any], np.ndarray]:
    """What goes into a policy, from all rows; quality, and each row's confidence, out of fold.

    ``told``: what confidences are made of, where it is not the answers that are fitted to.
    """
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    if not FOLDS <= int(right.sum()) <= len(right) - FOLDS:
        sys.exit(f"{int(right.sum())} of {len(right)} answers are right: nothing to calibrate on")
    confidence = np.zeros(len(right))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    for rest, held in folds.split(right, right):
        model = fit_calibration([answers[n] for n in rest], right[rest].tolist(), groups=groups)
        confidence[held] = [_confidence(model, (told or answers)[n]) for n in held]
    fitted = {
        "calibration": _rounded(asdict(fit_calibration(answers, right.tolist(), groups=groups))),
        "auroc": round(float(roc_auc_score(right, confidence)), 3),
        "brier": round(float(brier_score_loss(right, confidence)), 3),
        "log_loss": round(float(log_loss(right, confidence)), 3),
    }
    return fitted, confidence


def _rounded(weights: dict[str, Any]) -> dict[str, Any]:
    """As a policy file writes them; what is 0 or absent is left out."""
    return {
        name: _rounded(value) if isinstance(value, dict) else round(value, 3)
        for name, value in weights.items()
        if value
    }


def _confidence(model: Calibration, answer: Evidence) -> float:
    """As a gateway computes it."""
    found = model.confidence(answer)
    assert found is not None
    return found


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
