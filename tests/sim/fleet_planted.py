"""Gateways and hosts with a known mistake each, and the rule that has to catch it."""

from __future__ import annotations

from typing import Any

from tests.sim.fleet import Client, Gateway, Host


class NoCanary(Host):
    """Believes every copy."""

    def canary_passes(self, expert: str) -> bool:
        return True


class ServesAfterAFailedSwap(Host):
    """Forgets that a failed copy has overwritten what was there."""

    def end_swap(self, expert: str, took_ms: float, fault: str) -> None:
        super().end_swap(expert, took_ms, "" if fault == "failed" else fault)
        if fault == "failed":
            self.weights = None


class EvictsWhatIsInUse(Host):
    """Lets go of the weights of an expert that runs or is waited for."""

    def pinned(self) -> set[str]:
        return set()


class PoolsWithoutCounting(Host):
    """Lets a second load begin before the first is counted."""

    def load(self, expert: str) -> None:
        super().load(expert)
        self.pool.add("something else")


class RetriesAfterTheFirstToken(Gateway):
    """Starts an answer again that the caller has seen the beginning of."""

    def broken(self, client: Client, host: Host) -> None:
        self.send(client)


class ForgetsTheOrphans(Gateway):
    """Does nothing about the requests of a host that is gone."""

    def broken(self, client: Client, host: Host) -> None:
        self.suspect_until[host.name] = self.world.now_ms + 1_000.0


class SendsTwice(Gateway):
    """Takes a host that is no longer listed for dead, and does not withdraw what runs there."""

    def list(self) -> None:
        super().list()
        for client in list(self.world.clients.values()):
            unlisted = client.at is not None and client.at.name not in self.listed
            if client.end is None and not client.sent and unlisted:
                self.send(client)


class LeavesTheDepartedBehind(Gateway):
    """Does not tell the host that the caller has hung up."""

    def left(self, client: Client) -> None:
        self.world.end(client, "left")


class MovesWithoutTakingBack(Gateway):
    """Sends a waiting call to an idle host and leaves it where it was."""

    def move(self, client: Client, host: Host) -> None:
        self.send(client, but=host.name)


class ListsOnce(Gateway):
    """Keeps to the hosts that it found at the start."""

    def list(self) -> None:
        if not self.listed:
            super().list()


PLANTED: dict[type[Any], str] = {
    NoCanary: "a token for e. from (damaged|None)",
    ServesAfterAFailedSwap: "a token for e. from None",
    EvictsWhatIsInUse: "not pooled|no owner|is in use",
    PoolsWithoutCounting: "over its memory|no room|not served",
    RetriesAfterTheFirstToken: "cut after its first token|started again",
    ForgetsTheOrphans: "without an end",
    SendsTwice: "two owners|no owner|ended",
    MovesWithoutTakingBack: "two owners|no owner|ended",
    LeavesTheDepartedBehind: "has ended and is still owned",
    ListsOnce: "not served after the faults",
}
"""Each mistake and the rule (a regular expression) that has to catch it."""
