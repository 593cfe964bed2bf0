"""coe.yaml: loading, checks that span sections, and the settings the gateway runs with."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

import policies
import routers
from deployments.host_config import HostConfig
from deployments.placement import PlacementConfig
from deployments.placement_planner import PlannerConfig
from experts.catalogue import (
    Catalogue,
    EnvReference,
    ExpertsSection,
    Identifier,
    build_catalogue,
    check_env_reference,
    env_name,
    resolve_path,
)
from experts.errors import ConfigError
from experts.quantities import SizeBytes, Usd, micro_usd
from experts.scripted import Script
from experts.strict_yaml import Document, Section, first_of, load_document
from experts.types import Price, SourceKind
from gateway.breakers import BreakerRules
from gateway.retries import RetryRules

CONFIG_NAME = "coe.yaml"
_SHIPPED_POLICIES = Path(policies.__file__).parent
_SHIPPED_ARTIFACT = Path(routers.__file__).parent / "data" / "quickstart" / "artifact"
_QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart" / CONFIG_NAME
_REDIS_SCHEMES = {"redis", "rediss", "unix"}

ADMIN_KEY_CHARS_MIN = 16
EMBEDDER_ID = "coe/embedder"  # the router's embedder, as a model

Port = Annotated[int, Field(ge=0, le=65_535)]
TimeoutMs = Annotated[int, Field(ge=1, le=86_400_000)]


def _check_redis_url(url: str) -> str:
    """Never repeats the URL, which may hold a password. Raises ValueError."""
    if url.startswith("env:"):
        return check_env_reference(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError("not a valid URL") from None
    if parts.scheme not in _REDIS_SCHEMES:
        raise ValueError("expected redis://, rediss://, unix:// or env:NAME")
    if parts.password is not None:
        raise ValueError("a password is never written here; put the whole URL in env:NAME")
    return url


class EmbeddingsSection(Section):
    """The router's embedder for callers, as ``coe/embedder``. A forgotten price would mean free."""

    input_usd_per_mtok: Usd


class RouterSection(Section):
    artifact: str | None = Field(None, min_length=1, description="Folder; else the shipped one.")
    cache_entries: int = Field(10_000, ge=0, le=10_000_000)
    embeddings: EmbeddingsSection | None = Field(
        None, description="Serve the router's embedder at /v1/embeddings; absent: not served."
    )


class PoliciesSection(Section):
    dir: str | None = Field(None, min_length=1, description="Folder; else the shipped one.")
    default: Identifier = "auto"


class StateSection(Section):
    """Where shared state lives. ``redis_url`` None: an embedded Valkey server."""

    redis_url: Annotated[str, AfterValidator(_check_redis_url)] | None = None
    timeout_ms: TimeoutMs = 250

    def resolve_redis_url(self, environ: Mapping[str, str]) -> str | None:
        """The URL itself. Raises ConfigError when ``env:NAME`` names an unset variable."""
        if self.redis_url is None or not self.redis_url.startswith("env:"):
            return self.redis_url
        return _from_environ(self.redis_url, "state.redis_url", environ)


