"""The engine model and the floor, against figures worked out by hand."""

from __future__ import annotations

import pytest

from deployments.simulate.base import Quiet
from deployments.simulate.cluster import Cluster, cluster_json_schema, load_cluster, shipped_cluster
from deployments.simulate.engine import EngineModel
from deployments.simulate.floor import Floor, RuleBroken, replay
from deployments.simulate.job import Job, JobState
from deployments.simulate.workload import Arrival, Workload
from experts.errors import ConfigError
from experts.strict_yaml import load_text

CLUSTER = """
accelerators: {{count: {count}, device_bytes: 80GiB, kv_reserve_bytes: 10GiB,
               engines_per_accelerator: {engines}, usd_per_hour: 2.0}}
link: {{gigabytes_per_s: 10, efficiency: 0.5, swap_fixed_ms: 100}}
host: {{memory_bytes: {memory}, disk_gigabytes_per_s: 1}}
engine: {{in_flight_max: {batch}, prefill_tokens_per_s: 1000,
         decode_tokens_per_s_single: 100, decode_tokens_per_s_limit: 1000}}
experts: {{bytes: 2000000000}}
"""


def cluster(count: int = 1, batch: int = 4, engines: int = 1, memory: str = "100GiB") -> Cluster:
    text = CLUSTER.format(count=count, batch=batch, engines=engines, memory=memory)
    return load_text(text, Cluster, file="test.yaml")


def job(name: str, inputs: int, outputs: int, expert: str = "a") -> Job:
    return Job(name, expert, 0.0, inputs, outputs)


def run_to_end(engine: EngineModel) -> list[tuple[str, str, float]]:
    seen = []
    while (now_ms := engine.next_event_ms()) < float("inf"):
        engine.advance(now_ms)
        if begun := engine.take_prompt_end():
            seen.append(("first", begun.id, now_ms))
        elif ended := engine.take_answer_end():
            seen.append(("end", ended.id, now_ms))
    return seen


def test_a_step_saturates() -> None:
    speed = cluster().engine
    assert speed.step_ms(1) == pytest.approx(10.0)
    assert speed.step_ms(11) == pytest.approx(20.0)
    assert 1e3 * 1000 / speed.step_ms(1000) == pytest.approx(1000, rel=0.01)


def test_prompts_in_turn_then_answers_together() -> None:
    engine = EngineModel(cluster().engine)
    engine.add(job("x", 100, 11), 0.0)
    engine.add(job("y", 200, 6), 0.0)
    seen = run_to_end(engine)
    # x: prompt 0-100 ms; y: prompt 100-300; then 5 steps of 11 ms for both, 5 of 10 for x alone.
    assert [(kind, name) for kind, name, _ in seen] == [
        ("first", "x"),
        ("first", "y"),
        ("end", "y"),
        ("end", "x"),
    ]
    assert [at for *_, at in seen] == pytest.approx([100.0, 300.0, 355.0, 405.0])


def test_half_an_accelerator_takes_twice_as_long() -> None:
    engine = EngineModel(cluster().engine)
    engine.share = 0.5
    engine.add(job("x", 100, 3), 0.0)
    assert [at for *_, at in run_to_end(engine)] == pytest.approx([200.0, 240.0])


def test_a_prompt_can_be_taken_back() -> None:
    engine = EngineModel(cluster().engine)
    first, second = job("x", 100, 2), job("y", 50, 2)
    engine.add(first, 0.0)
    engine.add(second, 0.0)
    engine.remove_unsent(first, 40.0)
    assert [at for *_, at in run_to_end(engine)] == pytest.approx([90.0, 100.0])
    with pytest.raises(ValueError):
        engine.remove_unsent(second, 100.0)


class Scripted(Quiet):
    """Starts whatever waits once the first swap is done."""

    def __init__(self, floor: Floor) -> None:
        super().__init__(floor)
        self.jobs: list[Job] = []

    def arrived(self, job: Job) -> None:
        self.jobs.append(job)
        if len(self.jobs) == 1:
            self.floor.swap(self.floor.slots[0], job.expert)

    def swapped(self, slot: object) -> None:
        for waiting in self.jobs:
            self.floor.start(self.floor.slots[0], waiting)


def load(*arrivals: tuple[float, str]) -> Workload:
    made = tuple(Arrival(at_ms, expert, 100, 11) for at_ms, expert in arrivals)
    return Workload(tuple(sorted({e for _, e in arrivals})), made, 1_000.0)


