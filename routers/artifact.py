"""A trained router on disk: ``manifest.json`` and one ``.npz``. Nothing in it can run code."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, Final
from zipfile import BadZipFile, is_zipfile

import msgspec
import numpy as np

from experts.errors import ArtifactError
from routers.classifier import Gates, LinearHead, Mixing, References, RouterModel
from routers.embedder import Embedder
from routers.metrics import Metrics
from routers.quality import QualityModel
from routers.quality_record import (
    Evidence,
    QualityRecord,
    quality_arrays,
    quality_from_arrays,
)

__all__ = [
    "FORMAT_VERSION",
    "Artifact",
    "EmbedderRecord",
    "Manifest",
    "Quality",
    "TrainingRecord",
    "check_embedder",
    "load_artifact",
    "save_artifact",
]

FORMAT_VERSION: Final = 1
ARRAYS_BYTES_MAX: Final = 1 << 30
MANIFEST_BYTES_MAX: Final = 1 << 20
_MANIFEST: Final = "manifest.json"
_ARRAYS: Final = "arrays"
_QUALITY_ARRAYS: Final = "quality"
_DTYPES: Final = {"vectors": "float16", "labels": "int64", "weights": "float32", "bias": "float32"}

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


class EmbedderRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which embedder made the vectors; another one must not be used with them."""

    id: str
    digest: str
    dimensions: int


class TrainingRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the artifact comes from. ``data_digest``: SHA-256 of the prompts and labels."""

    data_digest: str
    seed: int
    rows_per_category: dict[str, int]
    metrics: Metrics


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of an artifact that is not an array. ``text_max_chars`` bounds the routing text."""

    format: int
    created: str
    embedder: EmbedderRecord
    text_max_chars: int
    categories: tuple[str, ...]
    mixing: Mixing
    gates: Gates
    training: TrainingRecord
    arrays_file: str
    arrays_digest: str
    quality: QualityRecord | None = None


class Quality(msgspec.Struct, frozen=True):
    """Estimates per expert, of an artifact trained on outcomes. The record's file and digest are
    filled in when it is saved."""

    model: QualityModel
    evidence: Evidence
    record: QualityRecord

    @property
    def experts(self) -> tuple[str, ...]:
        """In the order of the estimates' columns."""
        return self.record.experts + self.record.added


class Artifact(msgspec.Struct, frozen=True):
    """A loaded artifact. ``digest`` is the SHA-256 of the manifest, which pins the arrays."""

    manifest: Manifest
    model: RouterModel
    digest: str
    quality: Quality | None = None


def save_artifact(
    folder: Path,
    model: RouterModel,
    *,
    created: str,
    embedder: Embedder,
    text_max_chars: int,
    training: TrainingRecord,
    quality: Quality | None = None,
) -> str:
    """Write an artifact and return its digest.

    The arrays get a name made of their digest and the manifest is replaced last, in one rename:
    a reader sees the old artifact or the new one, also after a crash between the two.
    """
    files = {_ARRAYS: _arrays_of(model)}
    if quality is not None:
        files[_QUALITY_ARRAYS] = quality_arrays(quality.model, quality.evidence)
    digests = {stem: _arrays_digest(arrays) for stem, arrays in files.items()}
    names = {stem: f"{stem}-{digest[:16]}.npz" for stem, digest in digests.items()}
    manifest = Manifest(
        format=FORMAT_VERSION,
        created=created,
        embedder=EmbedderRecord(embedder.id, embedder.digest, embedder.dimensions),
        text_max_chars=text_max_chars,
        categories=model.trained_categories,
        mixing=model.mixing,
        gates=model.gates,
        training=training,
        arrays_file=names[_ARRAYS],
        arrays_digest=digests[_ARRAYS],
        quality=None
        if quality is None
        else msgspec.structs.replace(
            quality.record,
            arrays_file=names[_QUALITY_ARRAYS],
            arrays_digest=digests[_QUALITY_ARRAYS],
        ),
    )
    content = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    for stem, arrays in files.items():
        _replace(folder / names[stem], partial(_pack, arrays))
    _replace(folder / _MANIFEST, lambda stream: stream.write(content + b"\n"))
    for stem in (_ARRAYS, _QUALITY_ARRAYS):
        for stale in folder.glob(f"{stem}-*.npz"):
            if stale.name != names.get(stem):
                stale.unlink(missing_ok=True)
    return hashlib.sha256(content + b"\n").hexdigest()


def load_artifact(folder: Path) -> Artifact:
    """Read and check an artifact; ArtifactError names whatever does not fit."""
    content = _manifest_bytes(folder)
    manifest = _decoded(folder, content)
    arrays = _read_arrays(folder / manifest.arrays_file)
    _check_arrays(folder, manifest, arrays)
    model = RouterModel(
        manifest.categories,
        References(arrays["vectors"], arrays["labels"]),
        LinearHead(arrays["weights"], arrays["bias"]),
        manifest.mixing,
        manifest.gates,
    )
    return Artifact(
        manifest, model, hashlib.sha256(content).hexdigest(), _load_quality(folder, manifest)
    )


