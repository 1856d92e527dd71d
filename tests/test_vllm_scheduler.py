"""vLLM's own scheduler with KVortex's scheduler side, over simulated ranks and models.

A state machine lets requests come, return, be aborted and preempted, and copies be late and fail.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from budget import budget
from hypothesis import seed
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simulated_vllm import (
    BLOCK,
    FLIPPED,
    PAGE_BYTES,
    SimulatedDisk,
    SimulatedModel,
    SimulatedRank,
    continued,
    make_request,
    make_scheduler,
    merged,
    plan_of,
    vllm_config,
)

from kvortex import KVortexConfig
from kvortex.config import GIB
from kvortex.core import ConfigError
from kvortex.disk.format import PAGE

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from kvortex.block import Block
    from kvortex.core import DiskMove, Job, StepPlan

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

LONGEST_PROMPT = 28
MANY_STEPS = 1000
MOST_ROUNDS = 5
picks = st.integers(0, 99)
fails = st.sampled_from([None, None, 0, 1])
rarely = st.sampled_from([False] * 5 + [True])
ends = st.lists(st.tuples(picks, picks, st.sampled_from([True, True, True, False])), max_size=4)


class SchedulerMachine(RuleBasedStateMachine):
    """Steps as vLLM's engine does; `overlap` schedules a step before the last one's output."""

    config: ClassVar[Any]
    hasher: ClassVar[Any]
    num_ranks: ClassVar[int]
    overlap: ClassVar[bool]
    loads_fail: ClassVar[bool]
    late: ClassVar[bool]
    """Whether ranks start with one slot, and prepare the others from step to step."""
    disk_slots: ClassVar[int]
    """Of each rank's disk; 0 if there are none."""
    seen: ClassVar[Counter[str]]

    @initialize(
        num_blocks=st.sampled_from([14, 10, 20]),
        num_slots=st.sampled_from([24, 40, 60, 8, 3]),
        missing_slots=st.sampled_from([0, 0, 1, 3]),
        budget=st.sampled_from([16, 64, 5]),
        policy=st.sampled_from(["lru", "lru_freq"]),
        admission=st.sampled_from(["always", "adaptive"]),
        apart=st.booleans(),
        verify=st.sampled_from(["always", "off"]),
    )
    def open(
        self,
        num_blocks: int,
        num_slots: int,
        missing_slots: int,
        budget: int,
        policy: str,
        admission: str,
        apart: bool,
        verify: str = "off",
    ) -> None:
        """`apart` makes requests wait for their loads beside those that run."""
        pool = (num_slots + 0.5) * PAGE_BYTES * self.num_ranks / GIB
        ours = KVortexConfig(
            ram_pool_gb=pool,
            eviction_policy=policy,
            admission=admission,
            verify=verify,
            **self.disk_settings(),
        )
        config = self.config
        config.kv_transfer_config.kv_connector_extra_config = ours.model_dump()
        config.parallel_config.world_size = self.num_ranks
        config.scheduler_config.max_num_batched_tokens = budget
        config.scheduler_config.max_num_seqs = 4
        self.scheduler = make_scheduler(config, num_blocks, overlap=self.overlap)
        self.connector = self.scheduler.connector
        self.offload = self.connector._scheduler.offload
        self.index = self.offload.tier.index
        self.arrivals = Counter[str]()
        if apart:
            self.connector._scheduler.costs.load_bytes_per_s = 1.0
        assert self.index.num_slots == num_slots
        slots = [num_slots] * self.num_ranks
        slots[-1] = max(1, num_slots - missing_slots)
        self.ranks = [
            SimulatedRank(num_blocks, count, 1 if self.late else count) for count in slots
        ]
        self.overflow = self.offload.overflow
        for rank in self.ranks if self.disk_slots else ():
            rank.disk = SimulatedDisk(rank.host, self.disk_slots)
        self.model = SimulatedModel(self.ranks, ahead=self.overlap)
        self.bits_flip = self.loads_fail and ours.verify != "off"
        self.num_blocks = num_blocks
        self.requests: list[Request] = []
        self.prefixes: dict[bytes, tuple[int, ...]] = {}
        self.forgotten = 0
        self.steps = 0
        self.flying: deque[tuple[SchedulerOutput, ModelRunnerOutput, set[str]]] = deque()

    # What users do

    @rule(
        start=st.integers(0, 2),
        length=st.sampled_from([16, 28, 21, 9, 12, 5, 3]),
        end=st.lists(st.integers(0, 4), max_size=3),
        max_tokens=st.sampled_from([4, 1, 8]),
    )
    def arrive(self, start: int, length: int, end: list[int], max_tokens: int) -> None:
        self.add(continued([start], length) + end, max_tokens)

    @rule(
        who=st.lists(picks, min_size=1, max_size=3),
        more=st.lists(st.integers(0, 4), max_size=5),
        max_tokens=st.sampled_from([4, 1, 8]),
        lost=st.sampled_from([True, True, False]),
    )
    def come_back(self, who: list[int], more: list[int], max_tokens: int, lost: bool) -> None:
        """Some at once, and mostly when the GPU has lost what it had."""
        if lost:
            self.go_on(12, end=True)
            self.reset(running=False, connector=False)
        past = [self.requests[pick % len(self.requests)] for pick in who if self.requests]
        for request in past:
            self.add([*request.all_token_ids, *more], max_tokens)

    @precondition(lambda self: self.loads_fail)
    @rule(
        who=st.lists(picks, min_size=1, max_size=3),
        more=st.lists(st.integers(0, 4), max_size=5),
        fails=st.lists(fails, min_size=1, max_size=4),
        midway=st.one_of(st.none(), picks),
    )
    def come_back_to_failures(
        self, who: list[int], more: list[int], fails: list[int | None], midway: int | None
    ) -> None:
        """With others behind that share what is loaded, and tokens to compute from it."""
        self.come_back(who, more, 4, lost=True)
        self.come_back(who[:1], [*more, 1], 4, lost=False)
        for number, fail in enumerate(fails):
            self.step(fail, midway if number == 0 else None)

    @precondition(lambda self: self.bits_flip)
    @rule(
        who=st.lists(picks, min_size=1, max_size=3),
        more=st.lists(st.integers(0, 4), max_size=5),
        flips=st.lists(st.tuples(picks, st.sampled_from([0, 1, None])), min_size=1, max_size=3),
        midway=st.one_of(st.none(), picks),
    )
    def come_back_to_flipped_bits(
        self,
        who: list[int],
        more: list[int],
        flips: list[tuple[int, int | None]],
        midway: int | None,
    ) -> None:
        """In blocks that they will load, on one rank or all, and with others behind them."""
        self.go_on(12, end=True)
        past = [self.requests[pick % len(self.requests)] for pick in who if self.requests]
        for pick, rank in flips:
            self.flip(past, pick, rank)
        self.come_back(who, more, 4, lost=True)
        self.come_back(who[:1], [*more, 1], 4, lost=False)
        self.step(midway=midway)
        self.end_all()

    @rule(pick=picks)
    def abort(self, pick: int) -> None:
        from vllm.v1.request import RequestStatus

        names = sorted(self.scheduler.requests)
        if names:
            name = names[pick % len(names)]
            self.seen[f"aborted {self.scheduler.requests[name].status.name}"] += 1
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    @rule(running=rarely, connector=rarely)
    def reset(self, running: bool, connector: bool) -> None:
        """A successful one of both caches, as after which the weights may be others."""
        busy = bool(self.connector._scheduler._gpu._held) or self.loads_apart()
        busy = busy or bool(self.flying)  # a step under way may still write to what is given up
        if self.forgets_resets:
            running = running and not self.flying
        try:
            done = self.scheduler.reset_prefix_cache(running, connector)
        except RuntimeError:
            assert busy or self.blocks_held_by_who_waits()
            return
        self.seen[f"reset {done=}"] += 1
        if connector:
            assert self.index.resident == 0
            self.forgotten = self.index._orders
            assert self.overflow is None or self.overflow.disk.index.resident == 0
        if connector and done:
            self.model.epoch += 1

    # What the engine does

    @rule(pick=picks)
    def ask_again(self, pick: int) -> None:
        """As vLLM does for a request that it then has no room for."""
        waiting = list(self.scheduler.waiting)
        if waiting:
            request = waiting[pick % len(waiting)]
            tokens, _ = self.connector.get_num_new_matched_tokens(request, 0)
            assert tokens is None or (tokens % BLOCK == 0 and tokens < request.num_tokens)

    @rule(fail=fails, midway=st.one_of([st.none()] * 3 + [picks]))
    def step(self, fail: int | None = None, midway: int | None = None) -> None:
        """`fail` names the rank on which loads fail, `midway` a request aborted meanwhile."""
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            fails_on = fail % self.num_ranks if self.loads_fail and fail is not None else None
            result = self.execute(output, fails_on)
            self.flying.append((output, result, self.model.read_spoilt))
            if midway is not None:
                self.abort(midway)
            if self.overlap and len(self.flying) < 2 and output.total_num_scheduled_tokens:
                return
        if self.flying:
            self.update(*self.flying.popleft())

    @rule(steps=st.integers(2, 8), end=st.booleans(), fail=fails)
    def go_on(self, steps: int, end: bool, fail: int | None = None) -> None:
        for _ in range(steps):
            self.step(fail)
            if end:
                self.end_all()

    @rule(ends=ends)
    def end_some(self, ends: list[tuple[int, int, bool]]) -> None:
        for rank, number, well in ends:
            busy = [rank for rank in self.ranks if rank.under]
            if busy:
                busy[rank % len(busy)].end(number, well)

    @rule()
    def end_all(self) -> None:
        for rank in self.ranks:
            while rank.under:
                rank.end(0)
            while rank.disk is not None and rank.disk.under:
                rank.disk.end(0)

    # How it is done

    def disk_settings(self) -> dict[str, Any]:
        if not self.disk_slots:
            return {}
        size = (self.disk_slots + 0.5) * PAGE * self.num_ranks / GIB
        waiting_ms = 600_000  # a test does not depend on how fast it runs
        how = {"disk_pool_gb": size, "disk_read_deadline_ms": waiting_ms}
        return {"disk_path": "/nowhere", **how}

    def add(self, prompt: list[int], max_tokens: int) -> None:
        name = f"request {len(self.requests)}"
        request = make_request(name, prompt[:LONGEST_PROMPT], max_tokens, self.hasher)
        self.requests.append(request)
        self.scheduler.add_request(request)

    def flip(self, requests: list[Request], pick: int, rank: int | None) -> None:
        """A bit of a block that these could load, on every rank if `rank` is None."""
        slots = [block.slot for one in requests for block in self.readable(one)]
        if slots:
            slot = slots[pick % len(slots)]
            ranks = self.ranks if rank is None else [self.ranks[rank % self.num_ranks]]
            flipped = [one.flip(slot) for one in ranks]
            self.seen["flipped on several ranks"] += sum(flipped) > 1

    def readable(self, request: Request) -> list[Block]:
        """Its blocks in host memory."""
        from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

        keys = [make_block_hash_with_group_id(one, 0) for one in request.block_hashes]
        return [block for key in keys if (block := self.index.get(key)) is not None]

    def found_corrupt(self) -> dict[tuple[int, int], int]:
        """Blocks of loads that every rank has told of, by job and position, and their slots."""
        under_way = self.offload._flights
        return {
            (job_id, position): slot
            for rank in self.ranks
            for (job_id, position), slot in rank.corrupt.items()
            if job_id not in under_way
        }

    def given_up(self) -> set[int]:
        """Slots that nobody is to use any more."""
        suspects: set[int] = set(self.offload.tier.suspects)
        return set(self.found_corrupt().values()) - suspects

    def execute(self, output: SchedulerOutput, fails_on: int | None) -> ModelRunnerOutput:
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        plan = plan_of(output)
        assert plan.has_forward == (output.total_num_scheduled_tokens > 0)
        self.prepare_slots()
        self.assert_sound(plan)
        for number, rank in enumerate(self.ranks):
            rank.begin(plan, number == fails_on)
        bad_blocks = {block for rank in self.ranks for block in rank.bad_blocks}
        sampled = self.model.run(output)
        untold = [result for _, result, _ in self.flying if invalid_blocks(result)]
        assert bad_blocks or untold or not self.model.read_spoilt, "this should be computed again"
        for rank in self.ranks:
            rank.store(plan)
            rank.take_bad_blocks()
            self.arrivals.update(rank.take_arrived())
        arrived = {name for name, ranks in self.arrivals.items() if ranks == self.num_ranks}
        for name in arrived:
            del self.arrivals[name]
        self.seen["loads"] += len(plan.loads)
        self.seen["stores"] += len(plan.stores)
        self.seen["bad"] += bool(bad_blocks)
        told = KVConnectorOutput(
            kv_connector_worker_meta=merged(rank.report() for rank in self.ranks),
            invalid_block_ids=bad_blocks,
            finished_recving=arrived,
        )
        return ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index={name: number for number, name in enumerate(sampled)},
            sampled_token_ids=list(sampled.values()),
            kv_connector_output=told,
        )

    def assert_sound(self, plan: StepPlan) -> None:
        """Nothing is moved into or out of a slot whose bytes are known to have changed."""
        given_up = self.given_up()
        moves: list[Job | DiskMove] = [*plan.loads, *plan.stores]
        moves += [*plan.disk.reads, *plan.disk.writes] if plan.disk is not None else []
        assert given_up.isdisjoint(slot for move in moves for slot in move.slots.tolist())

    def prepare_slots(self) -> None:
        """Each rank at its own pace; the first has memory for thirty at most."""
        self.steps += 1
        for number, rank in enumerate(self.ranks):
            rank.grow(self.steps % (number + 1) == 0)
        if self.steps == 30:
            self.ranks[0].run_out()

    def update(
        self, output: SchedulerOutput, result: ModelRunnerOutput, read_spoilt: set[str]
    ) -> None:
        """No token is kept that was computed from a failed load."""
        lengths = {name: self.named(name).num_tokens for name in read_spoilt}
        self.scheduler.update_from_output(output, result)
        assert lengths == {name: self.named(name).num_tokens for name in lengths}

    def loads_apart(self) -> bool:
        """Whether blocks are filled for a request that does not run, maybe aborted since."""
        return any(
            request.is_finished() or request.status.name == "WAITING_FOR_REMOTE_KVS"
            for request in self.scheduler.requests.values()
        )

    def blocks_held_by_who_waits(self) -> bool:
        """Whether a request keeps what was loaded for it until it is its turn."""
        manager = self.scheduler.kv_cache_manager
        waiting = self.scheduler.requests.keys() - {
            one.request_id for one in self.scheduler.running
        }
        return any(any(manager.get_block_ids(name)) for name in waiting)

    @property
    def forgets_resets(self) -> bool:
        """Whether vLLM, at a second reset, delivers what a step under way at the first sampled."""
        return any(hasattr(request, "async_tokens_to_discard") for request in self.requests)

    def named(self, name: str) -> Request:
        return self.requests[int(name.split()[1])]

    @invariant()
    def what_is_readable_is_right_on_every_rank(self) -> None:
        from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

        for request in self.requests:
            for position, block_hash in enumerate(request.block_hashes, 1):
                key = make_block_hash_with_group_id(block_hash, 0)
                self.prefixes[key] = tuple(request.all_token_ids[: position * BLOCK])
        for block in self.index:
            expected = (self.model.epoch, *self.prefixes[block.key])
            for rank in self.ranks:
                assert rank.host[block.slot] in (expected, FLIPPED)
        for block in self.overflow.disk.index if self.overflow is not None else ():
            expected = (self.model.epoch, *self.prefixes[block.key])
            for rank in self.ranks:
                assert rank.disk is not None
                key, found = rank.disk.slots[block.slot]
                assert key == block.key
                assert found in (expected, FLIPPED)

    @invariant()
    def slots_are_conserved(self) -> None:
        self.index.check()
        if self.overflow is not None:
            self.overflow.disk.index.check()

    @invariant()
    def what_came_back_corrupt_is_counted_and_its_slot_is_nobodys(self) -> None:
        """But for one whose bytes came from disk, and which has been given another chance."""
        found, suspects = self.found_corrupt(), self.offload.tier.suspects
        slots = self.given_up()
        assert self.offload.counters.corrupt_blocks == len(found)
        assert suspects.keys() <= set(found.values())
        assert all(block.from_disk for block in suspects.values())
        assert self.index.quarantined <= len(slots)  # some may still have another reader
        assert slots.isdisjoint(self.index._free)
        assert slots.isdisjoint(block.slot for block in self.index)

    @invariant()
    def what_was_under_way_before_a_reset_is_never_readable(self) -> None:
        assert all(block.order > self.forgotten for block in self.index)

    @invariant()
    def outputs_are_what_the_model_says(self) -> None:
        for request in self.requests:
            prompt = list(request.prompt_token_ids or ())
            assert list(request.all_token_ids) == continued(prompt, request.num_tokens)

    @invariant()
    def every_token_of_a_prompt_has_an_explanation(self) -> None:
        for tracked in self.connector._scheduler._tracked.values():
            told = tracked.explanation
            if told is not None:
                tokens = told.gpu_tokens + told.loaded_tokens + sum(told.missed_tokens.values())
                assert tokens == (tracked.request.num_prompt_tokens - 1) // BLOCK * BLOCK

    def teardown(self) -> None:
        """Let everything end: nothing is left anywhere."""
        if not hasattr(self, "flying"):
            return
        for _ in range(MANY_STEPS):
            if not self.flying and not self.scheduler.has_requests():
                break
            self.end_all()
            self.step()
        self.count()
        assert not self.scheduler.has_requests(), "some request or copy never ends"
        assert not self.scheduler.requests
        assert not self.scheduler.running
        assert all(request.is_finished() for request in self.requests)
        assert self.connector.has_pending_push_work() is self.offload.pending is False
        side = self.connector._scheduler
        assert not any([side._tracked, side._gpu._held, side._loads._under_way, self.arrivals])
        assert self.index.reserved == 0
        assert self.index.quarantined == len(self.given_up())
        if all(rank.has_told_its_size for rank in self.ranks):
            usable = min(len(rank.host) for rank in self.ranks) - self.index.quarantined
            assert self.index.num_slots == usable
        else:
            assert self.late or not self.steps
        assert all(block.pins == 0 for block in self.index)
        if self.overflow is not None:
            assert not any([side._prefetcher._since, side._prefetcher._late])
            assert not any([self.overflow.fetches._fetches, self.overflow.write_behind._writing])
            assert self.overflow.fetches._room == self.overflow.fetches._most_held
            assert self.overflow.disk.index.reserved == 0
            assert all(block.pins == 0 for block in self.overflow.disk.index)
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == self.num_blocks - 1  # all but the null block
        self.what_is_readable_is_right_on_every_rank()
        self.slots_are_conserved()

    def count(self) -> None:
        self.seen["samples taken back"] += self.model.taken_back
        self.seen["preempted"] += sum(request.num_preemptions for request in self.requests)
        self.seen["evictions"] += self.offload.tier.evictions
        self.seen.update(
            {name: n for name, n in self.offload.counters.as_dict().items() if isinstance(n, int)}
        )


