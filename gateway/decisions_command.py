"""``coe decisions tail``: the decision log, as it stands and as it grows."""

from __future__ import annotations

import asyncio
import datetime
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experts.types import MICRO_USD_PER_USD
from gateway.keys_command import ConfigOption, configuration, with_store

if TYPE_CHECKING:
    from deployments.store import StateStore

__all__ = ["decision_line", "decisions_app"]

decisions_app = typer.Typer(help="What was decided, and why.", no_args_is_help=True)

_POLL_S = 0.5


@decisions_app.callback()
def _group() -> None:
    """What was decided, and why."""


@decisions_app.command()
def tail(
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=1_000, help="How many.")] = 20,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new ones until Ctrl-C.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Whole records, one JSON object per line.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Show the last decisions of all gateways, oldest first. No prompt is in them."""
    with_store(config, configuration(config), lambda store: _tail(store, lines, follow, as_json))


async def _tail(store: StateStore, lines: int, follow: bool, as_json: bool) -> None:
    from gateway.state.decisions import DecisionLog

    log = DecisionLog(store)
    # Asked first: what is written in between is shown, at worst twice in the middle of a change.
    last = await log.last_entry()
    shown = list(reversed(await log.tail(lines)))
    _print(shown, as_json)
    seen = {record["decision_id"] for record in shown}
    while follow:
        last, records = await log.read_after(last, 1_000)
        _print([r for r in records if r["decision_id"] not in seen], as_json)
        seen = {record["decision_id"] for record in records} or seen
        if not records:
            await asyncio.sleep(_POLL_S)


def _print(records: list[dict[str, Any]], as_json: bool) -> None:
    for record in records:
        print(json.dumps(record) if as_json else decision_line(record), flush=True)


def decision_line(record: dict[str, Any]) -> str:
    """One record for people: when, what became of it, who answered by which way, what it took."""
    moment = datetime.datetime.fromtimestamp(record["at_ms"] / 1000, datetime.UTC)
    stages = " > ".join(
        stage["expert"] + ("" if stage["verdict"] == "accept" else f" ({stage['verdict']})")
        for stage in record["stages"]
    )
    parts = [
        moment.strftime("%H:%M:%S"),
        record["outcome"] if not record["error"] else record["error"],
        f"{record['expert'] or '-'}",
        f"[{stages}]" if stages else "[no call]",
        f"{record.get('category', '-')}/{record.get('policy', '-')}",
        f"{record['total_ms']:.0f} ms",
        f"${record['cost_micro_usd'] / MICRO_USD_PER_USD:.6f}",
        record["decision_id"],
    ]
    return "  ".join(parts)
