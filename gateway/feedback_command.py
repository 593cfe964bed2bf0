"""``coe feedback``: what callers said of answers, out of the store and into a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.ask import CommandFailed
from gateway.keys_command import ConfigOption, JsonOption, configuration, with_store

if TYPE_CHECKING:
    from deployments.store import StateStore

__all__ = ["feedback_app", "read_feedback"]

_COLUMNS = frozenset({"input_sha256", "expert", "score"})

feedback_app = typer.Typer(help="What callers said of answers.", no_args_is_help=True)


@feedback_app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Parquet file to write, for coe train --feedback.")],
    config: ConfigOption = None,
    json_file: JsonOption = None,
) -> None:
    """Write all feedback that the store holds as rows of an outcomes table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gateway.feedback import outcome_rows

    rows = outcome_rows(with_store(config, configuration(config), _records))
    if not rows:
        raise CommandFailed("nobody has given any feedback yet; see POST /v1/feedback.")
    pq.write_table(pa.Table.from_pylist(rows), out)
    if json_file == "-":
        print(json.dumps({"rows": len(rows), "file": str(out)}))
        return
    if json_file is not None:
        Path(json_file).write_text(json.dumps({"rows": len(rows), "file": str(out)}))
    print(f"{len(rows)} decisions written to {out}")


async def _records(store: StateStore) -> list[dict[str, Any]]:
    from gateway.state.feedback import FeedbackStore

    return [record async for record in FeedbackStore(store).records()]


def read_feedback(path: Path) -> list[dict[str, Any]]:
    """The rows of an exported file. Raises CommandFailed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise CommandFailed(f"{path}: {error}") from error
    if rows and (missing := _COLUMNS - rows[0].keys()):
        raise CommandFailed(f"{path}: no column {', '.join(sorted(missing))}.")
    return rows
