"""``coe policy activate|rollback|release|canary|list``: policy versions in the shared store.

The same orders as the admin API's, for whoever can reach the store; every worker of every gateway
follows within a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.ask import CommandFailed
from gateway.keys_command import ConfigOption, configuration, with_store

if TYPE_CHECKING:
    from deployments.store import StateStore
    from gateway.policy_versions import PolicyRecord, Version

__all__ = ["add_commands"]

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The policy.")]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A policy file.")]
NameOption = Annotated[
    str | None, typer.Option("--name", help="The policy it is for (default: the file's name).")
]


def add_commands(app: typer.Typer) -> None:
    """Put the commands under ``coe policy``."""
    app.command("activate")(activate)
    app.command("rollback")(rollback)
    app.command("release")(release)
    app.command("canary")(canary)
    app.command("list")(list_policies)


def activate(file: FileArgument, name: NameOption = None, config: ConfigOption = None) -> None:
    """Put a version in force on every gateway of the store; it is checked first."""
    from gateway.policy_versions import activated

    version = _version(file, config)
    record = _change(name or file.stem, lambda r: activated(r, version, version.at_ms), config)
    print(f"{record.name}: {record.active} is in force")


def rollback(name: NameArgument, config: ConfigOption = None) -> None:
    """Put in force what was before; a second time goes back one step further."""
    from gateway.policy_versions import rolled_back

    _tell(_change(name, rolled_back, config))


def release(name: NameArgument, config: ConfigOption = None) -> None:
    """Put the file's version in force again, on each gateway its own file's."""
    from gateway.policy_versions import released

    _tell(_change(name, lambda r: released(r, _now_ms()), config))


def canary(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="The version to try.")] = None,
    share: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Of the sessions, such as 0.05.")
    ] = None,
    name: NameOption = None,
    off: Annotated[bool, typer.Option("--off", help="End the trial; needs --name.")] = False,
    config: ConfigOption = None,
) -> None:
    """Try a version on a share of the sessions, or end the trial."""
    from gateway.policy_versions import with_canary, without_canary

    if off:
        if name is None or file is not None or share is not None:
            raise CommandFailed("--off takes --name and nothing else.")
        _tell(_change(name, without_canary, config))
        return
    if file is None or share is None:
        raise CommandFailed("name a FILE and its --share, or --off with --name.")
    version = _version(file, config)
    wanted = share
    record = _change(name or file.stem, lambda r: with_canary(r, version, wanted), config)
    print(f"{record.name}: {record.canary} for {100 * record.canary_share:g} % of sessions")


def list_policies(config: ConfigOption = None) -> None:
    """Show what the store says of each policy; what it does not name follows its file."""
    from gateway.state.policies import PolicyStore

    async def read(store: StateStore) -> dict[str, PolicyRecord]:
        _, records = await PolicyStore(store).read()
        return records or {}

    records = with_store(config, configuration(config), read)
    if not records:
        print("the store holds no versions; every policy follows its file")
    for record in sorted(records.values(), key=lambda r: r.name):
        _tell(record)


def _version(file: Path, config: Path | None) -> Version:
    """The file's text, checked against the experts of coe.yaml."""
    from experts.strict_yaml import read_bounded
    from gateway.policy_versions import TEXT_BYTES_MAX, Version
    from policies.loader import parse_policy

    loaded = configuration(config)
    text = read_bounded(file)
    if len(text.encode()) > TEXT_BYTES_MAX:
        raise CommandFailed(f"{file} has more than {TEXT_BYTES_MAX} bytes.")
    experts = loaded.catalogue.ids if loaded is not None else None
    policy = parse_policy(text, name=file.stem, file=str(file), catalogue_ids=experts)
    return Version(policy.digest, text, _now_ms())


def _change(
    name: str, order: Callable[[PolicyRecord], PolicyRecord], config: Path | None
) -> PolicyRecord:
    from gateway.policy_versions import check_name
    from gateway.state.policies import PolicyStore

    check_name(name)
    return with_store(
        config, configuration(config), lambda store: PolicyStore(store).change(name, order)
    )


def _tell(record: PolicyRecord) -> None:
    active = record.active or "the file's version"
    trial = f", canary {record.canary} for {100 * record.canary_share:g} % of sessions"
    print(f"{record.name}: {active} is in force{trial if record.canary else ''}")


def _now_ms() -> int:
    return int(time.time() * 1000)
