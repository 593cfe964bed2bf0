"""Running a plan: stage after stage until an answer is accepted or nothing is left within the caps.

``policies.cascade`` decides; this module calls, measures and keeps the journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from experts.answer_shape import OddAnswer, check_answer, decode_chunk
from experts.errors import CoeError, DeadlineUnreachable, ExpertFailed
from experts.protocol import ExpertCall, ExpertReply
from experts.types import ExpertSpec, Usage
from gateway.caller import Caller, OpenStage, may_fail_over
from gateway.choice_logprobs import ChoiceLogprobs
from gateway.journal import Decision, Journal, StageNote, coe_head, coe_object
from gateway.relay import ChunkRelay, strip_logprobs, usage_in, usage_of
from gateway.stage_call import Timeouts, is_judged, is_short_of_time, stage_call
from gateway.wire import WireRequest
from policies.cascade import Cascade
from policies.types import Attempt, Evidence, Exhausted, Verdict

__all__ = ["OpenAnswer", "PlanRun"]

_UNREAD = Evidence(0.0, 0, finished=True, elapsed_ms=0.0)


class PlanRun:
    """One request's way through its plan. Used once, by one task."""

    def __init__(
        self,
        *,
        request: WireRequest,
        decision: Decision,
        journal: Journal,
        caller: Caller,
        timeouts: Timeouts,
        now_ms: Callable[[], float],
    ) -> None:
        self.request = request
        self.decision = decision
        self.journal = journal
        self.caller = caller
        self._timeouts = timeouts
        self.now_ms = now_ms
        self._specs = {spec.id: spec for spec in decision.experts}
        self.cascade = Cascade(decision.plan, journal.arrived_ms)
        self.drafts: list[str] = []  # whole answers of judged stages, for agreement

    # --- whole answers ---------------------------------------------------------------------------

    async def complete(self) -> dict[str, Any]:
        """The accepted answer's body; the last draft when nothing better fits into the caps.

        Raises the last stage's error when no stage answered.
        """
        draft: tuple[ExpertReply, StageNote] | None = None
        failure: CoeError | None = None
        step = self.cascade.next_attempt(self.now_ms())
        while isinstance(step, Attempt):
            try:
                draft = await self._ask(step)
            except CoeError as error:
                failure = self._failed(error)
            else:
                if self._verdict_on(step, *draft) is Verdict.ACCEPT:
                    break
            step = self.cascade.next_attempt(self.now_ms())
        if draft is None:
            raise failure or self._nothing_started(step)
        return self._answer(*draft)

    async def _ask(self, attempt: Attempt) -> tuple[ExpertReply, StageNote]:
        note, spec = self._begin(attempt), self._specs[attempt.stage.expert]
        with _Ending(note, self.now_ms):
            reply = await self.caller.complete(
                spec, self._call(attempt), note, short_of_time=self._short_of_time(attempt)
            )
        try:
            check_answer(reply.body)
        except OddAnswer as error:
            raise ExpertFailed(spec.id, 502, str(error)) from error
        note.usage, note.usage_is_estimated = self._usage_of_reply(reply)
        self.charge(note, spec)
        return reply, note

    def _verdict_on(self, attempt: Attempt, reply: ExpertReply, note: StageNote) -> Verdict:
        if not (is_judged(attempt) or self.request.wants_logprobs):
            verdict = self.cascade.judge(_UNREAD)  # as most answers: there is nothing to read
            note.verdict = verdict.value
            return verdict
        logprobs = ChoiceLogprobs(choices=0)
        logprobs.add(reply.body)
        evidence = logprobs.evidence(finished=True, elapsed_ms=0.0, earlier=self.drafts)
        verdict = self.cascade.judge(evidence)
        self.judged(note, evidence, logprobs.text)
        note.verdict = verdict.value
        return verdict

    def judged(self, note: StageNote, evidence: Evidence, text: str | None) -> None:
        """Note what the verdict rests on, and keep a whole draft to compare later ones with."""
        note.mean_logprob = evidence.mean_logprob
        note.confidence = self.cascade.confidence
        note.agreement = evidence.agreement
        if evidence.finished and text is not None:
            self.drafts.append(text)

    def _answer(self, reply: ExpertReply, note: StageNote) -> dict[str, Any]:
        self.journal.served = note
        self.journal.first_token_ms = note.ended_ms
        body = reply.body
        body["model"] = note.expert
        if not self.request.wants_logprobs:
            strip_logprobs(body)
        body["coe"] = coe_object(self.journal)
        return body

    def _usage_of_reply(self, reply: ExpertReply) -> tuple[Usage, bool]:
        usage = usage_of(reply.body)
        if usage is not None:
            return usage, False
        output = self.decision.max_output_tokens * self.request.choices  # nothing better is known
        return Usage(self.decision.prompt_tokens, output), True

    # --- streams ---------------------------------------------------------------------------------

    async def open(self) -> OpenAnswer:
        """A stream that may be sent: judged, or its stage needs no judging.

        A draft is aborted only if another stage can still run. Raises the last stage's error when
        no stage began to answer.
        """
        failure: CoeError | None = None
        step = self.cascade.next_attempt(self.now_ms())
        while isinstance(step, Attempt):
            try:
                answer = await self._begin_stream(step)
            except CoeError as error:
                failure = self._failed(error)
                step = self.cascade.next_attempt(self.now_ms())
                continue
            following = await self._after_judgement(answer)
            if following is None:
                self.journal.served = answer.note
                return answer
            step = following
        raise failure or self._nothing_started(step)

    async def _begin_stream(self, attempt: Attempt) -> OpenAnswer:
        note, spec = self._begin(attempt), self._specs[attempt.stage.expert]
        with _Ending(note, self.now_ms, only_on_error=True):
            opened, batches, first = await self.caller.open(
                spec, self._call(attempt), note, short_of_time=self._short_of_time(attempt)
            )
        note.first_event_ms = self.now_ms()
        answer = OpenAnswer(self, attempt, note, spec, opened, batches, first)
        try:
            if is_judged(attempt):
                await answer.hold_back()
            else:
                answer.look_at_first()
                answer.verdict = self.cascade.judge(Evidence(0.0, 0, False, 0.0))
        except BaseException as error:
            await answer.abort("failed" if isinstance(error, CoeError) else "aborted", error)
            raise
        return answer

    async def _after_judgement(self, answer: OpenAnswer) -> Attempt | Exhausted | None:
        """None: send this answer. Otherwise it was aborted and this comes next."""
        if answer.verdict is Verdict.ACCEPT:
            return None
        answer.charge()
        following = self.cascade.next_attempt(self.now_ms())
        if isinstance(following, Exhausted):
            return None  # a doubtful answer is better than none
        await answer.abort(Verdict.ESCALATE.value, None)
        return following

    # --- both ------------------------------------------------------------------------------------

    def _begin(self, attempt: Attempt) -> StageNote:
        note = StageNote(attempt.stage.expert, started_ms=self.now_ms())
        self.journal.stages.append(note)
        return note

    def _call(self, attempt: Attempt) -> ExpertCall:
        trace, note = self.journal.trace, self.journal.stages[-1]
        return stage_call(
            self.request,
            self.decision,
            attempt,
            request_id=self.journal.request_id,
            timeouts=self._timeouts,
            traceparent=trace.began_stage(note) if trace is not None else None,
        )

    def _short_of_time(self, attempt: Attempt) -> bool:
        return is_short_of_time(self.request, self.decision, attempt, self._timeouts)

    def charge(self, note: StageNote, spec: ExpertSpec) -> None:
        """Bring the stage's cost up to its usage as known now; down only to an exact count."""
        cost = spec.price.cost_micro_usd(note.usage.input_tokens, note.usage.output_tokens)
        self.cascade.spend(max(0, cost - note.cost_micro_usd))
        if cost > note.cost_micro_usd or not note.usage_is_estimated:
            note.cost_micro_usd = cost

    def _failed(self, error: CoeError) -> CoeError:
        """Let the next stage run, or raise when the request itself is at fault."""
        note = self.journal.stages[-1]
        note.verdict, note.error = "failed", type(error).__name__
        if not may_fail_over(error):
            raise error
        self.cascade.record_failure()
        return error

    def _nothing_started(self, step: Exhausted | Attempt) -> CoeError:
        plan = self.decision.plan
        elapsed_ms = self.now_ms() - self.journal.arrived_ms
        return DeadlineUnreachable(plan.stages[0].expert, elapsed_ms, plan.caps.deadline_ms)


