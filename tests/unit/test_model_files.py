"""What a model's folder tells before an engine is started on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from experts.compat import check_compatible, stop_tokens, unreadable
from experts.errors import ArtifactError


def model(folder: Path, config: Any = None, generation: Any = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or {}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    save_file({"weight": np.ones((64, 64), np.float32)}, folder / "model.safetensors")
    return folder


def test_folders_that_cannot_be_loaded_are_told_from_those_that_can(tmp_path: Path) -> None:
    names = ("good", "cut", "garbage", "empty", "bare", "broken")
    folders = {name: model(tmp_path / name) for name in names}
    weights = {name: folder / "model.safetensors" for name, folder in folders.items()}
    weights["cut"].write_bytes(weights["cut"].read_bytes()[:-1])
    weights["garbage"].write_bytes(b"\xff" * 4096)
    weights["empty"].unlink()
    (folders["bare"] / "config.json").unlink()
    (folders["broken"] / "config.json").write_text("[1]")
    reasons = unreadable({name: str(folder) for name, folder in folders.items()})
    assert set(reasons) == {"cut", "garbage", "empty", "bare", "broken"}
    assert "damaged or cut short" in reasons["cut"]
    assert "no *.safetensors" in reasons["empty"]
    assert "config.json is missing" in reasons["bare"]
    assert "not a JSON object" in reasons["broken"]


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({}, None, set()),
        ({"eos_token_id": 2}, None, {2}),
        ({"eos_token_id": None}, {"eos_token_id": [7, 2]}, {2, 7}),
        ({"eos_token_id": 0}, {"eos_token_id": 5}, {0, 5}),
        ({"eos_token_id": [1]}, {}, {1}),
    ],
)
def test_stop_tokens_come_from_both_files(
    tmp_path: Path, config: Any, generation: Any, ids: set[int]
) -> None:
    assert stop_tokens(str(model(tmp_path / "m", config, generation))) == ids


def test_a_chat_model_and_its_base_may_share_an_engine_although_they_stop_differently(
    tmp_path: Path,
) -> None:
    base = str(model(tmp_path / "base", {"hidden_size": 8, "eos_token_id": 1}))
    chat = str(model(tmp_path / "chat", {"hidden_size": 8, "eos_token_id": 2}))
    check_compatible(base, chat, expert="chat")
    assert stop_tokens(chat) - stop_tokens(base) == {2}


def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path) -> None:
    good, bad = str(model(tmp_path / "good")), model(tmp_path / "bad")
    (bad / "config.json").write_text("7")
    with pytest.raises(ArtifactError, match="not a JSON object"):
        check_compatible(good, str(bad), expert="bad")
