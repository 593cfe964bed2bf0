from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from deployments.host_config import HostConfig
from experts.errors import ConfigError
from experts.types import SourceKind
from gateway.config import Config, config_json_schema, default_config_path, load_config
from policies.live import PolicyWatcher

EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD = """\
experts:
  one:
    source: {path: models/one}
    price: {input_usd_per_mtok: 0.02, output_usd_per_mtok: 0.06}
    context_tokens: 2048
  far:
    source: {url: "https://api.example.com/v1", model: big, api_key: "env:FAR_KEY"}
    price: {input_usd_per_mtok: 1, output_usd_per_mtok: 3}
    context_tokens: 8192
hosts:
  - name: local
    experts: [one]
    engine: {kv_cache_bytes: 1GiB}
gateway: {port: 0, host_token: "env:TOKEN", limits: {body_bytes: 1MiB}}
state: {redis_url: "env:REDIS"}
policies: {dir: mine, default: main}
"""


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "coe.yaml"
    path.write_text(text)
    return load_config(path, {"HOME": "/h"})


def refusal(tmp_path: Path, old: str, new: str) -> ConfigError:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace(old, new))
    return caught.value


def test_paths_are_absolute_and_sizes_numbers(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.catalogue.get("one").location == str(tmp_path / "models/one")
    assert config.policies.dir == tmp_path / "mine"
    assert config.router.artifact.is_absolute()
    assert config.hosts == (HostConfig.model_validate({**config.hosts[0].model_dump()}),)
    assert config.hosts[0].engine.kv_cache_bytes == 2**30
    assert config.hosts[0].scheduler.age_bound_ms == 3000
    assert config.gateway.limits.body_bytes == 2**20
    assert config.state.timeout_ms == 250


def test_secrets_are_read_when_asked_for_and_only_by_name(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    environ = {"TOKEN": "t0ken", "REDIS": "redis://:pw@h:1/0"}
    assert config.gateway.host_token_env == "TOKEN"
    assert config.gateway.resolve_host_token(environ) == "t0ken"
    assert config.state.resolve_redis_url(environ) == "redis://:pw@h:1/0"
    assert "t0ken" not in repr(config)
    with pytest.raises(ConfigError, match="environment variable TOKEN is not set"):
        config.gateway.resolve_host_token({})


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "fragment"),
    [
        ("experts: [one]", "experts: [oen]", 12, "hosts[0].experts[0]", "Did you mean 'one'?"),
        ("experts: [one]", "experts: [one, one]", 12, "hosts[0].experts[1]", "listed twice"),
        ("experts: [one]", "experts: [one, far]", 12, "hosts[0].experts[1]", "needs no host"),
        ("experts: [one]", "experts: []", 12, "hosts[0].experts", "at least 1"),
        ("context_tokens: 2048", "context_tokens: 4096", 5, "experts.one.context_tokens", "2048"),
        ("port: 0", "prot: 0", 14, "gateway.prot", "Did you mean 'port'?"),
        ('"env:TOKEN"', "hunter2", 14, "gateway.host_token", "env:NAME"),
        ('"env:REDIS"', "redis://:hunter2@h/0", 15, "state.redis_url", "env:NAME"),
        ('"env:REDIS"', "http://hunter2", 15, "state.redis_url", "redis://"),
        (
            "1GiB}",
            "1GiB}\n    scheduler: {min_residency_ms: 9000}",
            14,
            "hosts[0].scheduler",
            "age",
        ),
        ("  far:", "  Far:", 6, "experts.Far", "the name 'Far'"),
    ],
)
def test_faults_have_line_and_key(
    tmp_path: Path, old: str, new: str, line: int, key: str, fragment: str
) -> None:
    error = refusal(tmp_path, old, new)
    assert (error.line, error.key) == (line, key)
    assert fragment in error.message
    assert "hunter2" not in error.message


def test_weights_without_a_host_are_refused(tmp_path: Path) -> None:
    start, end = GOOD.index("hosts:"), GOOD.index("gateway:")
    error = refusal(tmp_path, GOOD[start:end], "")
    assert (error.line, error.key) == (3, "experts.one")
    assert "no host lists it" in error.reason


def test_two_hosts_of_one_name_are_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, "gateway:", "  - {name: local, experts: [one]}\ngateway:")
    assert (error.line, error.key) == (14, "hosts[1].name")


def test_the_configuration_that_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COE_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    assert default_config_path() == EXAMPLES / "quickstart" / "coe.yaml"
    (tmp_path / "coe.yaml").write_text(GOOD)
    assert default_config_path() == tmp_path / "coe.yaml"
    monkeypatch.setenv("COE_CONFIG", "/etc/coe.yaml")
    assert default_config_path() == Path("/etc/coe.yaml")


@pytest.mark.parametrize("example", ["quickstart", "gpu"])
def test_examples_load_with_their_policies_and_fit_the_schema(example: str) -> None:
    path = EXAMPLES / example / "coe.yaml"
    config = load_config(path, {"HOME": "/h"})
    watcher = PolicyWatcher(config.policies.dir, config.catalogue.ids, config.policies.default)
    assert watcher.current.default_policy.name == "auto"
    assert all(spec.kind is SourceKind.WEIGHTS for spec in config.catalogue.specs)
    schema = config_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)


def test_the_quickstart_is_five_experts_in_the_cache_on_one_host() -> None:
    config = load_config(EXAMPLES / "quickstart" / "coe.yaml", {"COE_CACHE_DIR": "/c"})
    assert config.catalogue.ids == ("general", "sql", "json", "math", "convert")
    assert config.catalogue.get("sql").location == "/c/quickstart/sql"
    assert [host.experts for host in config.hosts] == [config.catalogue.ids]


def test_the_gpu_example_is_the_five_experts_of_the_paper() -> None:
    config = load_config(EXAMPLES / "gpu" / "coe.yaml", {})
    assert {spec.location for spec in config.catalogue.specs} == {
        "Qwen/Qwen2-7B-Instruct",
        "google/gemma-2-9b-it",
        "google/gemma-2-27b-it",
        "meta-llama/Llama-3.1-70B-Instruct",
        "Qwen/Qwen2-72B-Instruct",
    }


def test_the_embedder_is_served_only_at_a_price(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).router.models == ()
    priced = load(tmp_path, GOOD + "router: {embeddings: {input_usd_per_mtok: 0.01}}\n").router
    assert priced.models == ("coe/embedder",)
    assert priced.embeddings_price is not None
    assert priced.embeddings_price.cost_micro_usd(1_000_000, 0) == 10_000
    with pytest.raises(ConfigError, match="input_usd_per_mtok"):
        load(tmp_path, GOOD + "router: {embeddings: {}}\n")


def test_placement_is_off_unless_told_and_its_settings_reach_the_planner(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).placement.mode == "off"
    assert load(tmp_path, GOOD + "placement: {mode: off}\n").placement.mode == "off"
    told = "{mode: auto, half_life_s: 30, pause_s: 2, gain_min: 0.1, copies_max: 3}"
    placement = load(tmp_path, GOOD + f"placement: {told}\n").placement
    planner = placement.planner()
    assert (placement.mode, planner.half_life_ms, planner.pause_ms) == ("auto", 30_000.0, 2_000.0)
    assert (planner.placement.gain_min, planner.placement.copies_max) == (0.1, 3)
    with pytest.raises(ConfigError, match="pause_s"):
        load(tmp_path, GOOD + "placement: {pause_s: 0.5}\n")
