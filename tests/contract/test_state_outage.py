"""What a policy says about the state store's absence is what happens."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.contract.gateway_kit import PLAIN_POLICY, make_gateway, openai_client, spec

CLOSED = PLAIN_POLICY + "on_state_outage: {routing: closed}\n"


@pytest.mark.parametrize(("policy", "served"), [(PLAIN_POLICY, True), (CLOSED, False)])
async def test_without_the_store_the_policy_decides(
    tmp_path: Path, policy: str, served: bool
) -> None:
    gateway = make_gateway(
        tmp_path, [spec("echo")], policies={"auto": policy}, state_available=lambda: False
    )
    messages = [{"role": "user", "content": "hello"}]
    async with openai_client("http://test", gateway.app) as client:
        if served:
            answer = await client.chat.completions.create(model="auto", messages=messages)
            assert answer.model == "echo"
        else:
            with pytest.raises(openai.APIStatusError) as caught:
                await client.chat.completions.create(model="auto", messages=messages)
            assert caught.value.status_code == 503
            assert caught.value.response.headers["retry-after"] == "2"
