"""Can two checkpoints share one running engine? Compared before any weight is touched.

A swap exchanges weights only. Shapes, rotary tables, tokenizer and attention geometry stay those of
the engine, so everything in ``config.json`` that reaches them has to agree. Chat templates and
prices may differ: they belong to the expert.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experts.errors import ArtifactError

# Bookkeeping and sampling fields that no kernel and no table depends on.
_IRRELEVANT = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "attention_dropout",
        "pretraining_tp",
        "is_llama_config",
    }
)


def check_compatible(base: str, other: str, *, expert: str) -> None:
    """Raise ArtifactError naming every difference that rules out an in-place swap."""
    differences = config_differences(_config(base), _config(other))
    if _tokenizer_digest(base) != _tokenizer_digest(other):
        differences["tokenizer.json"] = "another vocabulary or normalisation"
    if differences:
        raise ArtifactError(
            other,
            f"{expert} cannot share an engine with {Path(base).name}; give it a host of its own",
            differences,
        )


def config_differences(base: dict[str, Any], other: dict[str, Any]) -> dict[str, str]:
    """Key -> "theirs, ours" for each relevant key of two model configurations that differs."""
    keys = (base.keys() | other.keys()) - _IRRELEVANT
    return {
        key: f"{other.get(key)!r}, the engine has {base.get(key)!r}"
        for key in sorted(keys)
        if base.get(key) != other.get(key)
    }


def unreadable(folders: Mapping[str, str]) -> dict[str, str]:
    """Expert -> reason, for each whose weights cannot be what was meant: missing or cut short.

    An engine that starts on such a folder takes minutes to say so, and its host's other experts
    would go down with it.
    """
    reasons: dict[str, str] = {}
    for expert, location in folders.items():
        try:
            _config(location)
            _check_weights(Path(location))
        except ArtifactError as error:
            reasons[expert] = error.message
    return reasons


def _check_weights(folder: Path) -> None:
    """Opening a file compares its header with its length; no tensor is read."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArtifactError(str(folder), "holds no *.safetensors file")
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ArtifactError(str(file), f"damaged or cut short: {error}") from error


def stop_tokens(location: str) -> frozenset[int]:
    """Token ids at which the model's answers end, by its own files."""
    folder = Path(location)
    generation = folder / "generation_config.json"
    ids: set[int] = set()
    for config in (_config(location), _json(generation) if generation.is_file() else {}):
        found = config.get("eos_token_id")
        ids.update([found] if isinstance(found, int) else found or ())
    return frozenset(ids)


def resolve_model_folder(location: str) -> Path:
    """A folder as given, or the local snapshot of a hub id (fetched if the hub is reachable)."""
    folder = Path(location)
    if folder.is_dir():
        return folder
    if location.startswith(("/", ".", "~")):
        raise ArtifactError(location, "no such model folder; run the setup or fix source.path")
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(location, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])
    )


def _config(location: str) -> dict[str, Any]:
    path = Path(location) / "config.json"
    if not path.is_file():
        raise ArtifactError(location, "config.json is missing; the folder is not a complete model")
    return _json(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text())
    except ValueError as error:
        raise ArtifactError(str(path), f"not readable as JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ArtifactError(str(path), "not a JSON object")
    return loaded


def _tokenizer_digest(location: str) -> str:
    path = Path(location) / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
