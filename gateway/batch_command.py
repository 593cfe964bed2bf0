"""``coe batch`` as a process: files, signals, bar, exit status."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.batch import BatchOptions, Stop, Summary, run_batch
from gateway.batch_files import InputFile, OutputFile
from gateway.batch_report import BatchBar

__all__ = ["exit_status", "run_files"]

_INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


def run_files(
    source_path: Path, target_path: Path, options: BatchOptions, *, retry_failed: bool
) -> Summary:
    """Run a batch to its end, or to Ctrl-C. Raises BatchError."""
    with InputFile(source_path) as source, OutputFile(target_path) as target:
        if retry_failed:
            target.drop_failed()
        return asyncio.run(_run(source, target, options))


def exit_status(summary: Summary) -> int:
    """0: every line has a good answer. 1: some failed. 130: stopped with lines left."""
    if summary.left:
        return _INTERRUPTED
    return 1 if summary.tally.total.failed else 0


async def _run(source: InputFile, target: OutputFile, options: BatchOptions) -> Summary:
    stop = Stop()
    with _stopping_on_signals(stop), BatchBar() as bar:
        return await run_batch(
            source, target, options, stop=stop, watch=bar, draw=random.SystemRandom().random
        )


@contextmanager
def _stopping_on_signals(stop: Stop) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop.ask)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
