"""Each policy on traces small enough to work out by hand; then rules that hold for all of them.

In the small cluster a request is 100 + 100 ms alone, and a swap is 500 ms.
"""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.simulate.cluster import Cluster, SchedulerSettings
from deployments.simulate.compare import POLICIES, Objectives, compare, make_policy
from deployments.simulate.floor import Tally, replay
from deployments.simulate.job import Job, JobState
from deployments.simulate.metrics import jain_index, judge
from deployments.simulate.workload import Arrival, Workload
from deployments.swap.config import SchedulerConfig
from experts.strict_yaml import load_text

PATIENCE_MS = 1e6


def cluster(slots: int, batch: int = 4, pooled: str = "100GiB") -> Cluster:
    text = f"""
accelerators: {{count: {slots}, device_bytes: 80GiB, kv_reserve_bytes: 10GiB, usd_per_hour: 3.6}}
link: {{gigabytes_per_s: 10, efficiency: 0.5, swap_fixed_ms: 100}}
host: {{memory_bytes: {pooled}, disk_gigabytes_per_s: 1}}
engine: {{in_flight_max: {batch}, prefill_tokens_per_s: 1000,
         decode_tokens_per_s_single: 100, decode_tokens_per_s_limit: 1000}}
experts: {{bytes: 2000000000}}
"""
    return load_text(text, Cluster, file="test.yaml")


def workload(*arrivals: tuple[float, str], outputs: int = 11) -> Workload:
    """Arrivals as (ms, expert), each of 100 input tokens."""
    made = tuple(
        Arrival(at_ms, expert, 100, outputs)
        for at_ms, expert in sorted(arrivals, key=lambda pair: pair[0])
    )
    experts = tuple(sorted({arrival.expert for arrival in made}))
    return Workload(experts, made, 10_000.0)


def run(name: str, load: Workload, on: Cluster, patience_ms: float = PATIENCE_MS) -> Tally:
    return replay(on, load, make_policy(name, load), patience_ms=patience_ms)


def order(tally: Tally) -> str:
    """Experts in the order in which their requests began."""
    served = [job for job in tally.jobs if job.state is JobState.SERVED]
    return "".join(
        job.expert for job in sorted(served, key=lambda j: (j.started_ms, int(j.id[1:])))
    )


def waits(tally: Tally) -> list[float]:
    return [round(job.started_ms - job.arrived_ms, 3) for job in tally.jobs]


MIXED = workload(*((float(n), e) for n, e in enumerate("abcabc")))


@pytest.mark.parametrize(
    ("policy", "served", "swaps"),
    [
        ("ours", "aabbcc", 3),
        ("llama_swap", "aabbcc", 3),
        ("clairvoyant", "aabbcc", 3),
        ("fcfs_lru", "abcabc", 6),
        ("ollama", "abcabc", 6),
        ("static", "aa", 0),
    ],
)
def test_a_mix_on_one_slot(policy: str, served: str, swaps: int) -> None:
    tally = run(policy, MIXED, cluster(1))
    assert order(tally) == served
    assert tally.swaps == swaps


def test_fcfs_waits_are_those_of_six_turns() -> None:
    tally = run("fcfs_lru", workload(*((0.0, e) for e in "abcabc")), cluster(1))
    assert waits(tally) == [500 + 700 * n for n in range(6)]  # swap 500, answer 200, and so on


def test_llama_swap_waits_are_those_of_three_turns() -> None:
    tally = run("llama_swap", workload(*((0.0, e) for e in "abcabc")), cluster(1))
    # Two prompts of 100 ms, then ten steps of 11 ms each for both (the first one ends at once with
    # the second: it may only decode once both prompts are done).
    turn_ms = 500 + 200 + 110
    assert waits(tally) == [500 + turn_ms * n for n in (0, 1, 2, 0, 1, 2)]


def test_fcfs_evicts_the_least_recently_used() -> None:
    load = workload((0, "a"), (1_000, "b"), (2_000, "a"), (3_000, "c"), (4_000, "a"), (5_000, "b"))
    tally = run("fcfs_lru", load, cluster(2))
    assert [job.hit for job in tally.jobs] == [False, False, True, False, True, False]
    assert tally.jobs[3].slot == tally.jobs[1].slot
    assert tally.swaps == 4


