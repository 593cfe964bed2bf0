from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from experts.errors import ConfigError, UnknownModel
from policies.live import PolicySet, PolicyWatcher

IDS = ("general", "sql")


def write(folder: Path, name: str, text: str) -> None:
    """As an editor saves: whole file or nothing."""
    draft = folder / f".{name}.draft"
    draft.write_text(text)
    draft.replace(folder / f"{name}.yaml")


def policy(expert: str = "general", cost: str = "0.01") -> str:
    return f"version: 1\ndefault: {expert}\ncaps: {{cost_usd: {cost}}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "auto", policy())
    write(tmp_path, "other", policy("sql"))
    return tmp_path


def test_loads_the_folder_and_ignores_other_files(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")
    watcher = PolicyWatcher(folder, IDS, "auto")
    assert watcher.current.names == ("auto", "other")
    assert watcher.current.default_policy is watcher.current.get("auto")
    with pytest.raises(UnknownModel):
        watcher.current.get("absent")


@pytest.mark.parametrize("name", ["auto", "other"])
def test_a_broken_file_at_start_is_refused(folder: Path, name: str) -> None:
    write(folder, name, policy("nobody"))
    with pytest.raises(ConfigError, match="nobody"):
        PolicyWatcher(folder, IDS, "auto")


def test_a_missing_default_at_start_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"default policy 'main' has no file; found: auto, other"):
        PolicyWatcher(folder, IDS, "main")
    with pytest.raises(ConfigError, match="cannot be read"):
        PolicyWatcher(folder / "absent", IDS, "auto")


def test_a_valid_change_replaces_the_set_and_leaves_the_old_one_intact(folder: Path) -> None:
    seen: list[PolicySet] = []
    watcher = PolicyWatcher(folder, IDS, "auto", on_change=seen.append)
    before = watcher.current
    write(folder, "auto", policy(cost="0.02"))
    write(folder, "new", policy())
    report = watcher.reload_now()
    assert (report.added, report.changed, report.removed) == (("new",), ("auto",), ())
    assert seen == [watcher.current]
    assert before.get("auto").caps.cost_micro_usd == 10_000
    assert watcher.current.get("auto").caps.cost_micro_usd == 20_000
    assert before.digests["auto"] != watcher.current.digests["auto"]


def test_an_unchanged_folder_changes_nothing(folder: Path) -> None:
    watcher = PolicyWatcher(folder, IDS, "auto", on_change=lambda _: pytest.fail("no change"))
    before = watcher.current
    assert not watcher.reload_now().any_change
    assert watcher.current is before


def test_a_broken_change_keeps_the_old_version_and_lets_others_through(folder: Path) -> None:
    watcher = PolicyWatcher(folder, IDS, "auto")
    write(folder, "other", policy("nobody"))
    write(folder, "auto", policy(cost="0.02"))
    report = watcher.reload_now()
    assert report.changed == ("auto",)
    assert watcher.current.get("other").default.experts == ("sql",)
    assert watcher.errors["other.yaml"].line == 2
    write(folder, "other", policy("general"))
    watcher.reload_now()
    assert watcher.errors == {}
    assert watcher.current.get("other").default.experts == ("general",)


def test_a_deleted_policy_disappears_except_the_default(folder: Path) -> None:
    watcher = PolicyWatcher(folder, IDS, "auto")
    (folder / "auto.yaml").unlink()
    (folder / "other.yaml").unlink()
    report = watcher.reload_now()
    assert report.removed == ("other",)
    assert watcher.current.names == ("auto",)
    assert "has no file" in watcher.errors["auto.yaml"].message


def test_a_vanished_folder_keeps_everything(folder: Path) -> None:
    watcher = PolicyWatcher(folder, IDS, "auto")
    folder.rename(folder.with_name("moved"))
    assert not watcher.reload_now().any_change
    assert watcher.current.names == ("auto", "other")
    assert "cannot be read" in watcher.errors[str(folder)].message


def test_a_wrong_suffix_is_reported_rather_than_ignored(folder: Path) -> None:
    watcher = PolicyWatcher(folder, IDS, "auto")
    (folder / "third.yml").write_text(policy())
    assert "rename it to third.yaml" in watcher.reload_now().errors["third.yml"].message


async def test_follows_the_folder_while_started(folder: Path) -> None:
    changes: asyncio.Queue[PolicySet] = asyncio.Queue()
    watcher = PolicyWatcher(folder, IDS, "auto", on_change=changes.put_nowait)
    await watcher.start()
    try:
        write(folder, "new", policy())
        async with asyncio.timeout(20):
            assert "new" in await changes.get()
            (folder / "new.yaml").unlink()
            assert "new" not in await changes.get()
    finally:
        await watcher.aclose()
    await watcher.aclose()
