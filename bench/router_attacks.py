"""Attacks on the shipped router, with its defences off and on, in one run.

    python bench/router_attacks.py [--json FILE] [--artifact DIR] [--rounds 12] [--seed 0]

Gadgets are ten-word prefixes that do not depend on the query, found by hill climbing on the
router's own posterior as in "Rerouting LLM Routers" (arXiv 2501.01818, section 4); ``gadget`` is
climbed against the undefended router, ``gadget_adaptive`` against the defended one by an attacker
who knows every rule of it. ``hijack`` puts the words of another category before the query. A
success is a query that leaves its own category for the specialist that the attacker wants, or, in
the untargeted families, for any specialist that is not its own. Searching uses training prompts,
judging held-out ones.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import _report  # noqa: E402 - the project root has to be importable first
from bench._attack_texts import FILLERS, FOREIGN, HIJACKS  # noqa: E402
from routers.artifact import load_artifact  # noqa: E402
from routers.classifier import RouterModel  # noqa: E402
from routers.embedder import AblatingEmbedder, load_embedder  # noqa: E402
from routers.metrics import decision_score  # noqa: E402
from routers.text import routing_text  # noqa: E402
from routers.types import GENERAL, Classification  # noqa: E402

DATA = ROOT / "routers" / "data" / "quickstart"
GADGET_WORDS = 10
CANDIDATES = 16
SEARCH_QUERIES = 6
LATIN_TWINS = str.maketrans("aceopsxyi", "асеорѕхуі")

Query = tuple[str, str]  # prompt, category
Attack = Callable[[str], str]


@dataclass(frozen=True)
class Victim:
    """The router with its defences on or off; everything else is the same."""

    model: RouterModel
    embedder: AblatingEmbedder
    defended: bool

    def decide(self, prompts: Sequence[str]) -> list[Classification]:
        texts = [routing_text(p, harden=self.defended) for p in prompts]
        if not self.defended:
            return self.model.classify(self.embedder.embed(texts))
        return self.model.classify(*self.embedder.embed_ablated(texts))

    def decided(self, prompts: Sequence[str]) -> list[str]:
        return [answer.category for answer in self.decide(prompts)]

    def pull(self, prompts: Sequence[str], target: str) -> float:
        """What a climber maximises: successes, and between two equals the target's posterior."""
        answers = self.decide(prompts)
        return statistics.mean((a.category == target) + a.posterior[target] for a in answers)


def main() -> int:
    options = _options()
    victims = _victims(options.artifact)
    heldout, training = _queries("heldout.jsonl"), _queries("prompts.jsonl")
    rng = Random(options.seed)
    result: dict[str, Any] = {"heldout": len(heldout), "seed": options.seed}
    result |= _quality(victims, heldout) | _cost(victims, heldout)
    targets = [c for c in victims["off"].model.trained_categories if c != GENERAL]
    result["attacks"] = {
        "gadget": _gadgets(victims, "off", targets, training, heldout, options.rounds, rng),
        "gadget_adaptive": _gadgets(victims, "on", targets, training, heldout, options.rounds, rng),
        "hijack": _targeted(victims, heldout, {t: _prefixes(HIJACKS[t]) for t in targets}),
        "padding": _untargeted(victims, heldout, _padding()),
        "unicode": _untargeted(victims, heldout, _unicode()),
        "languages": _foreign(victims),
    }
    _print(result)
    _report.write(result, options.json)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="result file; - for standard output")
    parser.add_argument("--artifact", type=Path, default=DATA / "artifact")
    parser.add_argument("--rounds", type=int, default=12, help="steps of a climb")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _victims(folder: Path) -> dict[str, Victim]:
    artifact = load_artifact(folder)
    embedder = load_embedder(artifact.manifest.embedder.id)
    if not isinstance(embedder, AblatingEmbedder):
        raise SystemExit(f"{artifact.manifest.embedder.id} offers no ablation")
    return {
        "off": Victim(artifact.model, embedder, False),
        "on": Victim(artifact.model, embedder, True),
    }