class OpenAnswer:
    """A stage's stream: held back and judged, then relayed to the caller."""

    def __init__(
        self,
        run: PlanRun,
        attempt: Attempt,
        note: StageNote,
        spec: ExpertSpec,
        opened: OpenStage,
        batches: AsyncIterator[list[bytes]],
        first: list[bytes],
    ) -> None:
        self._run = run
        self.note = note
        self._spec = spec
        self._opened = opened
        self._reader = _TimedReader(batches)
        self._held = first
        self._ended = False
        self._first_ms = run.now_ms()
        self.verdict = Verdict.WAIT
        request = run.request
        self._relay = ChunkRelay(
            expert=spec.id,
            rename=spec.upstream_model not in (None, spec.id),
            hide_logprobs=is_judged(attempt) and not request.wants_logprobs,
            include_usage=request.include_usage,
        )

    def look_at_first(self) -> None:
        """Raises ExpertFailed while another stage can still take over."""
        try:
            decode_chunk(self._held[0])
        except OddAnswer as error:
            raise self._odd(error) from error

    async def hold_back(self) -> None:
        """Read until the window is full, then judge; sets ``verdict``."""
        run = self._run
        window = run.decision.plan.window
        logprobs = ChoiceLogprobs(run.request.choices)
        self._weigh(logprobs, self._held)
        while True:
            elapsed_ms = run.now_ms() - self._first_ms
            evidence = logprobs.evidence(
                finished=self._ended, elapsed_ms=elapsed_ms, earlier=run.drafts
            )
            self.verdict = run.cascade.judge(evidence)
            if self.verdict is not Verdict.WAIT:
                break
            batch = await self._reader.next(max(0.0, window.hold_ms - elapsed_ms) / 1000.0)
            if batch is None:
                continue  # the window closed by time
            self._ended = not batch
            self._held = self._held + batch
            self._weigh(logprobs, batch)
        self.note.verdict = self.verdict.value
        run.judged(self.note, evidence, logprobs.text)

    def _weigh(self, logprobs: ChoiceLogprobs, payloads: list[bytes]) -> None:
        try:
            logprobs.add_payloads(payloads)
        except OddAnswer as error:
            raise self._odd(error) from error

    def _odd(self, error: OddAnswer) -> ExpertFailed:
        return ExpertFailed(self._spec.id, 502, str(error))

    async def batches(self) -> AsyncGenerator[list[bytes], None]:
        """The caller's payloads, from the first chunk to the last; ``[DONE]`` is the caller's.

        Raises what the expert's stream raises; tokens may have been sent by then.
        """
        journal, relay = self._run.journal, self._relay
        journal.first_token_ms = self._run.now_ms()
        held, self._held = self._held, []
        try:
            if out := relay.feed(held, coe_head(journal)):
                yield out
            async for batch in self._reader:
                if out := relay.feed(batch, None):
                    yield out
        except OddAnswer as error:
            raise self._odd(error) from error
        self._opened.passage.succeeded()
        self.charge()
        self.note.verdict = self.note.verdict or Verdict.ACCEPT.value
        if out := relay.finish(self.note.usage, coe_object(journal)):
            yield out

    def charge(self) -> None:
        """Account for what was generated so far: the expert's own count, or one token a chunk."""
        relay, note, run = self._relay, self.note, self._run
        exact = relay.usage or usage_in(self._held)
        if exact is not None:
            note.usage, note.usage_is_estimated = exact, False
        else:
            seen = relay.chunks + len(self._held)
            note.usage, note.usage_is_estimated = Usage(run.decision.prompt_tokens, seen), True
        run.charge(note, self._spec)

    async def abort(self, verdict: str, error: BaseException | None) -> None:
        """End the generation at the expert and account for it."""
        self.charge()
        self.note.verdict = verdict
        self.note.error = type(error).__name__ if error is not None else None
        if isinstance(error, CoeError):
            self._run.caller.broke(self._opened, self._spec, error)
        await self.aclose()

    async def aclose(self) -> None:
        """Idempotent. Closing before the end aborts the generation."""
        if self.note.ended_ms is None:
            self.note.ended_ms = self._run.now_ms()
        await self._reader.aclose()
        await self._opened.stack.aclose()


