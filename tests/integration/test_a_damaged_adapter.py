"""A specialist that cannot be built is named, and the others serve all the same."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import openai
import pytest

from examples.quickstart.prepare_models import (
    ADAPTERS_DIR,
    BASE_NAME,
    PreparationIncomplete,
    prepare,
)
from experts.catalogue import cache_dir
from tests.integration.stack import launch, quickstart_is_prepared, wait_ready, write_config

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(600)]

EXPERTS = (BASE_NAME, "sql", "json", "math")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds the base, and adapters of which one is cut short and one is gone."""
    assert quickstart_is_prepared(), "run `make models` first"
    built = cache_dir(os.environ) / "quickstart" / BASE_NAME
    shutil.copytree(built, tmp_path / "cache" / "quickstart" / BASE_NAME, copy_function=_link)
    adapters = tmp_path / "adapters"
    shutil.copytree(ADAPTERS_DIR, adapters)
    weights = adapters / "sql" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.rmtree(adapters / "math")
    said: list[str] = []
    with pytest.raises(PreparationIncomplete) as caught:
        prepare(
            tmp_path / "cache",
            progress=said.append,
            adapters_dir=adapters,
            specialists=("sql", "json", "math"),
        )
    assert set(caught.value.ready) == {BASE_NAME, "json"}
    for name in ("sql", "math"):
        (line,) = [one for one in said if one.startswith(f"{name}: cannot be prepared")]
        assert str(adapters / name) in line
        assert f"--only {name}" in line
    return tmp_path / "cache"


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def test_the_rest_still_serve(cache: Path, tmp_path: Path) -> None:
    experts = {
        name: {
            "source": {"path": f"cache:quickstart/{name}"},
            "price": {"input_usd_per_mtok": 0.02, "output_usd_per_mtok": 0.06},
            "context_tokens": 1024,
        }
        for name in EXPERTS
    }
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "auto.yaml").write_text(
        "version: 1\nroutes: {sql: sql, json: json, math: math}\ndefault: general\n"
        "fallbacks: [general]\ncaps: {cost_usd: 0.01}\n"
    )
    host = {
        "name": "local",
        "experts": list(EXPERTS),
        "engine": {"max_model_len": 1024, "kv_cache_bytes": "256MiB", "max_num_seqs": 8},
        "pool": {"host_memory_bytes": "2GiB"},
    }
    config = write_config(tmp_path, experts=experts, hosts=[host], policies={"dir": "policies"})
    running = launch(config, tmp_path, {"COE_CACHE_DIR": str(cache)})
    try:
        wait_ready(running)
        assert "quickstart/sql" in running.text()
        with openai.OpenAI(base_url=running.url, api_key="unused", max_retries=0) as client:
            assert _served(client, "json", "Extract the name as JSON: Bob is 42.") == "json"
            assert _served(client, "auto", "Write a SQL query for all users.") == "general"
            with pytest.raises(openai.InternalServerError) as refused:
                _served(client, "math", "What is 3 + 4?")
        assert refused.value.status_code == 503
        assert refused.value.code in ("expert_out_of_service", "host_unavailable")
    finally:
        if running.process.poll() is None:
            running.stop(signal.SIGTERM)


def _served(client: openai.OpenAI, model: str, text: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=8
    )
    return answer.model