def _check_http_url(url: str) -> str:
    """Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.password is not None:
        raise ValueError("expected http://host:port or https://host, without credentials")
    return url


class TelemetrySection(Section):
    """Traces. What the environment says (OTEL_*) stands before what is written here."""

    otlp_endpoint: Annotated[str, AfterValidator(_check_http_url)] | None = Field(
        None, description="OTLP over HTTP, such as http://127.0.0.1:4318; none: no traces."
    )
    sample_ratio: float = Field(1.0, ge=0.0, le=1.0)
    log_prompts: bool = Field(False, description="Put conversations into spans.")


class LimitsSection(Section):
    """Bounds of every connection and request."""

    connections: int = Field(4096, ge=1, le=1_000_000)
    header_bytes: SizeBytes = Field(32 * 1024, ge=1024, le=2**20)
    header_timeout_ms: TimeoutMs = 10_000
    body_timeout_ms: TimeoutMs = 30_000
    stalled_write_ms: TimeoutMs = 30_000
    body_bytes: SizeBytes = Field(2 * 2**20, ge=1024)
    prompt_chars: int = Field(400_000, ge=1)
    concurrent_requests: int = Field(1024, ge=1)
    connect_timeout_ms: TimeoutMs = 3_000
    request_timeout_ms: TimeoutMs = 120_000
    first_token_timeout_ms: TimeoutMs = 60_000
    idle_timeout_ms: TimeoutMs = 30_000
    keep_alive_grace_ms: TimeoutMs = 10_000
    keep_alive_interval_ms: TimeoutMs = 10_000


class RetriesSection(Section):
    """Calls made again while the caller has seen nothing, paid for by a budget of retries."""

    per_stage: int = Field(1, ge=0, le=10, description="At one expert, beyond the first call.")
    base_ms: float = Field(50.0, gt=0, le=60_000)
    cap_ms: float = Field(1_000.0, gt=0, le=60_000)
    budget_ratio: float = Field(0.1, ge=0, le=1, description="Retries earned by each request.")
    budget_burst: float = Field(20.0, ge=0, le=10_000)
    budget_per_s: float = Field(0.1, ge=0, le=1_000)

    def rules(self) -> RetryRules:
        return RetryRules(**self.model_dump())


class BreakersSection(Section):
    """When an expert or a host that fails is left alone, and for how long."""

    failures_in_a_row: int = Field(5, ge=1, le=10_000)
    failure_share: float = Field(0.5, gt=0, le=1)
    calls_min: int = Field(20, ge=1, le=1_000_000)
    window_ms: TimeoutMs = 10_000
    open_ms: TimeoutMs = 2_000
    open_max_ms: TimeoutMs = 30_000
    probe_lease_ms: TimeoutMs = 30_000

    def rules(self) -> BreakerRules:
        return BreakerRules(**self.model_dump())


class GatewaySection(Section):
    """How the world talks to us. Port 0: any free port. Prompts are never logged."""

    host: str = Field("127.0.0.1", min_length=1)
    port: Port = 8000
    workers: int = Field(1, ge=1, le=256)
    host_token: EnvReference | None = None
    require_keys: bool = Field(False, description="Refuse requests without a valid API key.")
    admin_host: str = Field("127.0.0.1", min_length=1)
    admin_port: Port | Literal["off"] | None = Field(
        None, description="Of the admin API and the console; the gateway's port plus one if unset."
    )
    admin_key: EnvReference | None = None
    limits: LimitsSection = LimitsSection()
    retries: RetriesSection = RetriesSection()
    breakers: BreakersSection = BreakersSection()

    @property
    def host_token_env(self) -> str | None:
        """The name of the variable that holds the hosts' shared token."""
        return env_name(self.host_token)

    def resolve_host_token(self, environ: Mapping[str, str]) -> str | None:
        """The token itself. Raises ConfigError when the variable is unset."""
        if self.host_token is None:
            return None
        return _from_environ(self.host_token, "gateway.host_token", environ)

    def resolve_admin_key(self, environ: Mapping[str, str]) -> str | None:
        """The key itself. Raises ConfigError when the variable is unset, or too short a key."""
        if self.admin_key is None:
            return None
        key = _from_environ(self.admin_key, "gateway.admin_key", environ)
        if len(key) < ADMIN_KEY_CHARS_MIN:
            reason = f"a key of fewer than {ADMIN_KEY_CHARS_MIN} characters can be guessed"
            raise ConfigError(CONFIG_NAME, None, "gateway.admin_key", reason)
        return key

    def admin_port_beside(self, port: int) -> int | None:
        """The admin port of a gateway that listens on ``port``; 0: any free one; None: none."""
        if self.admin_port == "off":
            return None
        if self.admin_port is not None:
            return self.admin_port
        return port + 1 if 0 < port < 65_535 else 0


class PlacementSection(Section):
    """Which experts' weights each host keeps in memory: decided by load while everybody serves."""

    # YAML 1.1 takes a plain off for false; what is meant is plain.
    mode: Annotated[
        Literal["off", "auto"], BeforeValidator(lambda said: "off" if said is False else said)
    ] = "off"
    half_life_s: float = Field(60.0, gt=0, le=86_400, description="How long ago load counts half.")
    pause_s: float = Field(5.0, ge=1, le=3_600, description="Between moves.")
    gain_min: float = Field(0.05, gt=0, lt=1, description="Share of the cost that a move saves.")
    copies_max: int = Field(64, ge=1, le=10_000, description="Of one expert.")

    def planner(self) -> PlannerConfig:
        return PlannerConfig(
            half_life_ms=self.half_life_s * 1000,
            pause_ms=self.pause_s * 1000,
            placement=PlacementConfig(self.gain_min, self.copies_max, idle_yields=True),
        )


class ConfigFile(Section):
    """The whole of coe.yaml."""

    experts: ExpertsSection
    hosts: tuple[HostConfig, ...] = ()
    router: RouterSection = RouterSection()
    policies: PoliciesSection = PoliciesSection()
    state: StateSection = StateSection()
    gateway: GatewaySection = GatewaySection()
    telemetry: TelemetrySection = TelemetrySection()
    placement: PlacementSection = PlacementSection()


@dataclass(frozen=True, slots=True)
class RouterSettings:
    artifact: Path
    cache_entries: int
    embeddings_price: Price | None = None  # None: the embedder is not served

    @property
    def models(self) -> tuple[str, ...]:
        """What may be asked for beside policies and the experts of the file."""
        return () if self.embeddings_price is None else (EMBEDDER_ID,)


@dataclass(frozen=True, slots=True)
class PolicySettings:
    dir: Path
    default: str


@dataclass(frozen=True, slots=True)
class Config:
    """A checked configuration: paths absolute, references valid, secrets still by name."""

    path: Path
    catalogue: Catalogue
    hosts: tuple[HostConfig, ...]
    router: RouterSettings
    policies: PolicySettings
    state: StateSection
    gateway: GatewaySection
    telemetry: TelemetrySection
    placement: PlacementSection


