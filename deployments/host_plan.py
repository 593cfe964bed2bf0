"""Which host runs which weights: the host side's reading of coe.yaml.

Hosts read only the ``experts`` and ``hosts`` sections; the gateway's sections are the gateway's to
check (``coe config check`` looks at the whole file).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pydantic import ConfigDict

from deployments.host_config import HostConfig
from experts.catalogue import ExpertsSection, build_catalogue
from experts.errors import ConfigError
from experts.strict_yaml import Section, load_document
from experts.types import AnswerParsers, ExpertSpec, SourceKind


class HostSideFile(Section):
    """coe.yaml as a host sees it."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    experts: ExpertsSection
    hosts: tuple[HostConfig, ...] = ()


class HostPlan(NamedTuple):
    """One host and, for each of its experts, its weight folder (or hub id) and its parsers."""

    config: HostConfig
    locations: dict[str, str]
    parsers: dict[str, AnswerParsers]


def load_hosts(path: Path) -> list[HostPlan]:
    """The hosts in the order of the file.

    Raises ConfigError for a file that is wrong, or a host that names what it cannot run.
    """
    document = load_document(path, HostSideFile)
    catalogue = build_catalogue(
        document.value.experts, base_dir=path.absolute().parent, environ=os.environ
    )
    plan: list[HostPlan] = []
    for at, host in enumerate(document.value.hosts):
        specs: dict[str, ExpertSpec] = {}
        for number, expert in enumerate(host.experts):
            where = ("hosts", at, "experts", number)
            if expert not in catalogue:
                raise document.unknown(where, expert, catalogue.ids, "expert")
            spec = catalogue.get(expert)
            if spec.kind is not SourceKind.WEIGHTS:
                raise document.error(where, f"{expert!r} has no weights that a host could run")
            specs[expert] = spec
        plan.append(
            HostPlan(
                host,
                {expert: spec.location for expert, spec in specs.items()},
                {expert: spec.parsers for expert, spec in specs.items()},
            )
        )
    if not plan:
        raise ConfigError(str(path), None, "hosts", "no host is configured")
    return plan
