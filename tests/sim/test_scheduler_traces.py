"""Hard stories as scripts: each command at its time, and below it every effect that it must have.

``COE_REWRITE_TRACES=1`` writes what happens into the files; review that as a diff. A script starts
with its settings; then ``<time in ms> <event> <arguments>``, effects indented below.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from deployments.swap.config import SchedulerConfig
from deployments.swap.core import Scheduler
from deployments.swap.effects import AbortInFlight, BeginSwap, Effect, Grant, Refuse, WakeAt

FOLDER = Path(__file__).parent / "traces"
SCRIPTS = sorted(FOLDER.glob("*.txt"))


def _settings(line: str) -> tuple[SchedulerConfig, str | None]:
    values: dict[str, Any] = dict(word.split("=") for word in line.split()[1:])
    resident = values.pop("resident", None)
    numbers = {
        key: (int if key in ("queue_max", "in_flight_max") else float)(value)
        for key, value in values.items()
    }
    return SchedulerConfig(**numbers), resident


def _perform(scheduler: Scheduler, line: str) -> list[Effect] | bool:
    time, event, *words = line.split()
    now_ms = float(time)
    plain = [word for word in words if "=" not in word]
    named = {key: float(value) for key, value in (w.split("=") for w in words if "=" in w)}
    match event:
        case "arrive":
            return scheduler.arrive(
                *plain,
                now_ms=now_ms,
                priority=int(named.get("priority", 0)),
                deadline_ms=named.get("deadline"),
            )
        case "swap_done":
            return scheduler.swap_done(plain[0], now_ms, named["took"])
        case "first_token":
            return scheduler.first_token(plain[0])
        case "swap_failed" | "retire":
            reason = " ".join(plain[1:])
            return getattr(scheduler, event)(plain[0], reason, now_ms)
        case "tick":
            return scheduler.tick(now_ms)
        case "cancel" | "finish" | "requeue" | "announce" | "restore":
            return getattr(scheduler, event)(plain[0], now_ms)
    raise AssertionError(f"no such event: {event}")


def _shown(effect: Effect) -> str:
    match effect:
        case Grant(name):
            return f"grant {name}"
        case Refuse(name):
            why = f" ({effect.detail})" if effect.detail else ""
            return f"refuse {name} {effect.reason} after {effect.wait_ms:.0f} ms{why}"
        case BeginSwap(expert):
            return f"begin swap to {expert}"
        case AbortInFlight(names):
            return f"abort {' '.join(names)}"
        case WakeAt(None):
            return "sleep"
        case WakeAt(at_ms):
            return f"wake at {at_ms:.0f}"


def _replay(text: str) -> str:
    out: list[str] = []
    scheduler: Scheduler | None = None
    for line in text.splitlines():
        if line.startswith("    "):
            continue
        out.append(line)
        if line.startswith("settings"):
            config, resident = _settings(line)
            scheduler = Scheduler(config, ("a", "b", "c"), resident)
        elif line and not line.startswith("#"):
            assert scheduler is not None, "a script begins with its settings"
            done = _perform(scheduler, line)
            effects = [str(done)] if isinstance(done, bool) else [_shown(e) for e in done]
            out.extend(f"    {effect}" for effect in effects)
            out[-1:] = [out[-1], f"    -> {scheduler.phase} {scheduler.resident or '-'}"]
    return "\n".join(out) + "\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script(script: Path) -> None:
    text = script.read_text()
    happened = _replay(text)
    if os.environ.get("COE_REWRITE_TRACES"):
        script.write_text(happened)
    else:
        assert happened == text


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 8
