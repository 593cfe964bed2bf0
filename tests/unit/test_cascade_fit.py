"""``coe policy cascade``: from recorded confidences to a policy file that drafts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from experts.errors import ConfigError
from gateway.cascade_fit import fit_cascade, recorded_evidence
from gateway.cli import app
from policies.loader import load_policy
from policies.types import Calibration
from routers.outcomes import Outcomes, read_outcomes

ROWS = 300
COST = {"small": 1.0, "large": 10.0, "mute": 4.0}


def write(folder: Path, *, confidence: bool = True, one_sided: bool = False) -> Path:
    """Small's confidence tells of small and a little of large, mute's tells nothing."""
    rng = np.random.default_rng(0)
    queries, rows = [], []
    for number in range(2 * ROWS):
        category = "easy" if number < ROWS else "hard"
        ease = rng.random()
        chance = {"small": ease if category == "easy" else 0.5 * ease, "large": 0.4 + 0.6 * ease}
        query = f"{category}-{number}"
        queries.append({"query_id": query, "prompt": query, "category": category})
        for expert, cost in COST.items():
            right = rng.random() < chance.get(expert, 0.5)
            told = math.log(0.05 + 0.9 * ease) if expert == "small" else -rng.exponential(0.3)
            row = {"query_id": query, "expert": expert, "cost": cost}
            row["score"] = 1.0 if one_sided and expert == "small" else float(right)
            rows.append(row | ({"confidence": told} if confidence else {}))
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(queries), folder / "queries.parquet")
    pq.write_table(pa.Table.from_pylist(rows), folder / "outcomes.parquet")
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return read_outcomes(write(tmp_path_factory.mktemp("data")))


def test_what_tells_something_drafts_and_what_it_tells_of_others_goes_along(
    outcomes: Outcomes,
) -> None:
    fit = fit_cascade(outcomes)
    own, moved = fit.confidence_sd["small"], fit.confidence_moves["small"]
    assert own > 0.05
    assert 0.01 < moved["large"] < own
    assert abs(moved["mute"]) < moved["large"]
    assert "mute" not in fit.confidence_sd, "its confidence is noise"
    again = fit_cascade(outcomes)
    assert (again.confidence_sd, again.calibrations) == (fit.confidence_sd, fit.calibrations)
    column, score = outcomes.experts.index("small"), outcomes.score
    news = fit.confidence[:, column] - np.array(
        [fit.quality[name]["small"] for name in outcomes.categories or ()]
    )
    measured = (news * (score[:, column] - score[:, column].mean())).mean() / news.std()
    assert own == pytest.approx(0.5 * measured, rel=0.25), "half of its size is believed"


def test_confidences_are_calibrated_in_every_category(outcomes: Outcomes) -> None:
    fit = fit_cascade(outcomes)
    names, column = np.array(outcomes.categories), outcomes.experts.index("small")
    for name in ("easy", "hard"):
        rows = names == name
        told, right = fit.confidence[rows, column], outcomes.score[rows, column]
        assert told.mean() == pytest.approx(right.mean(), abs=0.03)
    calibration = fit.calibrations["small"]
    assert calibration.by_category["hard"] < 0 < calibration.by_category["easy"]


def test_no_confidences_no_cascade_and_no_errors_no_draft(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mean token log-probabilities"):
        fit_cascade(read_outcomes(write(tmp_path / "none", confidence=False)))
    fit = fit_cascade(read_outcomes(write(tmp_path / "right", one_sided=True)))
    assert "small" not in fit.calibrations


def test_minus_infinity_is_a_confidence() -> None:
    told = Calibration(1.0, 0.0).confidence(recorded_evidence(-math.inf))
    assert told == pytest.approx(math.exp(-20), rel=1e-6)


def test_the_command_writes_a_policy_that_loads(tmp_path: Path) -> None:
    data, out = write(tmp_path / "data"), tmp_path / "fitted.yaml"
    arguments = ["policy", "cascade", "--data", str(data), "--cap-usd", "0.01"]
    done = CliRunner().invoke(app, [*arguments, "--quality-per-usd", "0.02", "--out", str(out)])
    assert done.exit_code == 0, done.output
    policy = load_policy(out, set(COST))
    assert policy.per_query is not None
    assert policy.per_query.confidence_sd.keys() == {"small"} <= policy.calibrations.keys()
    assert policy.per_query.quality["general"].keys() == set(COST)
    assert policy.caps.stages == 3
