from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experts.errors import ConfigError
from routers.dataset import read_prompts

ROWS = [
    {"prompt": f"{category} prompt {i}", "category": category}
    for category in ("sql", "math")
    for i in range(10)
]


def jsonl(folder: Path, rows: list[dict[str, object]], name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(folder: Path, rows: list[dict[str, object]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "queries.parquet")
    return folder


def test_the_three_forms_of_one_data_set_are_equal(tmp_path: Path) -> None:
    (tmp_path / "lines").mkdir()
    (tmp_path / "set").mkdir()
    file = jsonl(tmp_path / "lines", ROWS)
    table = parquet(tmp_path / "set", [{"query_id": str(i), **r} for i, r in enumerate(ROWS)])
    assert read_prompts(file) == read_prompts(tmp_path / "lines") == read_prompts(table)


def test_order_of_rows_does_not_matter_but_labels_do(tmp_path: Path) -> None:
    base = read_prompts(jsonl(tmp_path, ROWS))
    assert read_prompts(jsonl(tmp_path, ROWS[::-1])) == base
    relabelled = [*ROWS, {"prompt": "one more", "category": "sql"}]
    assert read_prompts(jsonl(tmp_path, relabelled)).digest != base.digest


def test_equal_prompts_count_once(tmp_path: Path) -> None:
    prompts = read_prompts(jsonl(tmp_path, [*ROWS, {**ROWS[0], "prompt": " sql  prompt 0 "}]))
    assert (len(prompts.texts), prompts.duplicates) == (20, 1)


def test_conflicting_labels_name_both_rows(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "sql prompt 3", "category": "math"}]
    with pytest.raises(ConfigError) as caught:
        read_prompts(jsonl(tmp_path, rows))
    assert caught.value.line == 21
    assert "p.jsonl:4" in caught.value.message


def test_conflicting_prompts_can_be_left_out(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "sql prompt x", "category": "sql"}]
    rows += [{"prompt": "sql prompt x", "category": "math"}]
    prompts = read_prompts(jsonl(tmp_path, rows), drop_conflicts=True)
    assert (prompts.conflicts, "sql prompt x" in prompts.texts) == (1, False)


@pytest.mark.parametrize(
    ("rows", "key", "line", "words"),
    [
        ([*ROWS, {"promt": "x", "category": "sql"}], "prompt", 21, "Did you mean 'promt'"),
        ([*ROWS, {"prompt": "x", "category": None}], "category", 21, "not empty"),
        ([*ROWS, {"prompt": "   ", "category": "sql"}], "prompt", 21, "not empty"),
        ([*ROWS, {"prompt": "\u200b", "category": "sql"}], "prompt", 21, "invisible"),
        ([*ROWS, {"prompt": "x", "category": "a\nb"}], "category", 21, "name"),
        ([*ROWS, {"prompt": "x", "category": "sqll"}], "category", 21, "Did you mean 'sql'"),
        (ROWS[:10], "category", None, "1 categories"),
        ([], "", None, "no rows"),
    ],
)
def test_unusable_rows_are_named_with_a_remedy(
    tmp_path: Path, rows: list[dict[str, object]], key: str, line: int | None, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_prompts(jsonl(tmp_path, rows))
    assert (caught.value.key, caught.value.line) == (key, line)
    assert words in caught.value.message


def test_parquet_without_categories_says_so(tmp_path: Path) -> None:
    parquet(tmp_path, [{"query_id": "1", "prompt": "x"}])
    with pytest.raises(ConfigError, match="category: the column is missing"):
        read_prompts(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "a", "category": "b"}\n{"prompt": \xff}\n')
    with pytest.raises(ConfigError) as caught:
        read_prompts(tmp_path / "bad.jsonl")
    assert caught.value.line == 2
    (tmp_path / "queries.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="not a Parquet file"):
        read_prompts(tmp_path)
    with pytest.raises(ConfigError, match="not found"):
        read_prompts(tmp_path / "nowhere")
