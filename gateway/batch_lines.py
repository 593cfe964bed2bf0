"""OpenAI's batch file formats: reading a request line, writing an output line. Pure.

A request's body is carried as the bytes that stood in the file, never decoded and encoded again, so
an expert gets exactly what the caller wrote.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from experts.types import MICRO_USD_PER_USD

__all__ = [
    "Answer",
    "Charge",
    "LineRefused",
    "Lost",
    "RequestLine",
    "answer_line",
    "digest_of",
    "is_torn_line",
    "lost_line",
    "parse_request_line",
    "read_output_line",
]

DIGEST_BYTES = 16
URLS = ("/v1/chat/completions", "/v1/completions")
_PROMPT_FIELD = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
_CUSTOM_ID_CHARS_MAX = 512
_SHOWN_CHARS = 40
_OUTPUT_START = b'{"id":"batch_req_'


class LineRefused(Exception):
    """A line that cannot be a request; the text says why."""


@dataclass(frozen=True, slots=True)
class RequestLine:
    """One checked line. ``body`` is the JSON object as it stood there. ``own_deadline``: it names
    how long it may take."""

    custom_id: str
    url: str
    model: str
    body: bytes
    own_deadline: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What the gateway answered, whatever the status. ``should_retry`` None: it did not say."""

    status: int
    request_id: str
    body: bytes
    expert: str | None = None
    cost_micro_usd: int = 0
    retry_after_s: float | None = None
    should_retry: bool | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer came. ``reason`` says what happened to the connection."""

    reason: str


@dataclass(frozen=True, slots=True)
class Charge:
    """What one output line says of its cost. ``expert`` None: nobody answered."""

    expert: str | None
    ok: bool
    input_tokens: int = 0
    output_tokens: int = 0
    cost_micro_usd: int = 0


# --- requests ------------------------------------------------------------------------------------


class _Line(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct):
    model: str
    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    prompt: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    stream: bool | None = None
    coe: msgspec.Raw = msgspec.Raw()


_line_decoder = msgspec.json.Decoder(_Line)
_body_decoder = msgspec.json.Decoder(_Body)


def parse_request_line(raw: bytes) -> RequestLine:
    """Check one line of the input file.

    Raises:
        LineRefused: not JSON, a field missing or of the wrong type, or something that a batch
            cannot do (another method or url, a stream).
    """
    line: _Line = _decoded(_line_decoder, raw, "")
    if not 0 < len(line.custom_id) <= _CUSTOM_ID_CHARS_MAX:
        raise LineRefused(f"custom_id: 1 to {_CUSTOM_ID_CHARS_MAX} characters are required")
    if line.method != "POST":
        raise LineRefused(f"method: {_shown(line.method)} is not supported, only POST")
    if line.url not in URLS:
        raise LineRefused(f"url: {_shown(line.url)} is not supported, only {' and '.join(URLS)}")
    body = bytes(line.body)
    head: _Body = _decoded(_body_decoder, body, "body: ")
    if not head.model:
        raise LineRefused("body.model: a non-empty string is required")
    if head.stream:
        raise LineRefused("body.stream: a batch has whole answers only")
    if getattr(head, _PROMPT_FIELD[line.url]) is msgspec.UNSET:
        raise LineRefused(f"body: {_PROMPT_FIELD[line.url]} is required by {line.url}")
    return RequestLine(line.custom_id, line.url, head.model, body, _names_deadline(head.coe))


def _names_deadline(coe: msgspec.Raw) -> bool:
    """Whether the ``coe`` object has one; whether it makes sense is for the gateway to say."""
    options: Any = msgspec.json.decode(coe) if bytes(coe) else None
    return isinstance(options, dict) and options.get("deadline_ms") is not None


def _decoded(decoder: msgspec.json.Decoder[Any], raw: bytes, where: str) -> Any:
    try:
        return decoder.decode(raw)
    except UnicodeDecodeError as error:
        raise LineRefused(f"{where}not valid UTF-8") from error
    except msgspec.DecodeError as error:  # a ValidationError is one; neither repeats the text
        raise LineRefused(f"{where}{error}") from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…")


def digest_of(custom_id: str) -> bytes:
    """A name of fixed length, equal only for equal ids (BLAKE2b, 128 bit)."""
    return hashlib.blake2b(custom_id.encode(), digest_size=DIGEST_BYTES).digest()


# --- answers -------------------------------------------------------------------------------------


def answer_line(line_id: str, custom_id: str, answer: Answer) -> bytes:
    """An output line, newline included.

    An answer that is not JSON (a proxy's error page) is carried as a string. A failed request that
    has cost money says so under ``coe``, since its body does not.
    """
    response = {
        "status_code": answer.status,
        "request_id": answer.request_id,
        "body": _one_line(answer.body),
    }
    line: dict[str, Any] = {"id": line_id, "custom_id": custom_id, "response": response}
    line["error"] = None
    if answer.status != 200 and answer.cost_micro_usd:
        cost_usd = answer.cost_micro_usd / MICRO_USD_PER_USD
        line["coe"] = {"expert": answer.expert, "cost_usd": cost_usd}
    return msgspec.json.encode(line) + b"\n"


def error_code(answer: Answer) -> str | None:
    """``error.code`` of an OpenAI error body; None where there is none."""
    try:
        body: Any = msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else None


def lost_line(line_id: str, custom_id: str, lost: Lost) -> bytes:
    """An output line for a request that never got an answer, newline included."""
    error = {"code": "connection_lost", "message": lost.reason}
    line = {"id": line_id, "custom_id": custom_id, "response": None, "error": error}
    return msgspec.json.encode(line) + b"\n"


def _one_line(body: bytes) -> msgspec.Raw | str:
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode(errors="replace")
    # Inside a JSON string a line break is always escaped, so these are white space between tokens.
    return msgspec.Raw(body.replace(b"\r", b" ").replace(b"\n", b" "))


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Coe(msgspec.Struct):
    expert: str | None = None
    cost_usd: float = 0.0
    usage: _Usage | None = None


class _AnswerBody(msgspec.Struct):
    coe: _Coe | None = None


class _Response(msgspec.Struct):
    status_code: int
    body: msgspec.Raw


class _OutputLine(msgspec.Struct):
    custom_id: str
    response: _Response | None
    coe: _Coe | None = None


_output_decoder = msgspec.json.Decoder(_OutputLine)
_answer_decoder = msgspec.json.Decoder(_AnswerBody)


def read_output_line(raw: bytes) -> tuple[str, Charge]:
    """The custom_id an output line belongs to, and what it cost.

    Raises:
        LineRefused: not a line of an output file.
    """
    line: _OutputLine = _decoded(_output_decoder, raw, "")
    answered = _answered(line.response)
    coe = line.coe if answered is None else answered.coe
    return line.custom_id, _charge(answered is not None, coe or _Coe())


def _answered(response: _Response | None) -> _AnswerBody | None:
    """The body of a good answer; None for any other, and for a 200 that holds no JSON object."""
    if response is None or response.status_code != 200:
        return None
    try:
        return _answer_decoder.decode(bytes(response.body))
    except msgspec.DecodeError:
        return None


def _charge(ok: bool, coe: _Coe) -> Charge:
    usage = coe.usage or _Usage()
    cost = round(coe.cost_usd * MICRO_USD_PER_USD)
    return Charge(coe.expert, ok, usage.prompt_tokens, usage.completion_tokens, cost)


def is_torn_line(tail: bytes) -> bool:
    """Whether the end of an output file is the beginning of a line of ours, cut off by a crash.

    A file system may also have grown the file without its data: zeros.
    """
    begun = tail[: len(_OUTPUT_START)]
    return _OUTPUT_START.startswith(begun) or not tail.strip(b"\0")
