"""What of coe.yaml can change while it serves, and what becomes of a file that cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.config import load_config
from gateway.reload import needs_restart, reloaded
from gateway.start_failed import StartFailed
from gateway.worker_processes import Workers

EXPERT = {
    "source": {"scripted": "echo"},
    "price": {"input_usd_per_mtok": 1, "output_usd_per_mtok": 2},
    "context_tokens": 4096,
}
WEIGHTS = {**EXPERT, "source": {"path": "/models/w"}, "context_tokens": 1024}
HOST = {"name": "h", "experts": ["w"]}


class Fake(Workers):
    def __init__(self, fails: str = "") -> None:
        self.fails, self.times = fails, 0

    def relieve(self) -> None:
        self.times += 1
        if self.fails:
            raise StartFailed(self.fails)


def written(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({"experts": {"a": EXPERT}, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"experts": {"a": EXPERT, "b": EXPERT}}, ()),
        ({"gateway": {"limits": {"body_bytes": 4096}, "require_keys": True}}, ()),
        ({"experts": {"a": EXPERT, "w": WEIGHTS}, "hosts": [HOST]}, ("hosts",)),
        ({"gateway": {"port": 9, "workers": 3}}, ("gateway.port", "gateway.workers")),
        ({"state": {"redis_url": "redis://elsewhere:1"}}, ("state",)),
    ],
)
def test_what_was_opened_at_the_start_cannot_change(
    tmp_path: Path, changes: dict[str, Any], keys: tuple[str, ...]
) -> None:
    old = load_config(written(tmp_path / "old.yaml"))
    new = load_config(written(tmp_path / "new.yaml", **changes))
    assert needs_restart(old, new) == keys
    assert needs_restart(new, new) == ()


def test_a_good_file_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, workers = written(tmp_path / "coe.yaml"), Fake()
    before = load_config(path)
    written(path, experts={"a": EXPERT, "b": EXPERT})
    after = reloaded(before, path, workers)
    assert (set(after.catalogue.ids), workers.times) == ({"a", "b"}, 1)
    assert "was taken over; experts: a, b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "fails", "said", "asked"),
    [
        ("experts: {a: {sauce: x}}", "", "sauce", 0),
        (json.dumps({"experts": {"a": EXPERT}, "gateway": {"port": 9}}), "", "gateway.port", 0),
        (json.dumps({"experts": {"b": EXPERT}}), "it ended", "it ended", 1),
    ],
)
def test_a_file_that_cannot_be_served_changes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    fails: str,
    said: str,
    asked: int,
) -> None:
    path, workers = written(tmp_path / "coe.yaml"), Fake(fails)
    before = load_config(path)
    path.write_text(text)
    assert reloaded(before, path, workers) is before
    assert workers.times == asked
    err = capsys.readouterr().err
    assert "was not taken over" in err
    assert said in err
