"""Whether the state store is worth asking: a breaker, pure (time is an argument).

Up: everything passes. One failure takes it down. Down: nothing passes until the back-off is over,
then one call passes as a probe while the others are still refused. The probe's success brings the
store back up; its failure doubles the back-off. So an absent store costs at most one timeout per
back-off window, whatever the load.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Admission(Enum):
    """How a call was let through; it is handed back with the call's outcome."""

    NORMAL = "normal"
    PROBE = "probe"


@dataclass(slots=True)
class StoreHealth:
    """Times in milliseconds on the caller's monotonic clock."""

    first_backoff_ms: float = 500.0
    max_backoff_ms: float = 4_000.0
    _backoff_ms: float = 0.0
    _retry_at_ms: float | None = None  # None: up
    _probing: bool = False

    @property
    def up(self) -> bool:
        return self._retry_at_ms is None

    def retry_in_ms(self, now_ms: float) -> float:
        """How long calls will still be refused; 0 when up or when a probe may pass."""
        return 0.0 if self._retry_at_ms is None else max(0.0, self._retry_at_ms - now_ms)

    def admit(self, now_ms: float) -> Admission | None:
        """None: refuse the call at once."""
        if self._retry_at_ms is None:
            return Admission.NORMAL
        if self._probing or now_ms < self._retry_at_ms:
            return None
        self._probing = True
        return Admission.PROBE

    def succeeded(self, admission: Admission) -> bool:
        """Returns True when this brought the store back up.

        An answer to a call from before the failure does not: it says nothing about now.
        """
        if admission is Admission.NORMAL:
            return False
        self._probing, self._retry_at_ms, self._backoff_ms = False, None, 0.0
        return True

    def failed(self, admission: Admission, now_ms: float) -> bool:
        """Returns True when this took the store down.

        Calls that were under way together fail together; only the first of them counts.
        """
        was_up = self.up
        if not was_up and admission is Admission.NORMAL:
            return False
        self._probing = False
        self._backoff_ms = min(
            self.max_backoff_ms, max(self.first_backoff_ms, 2 * self._backoff_ms)
        )
        self._retry_at_ms = now_ms + self._backoff_ms
        return was_up

    def abandoned(self, admission: Admission) -> None:
        """The call ended without evidence (its caller gave up): the next one may probe."""
        if admission is Admission.PROBE:
            self._probing = False
