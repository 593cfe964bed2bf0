"""What a batch asks of a running gateway, over HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from experts.types import MICRO_USD_PER_USD
from gateway.batch_files import BatchError
from gateway.batch_lines import Answer, Lost

__all__ = ["GatewayAddress", "GatewayClient", "RouteHint", "hint_of"]

ANSWER_BYTES_MAX = 64 * 2**20
_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class GatewayAddress:
    """``url`` without /v1. ``timeout_s`` bounds one attempt, its time in queues included."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 900.0
    connections: int = 16


@dataclass(frozen=True, slots=True)
class RouteHint:
    """The expert that would be asked first, and whether it is resident now."""

    expert: str
    resident: bool


class GatewayClient:
    """One session with one gateway. An answer of any status is an ``Answer``, none is ``Lost``."""

    def __init__(self, address: GatewayAddress) -> None:
        self._address = address
        self._base = address.url.rstrip("/").removesuffix("/v1")

    async def __aenter__(self) -> Self:
        headers = {"content-type": "application/json"}
        if self._address.api_key:
            headers["authorization"] = f"Bearer {self._address.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._address.connections + 1),
            timeout=aiohttp.ClientTimeout(
                total=self._address.timeout_s, sock_connect=_CONNECT_TIMEOUT_S
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self._session.close()

    async def post(self, path: str, body: bytes, request_id: str) -> Answer | Lost:
        """One attempt. Cancelling it cancels the generation at the gateway."""
        return await self._ask("POST", path, body, {"x-request-id": request_id})

    async def expert_names(self) -> frozenset[str]:
        """The ids that name an expert directly. Raises BatchError when the gateway cannot say."""
        answer = await self._ask("GET", "/v1/models", None, {})
        if isinstance(answer, Lost):
            raise self.gone(answer)
        if answer.status != 200:
            raise BatchError(f"{self._base}/v1/models answers {answer.status}: {said(answer)}")
        try:
            listed = msgspec.json.decode(answer.body, type=_Models)
        except msgspec.DecodeError as error:
            raise BatchError(f"{self._base} is not a CoE gateway: {error}") from error
        return frozenset(model.id for model in listed.data if model.coe.kind == "expert")

    async def is_up(self) -> bool:
        return isinstance(await self._ask("GET", "/health/live", None, {}), Answer)

    def gone(self, lost: Lost) -> BatchError:
        return BatchError(
            f"no gateway answers at {self._base} ({lost.reason}). Run again to go on."
        )

    async def _ask(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> Answer | Lost:
        url = self._base + path
        try:
            async with self._session.request(method, url, data=body, headers=headers) as reply:
                answer = _answer(reply, await _read_bounded(reply))
        except TimeoutError:  # before OSError, whose subclass it is
            return Lost(f"no answer within {self._address.timeout_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Lost(str(error) or type(error).__name__)
        if answer.status == 401:  # so it would be for every line
            raise BatchError(f"{self._base} answers 401: {said(answer)}")
        return answer


class _About(msgspec.Struct):
    kind: str


class _Model(msgspec.Struct):
    id: str
    coe: _About


class _Models(msgspec.Struct):
    data: list[_Model]


async def _read_bounded(reply: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := await reply.content.readany():
        size += len(part)
        if size > ANSWER_BYTES_MAX:
            raise aiohttp.ClientPayloadError(f"the answer exceeds {ANSWER_BYTES_MAX} bytes")
        parts.append(part)
    return b"".join(parts)


def _answer(reply: aiohttp.ClientResponse, body: bytes) -> Answer:
    headers = reply.headers
    return Answer(
        status=reply.status,
        request_id=headers.get("x-request-id", ""),
        body=body,
        expert=headers.get("x-coe-expert"),
        cost_micro_usd=round(_number(headers.get("x-coe-cost-usd")) * MICRO_USD_PER_USD),
        retry_after_s=_number(headers.get("retry-after")) or None,
        should_retry={"true": True, "false": False}.get(headers.get("x-should-retry", "")),
    )


def _number(text: str | None) -> float:
    """A header's number; 0 where there is none, or a date (which retry-after may hold)."""
    digits = (text or "").strip()
    return float(digits) if digits.replace(".", "", 1).isdecimal() and digits.isascii() else 0.0


# --- reading answers -----------------------------------------------------------------------------


class _Stage(msgspec.Struct):
    expert: str


class _Plan(msgspec.Struct):
    stages: list[_Stage]


class _Eligible(msgspec.Struct):
    expert: str
    resident: bool


class _Route(msgspec.Struct):
    plan: _Plan
    eligible: list[_Eligible]


def hint_of(outcome: Answer | Lost) -> RouteHint | None:
    """The first stage of an explained plan; None where nobody would be asked."""
    if isinstance(outcome, Lost) or outcome.status != 200:
        return None
    try:
        route = msgspec.json.decode(outcome.body, type=_Route)
    except msgspec.DecodeError as error:
        raise BatchError(f"/v1/route answers something else than a route: {error}") from error
    if not route.plan.stages:
        return None
    first = route.plan.stages[0].expert
    return RouteHint(first, any(e.resident for e in route.eligible if e.expert == first))


def said(answer: Answer) -> str:
    """The message of an error answer, for a person."""
    try:
        body: Any = msgspec.json.decode(answer.body)
        return str(body["error"]["message"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return f"{len(answer.body)} bytes that are no error object"
