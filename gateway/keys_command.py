"""``coe keys``: create, list and revoke API keys, in the store that the gateway uses.

What takes long to import is imported where it is used: every ``coe`` command loads this module.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import secrets
import stat
from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from deployments.environment import REDIS_ENV
from experts.quantities import micro_usd, parse_usd
from experts.types import MICRO_USD_PER_USD
from gateway.ask import CommandFailed
from gateway.key_views import key_view, usage_view
from gateway.keys import (
    NAME_CHARS_MAX,
    RATE_MAX,
    SECRET_BYTES,
    KeyBudgets,
    KeyLimits,
    KeyRecord,
    KeyScope,
    digest_of,
    key_secret,
)

if TYPE_CHECKING:
    from deployments.store import StateStore
    from gateway.config import Config
    from gateway.state.keys import KeyUsage

__all__ = ["configuration", "keys_app", "store_url", "with_store"]

keys_app = typer.Typer(help="API keys: who may ask, for what, how much.", no_args_is_help=True)

_TIMEOUT_MS = 3_000
T = TypeVar("T")


def _usd(text: str) -> Decimal:
    try:
        return parse_usd(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for stdout."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="coe.yaml (default: $COE_CONFIG, ./coe.yaml, the quickstart's)."),
]


def _count_option(what: str) -> Any:
    return typer.Option(min=1, max=RATE_MAX, metavar="N", show_default=False, help=what)


def _budget_option(window: str) -> Any:
    name, per = f"--budget-usd-{window}", "in all" if window == "total" else f"a {window}"
    text = f"May spend so much {per} (no limit)."
    return typer.Option(name, parser=_usd, metavar="USD", show_default=False, help=text)


@keys_app.command()
def create(
    name: Annotated[str, typer.Option(help="For people: whose key it is.")],
    budget_usd_hour: Annotated[Decimal | None, _budget_option("hour")] = None,
    budget_usd_day: Annotated[Decimal | None, _budget_option("day")] = None,
    budget_usd_month: Annotated[Decimal | None, _budget_option("month")] = None,
    budget_usd_total: Annotated[Decimal | None, _budget_option("total")] = None,
    rpm: Annotated[int | None, _count_option("Requests a minute (no limit).")] = None,
    tpm: Annotated[int | None, _count_option("Tokens a minute (no limit).")] = None,
    concurrency: Annotated[int | None, _count_option("Requests at a time (no limit).")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="May ask this policy; repeatable (all).")
    ] = None,
    expert: Annotated[
        list[str] | None, typer.Option(help="May use this expert; repeatable (all).")
    ] = None,
    config: ConfigOption = None,
    json_file: JsonOption = None,
) -> None:
    """Create a key and show its secret, this once. Windows are UTC hours, days and months."""
    if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable():
        raise CommandFailed(f"a name has 1 to {NAME_CHARS_MAX} printable characters.")
    loaded = configuration(config)
    scope = KeyScope(_names(policy), _names(expert))
    _check_names(loaded, scope)
    limits = KeyLimits(rpm, tpm, concurrency)
    amounts = (budget_usd_hour, budget_usd_day, budget_usd_month, budget_usd_total)
    budgets = KeyBudgets(*(None if usd is None else micro_usd(usd) for usd in amounts))
    secret = key_secret(secrets.token_bytes(SECRET_BYTES))

    from gateway.state.keys import KeyStore

    async def run(store: StateStore) -> KeyRecord:
        return await KeyStore(store).create(digest_of(secret), name, scope, limits, budgets)

    record = with_store(config, loaded, run)
    _write_json({**key_view(record), "secret": secret}, json_file)
    if json_file != "-":
        print(f"{record.id}  {record.name}: {_limits_text(record)}")
        print(f"{secret}\nKeep it: it is not stored here and cannot be shown again.")


@keys_app.command("list")
def list_keys(config: ConfigOption = None, json_file: JsonOption = None) -> None:
    """List all keys with what they may do and what they have spent. Never shows a secret."""

    from gateway.state.keys import KeyLedger, KeyStore

    async def run(store: StateStore) -> list[tuple[KeyRecord, KeyUsage]]:
        ledger, records = KeyLedger(store), await KeyStore(store).list()
        return [(record, await ledger.usage(record.digest)) for record in records]

    found = with_store(config, configuration(config), run)
    _write_json({"keys": [key_view(key) | usage_view(used) for key, used in found]}, json_file)
    if json_file != "-":
        _show(found)


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `coe keys list` shows it.")],
    config: ConfigOption = None,
    json_file: JsonOption = None,
) -> None:
    """Revoke a key, from the next request on and for good. Running requests finish."""

    from gateway.state.keys import KeyStore

    async def run(store: StateStore) -> int | None:
        return await KeyStore(store).revoke(key_id)

    revoked_ms = with_store(config, configuration(config), run)
    if revoked_ms is None:
        raise CommandFailed(f"there is no key {key_id!r}; `coe keys list` shows all.")
    _write_json({"id": key_id, "revoked_ms": revoked_ms}, json_file)
    if json_file != "-":
        print(f"{key_id} is revoked (since {_moment(revoked_ms)})")


# --- the store -----------------------------------------------------------------------------------


def configuration(path: Path | None) -> Config | None:
    """None where COE_REDIS_URL alone says which store is meant and there is no file to load."""
    from gateway.config import default_config_path, load_config

    chosen = path or default_config_path()
    if path is None and not chosen.exists() and os.environ.get(REDIS_ENV):
        return None
    return load_config(chosen)


def store_url(path: Path, loaded: Config | None) -> str:
    """The configuration's store, else COE_REDIS_URL, else that of the running ``coe serve``.

    Raises CommandFailed when there is none of them.
    """
    from gateway.run_files import running_store

    if loaded is not None and (url := loaded.state.resolve_redis_url(os.environ)) is not None:
        return url
    if url := os.environ.get(REDIS_ENV):
        return url
    if (url := running_store(path, os.environ)) is not None:
        return url
    raise CommandFailed(
        f"{path} names no store, so its keys are in the store that `coe serve` starts itself, and "
        f"no `coe serve` runs with this file. Start it first, or name a store in state.redis_url "
        f"or {REDIS_ENV}."
    )


def with_store(
    path: Path | None, loaded: Config | None, work: Callable[[StateStore], Awaitable[T]]
) -> T:
    from deployments.store import StateStore
    from gateway.config import default_config_path

    url = store_url(path or default_config_path(), loaded)

    async def run() -> T:
        store = StateStore(url, timeout_ms=_TIMEOUT_MS)
        try:
            return await work(store)
        finally:
            await store.aclose()

    return asyncio.run(run())


# --- options -------------------------------------------------------------------------------------


def _names(given: Sequence[str] | None) -> frozenset[str] | None:
    return frozenset(given) if given else None


def _check_names(loaded: Config | None, scope: KeyScope) -> None:
    """A key for a name that does not exist would be a key for nothing. Raises CommandFailed."""
    from policies.live import PolicyWatcher

    if loaded is None:
        return
    policies = PolicyWatcher(
        loaded.policies.dir, loaded.catalogue.ids, loaded.policies.default
    ).current.names
    for kind, asked, known in (
        ("policy", scope.policies, policies),
        ("expert", scope.experts, (*loaded.catalogue.ids, *loaded.router.models)),
    ):
        if unknown := sorted((asked or frozenset()) - set(known)):
            raise CommandFailed(f"no {kind} {unknown[0]!r}; known are {', '.join(known)}.")


# --- output --------------------------------------------------------------------------------------


def _write_json(result: dict[str, Any], target: str | None) -> None:
    """A file is for its owner alone: it may hold a secret."""
    if target is None:
        return
    text = json.dumps(result, indent=2, sort_keys=True) + "\n"
    if target == "-":
        print(text, end="")
        return
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):  # it may have been there, and open
                os.fchmod(descriptor, 0o600)
            file.write(text)
    except OSError as error:
        raise CommandFailed(f"{target} cannot be written: {error.strerror}.") from error


def _show(found: Sequence[tuple[KeyRecord, KeyUsage]]) -> None:
    if not found:
        print("no keys yet; `coe keys create --name N` makes one")
        return
    table = Table("key", "spent, USD", "limits")
    table.columns[0].no_wrap = True  # whole ids: they are to be copied
    for record, used in found:
        since = "" if record.revoked_ms is None else f"\nrevoked {_moment(record.revoked_ms)}"
        spent = f"today {_usd_text(used.day)}\nin all {_usd_text(used.total)}"
        table.add_row(f"{record.id}\n{record.name}{since}", spent, _limits_text(record))
    Console().print(table)


def _limits_text(record: KeyRecord) -> str:
    limits, parts = record.limits, list[str]()
    for label, names in (("policies", record.scope.policies), ("experts", record.scope.experts)):
        if names is not None:
            parts.append(f"{label} {' '.join(sorted(names))}")
    for count, unit in (
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.concurrent_requests, "at a time"),
    ):
        if count is not None:
            parts.append(f"{count} {unit}")
    for window, amount in record.budgets.by_name().items():
        if amount is not None:
            per = "in all" if window == "total" else f"a {window}"
            parts.append(f"{_usd_text(amount)} USD {per}")
    return ", ".join(parts) or "no limits"


def _usd_text(amount_micro_usd: int) -> str:
    return f"{Decimal(amount_micro_usd) / MICRO_USD_PER_USD:f}"


def _moment(at_ms: int) -> str:
    moment = datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M UTC")
