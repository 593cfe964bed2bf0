"""Structured logs: one JSON object per line, one line per finished request, never a prompt.

Lines written while a request is served carry its ids, whoever writes them.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import msgspec

from gateway.http_errors import CLIENT_CLOSED_STATUS, row_for
from gateway.journal import CURRENT, Journal

__all__ = ["JsonFormatter", "log_request", "status_of"]

REQUEST_DONE = "request_done"
_SECRET = re.compile(r"\b(coe-sk-|sk-|[Bb]earer )[A-Za-z0-9._~+/=-]{8,}")
_BLOT = r"\1[redacted]"
log = logging.getLogger("coe.gateway")


class JsonFormatter(logging.Formatter):
    """Renders a record, and the ``fields`` given as its ``extra``, as one JSON object.

    Secrets that begin as ours do, and bearer tokens, are blotted out wherever they stand: a library
    may quote a header in an exception.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at_ms": int(record.created * 1000),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_ids(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _SECRET.sub(_BLOT, msgspec.json.encode(line, enc_hook=str).decode())


def _ids() -> dict[str, str]:
    journal = CURRENT.get()
    if journal is None:
        return {}
    return {"request_id": journal.request_id, "decision_id": journal.decision_id}


def log_request(journal: Journal) -> None:
    """One line per request: ids, outcome, who answered, what it took and cost."""
    if not log.isEnabledFor(logging.INFO):
        return
    ended_ms = journal.ended_ms if journal.ended_ms is not None else journal.arrived_ms
    fields = {
        "request_id": journal.request_id,
        "decision_id": journal.decision_id,
        "trace_id": journal.trace.trace_id if journal.trace else None,
        "endpoint": journal.endpoint,
        "key_id": journal.access.key.id if journal.access.key else None,
        "status": status_of(journal),
        "outcome": journal.outcome,
        "error": type(journal.error).__name__ if journal.error else None,
        "expert": journal.served.expert if journal.served else None,
        "stages": len(journal.stages),
        "cost_micro_usd": journal.spent_micro_usd,
        "ms": round(ended_ms - journal.arrived_ms, 1),
    }
    log.info(REQUEST_DONE, extra={"fields": fields})


def status_of(journal: Journal) -> int:
    """The status the request ended with; 499 when the client left, the error's after a 200."""
    if journal.error is not None:
        return row_for(journal.error).status
    if journal.outcome == "client_closed":
        return CLIENT_CLOSED_STATUS
    return 200 if journal.outcome == "ok" else 500
