"""Input checks by line, recovery of the output, and who may write it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from gateway.batch_files import BatchError, InputFile, OutputFile, lines_left
from gateway.batch_lines import Answer, Lost, answer_line, lost_line


def request(custom_id: str, model: str = "auto", **changes: Any) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": custom_id}]}
    line = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    }
    return json.dumps(line | changes)


def written(folder: Path, lines: Iterable[str]) -> Path:
    path = folder / "in.jsonl"
    path.write_text("\n".join(lines))
    return path


def good(custom_id: str) -> bytes:
    body = b'{"coe":{"expert":"a","cost_usd":0.000002}}'
    return answer_line("batch_req_1", custom_id, Answer(200, "r", body))


def test_lines_are_found_again_by_index(tmp_path: Path) -> None:
    path = written(tmp_path, [request("a"), "", "  ", request("b", "sql"), request("ü", "sql")])
    with InputFile(path) as source:
        assert len(source) == 3
        assert [source.read(i).custom_id for i in (2, 0, 1)] == ["ü", "a", "b"]
        assert [source.models[c] for c in source.model_codes] == ["auto", "sql", "sql"]


def test_every_wrong_line_is_named_at_once(tmp_path: Path) -> None:
    lines = [request("a"), "not json", request("b", url="/v1/files"), request("a")]
    with pytest.raises(BatchError) as refused:
        InputFile(written(tmp_path, lines))
    first, *rest = str(refused.value).splitlines()
    assert first == "nothing was sent, the input is wrong"
    assert [line.split(":")[1] for line in rest] == ["2", "3", "4"]
    assert rest[2].endswith("custom_id 'a' is that of line 1")


def test_at_most_twenty_are_listed_and_all_counted(tmp_path: Path) -> None:
    with pytest.raises(BatchError) as refused:
        InputFile(written(tmp_path, [request("a")] * 31))
    listed = str(refused.value).splitlines()[1:]
    assert len(listed) == 21
    assert listed[-1] == "and 10 more"


def test_an_overlong_line_is_refused_and_the_next_ones_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.batch_files.LINE_BYTES_MAX", 300)
    lines = [request("a"), request("b" * 900), "x", request("c")]
    with pytest.raises(BatchError) as refused:
        InputFile(written(tmp_path, lines))
    assert [line.split(":")[1] for line in str(refused.value).splitlines()[1:]] == ["2", "3"]


def test_an_input_that_changes_under_the_run_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path, [request("a"), request("b")])
    with InputFile(path) as source:
        path.write_text("\n".join([request("b"), request("a")]))
        with pytest.raises(BatchError, match="changed while"):
            source.read(0)


def test_a_resumed_output_knows_what_is_left(tmp_path: Path) -> None:
    path = written(tmp_path, [request(name) for name in "abcd"])
    target_path = tmp_path / "out.jsonl"
    with OutputFile(target_path) as target:
        target.append(good("c"))
        target.append(good("a"))
    with InputFile(path) as source, OutputFile(target_path) as target:
        assert lines_left(source, target).tolist() == [1, 3]
        assert target.tally.total.cost_micro_usd == 4


@pytest.mark.parametrize("cut", [1, 5, 30, 80])
def test_a_torn_last_line_is_cut(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(good("a") + good("b")[:cut])
    with OutputFile(path) as target:
        assert target.cut_bytes == cut
        target.append(good("c"))
    assert path.read_bytes() == good("a") + good("c")


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(good("a") + good("b")[:-1])
    with OutputFile(path) as target:
        assert target.cut_bytes == 0
        assert target.tally.total.lines == 2
    assert path.read_bytes() == good("a") + good("b")


@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"my notes\n",
        good("a") + b"{}\n" + good("b"),
        good("a") + good("b")[:20] + b"\n",
    ],
)
def test_what_is_not_ours_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(BatchError, match="not a line of a batch output"):
        OutputFile(path)
    assert path.read_bytes() == content


def test_an_output_of_another_batch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(good("stranger"))
    with (
        InputFile(written(tmp_path, [request("a")])) as source,
        OutputFile(path) as target,
        pytest.raises(BatchError, match="another batch"),
    ):
        lines_left(source, target)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with OutputFile(path), pytest.raises(BatchError, match="another coe batch"):
        OutputFile(path)
    with OutputFile(path):
        pass


def test_dropping_failures_keeps_the_rest_and_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(good("a") + lost_line("batch_req_2", "b", Lost("x")) + good("c"))
    with OutputFile(path) as target:
        target.drop_failed()
        with pytest.raises(BatchError, match="another coe batch"):
            OutputFile(path)
        target.append(good("b"))
        assert target.tally.total.lines == 2
    assert path.read_bytes() == good("a") + good("c") + good("b")
    assert list(tmp_path.iterdir()) == [path]


async def test_a_commit_covers_what_was_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    syncs: list[int] = []
    real = os.fsync

    def counted(fd: int) -> None:
        real(fd)
        syncs.append(os.fstat(fd).st_size)

    with OutputFile(tmp_path / "out.jsonl") as target:
        monkeypatch.setattr(os, "fsync", counted)
        target.append(good("a"))
        target.append(good("b"))
        await target.commit()
        await target.commit()  # nothing new: no fsync
        assert syncs == [len(good("a") + good("b"))]
