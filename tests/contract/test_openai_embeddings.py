"""Embeddings: the router's own embedder, and experts behind a URL, with the official client.

The client asks for base64 unless told otherwise, and its own strict validation then refuses what it
asked for; so the strict suite asks for floats, and base64 is read with a client that is not strict.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from experts.scripted_server import ScriptedServer
from experts.types import Capability, Price, SourceKind
from gateway.config import EMBEDDER_ID
from gateway.embeddings_backend import EmbedderBackend, embedder_spec
from routers.embedder import OnnxMiniLm, load_embedder
from tests.contract.api_kit import SERVERS
from tests.contract.gateway_kit import Gateway, make_gateway, openai_client, served, spec

CHAT = frozenset({Capability.CHAT})


@pytest.fixture(scope="module")
def minilm() -> OnnxMiniLm:
    embedder = load_embedder()
    assert isinstance(embedder, OnnxMiniLm)
    return embedder


@pytest.fixture
async def upstream() -> AsyncIterator[tuple[ScriptedServer, str]]:
    server = ScriptedServer()
    async with served(server) as url:
        yield server, url


@pytest.fixture
async def gateway(
    tmp_path: Path, minilm: OnnxMiniLm, upstream: tuple[ScriptedServer, str]
) -> AsyncIterator[Gateway]:
    embedder = minilm.widened()
    remote = spec(
        "remote",
        f"{upstream[1]}/v1",
        kind=SourceKind.REMOTE,
        upstream_model="echo",
        secret_env="UPSTREAM_KEY",
        capabilities=frozenset({Capability.EMBEDDINGS}),
        context_tokens=512,
    )
    builtin = embedder_spec(embedder, Price(10_000_000))
    gateway = make_gateway(
        tmp_path,
        [spec("echo", capabilities=CHAT), remote, builtin],
        backends={EMBEDDER_ID: EmbedderBackend(embedder)},
    )
    yield gateway
    await gateway.pool.aclose()


@pytest.fixture(params=SERVERS)
async def client(request: Any, gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    if request.param == "in process":
        async with openai_client("http://gateway", gateway.app) as client:
            yield client
        return
    async with served(gateway.app) as url, openai_client(url) as client:
        yield client


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.hypot(*a) / math.hypot(*b)


async def test_the_router_s_embedder_answers_and_charges(
    client: AsyncOpenAI, gateway: Gateway
) -> None:
    texts = ["a cat on a mat", "a kitten on a rug", "interest rates rose"]
    raw = await client.embeddings.with_raw_response.create(
        model=EMBEDDER_ID, input=texts, encoding_format="float"
    )
    answer = raw.parse()
    cat, kitten, rates = (item.embedding for item in answer.data)
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert (answer.model, len(cat)) == (EMBEDDER_ID, 384)
    assert cosine(cat, kitten) > 0.5 > cosine(cat, rates)
    # [CLS] and [SEP] count: the model reads them.
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 7 + 7 + 5
    cost_micro_usd = 19 * 10
    assert raw.headers["x-coe-cost-usd"] == f"{cost_micro_usd / 1e6:.6f}"
    assert gateway.records[-1]["cost_micro_usd"] == cost_micro_usd
    assert gateway.records[-1]["endpoint"] == "embeddings"


async def test_base64_is_the_same_vector(gateway: Gateway) -> None:
    async with openai_client(
        "http://gateway", gateway.app, _strict_response_validation=False
    ) as client:
        ask: Any = {"model": EMBEDDER_ID, "input": "hello"}
        floats = await client.embeddings.create(**ask, encoding_format="float")
        decoded = await client.embeddings.create(**ask)  # asks for base64 and decodes it
        packed: Any = await client.embeddings.create(**ask, encoding_format="base64")
    raw = base64.b64decode(packed.data[0].embedding)
    unpacked = list(struct.unpack("<384f", raw))
    assert unpacked == pytest.approx(floats.data[0].embedding, abs=1e-7)
    assert unpacked == pytest.approx(decoded.data[0].embedding, abs=1e-7)


async def test_a_batch_larger_than_the_model_s_keeps_its_order(
    client: AsyncOpenAI, minilm: OnnxMiniLm
) -> None:
    texts = [f"number {n} " * (1 + n % 7) for n in range(40)]
    answer = await client.embeddings.create(model=EMBEDDER_ID, input=texts, encoding_format="float")
    direct = minilm.widened().embed([texts[33]])[0]
    assert answer.data[33].embedding == pytest.approx(direct.tolist(), abs=1e-2)
    assert cosine(answer.data[33].embedding, direct.tolist()) > 0.999


async def test_a_remote_expert_gets_the_request_as_it_was(
    client: AsyncOpenAI, upstream: tuple[ScriptedServer, str]
) -> None:
    answer = await client.embeddings.create(
        model="remote",
        input=["x", "y"],
        dimensions=4,
        encoding_format="float",
        extra_body={"input_type": "query"},
    )
    assert [len(item.embedding) for item in answer.data] == [4, 4]
    assert answer.model == "remote"
    assert (answer.model_extra or {})["coe"]["expert"] == "remote"
    sent = upstream[0].stats.last_body or {}
    assert sent["model"] == "echo"
    assert (sent["dimensions"], sent["input_type"]) == (4, "query")
    assert not {"stream", "max_tokens", "stream_options"} & set(sent)


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"input": "word " * 300}, "context_length_exceeded", "input"),
        ({"input": []}, "invalid_request", "input"),
        ({"dimensions": 7}, "invalid_request", "dimensions"),
        ({"input": [1, 2, 3]}, "invalid_request", "input"),
        ({"model": "echo-that-chats"}, "model_not_found", "model"),
        ({"model": "auto"}, "no_eligible_expert", None),
    ],
)
async def test_refusals_name_the_field(
    client: AsyncOpenAI, gateway: Gateway, change: dict[str, Any], code: str, param: str
) -> None:
    body: Any = {"model": EMBEDDER_ID, "input": "x"} | change
    with pytest.raises(openai.APIStatusError) as caught:
        await client.embeddings.create(**body)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert gateway.records == [] or gateway.records[-1]["cost_micro_usd"] == 0


async def test_an_embedder_does_not_chat(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model=EMBEDDER_ID, messages=[{"role": "user", "content": "hi"}]
        )
    assert caught.value.code == "no_eligible_expert"
    assert "cannot do chat" in caught.value.message


async def test_it_is_in_the_list_of_models(client: AsyncOpenAI) -> None:
    model = await client.models.retrieve(EMBEDDER_ID)
    assert (model.model_extra or {})["coe"]["capabilities"] == ["embeddings"]