def _load_quality(folder: Path, manifest: Manifest) -> Quality | None:
    record = manifest.quality
    if record is None:
        return None
    arrays = _read_arrays(folder / record.arrays_file)
    found = _arrays_digest(arrays)
    _refuse(
        folder,
        "does not agree with its manifest",
        {"quality arrays digest": (record.arrays_digest, found)},
    )
    try:
        model, evidence = quality_from_arrays(record, arrays)
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(
            str(folder / record.arrays_file), f"does not fit, train again: {error}"
        ) from error
    return Quality(model, evidence, record)


def check_embedder(folder: Path, manifest: Manifest, embedder: Embedder) -> None:
    """Refuse an embedder whose vectors cannot be compared with the artifact's."""
    wanted = manifest.embedder
    pairs = {
        "embedder digest": (wanted.digest, embedder.digest),
        "dimensions": (wanted.dimensions, embedder.dimensions),
    }
    if not _same_model(wanted.id, embedder.id):
        pairs["embedder id"] = (wanted.id, embedder.id)
    _refuse(folder, "was trained with another embedder; train again or use that one", pairs)


def _same_model(wanted: str, given: str) -> bool:
    """A sentence-transformers id may be a path, which moves; there the digest alone decides."""
    both = (wanted, given)
    return wanted == given or all(i.startswith("sentence-transformers:") for i in both)


def _refuse(folder: Path, reason: str, pairs: Mapping[str, tuple[object, object]]) -> None:
    unequal = {
        name: f"artifact {wanted}, here {found}"
        for name, (wanted, found) in pairs.items()
        if wanted != found
    }
    if unequal:
        raise ArtifactError(str(folder), reason, unequal)


def _manifest_bytes(folder: Path) -> bytes:
    path = folder / _MANIFEST
    if not path.is_file():
        raise ArtifactError(str(folder), f"has no {_MANIFEST}; make one with: coe train")
    if path.stat().st_size > MANIFEST_BYTES_MAX:
        raise ArtifactError(str(path), f"is larger than {MANIFEST_BYTES_MAX} bytes")
    return path.read_bytes()


def _decoded(folder: Path, content: bytes) -> Manifest:
    try:
        version = msgspec.json.decode(content, type=dict[str, Any]).get("format")
        _refuse(folder, "is of another format; train again", {"format": (version, FORMAT_VERSION)})
        manifest = msgspec.json.decode(content, type=Manifest)
    except msgspec.DecodeError as error:
        raise ArtifactError(str(folder / _MANIFEST), f"cannot be read: {error}") from error
    files = [manifest.arrays_file, manifest.quality.arrays_file if manifest.quality else "none"]
    if any(Path(name).name != name for name in files):
        raise ArtifactError(str(folder), "names an arrays file outside its folder")
    if len(set(manifest.categories)) < max(2, len(manifest.categories)):
        raise ArtifactError(str(folder), "needs two or more categories, each named once")
    return manifest


def _read_arrays(path: Path) -> Arrays:
    if not path.is_file():
        raise ArtifactError(str(path), "is missing")
    if path.stat().st_size > ARRAYS_BYTES_MAX:
        raise ArtifactError(str(path), f"is larger than {ARRAYS_BYTES_MAX} bytes")
    if not is_zipfile(path):
        raise ArtifactError(str(path), "cannot be read: not an npz archive")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, EOFError, BadZipFile) as error:
        raise ArtifactError(str(path), f"cannot be read: {error}") from error


def _check_arrays(folder: Path, manifest: Manifest, arrays: Arrays) -> None:
    found = {name: str(array.dtype) for name, array in arrays.items()}
    _refuse(folder, "holds other arrays than its format", {"arrays": (_DTYPES, found)})
    rows, d, c = len(arrays["labels"]), manifest.embedder.dimensions, len(manifest.categories)
    shapes = {"vectors": (rows, d), "labels": (rows,), "weights": (d, c), "bias": (c,)}
    _refuse(
        folder,
        "does not agree with its manifest",
        {name: (shape, arrays[name].shape) for name, shape in shapes.items()}
        | {"arrays digest": (manifest.arrays_digest, _arrays_digest(arrays))},
    )
    labels = arrays["labels"]
    if not rows or labels.min() < 0 or labels.max() >= c:
        raise ArtifactError(str(folder), "has labels outside its categories")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ArtifactError(str(folder), "holds numbers that are not finite")


def _arrays_of(model: RouterModel) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "vectors": np.ascontiguousarray(model.references.vectors, dtype=np.float16),
        "labels": np.ascontiguousarray(model.references.labels, dtype=np.int64),
        "weights": np.ascontiguousarray(model.head.weights, dtype=np.float32),
        "bias": np.ascontiguousarray(model.head.bias, dtype=np.float32),
    }


def _arrays_digest(arrays: Arrays) -> str:
    """SHA-256 over names, types, shapes and bytes: it does not depend on how npz is packed."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _pack(arrays: Mapping[str, Any], stream: IO[bytes]) -> None:
    np.savez(stream, allow_pickle=False, **arrays)


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside ``path``, flush to disk, then rename over it."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
