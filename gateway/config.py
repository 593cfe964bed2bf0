"""coe.yaml: loading, checks that span sections, and the settings the gateway runs with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

import policies
import routers
from deployments.host_config import HostConfig
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
from experts.quantities import SizeBytes
from experts.scripted import Script
from experts.strict_yaml import Document, Section, first_of, load_document
from experts.types import SourceKind

CONFIG_NAME = "coe.yaml"
_SHIPPED_POLICIES = Path(policies.__file__).parent
_SHIPPED_ARTIFACT = Path(routers.__file__).parent / "data" / "quickstart" / "artifact"
_QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart" / CONFIG_NAME
_REDIS_SCHEMES = {"redis", "rediss", "unix"}

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


class RouterSection(Section):
    artifact: str | None = Field(None, min_length=1, description="Folder; else the shipped one.")
    cache_entries: int = Field(10_000, ge=0, le=10_000_000)


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


class LimitsSection(Section):
    """Bounds of every request."""

    body_bytes: SizeBytes = Field(2 * 2**20, ge=1024)
    prompt_chars: int = Field(400_000, ge=1)
    concurrent_requests: int = Field(1024, ge=1)
    request_timeout_ms: TimeoutMs = 120_000
    first_token_timeout_ms: TimeoutMs = 60_000
    idle_timeout_ms: TimeoutMs = 30_000


class GatewaySection(Section):
    """How the world talks to us. Port 0: any free port. Prompts are never logged."""

    host: str = Field("127.0.0.1", min_length=1)
    port: Port = 8000
    workers: int = Field(1, ge=1, le=256)
    host_token: EnvReference | None = None
    require_keys: bool = Field(False, description="Refuse requests without a valid API key.")
    limits: LimitsSection = LimitsSection()

    @property
    def host_token_env(self) -> str | None:
        """The name of the variable that holds the hosts' shared token."""
        return env_name(self.host_token)

    def resolve_host_token(self, environ: Mapping[str, str]) -> str | None:
        """The token itself. Raises ConfigError when the variable is unset."""
        if self.host_token is None:
            return None
        return _from_environ(self.host_token, "gateway.host_token", environ)


class ConfigFile(Section):
    """The whole of coe.yaml."""

    experts: ExpertsSection
    hosts: tuple[HostConfig, ...] = ()
    router: RouterSection = RouterSection()
    policies: PoliciesSection = PoliciesSection()
    state: StateSection = StateSection()
    gateway: GatewaySection = GatewaySection()


@dataclass(frozen=True, slots=True)
class RouterSettings:
    artifact: Path
    cache_entries: int


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
        ),
        policies=PolicySettings(
            resolve_path(policy_dir, base_dir=base_dir, environ=env)
            if policy_dir
            else _SHIPPED_POLICIES,
            file.policies.default,
        ),
        state=file.state,
        gateway=file.gateway,
    )


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