def _queries(name: str) -> list[Query]:
    rows = map(json.loads, (DATA / name).read_text().splitlines())
    return [(row["prompt"], row["category"]) for row in rows]


# --- what the defences cost ----------------------------------------------------------------------


def _quality(victims: Mapping[str, Victim], heldout: Sequence[Query]) -> dict[str, float]:
    prompts, labels = zip(*heldout, strict=True)
    found, scores = {}, {}
    for name, victim in victims.items():
        decided = victim.decided(prompts)
        right = [a == b for a, b in zip(decided, labels, strict=True)]
        found[f"accuracy_{name}"] = round(statistics.mean(right), 4)
        scores[name] = list(map(decision_score, labels, decided))
        found[f"score_{name}"] = round(statistics.mean(scores[name]), 4)
    lost = [100 * (a - b) for a, b in zip(scores["off"], scores["on"], strict=True)]
    found["quality_points_lost"] = round(statistics.mean(lost), 2)
    found["quality_points_lost_se"] = round(statistics.stdev(lost) / math.sqrt(len(lost)), 2)
    return found


def _cost(victims: Mapping[str, Victim], heldout: Sequence[Query]) -> dict[str, float]:
    """Processor time of a decision (one thread decides) with defences off and on, in turns.

    200-word prompts. Time on the wall tells two such times apart only on an idle machine.
    """
    prompts = [_words(p, 200) for p, _ in heldout[:40]]
    took: dict[str, list[float]] = {name: [] for name in victims}
    for _ in range(3):
        for prompt in prompts:
            for name, victim in victims.items():
                started = time.thread_time()
                victim.decide([prompt])
                took[name].append((time.thread_time() - started) * 1000.0)
    off, on = (statistics.median(took[name]) for name in ("off", "on"))
    return {
        "p50_cpu_ms_off": round(off, 3),
        "p50_cpu_ms_on": round(on, 3),
        "added_p50_cpu_ms": round(on - off, 3),
    }