def test_fcfs_loads_a_second_copy_when_the_first_is_full() -> None:
    tally = run("fcfs_lru", workload((0, "a"), (1, "a"), (2, "a")), cluster(2, batch=1))
    assert [job.slot for job in tally.jobs] == [0, 1, 0]
    assert tally.swaps == 2


def test_llama_swap_lets_a_busy_model_keep_its_slot() -> None:
    busy = [(100.0 * n, "a") for n in range(60)]
    tally = run("llama_swap", workload(*busy, (1_000.0, "b")), cluster(1))
    cold = next(job for job in tally.jobs if job.expert == "b")
    assert cold.started_ms > 6_000  # only when nobody asks for a any more


def test_ollama_blocks_everybody_behind_its_head() -> None:
    # Both slots answer when c comes: a request for b, resident and with room, waits behind it.
    load = workload((0, "a"), (0, "b"), (550, "c"), (560, "b"))
    tally = run("ollama", load, cluster(2))
    behind = tally.jobs[3]
    assert behind.started_ms >= 700
    assert run("fcfs_lru", load, cluster(2)).jobs[3].started_ms >= 700
    assert run("llama_swap", load, cluster(2)).jobs[3].started_ms == 560


def test_ollama_unloads_after_the_keep_alive() -> None:
    load = workload((0, "a"), (200_000, "a"), (600_000, "a"))
    tally = run("ollama", load, cluster(1))
    assert [job.hit for job in tally.jobs] == [False, True, False]
    assert tally.swaps == 2
    assert run("fcfs_lru", load, cluster(1)).swaps == 1


def test_static_places_by_demand_and_turns_the_rest_away() -> None:
    load = workload(*((float(n), "a") for n in range(40)), (3, "b"), (4, "b"), (5, "c"))
    tally = run("static", load, cluster(2))
    assert tally.swaps == 0
    assert {job.slot for job in tally.jobs if job.expert == "a"} == {0}
    assert [job.expert for job in tally.jobs if job.state is JobState.MISSED] == ["c"]
    alone = run("static", workload(*((float(n), "a") for n in range(8))), cluster(2))
    assert {job.slot for job in alone.jobs} == {0, 1}


def test_the_planner_prefetches_and_keeps_what_is_needed_first() -> None:
    load = workload((600, "a"), (1_500, "b"), (3_000, "c"), (3_500, "b"))
    tally = run("clairvoyant", load, cluster(2))
    assert waits(tally) == [0, 0, 0, 0]
    assert tally.swaps == 3  # c takes the slot of a, which nobody needs again


def test_ours_serves_the_cold_expert_within_its_bound() -> None:
    busy = [(50.0 * n, "a") for n in range(1_200)]
    load, on = workload(*busy, (5_000.0, "b")), cluster(1)
    config = SchedulerConfig(in_flight_max=4)
    answer_ms = 4 * 100 + 10 * on.engine.step_ms(4)
    turn_ms = 500 + config.residency_ms(500) + answer_ms
    bound_ms = config.age_bound_ms + 3 * turn_ms

    def cold_wait_ms(policy: str) -> float:
        jobs: list[Job] = run(policy, load, on).jobs
        return next(job.started_ms - job.arrived_ms for job in jobs if job.expert == "b")

    assert cold_wait_ms("ours") <= bound_ms
    assert cold_wait_ms("llama_swap") > bound_ms  # the same load starves it there


def test_ours_takes_back_what_has_sent_nothing_when_a_drain_lasts_too_long() -> None:
    hurried = {"drain_deadline_ms": 50.0, "min_residency_ms": 0.0, "min_residency_factor": 0.0}
    on = cluster(1, batch=8).model_copy(update={"scheduler": SchedulerSettings(**hurried)})
    load = workload(*((600.0, "a") for _ in range(8)), *((601.0, "b") for _ in range(40)), (0, "a"))
    tally = run("ours", load, on)
    assert tally.stops > 0
    assert all(job.state is JobState.SERVED for job in tally.jobs)
    assert max(job.starts for job in tally.jobs) == 2  # a drain takes a request back only once


