"""The Serve configurations that we ship are valid and build what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments.app import build
from deployments.host_plan import load_hosts
from experts.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def application(name: str) -> Any:
    document = yaml.safe_load((ROOT / "deployments" / name).read_text())
    (found,) = ServeDeploySchema.model_validate(document).applications
    assert found.import_path == "deployments.app:build"
    return build({**found.args, "config": str(ROOT / found.args["config"])})


def replicas(bound: Any) -> list[Any]:
    """The expert host deployments of a built application."""
    root = bound._bound_deployment
    if root.name.startswith("expert-host-"):
        return [root]
    return [host._bound_deployment for host in root.init_args]


def test_the_quickstart_is_one_host_without_gpus() -> None:
    (host,) = replicas(application("quickstart.yaml"))
    assert host.name == "expert-host-local"
    assert host.ray_actor_options["num_gpus"] == 0
    assert list(host.init_args[1]) == ["general", "sql", "json", "math", "convert"]


def test_the_gpu_example_asks_for_the_gpus_of_each_engine() -> None:
    hosts = {h.name: h.ray_actor_options["num_gpus"] for h in replicas(application("gpu.yaml"))}
    assert hosts == {
        "expert-host-qwen2-7b": 1,
        "expert-host-gemma-2-9b": 1,
        "expert-host-gemma-2-27b": 1,
        "expert-host-llama-3.1-70b": 4,
        "expert-host-qwen2-72b": 4,
    }


def test_no_secret_is_among_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COE_HOST_TOKEN", "not-to-be-seen")
    monkeypatch.setenv("COE_REDIS_URL", "redis://:not-to-be-seen@127.0.0.1:1/0")
    (host,) = replicas(application("quickstart.yaml"))
    assert "not-to-be-seen" not in repr((host.init_args, host.init_kwargs))


def test_a_host_that_names_a_remote_expert_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "coe.yaml"
    path.write_text(
        "experts:\n"
        "  far:\n"
        "    source: {url: 'https://host/v1', model: far}\n"
        "    price: {input_usd_per_mtok: 1, output_usd_per_mtok: 1}\n"
        "    context_tokens: 1024\n"
        "hosts:\n"
        "  - name: local\n"
        "    experts: [far]\n"
    )
    with pytest.raises(ConfigError, match="no weights") as caught:
        load_hosts(path)
    assert caught.value.line == 8


@pytest.mark.parametrize("arguments", [{}, {"config": "nowhere.yaml"}])
def test_wrong_arguments_are_a_sentence(arguments: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"config|nowhere"):
        build(arguments)


def test_a_host_to_serve_that_is_misspelt_is_not_left_out_silently() -> None:
    config = str(ROOT / "examples" / "quickstart" / "coe.yaml")
    assert replicas(build({"config": config, "hosts": ["local"]}))
    with pytest.raises(ConfigError, match="no host is named locl"):
        build({"config": config, "hosts": ["local", "locl"]})