def test_a_swap_takes_copy_and_fixed_part_and_disk_when_not_pooled() -> None:
    one = replay(cluster(), load((0.0, "a")), Scripted, patience_ms=1e6)
    assert one.jobs[0].started_ms == pytest.approx(500.0)  # 2 GB at 5 GB/s, and 100 ms
    assert one.jobs[0].ended_ms == pytest.approx(700.0)
    assert not one.jobs[0].hit
    small = cluster(memory="2GiB")  # one expert: b is on disk
    both = Workload(("a", "b"), (Arrival(0.0, "b", 100, 11),), 1_000.0)
    cold = replay(small, both, Scripted, patience_ms=1e6)
    assert cold.jobs[0].started_ms == pytest.approx(2500.0)
    assert cold.disk_loads == 1


def floor_with(resident: str, batch: int = 1) -> tuple[Floor, Job]:
    floor = Floor(cluster(batch=batch), ["a", "b"], 1e6)
    floor.place(floor.slots[0], resident)
    return floor, job("x", 10, 10, "a")


def test_the_floor_allows_no_more_than_a_cluster_can() -> None:
    floor, request = floor_with("b")
    with pytest.raises(RuleBroken, match="wants a"):
        floor.start(floor.slots[0], request)
    floor, request = floor_with("a")
    floor.start(floor.slots[0], request)
    with pytest.raises(RuleBroken, match="full"):
        floor.start(floor.slots[0], job("y", 10, 10))
    with pytest.raises(RuleBroken, match="RUNNING"):
        floor.start(floor.slots[0], request)
    with pytest.raises(RuleBroken, match="runs requests"):
        floor.swap(floor.slots[0], "b")
    with pytest.raises(RuleBroken, match="not waiting"):
        floor.miss(request)
    request.first_token_ms = 0.0
    with pytest.raises(RuleBroken, match="cannot be stopped"):
        floor.stop(request)


def test_who_is_not_started_leaves_when_patience_ends() -> None:
    tally = replay(cluster(), load((0.0, "a"), (10.0, "a")), Quiet, patience_ms=50.0)
    assert [j.state for j in tally.jobs] == [JobState.MISSED] * 2
    assert [j.ended_ms for j in tally.jobs] == [50.0, 60.0]


def test_neighbours_share_their_accelerator() -> None:
    floor = Floor(cluster(engines=2), ["a"], 1e6)
    for slot in floor.slots:
        floor.place(slot, "a")

    class Spread(Quiet):
        def arrived(self, job: Job) -> None:
            self.floor.start(self.floor.slots[int(job.id[1:])], job)

    tally = floor.run(load((0.0, "a"), (0.0, "a")), Spread(floor))
    # 100 + 100 ms alone; at half speed each, both take 400.
    assert [j.ended_ms for j in tally.jobs] == pytest.approx([400.0, 400.0])


@pytest.mark.parametrize("name", ["h100_node", "samba_coe"])
def test_shipped_clusters_load(name: str) -> None:
    shipped = load_cluster(shipped_cluster(name))
    assert shipped.accelerators.count == 8
    assert shipped.pooled_max >= 150


def test_samba_coe_swaps_as_the_paper_reckons() -> None:
    assert load_cluster(shipped_cluster("samba_coe")).copy_ms == pytest.approx(211, abs=1)


@pytest.mark.parametrize(
    ("changed", "to", "reason"),
    [
        ("count: 1,", "count: 1, colour: red,", "colour"),
        ("engines_per_accelerator: 1", "engines_per_accelerator: 40", "need"),
        ("memory_bytes: 100GiB", "memory_bytes: 1GiB", "at least one expert"),
        ("decode_tokens_per_s_limit: 1000", "decode_tokens_per_s_limit: 50", "below"),
    ],
)
def test_wrong_cluster_files_are_refused(changed: str, to: str, reason: str) -> None:
    text = CLUSTER.format(count=1, batch=4, engines=1, memory="100GiB")
    assert changed in text
    with pytest.raises(ConfigError, match=reason):
        load_text(text.replace(changed, to), Cluster, file="test.yaml")


def test_the_schema_names_every_section() -> None:
    assert set(cluster_json_schema()["properties"]) == set(Cluster.model_fields)
