"""What an attacker writes round a question must not decide who answers it."""

from __future__ import annotations

import numpy as np

from routers.classifier import Gates, LinearHead, Mixing, References, RouterModel
from routers.fit import Sample, best_ablation_min
from routers.lookalikes import fold_lookalikes
from routers.text import routing_text
from routers.types import GENERAL
from routers.word_salad import without_word_salad

GADGET = "cassandra sunni collect randomly commissioners wednesday affecting busiest chart"
QUESTION = "What is the sum of three and four?"


def test_letters_drawn_like_latin_ones_are_read_as_latin() -> None:
    assert fold_lookalikes("ѕеlесt nаmе frоm the tаblе") == "select name from the table"


def test_prose_in_another_script_is_left_alone() -> None:
    russian = "Сколько будет три плюс четыре?"
    assert fold_lookalikes(russian) == russian


def test_a_word_with_one_letter_that_has_no_latin_twin_is_left_alone() -> None:
    assert fold_lookalikes("the word жара means heat") == "the word жара means heat"


def test_stacked_marks_are_removed_and_accents_kept() -> None:
    assert routing_text("s\u0337\u0322e\u0338lect a caf\u00e9") == "select a caf\u00e9"


def test_a_gadget_is_left_out_at_either_end() -> None:
    assert without_word_salad(f"{GADGET} {QUESTION}") == (QUESTION, 9)
    assert without_word_salad(f"{QUESTION} {GADGET}") == (QUESTION, 9)


def test_a_keyword_search_is_not_emptied() -> None:
    assert without_word_salad(GADGET) == (GADGET, 0)


def test_sentences_in_other_languages_are_kept() -> None:
    for text in (
        "Wie viele Tage hat ein Monat, wenn es ein kurzer ist und nicht ein langer?",
        "Quelle est la somme de tous les prix dans la table des ventes pour cette ville?",
        "Cuánto cuesta en total si compro tres libros y una mesa en la tienda?",
    ):
        assert without_word_salad(text) == (text, 0)


def test_measuring_needs_the_undefended_text() -> None:
    assert routing_text(f"{GADGET} {QUESTION}", harden=False).startswith("cassandra")


def _model(ablation_min: float) -> RouterModel:
    eye = np.eye(2)
    return RouterModel(
        (GENERAL, "sql"),
        References(eye.astype(np.float16), np.arange(2)),
        LinearHead((9 * eye).astype(np.float32), np.zeros(2, dtype=np.float32)),
        Mixing(1, 0.5, 1.0),
        Gates(1.0, -1.0, ablation_min),
    )


def _decided(
    model: RouterModel, whole: int, head_off: int, tail_off: int
) -> tuple[str, str | None]:
    axes = np.eye(2, dtype=np.float32)
    (answer,) = model.classify(axes[[whole]], axes[[[head_off, tail_off]]])
    return answer.category, answer.gate


def test_a_specialist_that_one_end_alone_asks_for_is_not_chosen() -> None:
    assert _decided(_model(0.1), 1, 0, 1) == (GENERAL, "ablation")
    assert _decided(_model(0.1), 1, 1, 0) == (GENERAL, "ablation")
    assert _decided(_model(0.1), 1, 1, 1) == ("sql", None)


def test_general_needs_no_support_and_zero_turns_the_gate_off() -> None:
    assert _decided(_model(0.1), 0, 1, 1) == (GENERAL, None)
    assert _decided(_model(0.0), 1, 0, 0) == ("sql", None)


def _floor_chosen(rows: int, *, siblings: bool) -> float:
    """One text in fifty falls short of .1; of those seven in ten were right, three are general.

    Stopping them costs 7 · 0.5 - 3 · 1 = 0.5 in 500 rows: 0.1 point of the mean, at any size.
    """
    row = np.arange(rows)
    short, case = row % 50 == 0, (row // 50) % 10
    sample = Sample(
        vectors=np.zeros((rows, 2), dtype=np.float16),
        labels=np.where(short & (case >= 7), 0, 1),
        groups=case if siblings else row,
        categories=(GENERAL, "sql"),
    )
    posterior, support = np.tile([0.1, 0.9], (rows, 1)), np.where(short, 0.1, 1.0)
    return best_ablation_min(posterior, np.ones(rows), support, sample, Gates(1.0, -1.0))


def test_an_ablation_floor_needs_evidence_and_not_only_a_low_mean() -> None:
    nothing_stopped, everything_short_stopped = 0.1, 0.5
    assert _floor_chosen(20_000, siblings=False) == everything_short_stopped
    assert _floor_chosen(1_000, siblings=False) == nothing_stopped


def test_rows_of_one_group_are_one_piece_of_evidence() -> None:
    assert _floor_chosen(20_000, siblings=True) == 0.1
