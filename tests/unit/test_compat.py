"""Which checkpoints may share an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experts.compat import (
    architecture_digest,
    check_compatible,
    config_differences,
    resolve_model_folder,
    weights_bytes,
)
from experts.errors import ArtifactError
from experts.vllm_serving import sampling_defaults

BASE = {"hidden_size": 64, "rope_theta": 1e4, "vocab_size": 10, "dtype": "bfloat16"}


def write(folder: Path, config: dict[str, Any], tokenizer: str = "{}") -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer)
    return str(folder)


def test_bookkeeping_does_not_matter_but_geometry_does(tmp_path: Path) -> None:
    base = write(tmp_path / "base", BASE)
    same = write(tmp_path / "same", {**BASE, "dtype": "float32", "_name_or_path": "x"})
    check_compatible(base, same, expert="same")
    turned = write(tmp_path / "turned", {**BASE, "rope_theta": 1e6})
    with pytest.raises(ArtifactError) as caught:
        check_compatible(base, turned, expert="turned")
    assert caught.value.differences == {"rope_theta": "1000000.0, the engine has 10000.0"}


def test_another_tokenizer_is_another_expert(tmp_path: Path) -> None:
    base = write(tmp_path / "base", BASE)
    other = write(tmp_path / "other", BASE, tokenizer='{"x": 1}')
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        check_compatible(base, other, expert="other")


def test_the_architectures_digest_is_equal_where_an_engine_can_be_shared(tmp_path: Path) -> None:
    digest = architecture_digest(write(tmp_path / "base", BASE))
    same = {**BASE, "rope_theta": 10_000, "torch_dtype": "float32", "head_dim": None}
    assert architecture_digest(write(tmp_path / "same", same)) == digest
    turned = {**BASE, "rope_theta": 1e6}
    assert architecture_digest(write(tmp_path / "turned", turned)) != digest
    assert architecture_digest(write(tmp_path / "other", BASE, '{"x": 1}')) != digest


def test_a_key_that_one_side_lacks_is_a_difference() -> None:
    assert "head_dim" in config_differences(BASE, {**BASE, "head_dim": 32})


@pytest.mark.parametrize("text", [None, "{"])
def test_an_incomplete_folder_says_what_is_missing(tmp_path: Path, text: str | None) -> None:
    base = write(tmp_path / "base", BASE)
    (tmp_path / "half").mkdir()
    if text is not None:
        (tmp_path / "half" / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        check_compatible(base, str(tmp_path / "half"), expert="half")


def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such model folder"):
        resolve_model_folder(str(tmp_path / "nowhere"))
    assert resolve_model_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("config", "defaults"),
    [
        (None, {}),
        ({"eos_token_id": 2}, {}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        (
            {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": None},
            {"temperature": 0.2, "top_p": 0.9},
        ),
    ],
)
def test_sampling_defaults_are_the_experts_own(
    tmp_path: Path, config: dict[str, Any] | None, defaults: dict[str, float]
) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert sampling_defaults(tmp_path) == defaults


def test_weights_are_sized_by_their_headers_and_by_what_an_engine_makes_of_them(
    tmp_path: Path,
) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "proj": torch.zeros(4, 8, dtype=torch.bfloat16),
        "packed": torch.zeros(4, 2, dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_bytes(str(tmp_path)) == 64 + 32
    assert weights_bytes(str(tmp_path), element_bytes=4) == 128 + 32, "integers stay as they are"


def test_a_quantised_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    quantised = {**BASE, "quantization_config": {"quant_method": "compressed-tensors"}}
    whole = {"a.weight_packed": torch.zeros(4, 1), "a.weight_scale": torch.zeros(4)}
    folders = {}
    for name, tensors in (
        ("base", whole),
        ("same", whole),
        ("lacking", {"a.weight_scale": whole["a.weight_scale"]}),
    ):
        folders[name] = write(tmp_path / name, quantised)
        save_file(tensors, Path(folders[name]) / "model.safetensors")
    check_compatible(folders["base"], folders["same"], expert="same")
    with pytest.raises(ArtifactError, match=r"a\.weight_packed: missing"):
        check_compatible(folders["base"], folders["lacking"], expert="lacking")
