"""Running a plan, as decisions only: which stage next, is this answer good enough, what is spent.

Pure: the caller owns the clock, the calls and the money. One ``Cascade`` serves one request:

    attempt = cascade.next_attempt(now_ms)      # run attempt.stage within attempt.timeout_ms
    verdict = cascade.judge(evidence)           # repeatedly while streaming, once on a whole answer
    cascade.spend(micro_usd)                    # what the stage cost, also when it was aborted
    cascade.record_failure()                    # or: it failed before the caller saw a token

After ESCALATE or a failure, ask ``next_attempt`` again. If it answers ``Exhausted`` after an
ESCALATE, the caller still holds the draft that was not accepted and should serve that: ask before
aborting a held-back stream. Nothing may follow ACCEPT, because tokens may have been sent.

The caps hold whatever the caller does: at most ``caps.stages`` attempts, none after the deadline,
and none whose worst case would take the money spent, plus the worst case of a stage whose cost is
not yet known, above ``caps.cost_micro_usd``.
"""

from __future__ import annotations

from policies.types import Attempt, Evidence, Exhausted, Plan, StreamWindow, Verdict


class Cascade:
    """The state of one request's cascade. Times are milliseconds on the caller's clock."""

    def __init__(self, plan: Plan, started_ms: float) -> None:
        self._plan = plan
        self._deadline_ms = started_ms + plan.caps.deadline_ms
        self._attempts = 0
        self._spent_micro_usd = 0
        self._unsettled_micro_usd = 0
        self._accepted = False
        self._confidence: float | None = None  # of the running stage's answer
        self._confidence_before: float | None = None

    @property
    def confidence(self) -> float | None:
        """The calibrated confidence that the running stage was judged by; None: not judged."""
        return self._confidence

    @property
    def spent_micro_usd(self) -> int:
        return self._spent_micro_usd

    @property
    def stages_run(self) -> int:
        """Attempts granted so far, failed ones included."""
        return self._attempts

    def next_attempt(self, now_ms: float) -> Attempt | Exhausted:
        """Grant the next stage, or say which cap forbids it. Raises RuntimeError after ACCEPT."""
        if self._accepted:
            raise RuntimeError("an answer was accepted; no stage may follow it")
        obstacle = self._obstacle(now_ms)
        if obstacle is not None:
            return Exhausted(obstacle)
        index = self._attempts
        self._attempts += 1
        self._confidence_before, self._confidence = self._confidence, None
        self._unsettled_micro_usd += self._plan.stage_costs_micro_usd[index]
        return Attempt(
            index=index,
            stage=self._plan.stages[index],
            timeout_ms=self._deadline_ms - now_ms,
            is_last=self._attempts == self._stages_max,
        )

    def judge(self, evidence: Evidence) -> Verdict:
        """Judge the running stage's prefix, or its whole answer when ``evidence.finished``.

        ``evidence.elapsed_ms`` counts from the stage's first token, so that waiting for an expert
        to become resident is not held against its draft. The last stage is accepted at once.
        Raises RuntimeError before the first attempt.
        """
        if not self._attempts:
            raise RuntimeError("no stage is running")
        rule = self._plan.stages[self._attempts - 1].accept
        if rule is None or self._attempts == self._stages_max:
            verdict = Verdict.ACCEPT
        elif not _window_is_full(self._plan.window, evidence):
            verdict = Verdict.WAIT
        else:
            self._confidence = confidence = rule.calibration.confidence(evidence)
            bound = rule.bound(self._confidence_before)
            sure = confidence is not None and confidence >= bound
            verdict = Verdict.ACCEPT if sure else Verdict.ESCALATE
        self._accepted = verdict is Verdict.ACCEPT
        return verdict

    def record_failure(self) -> None:
        """The running stage failed before the caller saw a token: the next one may run.

        Call ``spend`` first if the failed call cost anything; without it the call counts as free.
        """
        if not self._attempts:
            raise RuntimeError("no stage is running")
        self._unsettled_micro_usd = 0
        self._accepted = False

    def spend(self, micro_usd: int) -> None:
        """Add the true cost of the running stage; it replaces the stage's worst case."""
        if micro_usd < 0:
            raise ValueError("money cannot be negative")
        self._spent_micro_usd += micro_usd
        self._unsettled_micro_usd = 0

    @property
    def _stages_max(self) -> int:
        return min(len(self._plan.stages), self._plan.caps.stages)

    def _obstacle(self, now_ms: float) -> str | None:
        if self._attempts >= self._stages_max:
            return "stages"
        if now_ms >= self._deadline_ms:
            return "deadline"
        committed = self._spent_micro_usd + self._unsettled_micro_usd
        worst = committed + self._plan.stage_costs_micro_usd[self._attempts]
        return "cost" if worst > self._plan.caps.cost_micro_usd else None


def _window_is_full(window: StreamWindow, evidence: Evidence) -> bool:
    return (
        evidence.finished
        or evidence.logprob_tokens >= window.tokens
        or evidence.elapsed_ms >= window.hold_ms
    )
