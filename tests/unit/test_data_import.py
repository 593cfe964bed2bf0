"""Each public format in a tiny file of its own shape, and what is said about wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experts.errors import ConfigError
from gateway.data_import.command import import_data
from routers.outcomes import Outcomes, read_outcomes


def _imported(source: Path, format_name: str, **options: Any) -> Outcomes:
    out = source.parent / f"out-{format_name}"
    import_data(source, out, format_name, **options)
    return read_outcomes(out)


def _cell(data: Outcomes, prompt: str, expert: str) -> tuple[float, float]:
    row, column = data.prompts.index(prompt), data.experts.index(expert)
    return float(data.score[row, column]), float(data.cost[row, column])


WIDE = {
    "sample_id": ["mmlu-law.val.0", "arc.1"],
    "prompt": ["Which tort?", "Why is ice light?"],
    "eval_name": ["mmlu-law", "arc-challenge"],
    "gpt-4": [1.0, 0.25],
    "gpt-4|model_response": ["A", "B"],
    "gpt-4|total_cost": [0.0123, 0.02],
    "mistralai/mistral-7b-chat": [0.0, 1.0],
    "mistralai/mistral-7b-chat|model_response": ["C", "D"],
    "mistralai/mistral-7b-chat|total_cost": [0.0001, 0.0002],
    "oracle_model_to_route_to": ["gpt-4", "mistralai/mistral-7b-chat"],
}


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_routerbench_wide_table(tmp_path: Path, suffix: str) -> None:
    table, file = pa.table(WIDE), tmp_path / f"routerbench_0shot{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, file)
    elif suffix == ".json":
        file.write_text(json.dumps(table.to_pylist()))
    else:
        import pyarrow.csv as pc

        pc.write_csv(table, file)
    data = _imported(file, "routerbench")
    assert data.experts == ("gpt-4", "mistralai/mistral-7b-chat")
    assert _cell(data, "Why is ice light?", "gpt-4") == (0.25, 0.02)
    assert sorted(data.categories or ()) == ["arc-challenge", "mmlu-law"]
    assert data.cost_unit == "USD"


def test_routerbench_pickle_is_refused_with_the_conversion(tmp_path: Path) -> None:
    file = tmp_path / "routerbench_0shot.pkl"
    file.write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"runs code.*to_parquet\('routerbench_0shot\.parquet'\)"):
        import_data(file, tmp_path / "out", "routerbench")


def test_routellm_folder_of_domains(tmp_path: Path) -> None:
    folder = tmp_path / "responses"
    folder.mkdir()
    header = "prompt,mixtral-8x7b-instruct-v0.1,gpt-4-1106-preview\n"
    (folder / "mmlu_anatomy.csv").write_text(
        header + '"Which nerve?\nA. facial\nAnswer:",True,True\n"Which ""face""?",False,True\n'
    )
    (folder / "mmlu_virology.csv").write_text(header + "Which virus?,True,False\n")
    data = _imported(folder, "routellm", costs={"mixtral-8x7b-instruct-v0.1": 0.0, **STRONG})
    assert _cell(data, 'Which "face"?', "mixtral-8x7b-instruct-v0.1") == (0.0, 0.0)
    assert _cell(data, "Which virus?", "gpt-4-1106-preview") == (0.0, 1.0)
    assert sorted(data.categories or ()) == ["anatomy", "anatomy", "virology"]


STRONG = {"gpt-4-1106-preview": 1.0}


def test_routellm_gsm8k_has_response_texts_besides(tmp_path: Path) -> None:
    file = tmp_path / "gsm8k_responses.csv"
    file.write_text(
        "prompt,weak,strong,weak_response,strong_response\nHow many?,False,True,I think 3,It is 4\n"
    )
    data = _imported(file, "routellm")
    assert data.experts == ("strong", "weak")
    assert data.cost_unit == "calls"


def test_routellm_names_row_and_column_of_a_wrong_value(tmp_path: Path) -> None:
    file = tmp_path / "mmlu_law.csv"
    file.write_text('prompt,weak,strong\n"two\nlines",True,False\nnext,maybe,True\n')
    with pytest.raises(ConfigError, match=r"mmlu_law\.csv:4: weak: must be True or False"):
        import_data(file, tmp_path / "out", "routellm")
    assert not (tmp_path / "out").exists()


def test_embedllm_long_table(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    rows = ["7,0,0,2+2?,a/one,1,gsm8k", "7,1,0,2+2?,b/two,0,gsm8k", "8,0,0,3+3?,a/one,0,gsm8k"]
    again = ["8,1,0,3+3?,b/two,1,gsm8k", "8,1,0,3+3?,b/two,0,gsm8k"]
    head = "prompt_id,model_id,category_id,prompt,model_name,label,category\n"
    file.write_text(head + "\n".join([*rows, *again]) + "\n")
    report = import_data(file, tmp_path / "out", "embedllm", costs={"a/one": 1, "b/two": 3})
    data = read_outcomes(tmp_path / "out")
    assert (report.queries, report.answers, report.repeated) == (2, 4, 1)
    assert _cell(data, "3+3?", "b/two") == (0.5, 3.0)  # two runs, averaged


def test_llmrouterbench_takes_the_latest_run_and_no_demo(tmp_path: Path) -> None:
    bench = tmp_path / "bench"
    _llmrouterbench_run(bench, "one", "20250101_000000", score=0.0)
    _llmrouterbench_run(bench, "one", "20250201_000000", score=1.0)
    _llmrouterbench_run(bench, "one", "20250301_000000", score=0.0, demo=True)
    _llmrouterbench_run(bench, "two", "20250101_000000", score=0.5)
    data = _imported(bench, "llmrouterbench")
    assert _cell(data, "What is 6*7?", "one") == (1.0, 0.001)
    assert _cell(data, "What is 6*7?", "two") == (0.5, 0.001)
    assert data.categories == ("aime",)


def _llmrouterbench_run(
    bench: Path, model: str, stamp: str, *, score: float, demo: bool = False
) -> None:
    file = bench / "aime" / "test" / model / f"aime-test-{model}-{stamp}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"index": 1, "origin_query": "What is 6*7?", "prompt": "Question: …", "score": score}
    tokens = {"prompt_tokens": 50, "completion_tokens": 20, "cost": 0.001}
    head = {"model_name": model, "dataset_name": "aime", "split": "test", "demo": demo}
    file.write_text(json.dumps({**head, "records": [{**record, **tokens, "raw_output": "…"}]}))


def test_routerarena_predictions_per_model(tmp_path: Path) -> None:
    folder = tmp_path / "predictions"
    folder.mkdir()
    for model, accuracy in (("a/cheap", 0.0), ("b/dear", 1.0)):
        entry = {
            "global index": "ArcMMLU_655",
            "prompt": "Which?",
            "prediction": model,
            "generated_result": {"success": True, "token_usage": {"input_tokens": 97}},
            "cost": 2.5e-05,
            "accuracy": accuracy,
            "for_optimality": False,
        }
        unjudged = {**entry, "global index": "ArcMMLU_1", "prompt": "Who?", "accuracy": None}
        (folder / f"{model[0]}.json").write_text(json.dumps([entry, unjudged]))
    report = import_data(folder, tmp_path / "out", "routerarena")
    data = read_outcomes(tmp_path / "out")
    assert report.unscored == 2
    assert _cell(data, "Which?", "b/dear") == (1.0, 2.5e-05)
    assert data.categories == ("ArcMMLU",)


def test_jsonl_with_confidence(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    lines = [
        {"prompt": "p", "expert": "one", "score": True, "cost": 1, "confidence": -0.5},
        {"prompt": "p", "expert": "two", "score": 0.5, "cost": 2, "confidence": -0.1},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    data = _imported(file, "jsonl", cost_unit="credits")
    assert data.confidence is not None
    assert data.confidence.tolist() == [[-0.5, -0.1]]
    assert data.cost_unit == "credits"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "p", "expert": "b", "score": 1.5}, r":2: score: a score must be 0 to 1"),
        ({"prompt": "p", "expert": "b", "score": "good"}, r":2: score: must be a number"),
        ({"prompt": " ", "expert": "b", "score": 1}, r":2: prompt: must be a text"),
        ({"prompt": "p", "model": "b", "score": 1}, r":2: expert: the column is missing"),
        ({"prompt": "p", "expert": "b", "score": 1, "cost": -1}, r":2: cost: must be 0 or more"),
    ],
)
def test_errors_name_row_and_column(tmp_path: Path, line: dict[str, Any], says: str) -> None:
    file = tmp_path / "mine.jsonl"
    good = {"prompt": "p", "expert": "a", "score": 1, "cost": 1}
    file.write_text(json.dumps(good) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match=says):
        import_data(file, tmp_path / "out", "jsonl")


def test_a_partly_recorded_cost_is_not_guessed(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    lines = [
        {"prompt": "p", "expert": "one", "score": 1, "cost": 1},
        {"prompt": "p", "expert": "two", "score": 1},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(ConfigError, match="two: has answers without a cost"):
        import_data(file, tmp_path / "out", "jsonl")
    assert _cell(_imported(file, "jsonl", costs={"two": 7}), "p", "two") == (1.0, 7.0)


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"prompt": "p", "expert": "a", "score": 1}))
    with pytest.raises(ConfigError, match="exists already"):
        import_data(file, tmp_path, "jsonl")
