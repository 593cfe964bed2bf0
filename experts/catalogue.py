"""The expert catalogue: the ``experts`` section of coe.yaml and what it becomes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    WithJsonSchema,
    model_validator,
)

from experts.errors import UnknownModel
from experts.quantities import ParameterCount, Usd, micro_usd
from experts.strict_yaml import Section
from experts.types import AnswerParsers, Capability, ExpertSpec, Price, SourceKind

ID_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
ENV_PATTERN = r"env:[A-Za-z_][A-Za-z0-9_]*"
_PARSER_PATTERN = r"[A-Za-z0-9][\w.-]{0,63}"
_HUB_PATTERN = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_RESERVED_IDS = {"auto", "coe"}
_CACHE_PREFIX = "cache:"


def check_id(value: str) -> str:
    """An id that is safe in URLs, file names and metrics. Raises ValueError."""
    if not re.fullmatch(ID_PATTERN, value):
        raise ValueError(
            f"the name {value!r} may hold a-z, 0-9, dot, underscore and hyphen, must start with a "
            "letter or digit and have at most 64 characters"
        )
    return value


def _check_expert_id(value: str) -> str:
    if value in _RESERVED_IDS or value.startswith("coe/"):
        raise ValueError(f"the name {value!r} is kept for policies; choose another")
    return check_id(value)


def check_env_reference(value: Any) -> str:
    """``env:NAME``. Never repeats the value, which may be a secret. Raises ValueError."""
    if not isinstance(value, str) or not re.fullmatch(ENV_PATTERN, value):
        raise ValueError("a secret is never written here; name an environment variable as env:NAME")
    return value


Identifier = Annotated[str, AfterValidator(check_id)]
ExpertId = Annotated[str, AfterValidator(_check_expert_id)]
EnvReference = Annotated[
    str,
    BeforeValidator(check_env_reference),
    WithJsonSchema({"type": "string", "pattern": f"^{ENV_PATTERN}$"}),
]


Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]


def env_name(reference: str | None) -> str | None:
    """The variable that ``env:NAME`` names."""
    return reference.removeprefix("env:") if reference else None


class SourceSection(Section):
    """Where the answers come from: exactly one of path, hub, url and scripted."""

    path: str | None = Field(None, min_length=1, description="Folder, or cache:<folder>.")
    hub: str | None = Field(None, description="Hugging Face id, org/name.")
    url: str | None = Field(None, description="Base URL of an OpenAI-compatible server.")
    model: str | None = Field(None, min_length=1, description="The name the server knows it by.")
    api_key: EnvReference | None = None
    scripted: str | None = Field(None, min_length=1, description="Behaviour of the shipped fake.")

    @model_validator(mode="after")
    def _one_source(self) -> SourceSection:
        given = [name for name in ("path", "hub", "url", "scripted") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                "expected exactly one of path, hub, url and scripted, got "
                + (" and ".join(given) or "none")
            )
        if self.url is None and (self.model is not None or self.api_key is not None):
            raise ValueError("model and api_key belong to a url source")
        if self.url is not None and self.model is None:
            raise ValueError("a url source needs model, the name the server knows it by")
        _check_location(self)
        return self

    @property
    def kind(self) -> SourceKind:
        if self.url is not None:
            return SourceKind.REMOTE
        return SourceKind.SCRIPTED if self.scripted is not None else SourceKind.WEIGHTS


def _check_location(source: SourceSection) -> None:
    if source.hub is not None and not re.fullmatch(_HUB_PATTERN, source.hub):
        raise ValueError(f"hub: expected org/name, got {source.hub!r}")
    if source.url is not None:
        _check_url(source.url)
    if source.path is not None and source.path.startswith(_CACHE_PREFIX):
        inside = PurePosixPath(source.path.removeprefix(_CACHE_PREFIX))
        if inside.is_absolute() or ".." in inside.parts or not inside.parts:
            raise ValueError("path: cache:<folder> must name a folder inside the cache")


def _check_url(url: str) -> None:
    """Raises ValueError without repeating the URL, which may hold a password."""
    try:
        parts = urlsplit(url)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        raise ValueError("url: not a valid URL") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname or not port_ok:
        raise ValueError("url: expected http:// or https:// with a host name")
    if parts.username is not None or parts.password is not None:
        raise ValueError("url: no user or password here; use api_key: env:NAME")
    if parts.query or parts.fragment or not parts.path.strip("/"):
        raise ValueError("url: expected the base path of the API, such as https://host/v1")


class PriceSection(Section):
    """USD per million tokens. There is no default: a forgotten price would mean free."""

    input_usd_per_mtok: Usd
    output_usd_per_mtok: Usd


class ExpertSection(Section):
    """One expert as coe.yaml describes it."""

    source: SourceSection
    price: PriceSection
    context_tokens: int = Field(ge=1, le=10_000_000)
    capabilities: frozenset[Capability] = frozenset({Capability.CHAT, Capability.COMPLETIONS})
    parameters: ParameterCount | None = None
    tags: frozenset[str] = frozenset()
    languages: frozenset[Language] = Field(
        default=frozenset(), description="ISO 639 codes it was made for, such as en; empty: any."
    )
    description: str = ""
    options: dict[str, JsonValue] = Field(
        default_factory=dict, description="Options of a scripted expert's behaviour."
    )
    tool_call_parser: str | None = Field(
        None, pattern=_PARSER_PATTERN, description="How it writes tool calls; vLLM's name for it."
    )
    reasoning_parser: str | None = Field(
        None, pattern=_PARSER_PATTERN, description="How it marks its reasoning; vLLM's name for it."
    )

    @model_validator(mode="after")
    def _embeddings_have_a_server(self) -> ExpertSection:
        if Capability.EMBEDDINGS in self.capabilities and self.source.kind is SourceKind.WEIGHTS:
            raise ValueError("expert hosts make no embeddings; embeddings need a url source")
        return self

    @model_validator(mode="after")
    def _options_have_a_reader(self) -> ExpertSection:
        if self.options and self.source.scripted is None:
            raise ValueError("options belong to a scripted source")
        return self

    @model_validator(mode="after")
    def _tool_calls_can_be_read(self) -> ExpertSection:
        hosted = self.source.kind is SourceKind.WEIGHTS
        if not hosted and (self.tool_call_parser or self.reasoning_parser):
            raise ValueError("parsers belong to experts with weights; a server has its own")
        if hosted and Capability.TOOLS in self.capabilities and self.tool_call_parser is None:
            raise ValueError(
                "tools need tool_call_parser: the way its model writes calls, such as hermes"
            )
        return self


ExpertsSection = Annotated[dict[ExpertId, ExpertSection], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All experts by id, in the order of the file."""

    _specs: Mapping[str, ExpertSpec] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._specs)

    @property
    def specs(self) -> tuple[ExpertSpec, ...]:
        return tuple(self._specs.values())

    def get(self, expert_id: str) -> ExpertSpec:
        """Raises UnknownModel with the ids there are."""
        spec = self._specs.get(expert_id)
        if spec is None:
            raise UnknownModel(model=expert_id, available=self.ids)
        return spec

    def __getitem__(self, expert_id: str) -> ExpertSpec:
        return self.get(expert_id)

    def __contains__(self, expert_id: object) -> bool:
        return expert_id in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def extended(self, spec: ExpertSpec) -> Catalogue:
        """These experts and one more. Raises ValueError when its id is taken."""
        if spec.id in self._specs:
            raise ValueError(f"there is an expert {spec.id!r} already")
        return Catalogue({**self._specs, spec.id: spec})

    def values(self) -> tuple[ExpertSpec, ...]:
        return self.specs