def _words(prompt: str, count: int) -> str:
    words = prompt.split()
    return " ".join((words * (count // len(words) + 1))[:count])


# --- attacks -------------------------------------------------------------------------------------


def _gadgets(
    victims: Mapping[str, Victim],
    climbed: str,
    targets: Sequence[str],
    training: Sequence[Query],
    heldout: Sequence[Query],
    rounds: int,
    rng: Random,
) -> dict[str, Any]:
    """One gadget a target, climbed against ``victims[climbed]`` and judged on both."""
    vocabulary = _vocabulary(training, adaptive=climbed == "on")
    gadgets: dict[str, list[Attack]] = {}
    texts = {}
    for number, target in enumerate(targets, start=1):
        print(f"climbing for {target} ({number}/{len(targets)})", file=sys.stderr)
        others = [p for p, c in training if c != target]
        gadget = _climb(
            victims[climbed], target, rng.sample(others, SEARCH_QUERIES), vocabulary, rounds, rng
        )
        texts[target] = gadget
        gadgets[target] = list(_prefixes([gadget]))
    return _targeted(victims, heldout, gadgets) | {"gadgets": texts}


def _vocabulary(training: Sequence[Query], *, adaptive: bool) -> list[str]:
    """Words of the training prompts; the adaptive attacker keeps their digits and punctuation.

    Those are what the word-salad rule takes for signs of a sentence.
    """
    words = {w for prompt, _ in training for w in prompt.split()}
    kept = words if adaptive else {w for w in words if w.isalpha() and len(w) > 2}
    return sorted(kept)


def _climb(
    victim: Victim,
    target: str,
    queries: Sequence[str],
    vocabulary: Sequence[str],
    rounds: int,
    rng: Random,
) -> str:
    """The prefix that pulls ``queries`` hardest to ``target`` after ``rounds`` rounds of moves."""

    def pull(words: Sequence[str]) -> float:
        return victim.pull([f"{' '.join(words)} {q}" for q in queries], target)

    best = [rng.choice(vocabulary) for _ in range(GADGET_WORDS)]
    best_pull = pull(best)
    for _ in range(rounds):
        place = rng.randrange(GADGET_WORDS)
        for _ in range(CANDIDATES):
            moved = [*best[:place], rng.choice(vocabulary), *best[place + 1 :]]
            moved_pull = pull(moved)
            if moved_pull > best_pull:
                best, best_pull = moved, moved_pull
    return " ".join(best)


def _prefixes(texts: Iterable[str]) -> list[Attack]:
    return [lambda prompt, text=text: f"{text} {prompt}" for text in texts]  # type: ignore[misc]


def _padding() -> list[Attack]:
    before = [lambda p, f=f: f"{f} {p}" for f in FILLERS]  # type: ignore[misc]
    after = [lambda p, f=f: f"{p} {f}" for f in FILLERS]  # type: ignore[misc]
    return [*before, *after]


def _unicode() -> list[Attack]:
    return [
        lambda p: p.translate(LATIN_TWINS),
        lambda p: "\u200b".join(p),
        lambda p: "".join(c + "\u0336" if c.isalpha() else c for c in p),
        _fullwidth,
        lambda p: f"\u202e{p}\u202c",
        lambda p: "".join(f"{c}\U000e0041" for c in p),
    ]


def _fullwidth(prompt: str) -> str:
    return "".join(
        chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in unicodedata.normalize("NFC", prompt)
    )


# --- judging -------------------------------------------------------------------------------------


def _targeted(
    victims: Mapping[str, Victim],
    heldout: Sequence[Query],
    attacks: Mapping[str, Sequence[Attack]],
) -> dict[str, Any]:
    """Share of other categories' queries that end at the target, by target and in the mean."""
    found: dict[str, Any] = {}
    for name, victim in victims.items():
        by_target = {}
        for target, moves in attacks.items():
            prompts = [p for p, c in heldout if c != target]
            already = victim.decided(prompts)
            hits = [
                after == target
                for move in moves
                for before, after in zip(
                    already, victim.decided([move(p) for p in prompts]), strict=True
                )
                if before != target
            ]
            by_target[target] = round(statistics.mean(hits), 3)
        found[f"success_{name}"] = round(statistics.mean(by_target.values()), 3)
        found[f"success_{name}_by_target"] = by_target
    return found


def _untargeted(
    victims: Mapping[str, Victim], heldout: Sequence[Query], attacks: Sequence[Attack]
) -> dict[str, Any]:
    """Share sent to a wrong specialist, and share decided as without the attack."""
    prompts, labels = zip(*heldout, strict=True)
    found: dict[str, Any] = {}
    for name, victim in victims.items():
        clean = victim.decided(prompts)
        wrong, kept = [], []
        for move in attacks:
            decided = victim.decided([move(p) for p in prompts])
            wrong += [d not in (GENERAL, c) for d, c in zip(decided, labels, strict=True)]
            kept += [d == c for d, c in zip(decided, clean, strict=True)]
        found[f"success_{name}"] = round(statistics.mean(wrong), 3)
        found[f"decision_kept_{name}"] = round(statistics.mean(kept), 3)
    return found


def _foreign(victims: Mapping[str, Victim]) -> dict[str, Any]:
    prompts, labels = zip(*FOREIGN, strict=True)
    found: dict[str, Any] = {"prompts": len(prompts)}
    for name, victim in victims.items():
        decided = victim.decided(prompts)
        wrong = [d not in (GENERAL, c) for d, c in zip(decided, labels, strict=True)]
        right = [d == c for d, c in zip(decided, labels, strict=True)]
        found[f"success_{name}"] = round(statistics.mean(wrong), 3)
        found[f"accuracy_{name}"] = round(statistics.mean(right), 3)
    return found


def _print(result: Mapping[str, Any]) -> None:
    for name, found in result["attacks"].items():
        print(
            f"{name:>16}  off {found['success_off']:.3f}  on {found['success_on']:.3f}",
            file=sys.stderr,
        )
    for key in (
        "accuracy_off",
        "accuracy_on",
        "quality_points_lost",
        "quality_points_lost_se",
        "added_p50_cpu_ms",
    ):
        print(f"{key:>24}  {result[key]}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
