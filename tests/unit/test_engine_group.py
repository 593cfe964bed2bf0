"""Engines that take turns on one device, over engines and a device that only keep books.

The device has as many bytes as it has, an awake engine needs its own and a sleeping one leaves a
residue; a wake or a start that does not fit fails as CUDA does. Failures can be planted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from experts.compat import architecture_digest
from experts.device_memory import (
    DeviceMemory,
    Footprint,
    footprint,
    pool_shares,
    shortfalls,
    start_utilization,
)
from experts.engine_group import EngineGroup
from experts.engine_states import (
    TRANSITIONS,
    Action,
    EngineState,
    IllegalEngineTransition,
    Step,
    next_step,
    transition,
)
from experts.errors import ArtifactError, CanaryMismatch, CoeError, HostLost, SwapFailed
from experts.vllm_engine import EngineSettings, SwapReport

AWAKE, ASLEEP, ABSENT = EngineState.AWAKE, EngineState.ASLEEP, EngineState.ABSENT


@dataclass
class Device:
    """``total`` bytes; engines by the bytes each of them holds now; ``log`` of what happened."""

    total: int = 100
    held: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    failing: list[str] = field(default_factory=list)  # "wake wide": the next such step fails

    @property
    def free(self) -> int:
        return self.total - sum(self.held.values())

    def does(self, what: str, engine: Engine, size: int) -> None:
        step = f"{what} {engine.name}"
        self.log.append(step)
        if step in self.failing:
            self.failing.remove(step)
            raise RuntimeError(f"planted: {step}")
        if size - self.held.get(engine.name, 0) > self.free:
            raise RuntimeError("CUDA Error: out of memory")
        self.held[engine.name] = size


@dataclass
class Engine:
    name: str
    device: Device
    needs: int
    residue: int
    resident: str | None = None
    wrong: bool = False  # answers its canary wrongly
    dead: bool = False
    pooled: Mapping[str, Any] = field(default_factory=dict)
    in_pool: frozenset[str] = frozenset()
    entry_bytes: int = 7
    load_ms: float | None = None

    async def make_resident(self, expert: str, keep: Sequence[str] = ()) -> SwapReport:
        assert self.device.held[self.name] == self.needs, "a copy into an engine that is not awake"
        self.device.log.append(f"copy {expert}")
        self.resident = None
        if self.wrong:
            raise CanaryMismatch(expert, 1, 2, 0.0, 0.0)
        self.resident = expert
        return SwapReport(expert, "pool", 1, 1.0, 1.0, 1.0)

    async def prefetch(self, expert: str, keep: Sequence[str] = ()) -> bool:
        return True

    async def evict(self, expert: str) -> None:
        self.in_pool -= {expert}

    async def sleep(self) -> None:
        self.device.does("sleep", self, self.residue)

    async def wake(self) -> bool:
        self.device.does("wake", self, self.needs)
        return True

    async def prove(self, expert: str) -> float:
        self.device.log.append(f"prove {expert}")
        if self.wrong:
            raise CanaryMismatch(expert, 1, 2, 0.0, 0.0)
        return 1.0

    async def device_memory(self) -> DeviceMemory | None:
        return DeviceMemory(self.device.free, self.device.total)

    async def serve(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"engine": self.name}

    async def check_health(self) -> None:
        if self.dead:
            raise HostLost("", "")

    def shutdown(self) -> None:
        self.device.log.append(f"stop {self.name}")
        self.device.held.pop(self.name, None)


@dataclass
class World:
    """Starts engines on the device; ``shares``: what each was told it may take of it."""

    device: Device = field(default_factory=Device)
    needs: int = 60
    residue: int = 5
    small: str = ""  # this one needs half
    engines: dict[str, Engine] = field(default_factory=dict)
    shares: list[float | None] = field(default_factory=list)
    lazily: list[bool] = field(default_factory=list)

    async def start_engine(
        self,
        experts: Mapping[str, str],
        settings: EngineSettings,
        *,
        progress: Callable[[str], None],
        lazy: bool = False,
    ) -> tuple[Engine, dict[str, str]]:
        name = sorted(experts)[0]
        needs = self.needs // 2 if name == self.small else self.needs
        engine = Engine(name, self.device, needs, self.residue)
        try:
            self.device.does("start", engine, needs)
        except RuntimeError as error:
            raise ArtifactError(name, str(error)) from error
        self.shares.append(settings.device_share)
        self.lazily.append(lazy)
        self.engines[name] = engine
        engine.resident = next(iter(experts))
        return engine, {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Experts a and b of one architecture, w and x of another, z of a third."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for expert, width in (("a", 8), ("w", 16), ("b", 8), ("x", 16), ("z", 32)):
        folder = root / expert
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"hidden_size": width}))
        save_file({"weight": np.zeros((width, 4), np.float32)}, folder / "model.safetensors")
        found[expert] = str(folder)
    return found


async def started(
    world: World, folders: Mapping[str, str], experts: str = "awbx", engines_max: int = 2
) -> tuple[EngineGroup, dict[str, str]]:
    return await EngineGroup.start(
        {e: folders[e] for e in experts},
        EngineSettings(pool_bytes=4096),
        engines_max=engines_max,
        progress=lambda _note: None,
        start_engine=world.start_engine,
    )


async def test_each_engine_rehearses_before_the_next_one_starts(folders: dict[str, str]) -> None:
    world = World()
    group, refused = await started(world, folders)
    assert refused == {}
    assert world.device.log == [
        *("start a", "sleep a", "wake a", "prove a", "sleep a"),
        *("start w", "sleep w", "wake w", "prove w", "sleep w"),
        "wake a",
    ]
    assert dict(group.engine_of) == {"a": "a", "b": "a", "w": "w", "x": "w"}
    assert group.states == {"a": AWAKE, "w": ASLEEP}


async def test_three_ways_cheapest_first(folders: dict[str, str]) -> None:
    world = World()
    group, _ = await started(world, folders)
    world.device.log.clear()
    assert (await group.make_resident("b")).way == "in_place"
    assert world.device.log == ["copy b"]
    world.device.log.clear()
    assert (await group.make_resident("x")).way == "wake"
    assert world.device.log == ["sleep a", "wake w", "copy x"]
    world.device.log.clear()
    # Its weights are still those it fell asleep with: proved, not copied.
    report = await group.make_resident("b")
    assert (report.way, report.swap.source, report.swap.bytes) == ("wake", "device", 0)
    assert world.device.log == ["sleep w", "wake a", "prove b"]
    world.engines["w"].dead = True
    await group.check_health()
    world.device.log.clear()
    assert (await group.make_resident("w")).way == "start"
    assert world.device.log == ["sleep a", "start w", "copy w"]
    assert world.lazily == [False, False, True]
    assert group.resident == "w"


async def test_a_wake_is_tried_twice_and_then_the_engine_starts_afresh(
    folders: dict[str, str],
) -> None:
    world = World()
    group, _ = await started(world, folders)
    world.device.failing = ["wake w"]
    assert (await group.make_resident("w")).way == "wake"
    await group.make_resident("a")
    world.device.failing = ["wake w", "wake w"]
    with pytest.raises(SwapFailed, match="does not wake") as caught:
        await group.make_resident("w")
    assert caught.value.expert == "w"
    assert group.states == {"a": ASLEEP, "w": ABSENT}
    assert group.resident is None
    assert (await group.make_resident("x")).way == "start"


async def test_pain_08_an_engine_that_answers_wrongly_after_its_wake_is_not_kept(
    folders: dict[str, str],
) -> None:
    world = World()
    group, _ = await started(world, folders)
    world.engines["w"].wrong = True
    with pytest.raises(CanaryMismatch):
        await group.make_resident("x")
    assert group.states["w"] is ABSENT
    assert (await group.make_resident("x")).way == "start"
    # In place nothing but the expert itself is in doubt.
    world.engines["w"].wrong = True
    with pytest.raises(CanaryMismatch):
        await group.make_resident("w")
    assert group.states["w"] is AWAKE


async def test_an_engine_that_does_not_fall_asleep_makes_room_all_the_same(
    folders: dict[str, str],
) -> None:
    world = World()
    group, _ = await started(world, folders)
    world.device.failing = ["sleep a"]
    await group.make_resident("w")
    assert group.states == {"a": ABSENT, "w": AWAKE}
    assert (await group.make_resident("a")).way == "start"


async def test_an_engine_beside_whose_residue_another_cannot_wake_is_refused(
    folders: dict[str, str],
) -> None:
    """It starts and sleeps well; but then the first one has not enough left."""
    world = World(Device(total=100), needs=88, residue=10, small="z")
    group, refused = await started(world, folders, "awz", engines_max=3)
    assert re.search("too small for these engines", refused["z"])
    assert group.states == {"a": AWAKE, "w": ASLEEP}
    assert "stop z" in world.device.log


async def test_too_many_architectures_are_refused_with_the_difference(
    folders: dict[str, str],
) -> None:
    group, refused = await started(World(), folders, "awz")
    assert set(refused) == {"z"}
    assert re.search(r"hidden_size: 32, the engine has 8.*engines_max", refused["z"])
    with pytest.raises(SwapFailed, match="not in the weight pool"):
        await group.make_resident("z")


async def test_a_second_engine_that_cannot_start_leaves_the_first_in_service(
    folders: dict[str, str],
) -> None:
    world = World(Device(failing=["start w"]))
    group, refused = await started(world, folders)
    assert set(refused) == {"w", "x"}
    assert (await group.make_resident("b")).way == "in_place"


@given(
    st.lists(st.tuples(st.sampled_from("abwxz"), st.sets(st.integers(0, 8))), max_size=12),
)
@settings(max_examples=60, deadline=None)
async def test_whatever_fails_one_engine_at_most_is_awake_and_the_device_is_never_overrun(
    folders: dict[str, str], turns: list[tuple[str, set[int]]]
) -> None:
    """Every turn ends with its expert resident or with an error, and the next one can begin."""
    world = World(Device(total=100), needs=80, residue=10)
    group, _ = await started(world, folders, "awbxz", engines_max=3)
    kinds = [f"{what} {name}" for what in ("start", "sleep", "wake") for name in "awz"]
    for expert, failing in turns:
        world.device.failing = [kinds[at] for at in failing] * 2
        try:
            await group.make_resident(expert)
        except CoeError:
            assert group.resident != expert
        else:
            assert group.resident == expert
        states = list(group.states.values())
        assert states.count(AWAKE) <= 1
        assert set(states) <= {AWAKE, ASLEEP, ABSENT}
        assert world.device.free >= 0
        assert set(world.device.held) == {n for n, s in group.states.items() if s is not ABSENT}
    world.device.failing = []
    for expert in "zaw":
        await group.make_resident(expert)
        assert group.resident == expert


async def test_each_running_engine_shows_its_part_of_the_pool(folders: dict[str, str]) -> None:
    world = World()
    group, _ = await started(world, folders)
    world.engines["a"].in_pool = frozenset("ab")
    world.engines["a"].load_ms, world.engines["w"].load_ms = 40.0, 900.0
    narrow, wide = group.pools
    assert (narrow.experts, narrow.pooled, narrow.entry_bytes) == (("a", "b"), {"a", "b"}, 7)
    assert narrow.group == architecture_digest(folders["b"]) != wide.group
    assert narrow.limit_bytes + wide.limit_bytes <= 4096
    assert group.load_ms == 900.0
    await group.evict("b")
    assert group.in_pool == {"a"}
    world.engines["w"].dead = True
    await group.check_health()
    assert [pool.group for pool in group.pools] == [narrow.group], "what is gone holds nothing"
    await group.evict("x")


def test_no_step_begins_while_another_is_under_way() -> None:
    for between in set(EngineState) - {AWAKE, ASLEEP, ABSENT, EngineState.HALF_AWAKE}:
        with pytest.raises(IllegalEngineTransition):
            next_step({"a": between, "b": ASLEEP}, "b")
    assert next_step({"a": EngineState.HALF_AWAKE, "b": ASLEEP}, "b") == Step(Action.KILL, "a")
    with pytest.raises(IllegalEngineTransition):
        transition(AWAKE, next(e for s, e in TRANSITIONS if s is ABSENT))


def test_the_design_page_holds_the_same_table() -> None:
    page = Path("deployments/swap/design.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \|$", page.split("## Engines")[1], re.M)
    assert set(rows) - {("state", "event", "next")} == {
        (state.value, event.value, following.value)
        for (state, event), following in TRANSITIONS.items()
    }


def test_device_books() -> None:
    whole, gib = DeviceMemory(100 << 30, 100 << 30), 1 << 30
    assert start_utilization(whole) == 0.9
    assert start_utilization(DeviceMemory(50 << 30, 100 << 30)) == 0.499
    one = footprint(whole, DeviceMemory(40 * gib, 100 * gib), DeviceMemory(98 * gib, 100 * gib))
    assert one == Footprint(awake_bytes=60 * gib, asleep_bytes=2 * gib)
    big = Footprint(awake_bytes=99 * gib, asleep_bytes=5 * gib)
    assert shortfalls(100 * gib, {"one": one, "big": big}) == {"big": 1 * gib}


def test_every_engine_gets_room_for_its_largest_expert_first() -> None:
    sizes = {"many": dict.fromkeys("abcdefghij", 10), "one": {"x": 40}}
    assert pool_shares(90, sizes) == {"many": 50, "one": 40}
    assert pool_shares(45, sizes) == {"many": 45, "one": 0}
    assert sum(pool_shares(1000, sizes).values()) <= 1000
