"""What is in force when files and the shared store both have something to say."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts.errors import UnknownModel
from policies.live import PolicyWatcher
from policies.policy_set import Override, takes_canary

IDS = ("small", "large")


def text(expert: str, cost: str = "0.01") -> str:
    return f"version: 1\ndefault: {expert}\ncaps: {{cost_usd: {cost}}}\n"


def expert_of(watcher: PolicyWatcher, name: str = "auto") -> str:
    return watcher.current.get(name).default.experts[0]


@pytest.fixture
def watcher(tmp_path: Path) -> PolicyWatcher:
    (tmp_path / "auto.yaml").write_text(text("small"))
    return PolicyWatcher(tmp_path, IDS, "auto")


def test_the_store_stands_before_the_file_until_it_lets_go(
    watcher: PolicyWatcher, tmp_path: Path
) -> None:
    watcher.set_overrides({"auto": Override(text("large"))})
    assert expert_of(watcher) == "large"
    assert watcher.current.from_store == {"auto"}
    (tmp_path / "auto.yaml").write_text(text("small", "0.02"))
    watcher.reload_now()
    assert expert_of(watcher) == "large"
    watcher.set_overrides({"auto": Override()})
    assert expert_of(watcher) == "small"
    assert watcher.current.get("auto").caps.cost_micro_usd == 20_000


def test_a_wrong_version_in_the_store_changes_nothing_and_is_told(watcher: PolicyWatcher) -> None:
    watcher.set_overrides({"auto": Override(text("large"))})
    watcher.set_overrides({"auto": Override(text("nobody"), text("nobody"), 0.5)})
    assert expert_of(watcher) == "large"
    assert not watcher.current.canaries
    assert set(watcher.errors) == {"store:auto", "store:auto (canary)"}
    watcher.set_overrides({})
    assert expert_of(watcher) == "small"
    assert not watcher.errors


def test_a_policy_can_live_in_the_store_alone(watcher: PolicyWatcher) -> None:
    watcher.set_overrides({"fresh": Override(text("large"))})
    assert watcher.current.names == ("auto", "fresh")
    watcher.set_overrides({})
    with pytest.raises(UnknownModel):
        watcher.current.get("fresh")


def test_a_canary_gets_its_share_of_the_sessions_and_keeps_them(watcher: PolicyWatcher) -> None:
    watcher.set_overrides({"auto": Override(None, text("large"), 0.2)})
    current = watcher.current
    sessions = [f"session-{n}" for n in range(5_000)]
    chosen = {s: current.choose("auto", s).default.experts[0] for s in sessions}
    share = sum(expert == "large" for expert in chosen.values()) / len(sessions)
    assert share == pytest.approx(0.2, abs=0.02)
    assert chosen == {s: current.choose("auto", s).default.experts[0] for s in sessions}
    watcher.set_overrides({"auto": Override(None, text("large"), 0.4)})
    wider = {s for s in sessions if watcher.current.choose("auto", s).default.experts[0] == "large"}
    assert {s for s, expert in chosen.items() if expert == "large"} < wider


def test_the_ends_of_the_range_mean_nobody_and_everybody() -> None:
    assert not any(takes_canary("d", str(n), 0.0) for n in range(1_000))
    assert all(takes_canary("d", str(n), 1.0) for n in range(1_000))
