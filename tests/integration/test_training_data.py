"""The data that the quickstart's adapters were trained on can be made again, word for word.

Takes up to ten seconds for an adapter, so it is not among the fast tests; it needs no engine.
"""

from __future__ import annotations

import json

import pytest

from examples.quickstart.prepare_models import ADAPTERS_DIR, SPECIALISTS
from examples.quickstart.tasks import TASKS
from examples.quickstart.train_specialists import (
    Recipe,
    data_digest,
    heldout_examples,
    training_examples,
)


@pytest.mark.parametrize("name", SPECIALISTS)
def test_a_cards_data_can_be_generated_again(name: str) -> None:
    card = json.loads((ADAPTERS_DIR / name / "card.json").read_text())
    recipe = Recipe(card["steps"], seed=card["seed"], heldout=card["heldout_questions"])
    assert data_digest(training_examples(TASKS[name], recipe)) == card["train_data_digest"]
    assert data_digest(heldout_examples(TASKS[name], recipe)) == card["heldout_data_digest"]