class DiskMachine(SchedulerMachine):
    """With disks, which keep requests waiting."""

    @rule(ends=ends)
    def end_some_on_disk(self, ends: list[tuple[int, int, bool]]) -> None:
        for rank, number, well in ends:
            busy = [rank.disk for rank in self.ranks if rank.disk is not None and rank.disk.under]
            if busy:
                busy[rank % len(busy)].end(number, well)

    @rule(
        who=st.lists(picks, min_size=1, max_size=3),
        more=st.lists(st.integers(0, 4), max_size=5),
        steps=st.integers(0, 3),
        then=st.sampled_from(["answer", "answer", "fail", "be late", "be left", "be reset"]),
        pick=picks,
    )
    def come_back_to_disk(
        self, who: list[int], more: list[int], steps: int, then: str, pick: int
    ) -> None:
        """When the host has lost what it had, too, as others needed it; then reads are under way,
        and end in some way."""
        self.go_on(12, end=True)
        self.reset(running=False, connector=False)
        tier = self.offload.tier
        tier.abort(tier.reserve([b"%d" % n for n in range(self.index.num_slots)]))
        self.come_back(who, more, 4, lost=False)
        self.go_on(steps, end=False)
        held_back = [name for name in sorted(self.scheduler.requests) if self.is_held_back(name)]
        if not held_back:
            return
        self.seen[f"held back, to {then}"] += 1
        self.seen["shared reads"] += any(
            len(read.fetches) > 1 for read in self.offload.overflow.fetches.under_way
        )
        if then == "be late":
            self.be_impatient()
        elif then == "be left":
            self.abort(pick)
        elif then == "be reset":
            self.reset(running=True, connector=True)
        else:
            self.end_some_on_disk(
                [(rank, pick, then == "answer") for rank in range(self.num_ranks)]
            )

    def be_impatient(self) -> None:
        """For one step nobody waits for the disk."""
        prefetcher = self.connector._scheduler._prefetcher
        patience, prefetcher._deadline_s = prefetcher._deadline_s, 0.0
        self.step()
        prefetcher._deadline_s = patience

    def is_held_back(self, name: str) -> bool:
        fetch = self.offload.overflow.fetches.of(name)
        return fetch is not None and fetch.under_way