TINY = [
    MIXED,
    workload((0, "a"), (0, "b"), (0, "c"), (900, "a"), (1_800, "b"), (2_700, "c")),
    workload(*((300.0 * n, e) for n, e in enumerate("aababcabcc"))),
    workload(*((0.0, e) for e in "aaaabbbbcccc")),
]


@pytest.mark.parametrize("load", TINY)
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("objective_ms", [650.0, 1_500.0, 4_000.0])
def test_nobody_beats_the_clairvoyant(load: Workload, slots: int, objective_ms: float) -> None:
    result = compare(cluster(slots), load, Objectives(objective_ms, PATIENCE_MS))
    bound = result.policies["clairvoyant"]
    assert set(result.policies) == set(POLICIES)
    assert all(other.goodput <= bound.goodput for other in result.policies.values())
    if objective_ms == 4_000.0:  # at an objective in reach, its own plan is as good as any
        assert result.planner.goodput == bound.goodput


def check_slots(tally: Tally, batch: int) -> None:
    """From the finished jobs alone: no slot ran two experts at once, nor more than its batch."""
    served = sorted(
        (job for job in tally.jobs if job.state is JobState.SERVED), key=lambda job: job.slot
    )
    for _, group in itertools.groupby(served, key=lambda job: job.slot):
        jobs = list(group)
        for job in jobs:
            beside = [o for o in jobs if o.started_ms <= job.started_ms < o.ended_ms]
            assert len(beside) <= batch
            assert {other.expert for other in beside} == {job.expert}


LOADS = st.lists(
    st.tuples(st.integers(0, 8_000), st.sampled_from("abcde")), min_size=1, max_size=40
)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(arrivals=LOADS, slots=st.integers(1, 3), batch=st.integers(1, 3), hurried=st.booleans())
def test_every_arrival_is_served_once_or_counted_as_a_miss(
    policy: str, arrivals: list[tuple[int, str]], slots: int, batch: int, hurried: bool
) -> None:
    load = workload(*((float(at), expert) for at, expert in arrivals), outputs=30)
    patience_ms = 1_500.0 if hurried else PATIENCE_MS
    on = cluster(slots, batch, pooled="6GiB")
    tally = run(policy, load, on, patience_ms)
    assert len(tally.jobs) == len(arrivals)
    assert len({job.id for job in tally.jobs}) == len(arrivals)
    for job in tally.jobs:
        if job.state is JobState.SERVED:
            assert job.arrived_ms <= job.started_ms < job.first_token_ms <= job.ended_ms
            assert job.started_ms - job.arrived_ms <= patience_ms + 1e-6
        else:
            assert job.state is JobState.MISSED
            assert job.ended_ms >= job.arrived_ms
    check_slots(tally, batch)
    assert sum(job.starts for job in tally.jobs) == tally.stops + sum(
        job.state is JobState.SERVED for job in tally.jobs
    )
    if policy == "static":
        assert tally.swaps == 0
    elif not hurried:
        assert all(job.state is JobState.SERVED for job in tally.jobs)


def test_equal_arrivals_give_equal_results() -> None:
    def result() -> str:
        outcome = compare(cluster(2), TINY[2], Objectives(1_000.0, PATIENCE_MS))
        return json.dumps(outcome.as_json(), sort_keys=True)

    assert result() == result()


def test_figures_by_hand() -> None:
    load = workload((0, "a"), (0, "b"))
    on = cluster(1)
    tally = run("static", load, on, patience_ms=2_000.0)
    result = judge(tally, load, on, ttft_objective_ms=100.0, patience_ms=2_000.0)
    assert (result.served, result.missed, result.goodput) == (1, 1, 0.5)
    assert result.expert_mean_wait_s == {"a": 0.0, "b": 2.0}  # the miss waited its patience
    assert result.fairness == 0.5
    assert result.hit_rate == 1.0
    # 10 s of one accelerator at 3.60 dollars an hour is one cent, for 111 tokens.
    assert result.cost_micro_usd_per_mtok == pytest.approx(10_000 * 1e6 / 111, abs=1)


def test_jain_index() -> None:
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([]) == jain_index([0.0, 0.0]) == 1.0
