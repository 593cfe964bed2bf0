"""What better inputs would be worth to the router: the whole of it, trained on more than it reads.

    python bench/routing_inputs.py FOLDER [--sets a,b] [--splits 3] [--budgets 31,54]
        [--model DIR] [--first-split 0] [--inputs shipped,model] [--json FILE]

``shipped`` is the router as it is. ``told_category`` and ``told_source`` have the true label beside
the embedding, in training and in use: what no prompt says better, so the most that finding the
category more often could bring. ``model`` has the mean hidden state at half the depth of a causal
language model in a local folder: what a larger encoder could bring. An input has as much weight in
the joined unit vector as the embedding; every part of the router is fitted on it.

``explained`` is the share of variance of what decides a route that is told on held-out rows, as in
routing_signals; the other figures are those of routing_ceilings, in means over splits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import _report
from bench.routing_ceilings import figures_of, mean_figures
from bench.routing_signals import explained
from gateway.evaluation.evaluate import split_by_prompt
from policies.frontier import solve_frontier
from routers.embedder import DEFAULT_EMBEDDER, load_embedder
from routers.estimate import estimates
from routers.outcome_train import embedded, train_on_outcomes
from routers.outcomes import Outcomes, holds_outcomes, read_outcomes

Float32Array = NDArray[np.float32]
Figures = dict[str, float]
Encoder = Callable[[Sequence[str]], Float32Array]

_TOKENS_MAX: Final = 160
_ROWS_AT_ONCE: Final = 16


class Table:
    """An embedder that looks its vectors up."""

    id, digest = "bench-table", "0" * 64

    def __init__(self, texts: Sequence[str], vectors: Float32Array) -> None:
        self._row_of = {text: row for row, text in enumerate(texts)}
        self._vectors = vectors
        self.dimensions = vectors.shape[1]

    def embed(self, texts: Sequence[str]) -> Float32Array:
        return self._vectors[[self._row_of[text] for text in texts]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of data-set folders")
    parser.add_argument("--sets", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--first-split", type=int, default=0, help="its seed, to go on from a run")
    parser.add_argument("--inputs", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--holdout", type=float, default=0.3)
    parser.add_argument("--budgets", default="", help="as in 31,54")
    parser.add_argument("--model", metavar="DIR", help="a causal language model's folder")
    parser.add_argument("--json", metavar="FILE", help="- for standard output")
    options = parser.parse_args()
    wanted = set(filter(None, options.sets.split(",")))
    encoder = None if options.model is None else hidden_states(options.model)
    result = {
        folder.name: over_splits(read_outcomes(folder), options, encoder)
        for folder in sorted(options.data.iterdir())
        if holds_outcomes(folder) and (not wanted or folder.name in wanted)
    }
    for name, inputs in result.items():
        for what, figures in inputs.items():
            cells = ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
            print(f"{name:<22}{what:<16}{cells}")
    about = {"splits": options.splits, "first_split": options.first_split}
    _report.write({"sets": result, **about}, options.json)


def over_splits(
    data: Outcomes, options: argparse.Namespace, encoder: Encoder | None
) -> dict[str, Figures]:
    """By input, each figure's mean over splits."""
    budgets = tuple(float(budget) for budget in options.budgets.split(",") if budget)
    wanted = set(filter(None, options.inputs.split(",")))
    found: dict[str, list[Figures]] = {}
    for what, vectors in inputs_of(data, encoder).items():
        for seed in range(options.first_split, options.first_split + options.splits):
            if wanted and what not in wanted:
                continue
            print(f"{data.name}: {what}, split of seed {seed}", file=sys.stderr)
            rest, held = split_by_prompt(data, options.holdout, seed)
            row = figures(data, vectors, rest, held, seed, budgets)
            found.setdefault(what, []).append(row)
    return {what: mean_figures(rows) for what, rows in found.items()}


def inputs_of(data: Outcomes, encoder: Encoder | None) -> dict[str, Float32Array]:
    """[n, d] unit vectors per kind of input."""
    own = embedded(data.texts, load_embedder(DEFAULT_EMBEDDER), lambda *_: None)
    found = {"shipped": own}
    if data.categories is not None:
        found["told_category"] = beside(own, one_hot(data.categories))
        finer = list(zip(data.categories, data.sources or data.categories, strict=True))
        if len(set(finer)) > len(set(data.categories)):
            found["told_source"] = beside(own, one_hot([f"{c}\0{s}" for c, s in finer]))
    if encoder is not None:
        states = encoder(data.texts)
        spread = np.maximum(states.std(axis=0), 1e-6)
        found["model"] = beside(own, (states - states.mean(axis=0)) / spread)
    return found


def one_hot(labels: Sequence[str]) -> Float32Array:
    names, rows = np.unique(np.array(labels), return_inverse=True)
    return np.eye(len(names), dtype=np.float32)[rows]


def beside(own: Float32Array, more: Float32Array) -> Float32Array:
    """Two halves of a unit vector."""
    length = np.maximum(np.linalg.norm(more, axis=1, keepdims=True), 1e-9)
    joined: Float32Array = np.hstack([own, more / length]).astype(np.float32) * np.sqrt(0.5)
    return joined.astype(np.float32)


def figures(
    data: Outcomes,
    vectors: Float32Array,
    rest: NDArray[np.int64],
    held: NDArray[np.int64],
    seed: int,
    budgets: Sequence[float],
) -> Figures:
    train, test = data.rows(rest), data.rows(held)
    trained = train_on_outcomes(
        train,
        Table(data.texts, vectors),
        seed=seed,
        progress=lambda *_: None,
        vectors=vectors[rest],
    )
    known = trained.evidence
    asked = estimates(trained.classifier, trained.quality, test.texts, vectors[held])
    corners = solve_frontier(
        known.quality, known.expected_cost, known.score, known.cost, known.mapped
    )
    return {
        "explained": explained(asked.quality, test.score, train.score.mean(axis=0)),
        **figures_of(asked.quality, asked.cost, corners, train, test, budgets, asked.mapped),
    }


def hidden_states(folder: str) -> Encoder:
    """Mean over tokens at half the depth, without the first token, which attention uses as a sink.

    Of a longer text the first two thirds of the window are its head, the last third its tail.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layer = model.config.num_hidden_layers // 2
    del model.layers[layer:]
    model.norm = torch.nn.Identity()

    def encode(texts: Sequence[str]) -> Float32Array:
        tail = _TOKENS_MAX // 3
        whole = [tokenizer.encode(text) for text in texts]
        rows = [t if len(t) <= _TOKENS_MAX else t[: _TOKENS_MAX - tail] + t[-tail:] for t in whole]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        out = np.zeros((len(rows), model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), _ROWS_AT_ONCE):
            chunk = order[start : start + _ROWS_AT_ONCE]
            print(f"\rencoded {start} of {len(order)}", end="", file=sys.stderr)
            width = max(2, *(len(rows[row]) for row in chunk))
            ids = torch.zeros(len(chunk), width, dtype=torch.long)
            mask = torch.zeros(len(chunk), width)
            for at, row in enumerate(chunk):
                ids[at, : len(rows[row])] = torch.tensor(rows[row])
                mask[at, : len(rows[row])] = 1
            with torch.inference_mode():
                states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
            mask[:, 0] = 0
            weights = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1))[..., None]
            out[chunk] = (states * weights).sum(dim=1).numpy()
        print(file=sys.stderr)
        return out

    return encode


if __name__ == "__main__":
    main()