def invalid_blocks(result: ModelRunnerOutput) -> set[int]:
    assert result.kv_connector_output is not None
    return set(result.kv_connector_output.invalid_block_ids)


def machine_over(
    folder: Path,
    num_ranks: int,
    seen: Counter[str],
    *,
    overlap: bool,
    loads_fail: bool,
    late: bool = False,
    disk_slots: int = 0,
) -> type[SchedulerMachine]:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    members = {
        "config": vllm_config(
            folder,
            overlap=overlap,
            connector=KVortexConfig().kv_transfer_config(),
        ),
        "hasher": staticmethod(get_request_block_hasher(BLOCK, hash_function)),
        "num_ranks": num_ranks,
        "overlap": overlap,
        "loads_fail": loads_fail,
        "late": late,
        "disk_slots": disk_slots,
        "seen": seen,
    }
    kind = DiskMachine if disk_slots else SchedulerMachine
    return type(f"SchedulerMachine_{num_ranks}", (kind,), members)


def drive(
    machine: type[SchedulerMachine], seen: Counter[str], steps: int, reached: list[str]
) -> None:
    """In rounds of examples, until each of these situations was reached.

    What is drawn depends on what vLLM answers: what is rare does not come up in every version of it
    at once.
    """
    for number in range(MOST_ROUNDS):
        drawn = seed(number)(machine) if number else machine
        run_state_machine_as_test(drawn, settings=budget(40, stateful_step_count=steps))
        if all(seen[what] for what in reached):
            return
    assert [what for what in reached if not seen[what]] == []


