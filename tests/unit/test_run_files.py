"""Where ``coe serve`` keeps its data and notes its store's address, and who may read it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from gateway.run_files import (
    AlreadyRunning,
    claimed_data_folder,
    data_folder,
    noted_store,
    running_store,
)

URL = "redis://:password@127.0.0.1:1/0"


@pytest.fixture
def environ(tmp_path: Path) -> Mapping[str, str]:
    return {"XDG_STATE_HOME": str(tmp_path / "state"), "COE_CACHE_DIR": str(tmp_path / "cache")}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "site" / "coe.yaml"


def test_each_configuration_has_a_folder_of_its_own(config: Path, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    folder = data_folder(config, home)
    assert folder.parent == tmp_path / ".local" / "state" / "coe"
    assert folder.name.startswith("site-")
    assert data_folder(config.with_name("other.yaml"), home) != folder


def test_one_process_holds_a_data_folder(config: Path, environ: Mapping[str, str]) -> None:
    with claimed_data_folder(config, environ) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        with pytest.raises(AlreadyRunning), claimed_data_folder(config, environ):
            pass
    with claimed_data_folder(config, environ) as again:
        assert again == folder


def test_the_address_is_for_its_owner_and_gone_afterwards(
    config: Path, environ: Mapping[str, str]
) -> None:
    assert running_store(config, environ) is None
    with noted_store(config, URL, environ) as note:
        assert note.stat().st_mode & 0o777 == 0o600
        assert running_store(config, environ) == URL
        assert running_store(config.with_name("other.yaml"), environ) is None
    assert running_store(config, environ) is None
    assert os.listdir(note.parent) == []  # noqa: PTH208


@pytest.mark.parametrize("text", ["", "{", "{}", '{"pid": 1, "started": 5.0, "redis_url": "x"}'])
def test_a_note_nobody_stands_behind_counts_for_nothing(
    config: Path, environ: Mapping[str, str], text: str
) -> None:
    with noted_store(config, URL, environ) as note:
        note.write_text(text)
        assert running_store(config, environ) is None
        dead = {"pid": 2**22 - 3, "started": 1.0, "redis_url": URL}
        note.write_text(json.dumps(dead))
        assert running_store(config, environ) is None