def load_config(path: Path, environ: Mapping[str, str] | None = None) -> Config:
    """Load and check coe.yaml. Raises ConfigError with file, line and key.

    ``environ`` (default: the process's) decides where ``cache:`` points; secrets are not read.
    Whether folders exist is checked by those who open them.
    """
    env = os.environ if environ is None else environ
    document = load_document(path, ConfigFile)
    base_dir = path.absolute().parent
    catalogue = build_catalogue(document.value.experts, base_dir=base_dir, environ=env)
    problems = _problems(document, catalogue)
    if problems:
        raise first_of(problems)
    file = document.value
    artifact, policy_dir = file.router.artifact, file.policies.dir
    return Config(
        path=path.absolute(),
        catalogue=catalogue,
        hosts=file.hosts,
        router=RouterSettings(
            resolve_path(artifact, base_dir=base_dir, environ=env)
            if artifact
            else _SHIPPED_ARTIFACT,
            file.router.cache_entries,
            _embeddings_price(file.router.embeddings),
        ),
        policies=PolicySettings(
            resolve_path(policy_dir, base_dir=base_dir, environ=env)
            if policy_dir
            else _SHIPPED_POLICIES,
            file.policies.default,
        ),
        state=file.state,
        gateway=file.gateway,
        telemetry=file.telemetry,
        placement=file.placement,
    )


def _embeddings_price(section: EmbeddingsSection | None) -> Price | None:
    return None if section is None else Price(micro_usd(section.input_usd_per_mtok))


def default_config_path() -> Path:
    """COE_CONFIG, else ./coe.yaml, else the quickstart's when run from a source checkout."""
    if chosen := os.environ.get("COE_CONFIG"):
        return Path(chosen)
    here = Path.cwd() / CONFIG_NAME
    return _QUICKSTART if not here.exists() and _QUICKSTART.exists() else here


def config_json_schema() -> dict[str, Any]:
    """JSON Schema of coe.yaml, for editors."""
    schema = ConfigFile.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "coe.yaml",
    }


# --- checks that span sections -------------------------------------------------------------------


def _problems(document: Document[ConfigFile], catalogue: Catalogue) -> list[ConfigError]:
    hosts = document.value.hosts
    found: list[ConfigError] = []
    for index, host in enumerate(hosts):
        if host.name in {other.name for other in hosts[:index]}:
            reason = f"another host is named {host.name!r} already"
            found.append(document.error(("hosts", index, "name"), reason))
        found.extend(_host_problems(document, catalogue, index, host))
    found.extend(_script_problems(document, catalogue))
    found.extend(_admin_problems(document))
    # A mistyped name on a host also leaves an expert without one: report the cause alone.
    return found or list(_homeless(document, catalogue))


def _script_problems(document: Document[ConfigFile], catalogue: Catalogue) -> Iterator[ConfigError]:
    for spec in catalogue.specs:
        if spec.kind is SourceKind.SCRIPTED:
            try:
                Script.parse(spec.location, spec.options)
            except ConfigError as error:
                where = ("experts", spec.id, "source", "scripted")
                yield document.error(where, f"{spec.location!r}: {error.key} {error.reason}")


def _admin_problems(document: Document[ConfigFile]) -> Iterator[ConfigError]:
    gateway = document.value.gateway
    open_door = gateway.admin_port != "off" and gateway.admin_key is None
    if open_door and not is_loopback(gateway.admin_host):
        reason = f"{gateway.admin_host} can be reached from other machines; set gateway.admin_key"
        yield document.error(("gateway", "admin_host"), reason)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _homeless(document: Document[ConfigFile], catalogue: Catalogue) -> Iterator[ConfigError]:
    hosted = {expert for host in document.value.hosts for expert in host.experts}
    for spec in catalogue.specs:
        if spec.kind is SourceKind.WEIGHTS and spec.id not in hosted:
            reason = "has weights but no host lists it, so nothing would run it"
            yield document.error(("experts", spec.id), reason)


def _host_problems(
    document: Document[ConfigFile], catalogue: Catalogue, index: int, host: HostConfig
) -> Iterator[ConfigError]:
    limit = host.engine.max_model_len
    for position, name in enumerate(host.experts):
        loc = ("hosts", index, "experts", position)
        if name not in catalogue:
            yield document.unknown(loc, name, catalogue.ids, "expert")
            continue
        spec = catalogue.get(name)
        if name in host.experts[:position]:
            yield document.error(loc, f"{name!r} is listed twice")
        if spec.kind is not SourceKind.WEIGHTS:
            yield document.error(loc, f"{name!r} is a {spec.kind.value} expert and needs no host")
        elif spec.context_tokens > limit:
            yield document.error(
                ("experts", name, "context_tokens"),
                f"{spec.context_tokens} exceeds engine.max_model_len {limit} of host {host.name!r}",
            )


def _from_environ(reference: str, key: str, environ: Mapping[str, str]) -> str:
    name = reference.removeprefix("env:")
    value = environ.get(name)
    if not value:
        raise ConfigError(
            CONFIG_NAME, None, key, f"the environment variable {name} is not set or empty"
        )
    return value