def build_catalogue(
    experts: Mapping[str, ExpertSection], *, base_dir: Path, environ: Mapping[str, str]
) -> Catalogue:
    """Resolve the section: paths become absolute, prices whole micro-dollars.

    ``base_dir`` is the folder of the file, which relative paths start from.
    """
    return Catalogue(
        {name: _spec(name, section, base_dir, environ) for name, section in experts.items()}
    )


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Where ``cache:`` points: COE_CACHE_DIR, else XDG_CACHE_HOME/coe, else ~/.cache/coe."""
    if chosen := environ.get("COE_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    if xdg := environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "coe"
    home = environ.get("HOME")
    return (Path(home) if home else Path.home()) / ".cache" / "coe"


def resolve_path(text: str, *, base_dir: Path, environ: Mapping[str, str]) -> Path:
    """A path of the file as an absolute path: ``cache:<folder>``, absolute, or from base_dir."""
    if text.startswith(_CACHE_PREFIX):
        return cache_dir(environ) / text.removeprefix(_CACHE_PREFIX)
    return (base_dir / Path(text).expanduser()).absolute()


def _spec(
    name: str, section: ExpertSection, base_dir: Path, environ: Mapping[str, str]
) -> ExpertSpec:
    source, price = section.source, section.price
    return ExpertSpec(
        id=name,
        kind=source.kind,
        location=_location(source, base_dir, environ),
        price=Price(micro_usd(price.input_usd_per_mtok), micro_usd(price.output_usd_per_mtok)),
        context_tokens=section.context_tokens,
        capabilities=section.capabilities,
        parameters=section.parameters,
        tags=section.tags,
        languages=section.languages,
        description=section.description,
        upstream_model=source.model,
        secret_env=env_name(source.api_key),
        options=dict(section.options),
        parsers=AnswerParsers(section.tool_call_parser, section.reasoning_parser),
    )


def _location(source: SourceSection, base_dir: Path, environ: Mapping[str, str]) -> str:
    if source.path is not None:
        return str(resolve_path(source.path, base_dir=base_dir, environ=environ))
    return source.hub or source.scripted or str(source.url).rstrip("/")
