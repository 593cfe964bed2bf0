"""Without a terminal, long work says where it is: not never, and not all the time."""

from __future__ import annotations

from gateway.progress_lines import ProgressLines


def test_a_stage_is_told_of_at_its_begin_now_and_then_and_at_its_end() -> None:
    now, lines = [100.0], list[str]()
    report = ProgressLines(lambda: now[0], lines.append)
    for done in range(0, 101):
        report("embed", done, 100)
        now[0] += 0.25
    assert [line.split()[-1] for line in lines] == ["0/100", "40/100", "80/100", "100/100"]
    assert lines[0] == "     0.0 s  embed  0/100"
    report("embed", 100, 100)
    report("write", 1, 1)
    assert [line.split()[-2] for line in lines[4:]] == ["write"]


def test_a_stage_that_begins_again_ends_again() -> None:
    lines = list[str]()
    report = ProgressLines(lambda: float(20 * len(lines)), lines.append)
    for done in (0, 2, 0, 2):
        report("fit", done, 2)
    assert [line.split()[-1] for line in lines] == ["0/2", "2/2", "0/2", "2/2"]
