from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import pytest

from experts.errors import QueueFull
from routers.batching import MicroBatcher


class Worker:
    """Doubles numbers; ``gate`` holds a batch back until the test lets it go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.begun = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        self.begun.release()
        assert self.gate.wait(10)
        if self.error:
            raise self.error
        return [2 * item for item in items]


def batcher(
    worker: Worker, max_batch: int = 4, max_wait_ms: float = 0.0, queue_max: int = 100
) -> MicroBatcher[int, int]:
    return MicroBatcher(
        worker, name="t", max_batch=max_batch, max_wait_ms=max_wait_ms, queue_max=queue_max
    )


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    made = Worker()
    yield made
    made.gate.set()


async def started(worker: Worker, batches: int) -> None:
    """Wait until that many batches have begun."""
    for _ in range(batches):
        assert await asyncio.to_thread(worker.begun.acquire, timeout=10)


async def test_one_thread_that_is_not_the_event_loop(worker: Worker) -> None:
    b = batcher(worker)
    answers = await asyncio.gather(*[b.submit(i) for i in range(10)])
    await b.aclose()
    assert answers == [2 * i for i in range(10)]
    assert len(worker.threads) == 1
    assert threading.get_ident() not in worker.threads


async def test_a_lone_item_does_not_wait_for_company(worker: Worker) -> None:
    b = batcher(worker, max_wait_ms=3_600_000.0)
    assert await asyncio.wait_for(b.submit(1), 10) == 2
    await b.aclose()


async def test_items_that_arrive_together_share_a_batch(worker: Worker) -> None:
    b = batcher(worker, max_batch=4)
    await asyncio.gather(*[b.submit(i) for i in range(10)])
    await b.aclose()
    assert worker.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_a_gathering_batch_starts_as_soon_as_it_is_full(worker: Worker) -> None:
    b = batcher(worker, max_batch=3, max_wait_ms=3_600_000.0)
    first = [b.submit(1), b.submit(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert worker.batches == []
    assert await asyncio.wait_for(asyncio.gather(*first, b.submit(3)), 10) == [2, 4, 6]
    assert worker.batches == [[1, 2, 3]]
    await b.aclose()


async def test_what_waits_during_a_run_is_the_next_batch(worker: Worker) -> None:
    worker.gate.clear()
    b = batcher(worker, max_wait_ms=3_600_000.0)
    first = b.submit(1)
    await started(worker, 1)
    rest = [b.submit(i) for i in (2, 3)]
    worker.gate.set()
    await asyncio.gather(first, *rest)
    assert worker.batches == [[1], [2, 3]]
    await b.aclose()


async def test_queue_bound_refuses_then_recovers(worker: Worker) -> None:
    worker.gate.clear()
    b = batcher(worker, queue_max=2)
    running = b.submit(0)
    await started(worker, 1)
    waiting = [b.submit(1), b.submit(2)]
    with pytest.raises(QueueFull) as caught:
        b.submit(3)
    assert caught.value.depth == 2
    worker.gate.set()
    assert await asyncio.gather(running, *waiting) == [0, 2, 4]
    assert await b.submit(3) == 6
    await b.aclose()


async def test_a_cancelled_item_frees_its_place_and_is_not_computed(worker: Worker) -> None:
    worker.gate.clear()
    b = batcher(worker, queue_max=1)
    running = b.submit(0)
    await started(worker, 1)
    b.submit(1).cancel()
    await asyncio.sleep(0)
    replacement = b.submit(2)
    worker.gate.set()
    assert await asyncio.gather(running, replacement) == [0, 4]
    assert worker.batches == [[0], [2]]
    await b.aclose()


async def test_an_item_cancelled_while_it_runs_harms_nobody(worker: Worker) -> None:
    worker.gate.clear()
    b = batcher(worker)
    one, other = b.submit(1), b.submit(2)
    await started(worker, 1)
    one.cancel()
    worker.gate.set()
    assert await other == 4
    await b.aclose()


async def test_an_error_reaches_every_caller_and_the_next_batch_works(worker: Worker) -> None:
    worker.error = MemoryError("no room")
    b = batcher(worker)
    results = await asyncio.gather(b.submit(1), b.submit(2), return_exceptions=True)
    assert results == [worker.error, worker.error]
    worker.error = None
    assert await b.submit(3) == 6
    await b.aclose()


async def test_close_finishes_what_was_accepted_and_refuses_the_rest(worker: Worker) -> None:
    worker.gate.clear()
    b = batcher(worker, max_batch=1)
    accepted = [b.submit(i) for i in range(3)]
    closing = asyncio.create_task(b.aclose())
    await started(worker, 1)
    with pytest.raises(RuntimeError, match="closed"):
        b.submit(9)
    assert not closing.done()
    worker.gate.set()
    await closing
    assert await asyncio.gather(*accepted) == [0, 2, 4]


async def test_close_returns_when_everything_was_cancelled(worker: Worker) -> None:
    b = batcher(worker, max_wait_ms=3_600_000.0)
    for future in [b.submit(1), b.submit(2)]:
        future.cancel()
    await asyncio.wait_for(b.aclose(), 10)
    assert worker.batches == []


@pytest.mark.parametrize("bad", [{"max_batch": 0}, {"queue_max": 0}, {"max_wait_ms": -1.0}])
def test_senseless_bounds_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        batcher(Worker(), **bad)  # type: ignore[arg-type]
