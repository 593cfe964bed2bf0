"""What a swap to each expert costs from where the slot stands now.

Experts of one architecture share an engine, and a swap between them is a copy. Where a host runs
several engines, all but one sleep, and a swap to an expert of a sleeping engine puts one engine to
sleep and wakes (or starts) another first. That costs much more, and about the same for every expert
of the engine, so it is measured per engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deployments.swap.lanes import Lane
from deployments.swap.measures import Measured

__all__ = ["EngineCosts"]


class EngineCosts:
    """Keeps every lane's ``swap`` at the measurement that holds now.

    ``engines`` maps experts to engines; experts outside it share one. ``measured`` makes an empty
    measurement.
    """

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        engines: Mapping[str, str],
        measured: Callable[[], Measured],
    ) -> None:
        self._lanes = lanes
        self._engine_of = {expert: engines.get(expert, "") for expert in lanes}
        self._in_place = {expert: lane.swap for expert, lane in lanes.items()}
        self._turning = {engine: measured() for engine in set(self._engine_of.values())}
        self._awake: str | None = None

    def in_place(self, expert: str) -> bool:
        """Whether a swap to this expert is a copy into the engine that is awake.

        Before anything has run, every engine may be: nobody has measured otherwise.
        """
        return self._awake in (None, self._engine_of[expert])

    def awake(self, expert: str) -> None:
        """The slot has turned to this expert's engine."""
        engine = self._engine_of[expert]
        if engine == self._awake:
            return
        self._awake = engine
        if len(self._turning) > 1:
            for name, lane in self._lanes.items():
                own = self._engine_of[name]
                lane.swap = self._in_place[name] if own == engine else self._turning[own]
