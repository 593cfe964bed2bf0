from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from experts.errors import ConfigError
from experts.strict_yaml import Section, load_model, load_text
from experts.yaml_tree import MAX_FILE_BYTES


class Engine(Section):
    max_num_seqs: int = 16
    dtype: str = "auto"


class Host(Section):
    name: str
    engine: Engine = Engine()


class Site(Section):
    hosts: tuple[Host, ...]
    weights: dict[str, float] = Field(default_factory=dict)
    note: str | None = None


GOOD = """\
hosts:
  - name: one
    engine:
      max_num_seqs: 8
weights: {a: 1, b: 0.5}
"""


def refusal(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_text(text, Site, file="site.yaml")
    return caught.value


def test_loads_nested_sections_and_turns_lists_into_tuples() -> None:
    site = load_text(GOOD, Site, file="site.yaml")
    assert site == Site(
        hosts=(Host(name="one", engine=Engine(max_num_seqs=8)),), weights={"a": 1.0, "b": 0.5}
    )


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "reason"),
    [
        ("8", "abc", 4, "hosts[0].engine.max_num_seqs", "expected a whole number, got 'abc'"),
        ("8", '"8"', 4, "hosts[0].engine.max_num_seqs", "expected a whole number, got '8'"),
        ("8", "1.5", 4, "hosts[0].engine.max_num_seqs", "expected a whole number, got 1.5"),
        ("0.5", "[]", 5, "weights.b", "expected a number, got a list"),
        ("0.5", ".nan", 5, "weights.b", "expected a finite number"),
        ("name: one", "name: no", 2, "hosts[0].name", "expected text, got false"),
        ("name: one", "engine: {}", 3, "hosts[0].engine", "written twice, first on line 2"),
        ("name: one", "", 3, "hosts[0].name", "is required"),
        ("weights: {a: 1, b: 0.5}", "weights:", 5, "weights", "expected a mapping, got nothing"),
        ("a: 1", "1: 1", 5, "weights", "the key '1' is not text; put it in quotes"),
        ("a: 1", "a: &x 1", 5, "", "anchors and aliases are not accepted; write it out"),
    ],
)
def test_names_line_key_and_reason(old: str, new: str, line: int, key: str, reason: str) -> None:
    assert GOOD.count(old) == 1
    error = refusal(GOOD.replace(old, new))
    assert (error.file, error.line, error.key, error.reason) == ("site.yaml", line, key, reason)


def test_an_unknown_key_is_at_its_own_line_with_the_nearest_known_one() -> None:
    error = refusal(GOOD.replace("max_num_seqs", "max_num_seq"))
    assert (error.line, error.key) == (4, "hosts[0].engine.max_num_seq")
    assert error.nearest == "max_num_seqs"
    assert "Did you mean 'max_num_seqs'?" in str(error)


def test_an_unknown_key_unlike_any_other_lists_what_is_known() -> None:
    error = refusal(GOOD + "qqq: 1\n")
    assert (error.line, error.nearest) == (6, None)
    assert "known: hosts, note, weights" in error.reason


def test_the_first_error_of_the_file_is_raised_and_the_others_counted() -> None:
    error = refusal(GOOD.replace("8", "abc").replace("0.5", "x") + "qqq: 1\n")
    assert error.line == 4
    assert error.reason.endswith("(and 2 more problems in this file)")


@pytest.mark.parametrize(
    ("text", "line", "fragment"),
    [
        ("hosts: [\n  {name: a\n", 3, "not valid YAML"),
        ("note: a\nhosts: \x01\n", 2, "not valid YAML"),
        ("", None, "the file is empty"),
        ("- 1\n", 1, "expected a mapping, got a list"),
        ("note: !!python/object/apply:os.getcwd []\n", 1, "is not accepted"),
        ("note: a\n---\nnote: b\n", 2, "single document"),
        ("note: " + "[" * 5000, 1, "nested deeper than 32 levels"),
        ("#" * (MAX_FILE_BYTES + 1), None, "larger than the limit"),
    ],
)
def test_text_that_is_not_a_plain_small_mapping(text: str, line: int | None, fragment: str) -> None:
    error = refusal(text)
    assert fragment in error.reason
    assert error.line == line


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "latin.yaml"
    binary.write_bytes(b"note: a\nhosts: \xff\n")
    for path, fragment in [
        (tmp_path / "absent.yaml", "there is no such file"),
        (tmp_path, "cannot be read"),
        (binary, "not valid UTF-8"),
    ]:
        with pytest.raises(ConfigError, match=fragment) as caught:
            load_model(path, Site)
        assert caught.value.file == str(path)


def test_the_error_keeps_no_reference_to_the_input() -> None:
    error = refusal(GOOD.replace("8", "abc"))
    assert error.__cause__ is None
    assert error.__suppress_context__