class _Ending:
    """Stamps a stage's end, whichever way it ends."""

    def __init__(
        self, note: StageNote, now_ms: Callable[[], float], *, only_on_error: bool = False
    ) -> None:
        self._note = note
        self._now_ms = now_ms
        self._only_on_error = only_on_error

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or not self._only_on_error:
            self._note.ended_ms = self._now_ms()
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self._note.verdict = "aborted"


class _TimedReader:
    """Reads an async iterator with a time limit that does not disturb it.

    A read that outlasts its limit stays under way in a task and is picked up by the next one.
    """

    def __init__(self, batches: AsyncIterator[list[bytes]]) -> None:
        self._batches = batches
        self._reading: asyncio.Task[list[bytes]] | None = None

    async def next(self, timeout_s: float) -> list[bytes] | None:
        """The next batch, empty at the end, None when it did not come in time."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read())
        done, _ = await asyncio.wait({self._reading}, timeout=timeout_s)
        if not done:
            return None
        reading, self._reading = self._reading, None
        return reading.result()

    def __aiter__(self) -> _TimedReader:
        return self

    async def __anext__(self) -> list[bytes]:
        if self._reading is None:
            return await anext(self._batches)
        reading = self._reading
        try:
            batch = await reading
        finally:
            reading.cancel()
            self._reading = None
        if not batch:
            raise StopAsyncIteration
        return batch

    async def aclose(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            await asyncio.wait({reading})
            if not reading.cancelled():
                reading.exception()  # looked at, so that asyncio does not report it as lost
        if isinstance(self._batches, AsyncGenerator):
            await self._batches.aclose()

    async def _read(self) -> list[bytes]:
        return await anext(self._batches, [])