@pytest.mark.fuzz
@pytest.mark.parametrize(
    ("num_ranks", "overlap", "loads_fail", "late"),
    [
        pytest.param(1, False, False, False, id="one-rank"),
        pytest.param(1, False, True, False, id="loads-fail"),
        pytest.param(2, False, True, False, id="two-ranks-loads-fail"),
        pytest.param(3, True, False, False, id="three-ranks-overlapping-steps"),
        pytest.param(1, True, True, False, id="loads-fail-overlapping-steps"),
        pytest.param(2, True, True, False, id="two-ranks-loads-fail-overlapping-steps"),
        pytest.param(2, True, False, True, id="slots-come-late"),
    ],
)
def test_the_scheduler_loads_only_what_all_ranks_stored(
    num_ranks: int,
    overlap: bool,
    loads_fail: bool,
    late: bool,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = Counter[str]()
    folder = tmp_path_factory.mktemp("model")
    machine = machine_over(
        folder, num_ranks, seen, overlap=overlap, loads_fail=loads_fail, late=late
    )
    for name in ("kvortex", "vllm"):
        caplog.set_level(logging.CRITICAL, name)
    reached = ["loads", "stores", "evictions", "aborted RUNNING", "apart_loads"]
    reached += ["missed_never_stored", "missed_evicted"]
    reached += ["lost_slots"] if late else ["discarded_stores"]
    reached += [] if loads_fail or late else ["aborted WAITING_FOR_REMOTE_KVS"]
    reached += ["corrupt_blocks"] if loads_fail else []
    reached += ["flipped on several ranks"] if loads_fail and num_ranks > 1 else []
    reached += ["samples taken back"] if loads_fail and overlap else []
    drive(machine, seen, 60, reached)
    assert bool(seen["failed_loads"]) is loads_fail
    assert bool(seen["corrupt_blocks"]) is loads_fail


@pytest.mark.fuzz
@pytest.mark.parametrize(
    ("num_ranks", "overlap", "loads_fail", "disk_slots"),
    [
        pytest.param(1, False, True, 40, id="loads-fail"),
        pytest.param(2, True, False, 12, id="two-ranks-overlapping-steps"),
        pytest.param(1, True, True, 40, id="loads-fail-overlapping-steps"),
    ],
)
def test_requests_wait_for_the_disk_and_get_only_what_it_kept(
    num_ranks: int,
    overlap: bool,
    loads_fail: bool,
    disk_slots: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = Counter[str]()
    machine = machine_over(
        tmp_path, num_ranks, seen, overlap=overlap, loads_fail=loads_fail, disk_slots=disk_slots
    )
    for name in ("kvortex", "vllm"):
        caplog.set_level(logging.CRITICAL, name)
    reached = [f"held back, to {then}" for then in ("answer", "fail", "be late", "be left")]
    reached += ["held back, to be reset", "shared reads", "disk_late_reads", "disk_hit_tokens"]
    reached += ["disk_failed_reads", "disk_missed_writes"]
    reached += ["corrupt_blocks", "disk_distrusted_blocks"] if loads_fail else []
    drive(machine, seen, 40, reached)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"trace_path": "/no/such/folder/trace"}, "/no/such/folder/trace: cannot be written"),
        ({"ram_pool_gb": 1e-9}, "ram_pool_gb=1e-09: one KV block takes"),
    ],
)
def test_what_only_the_scheduler_can_refuse_is_one_line_in_the_log(
    settings: dict[str, Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transfer = KVortexConfig(**settings).kv_transfer_config()
    config = vllm_config(tmp_path, overlap=False, connector=transfer)
    logger = logging.getLogger("kvortex.connector.connector")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(ConfigError, match=reason):
            make_scheduler(config, 8, overlap=False)
    finally:
        logger.removeHandler(caplog.handler)
    (line,) = {record.getMessage() for record in caplog.records if record.name == logger.name}
    assert line.startswith(f"KVortex cannot start: {reason}")


@pytest.fixture
def failing(
    request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> SchedulerMachine:
    """Of one rank, whose loads fail when told to; the parameter is whether steps overlap."""
    for name in ("kvortex", "vllm"):
        caplog.set_level(logging.CRITICAL, name)
    return machine_over(tmp_path, 1, Counter(), overlap=request.param, loads_fail=True)()


either_way = pytest.mark.parametrize(
    "failing", [pytest.param(False, id="one-step"), pytest.param(True, id="overlap")], indirect=True
)


@either_way
@pytest.mark.parametrize("aborted", [None, 0, 1])
def test_all_who_share_a_failed_load_compute_it_again(
    aborted: int | None, failing: SchedulerMachine
) -> None:
    """vLLM would have only the first of them do so, which may be gone by then."""
    failing.open(20, 40, 0, 64, "lru", "always", apart=False)
    prompt = continued([1], 20)
    failing.add(prompt, 1)
    failing.go_on(3, end=True)
    failing.reset(running=False, connector=False)
    failing.add(prompt, 4)
    failing.add([*prompt, 0], 4)
    failing.step(fail=0)
    if aborted is not None:
        failing.abort(aborted)
    failing.teardown()
    assert failing.seen["bad"] == 1
    assert failing.seen["failed_loads"] == 4
    assert sum(request.status.name == "FINISHED_ABORTED" for request in failing.requests) == (
        aborted is not None
    )


@either_way
def test_who_waits_apart_behind_a_failed_load_of_another_computes_it_again(
    failing: SchedulerMachine,
) -> None:
    failing.open(20, 40, 0, 64, "lru", "always", apart=True)
    prompt = continued([1], 25)
    failing.add(prompt, 1)
    failing.go_on(3, end=True)
    failing.reset(running=False, connector=False)
    failing.add(prompt[:21], 1)
    failing.add(prompt, 4)
    failing.add([*prompt, 0], 4)
    failing.step(fail=0)
    waiting = [request.status.name for request in failing.requests[2:]]
    assert waiting == ["WAITING_FOR_REMOTE_KVS"] * 2
    failing.abort(0)
    failing.teardown()
    assert failing.seen["failed_loads"] == 5 + 1 + 1


@either_way
def test_what_an_aborted_request_computed_from_a_failed_load_is_found_by_nobody(
    failing: SchedulerMachine,
) -> None:
    """vLLM leaves it in its cache, behind a block that others compute again."""
    failing.open(14, 8, 0, 5, "lru", "always", apart=False)
    failing.arrive(0, 16, [], 4)
    failing.come_back([0], [0], 4, lost=True)
    failing.come_back([0, 0], [], 4, lost=True)
    for _ in range(2):
        failing.abort(0)
    failing.come_back([0], [], 4, lost=True)
    failing.step(fail=0, midway=0)
    assert failing.seen["bad"] == 1
    failing.come_back([0, 1], [], 4, lost=False)
    failing.come_back([0], [], 4, lost=True)
    failing.teardown()


@pytest.mark.parametrize("failing", [True], indirect=True)
@pytest.mark.parametrize(("begun", "new"), [(False, True), (False, False), (True, False)])
def test_nothing_is_computed_from_what_a_failed_load_had_sampled(
    begun: bool, new: bool, failing: SchedulerMachine
) -> None:
    """vLLM's first model runner would, as it was in the step before; `begun` is to have outputs,
    `new` to be handed over as new."""
    failing.open(20, 40, 0, 64, "lru", "always", apart=False)
    failing.connector._scheduler._setbacks._runner._in_pipeline = new
    prompt = continued([1], 17)
    failing.add(prompt, 8 if begun else 1)
    failing.go_on(4, end=True)
    while failing.flying:
        failing.update(*failing.flying.popleft())
    failing.reset(running=begun, connector=False)
    if not begun:
        failing.add(prompt, 8)
    assert bool(failing.requests[-1].num_output_tokens) is begun
    failing.step(fail=0)
    failing.step()
    assert failing.seen["bad"] == 1
    before = failing.model.taken_back
    failing.step()
    assert failing.model.taken_back == before + 1
    failing.teardown()


@pytest.mark.parametrize("failing", [True], indirect=True)
def test_nothing_is_kept_of_who_is_preempted_before_its_load_is_known_to_have_failed(
    failing: SchedulerMachine,
) -> None:
    """vLLM delivers what a step under way samples for a request that the next one preempts."""
    failing.open(14, 40, 0, 64, "lru", "always", apart=False)
    failing.scheduler.defer_block_free = False  # else vLLM 0.32 preempts nobody in a step under way
    prompt = continued([1], 24)
    failing.add(prompt, 1)
    failing.go_on(3, end=True)
    failing.reset(running=False, connector=False)
    failing.add(continued([2], 24), 8)
    failing.add(prompt, 4)  # they fill twelve of thirteen blocks, and each is about to need one
    failing.step(fail=0)
    assert failing.seen["bad"] == 1
    failing.step()
    assert failing.requests[-1].status.name == "PREEMPTED"
    failing.teardown()


def test_a_load_apart_that_fails_leaves_others_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its blocks may have been those of requests that are gone, whose others have new owners."""
    for name in ("kvortex", "vllm"):
        caplog.set_level(logging.CRITICAL, name)
    seen = Counter[str]()
    machine = machine_over(tmp_path, 1, seen, overlap=False, loads_fail=True, disk_slots=40)()
    assert isinstance(machine, DiskMachine)
    machine.open(14, 24, 0, 16, "lru", "always", apart=True)
    machine.arrive(0, 16, [], 4)
    machine.step(midway=0)
    machine.arrive(0, 16, [], 4)
    machine.arrive(1, 16, [], 4)
    machine.come_back_to_disk([0, 0, 98], [0], 1, "answer", 0)
    machine.go_on(2, end=False)
    machine.end_all()
    machine.arrive(2, 3, [], 4)
    machine.go_on(2, end=False, fail=0)
    assert seen["bad"] == 1
    computed = {name: request.num_tokens for name, request in machine.scheduler.requests.items()}
    running = list(machine.scheduler.running)
    machine.step()
    assert len(running) == 3
    assert all(one.num_tokens == computed[one.request_id] + 1 for one in running)
    machine.teardown()
