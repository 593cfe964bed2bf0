"""Can two checkpoints share one running engine? Compared before any weight is touched.

A swap exchanges weights only. Shapes, rotary tables, tokenizer and attention geometry stay those of
the engine, so everything in ``config.json`` that reaches them has to agree. Chat templates and
prices may differ: they belong to the expert.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
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
    differences = folder_differences(base, other)
    differences |= {} if differences else missing_tensors(base, other)
    if differences:
        raise ArtifactError(
            other,
            f"{expert} cannot share an engine with {Path(base).name}; give it a host of its own",
            differences,
        )


def folder_differences(base: str, other: str) -> dict[str, str]:
    """What keeps two model folders from sharing an engine; empty when nothing does."""
    differences = config_differences(_config(base), _config(other))
    if _tokenizer_digest(base) != _tokenizer_digest(other):
        differences["tokenizer.json"] = "another vocabulary or normalisation"
    return differences


def engine_groups(folders: Mapping[str, str]) -> list[list[str]]:
    """Experts that can share an engine, together; groups in the order of their first expert."""
    groups: list[list[str]] = []
    for expert, folder in folders.items():
        for group in groups:
            if not folder_differences(folders[group[0]], folder):
                group.append(expert)
                break
        else:
            groups.append([expert])
    return groups


def architecture_digest(folder: str) -> str:
    """Equal for two model folders exactly when they can share an engine, also on other machines."""
    relevant = {
        key: _with_whole_numbers(value)
        for key, value in _config(folder).items()
        if key not in _IRRELEVANT and value is not None  # absent and null are the same
    }
    text = json.dumps([relevant, _tokenizer_digest(folder)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_whole_numbers(value: Any) -> Any:
    """10000.0 is 10000, as it is to ``config_differences``."""
    if isinstance(value, dict):
        return {key: _with_whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def missing_tensors(base: str, other: str) -> dict[str, str]:
    """Tensors that ``other``'s quantised checkpoint lacks, or has in another shape, beside
    ``base``'s: vLLM keeps no account of them. Empty for checkpoints that are not quantised, whose
    numbers are checked when they are loaded."""
    if "quantization_config" not in _config(base):
        return {}
    mine, theirs = _tensor_shapes(base), _tensor_shapes(other)
    return {
        name: f"{theirs.get(name, 'missing')}, the engine's first expert has {shape}"
        for name, shape in mine.items()
        if theirs.get(name) != shape
    }


def _tensor_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor["shape"])
        for header in _headers(folder)
        for name, tensor in header.items()
    }


def _headers(folder: str) -> Iterator[dict[str, Any]]:
    for file in sorted(Path(folder).glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        header.pop("__metadata__", None)
        yield header


def weights_bytes(folder: str, *, element_bytes: int | None = None) -> int:
    """Bytes of a folder's weights, by the headers of its files; with ``element_bytes``, of its
    floating-point tensors if an engine held each of their elements in so many bytes."""
    total = 0
    for header in _headers(folder):
        for tensor in header.values():
            start, stop = tensor["data_offsets"]
            floating = tensor["dtype"] in ("BF16", "F16", "F32", "F64")
            count = math.prod(tensor["shape"])
            total += count * element_bytes if floating and element_bytes else stop - start
    return total


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
