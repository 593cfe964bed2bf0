"""The list of models as Anthropic's official client, strict, sees it; OpenAI's keeps its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import AsyncAnthropic

from tests.contract.api_kit import SERVERS, anthropic_client, api_gateway
from tests.contract.gateway_kit import Gateway, openai_client, served

VERSION = {"anthropic-version": "2023-06-01"}


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return api_gateway(tmp_path)


@pytest.fixture(params=SERVERS)
async def client(request: Any, gateway: Gateway) -> AsyncIterator[AsyncAnthropic]:
    if request.param == "in process":
        async with anthropic_client("http://gateway", gateway.app) as client:
            yield client
        return
    async with served(gateway.app) as url, anthropic_client(url) as client:
        yield client


async def names_for_openai(gateway: Gateway) -> list[str]:
    async with openai_client("http://gateway", gateway.app) as client:
        return [model.id async for model in client.models.list()]


async def test_it_lists_the_same_models(client: AsyncAnthropic, gateway: Gateway) -> None:
    page = await client.models.list()
    ids = [model.id for model in page.data]
    assert ids == await names_for_openai(gateway)
    assert (page.first_id, page.last_id, page.has_more) == (ids[0], ids[-1], False)


@pytest.mark.parametrize("limit", [1, 5, 1_000])
async def test_page_by_page_nothing_is_lost_or_doubled(
    client: AsyncAnthropic, gateway: Gateway, limit: int
) -> None:
    names = await names_for_openai(gateway)
    assert [model.id async for model in client.models.list(limit=limit)] == names
    before = await client.models.list(limit=2, before_id=names[4])
    assert [model.id for model in before.data] == names[2:4], "those right before it"
    assert before.has_more


async def test_one_model(client: AsyncAnthropic) -> None:
    model = await client.models.retrieve("echo")
    assert (model.id, model.type, model.display_name) == ("echo", "model", "echo")
    assert (model.max_input_tokens, model.lifecycle) == (8_192, "active")
    assert model.created_at == datetime(1970, 1, 1, tzinfo=UTC), "nobody knows"
    assert (await client.models.retrieve("coe/casc")).max_input_tokens is None


async def test_errors_have_the_shape_too(client: AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        await client.models.retrieve("nobody")
    shown: Any = caught.value.body
    assert (shown["type"], shown["error"]["type"]) == ("error", "not_found_error")
    assert shown["request_id"] == caught.value.request_id
    for asked in ({"limit": 0}, {"after_id": "nobody"}):
        query: Any = asked
        with pytest.raises(anthropic.BadRequestError):
            await client.models.list(**query)


async def test_only_who_names_the_version_gets_it(gateway: Gateway) -> None:
    transport = httpx2.ASGITransport(app=gateway.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as http:
        missing = await http.get("/v1/models/nobody")
        plain = await http.get("/v1/models/echo")
        theirs = await http.get("/v1/models/echo", headers=VERSION)
    assert missing.json()["error"]["code"] == "model_not_found"
    assert (plain.json()["object"], "object" in theirs.json()) == ("model", False)
    assert plain.json()["coe"] == theirs.json()["coe"]
