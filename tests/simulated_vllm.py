"""What surrounds vLLM's scheduler: ranks that copy when told to, and a model that runs at once.

No bytes are moved. What a GPU block or a host slot holds is a `Print`: the epoch of the weights and
every token, from the first one of the prefix to the last one whose KV is in the block.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from kvortex.core import Direction, DiskReport, StepReport

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
    from vllm.v1.request import Request

    from kvortex.connector.messages import ReportMessage
    from kvortex.core import BlockKey, DiskMove, DiskPlan, Job, StepPlan

Print = tuple[int, ...] | str
NOTHING, TORN, SPOILT, FLIPPED = "nothing", "torn", "spoilt", "flipped"
"""Never written; half a copy; computed from a load that failed, or what such a load left; other
bytes than were stored, which a load finds out."""

BLOCK = 4
VOCABULARY = 5
GARBAGE = 99
"""The token that is sampled from what is spoilt."""
MAX_TOKENS = 32
PAGE_BYTES = 2 * BLOCK * 8 * 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "max_position_embeddings": 4096,
    "vocab_size": 512,
    "torch_dtype": "float32",
}


def vllm_config(folder: Path, *, overlap: bool, connector: dict[str, Any]) -> Any:
    """vLLM's configuration of a model of which there is only a config.json."""
    from vllm.engine.arg_utils import EngineArgs

    (folder / "config.json").write_text(json.dumps(CONFIG))
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32",
        max_model_len=MAX_TOKENS,
        enforce_eager=True,
        enable_prefix_caching=True,
        async_scheduling=overlap,
        kv_transfer_config=connector,
    ).create_engine_config()
    config.scheduler_config.async_scheduling = overlap  # which vLLM turns off on a CPU
    config.cache_config.block_size = BLOCK
    if hasattr(config.cache_config, "kv_cache_layout"):  # else vLLM's engine chooses it at start
        config.cache_config.kv_cache_layout = "LBHNC"
    return config


def make_scheduler(config: Any, num_blocks: int, *, overlap: bool) -> Any:
    """vLLM's own, over one group of full attention."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
    )
    from vllm.v1.structured_output import StructuredOutputManager

    shape = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    group = KVCacheGroupSpec(["layer"], FullAttentionSpec(**shape))
    size = num_blocks * PAGE_BYTES
    if "shared_by" in KVCacheTensor.__dataclass_fields__:
        tensor = KVCacheTensor(size=size, shared_by=["layer"])  # vLLM 0.26
    else:
        tensor = KVCacheTensor(
            size=size, layers=["layer"], layer_stride=size, block_stride=PAGE_BYTES
        )
    config.cache_config.num_gpu_blocks = num_blocks
    return (AsyncScheduler if overlap else Scheduler)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks, [tensor], [group]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=False,
    )


def make_request(name: str, prompt: list[int], max_tokens: int, hasher: Any) -> Request:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        pooling_params=None,
        block_hasher=hasher,
    )


def continued(text: list[int], length: int) -> list[int]:
    """The text and what the model says after it, which depends on every token."""
    text = list(text)
    while len(text) < length:
        text.append(hash(tuple(text)) % VOCABULARY)
    return text[:length]


@dataclass(slots=True, eq=False)
class Copy:
    """One job on one rank, and what its sources held when it began."""

    job: Job
    direction: Direction
    prints: list[Print]


@dataclass(slots=True, eq=False)
class Move:
    """One disk move on one rank, and what the host held when it began."""

    move: DiskMove
    is_write: bool
    prints: list[Print]
    void: bool = False
    """A write that a clear overtook."""


class SimulatedDisk:
    """One rank's, empty at first; moves end when told to, well or not."""

    def __init__(self, host: list[Print], num_slots: int) -> None:
        self.slots: dict[int, tuple[BlockKey, Print]] = {}
        self.under: list[Move] = []
        self._host = host
        self._num_slots: int | None = num_slots
        self._finished: dict[int, int] = {}
        self._failed: dict[int, frozenset[int]] = {}
        self._lost: dict[int, frozenset[int]] = {}

    def begin(self, plan: DiskPlan) -> None:
        if plan.clear:
            self.slots.clear()
            for move in self.under:
                move.void = True
        for slot in plan.erases:
            self.slots.pop(slot, None)
        for one in plan.writes:
            prints = [self._host[slot] for slot in one.slots.tolist()]
            assert TORN not in prints, "a block is written before it is there"
            for disk_slot in one.disk_slots.tolist():
                self.slots.pop(disk_slot, None)
            self.under.append(Move(one, True, prints))
        for one in plan.reads:
            for slot in one.slots.tolist():
                self._host[slot] = TORN
            self.under.append(Move(one, False, []))

    def end(self, number: int, well: bool = True) -> None:
        """Let a move end; of a read that goes wrong, an odd number is one that came too late."""
        move = self.under.pop(number % len(self.under))
        self._finished[move.move.id] = 1
        bad = self._end_write(move, well) if move.is_write else self._end_read(move, well)
        self._failed[move.move.id] = frozenset(bad)
        if bad and not move.is_write and not (number % 2 and not well):
            self._lost[move.move.id] = frozenset(bad)

    def report(self) -> DiskReport:
        told = self._num_slots is None
        survivors: dict[bytes, int] | None = None if told else {}
        report = DiskReport(self._finished, self._failed, self._lost, survivors, self._num_slots)
        self._finished, self._failed, self._lost, self._num_slots = {}, {}, {}, None
        return report

    def _end_write(self, move: Move, well: bool) -> set[int]:
        one = move.move
        held = [self._host[slot] for slot in one.slots.tolist()]
        assert held == move.prints, "a slot was given away while the disk wrote it"
        if well and not move.void:
            self.slots.update(
                zip(one.disk_slots.tolist(), zip(one.keys, held, strict=True), strict=True)
            )
        return set() if well else set(range(len(one.keys)))

    def _end_read(self, move: Move, well: bool) -> set[int]:
        one, bad = move.move, set()
        rows = zip(one.keys, one.slots.tolist(), one.disk_slots.tolist(), strict=True)
        for position, (key, slot, disk_slot) in enumerate(rows):
            assert self._host[slot] == TORN, "two moves into one slot"
            held_key, found = self.slots.get(disk_slot, (b"", TORN))
            if well and held_key == key:
                self._host[slot] = found
            else:
                bad.add(position)
        return bad


class SimulatedRank:
    """A worker: a StepPlan goes in, a StepReport comes out.

    A store reads its sources only when it ends, and a load notices then whether its slots were
    written meanwhile: whoever reuses them too early is found out.
    """

    def __init__(self, num_blocks: int, num_slots: int, ready_slots: int) -> None:
        self.ready_slots = ready_slots
        self.gpu: list[Print] = [NOTHING] * num_blocks
        self.host: list[Print] = [NOTHING] * num_slots
        self.disk: SimulatedDisk | None = None
        self.spoilt_ends: set[int] = set()
        """Spoilt blocks of which only the beginning was computed again."""
        self.under: list[Copy] = []
        self.bad_blocks: set[int] = set()
        self.arrived: list[str] = []
        """Requests whose own load ended, well or not."""
        self.corrupt: dict[tuple[int, int], int] = {}
        """Every block that came back flipped: job and position of the load, and its slot."""
        self._misled = False
        self._finished: dict[int, int] = {}
        self._failed: set[int] = set()
        self._corrupt: dict[int, frozenset[int]] = {}
        self._slots_to_tell: int | None = num_slots
        self._grows = ready_slots < num_slots
        self._step: int | None = None

    def write(self, block: int, found: Print) -> None:
        """Bytes behind those written stay; they are right if they continue the same tokens."""
        held = self.gpu[block]
        same_place = (len(held) - 2) // BLOCK == (len(found) - 2) // BLOCK
        if same_place and held[: len(found)] == found:
            return
        if found != SPOILT and len(found) % BLOCK != 1 and self.gpu[block] == SPOILT:
            self.spoilt_ends.add(block)
        elif found == SPOILT or len(found) % BLOCK == 1:
            self.spoilt_ends.discard(block)
        self.gpu[block] = found

    def begin(self, plan: StepPlan, fail: bool) -> None:
        """Before the model runs: what it reads is loaded, or reported as bad in this step.

        A load that belongs to one request, which does not run, arrives when it ends.
        """
        self._step = plan.step
        self._spoil(plan.lost_block_ids)
        self._misled = bool(plan.lost_block_ids)
        if self.disk is not None and plan.disk is not None:
            self.disk.begin(plan.disk)
        for job in plan.loads:
            if fail or not self._exists(job):
                self._fail(job)
                self._spoil(job.block_ids.tolist())
                self._misled |= job.request_id is None
                continue
            prints = [self.host[slot] for slot in job.slots.tolist()]
            if job.request_id is not None:
                for block in job.block_ids.tolist():
                    self.write(block, TORN)
            elif self._bring(job, prints):  # that was waited for: it is told in this step
                self._finished[job.id] = 1
                continue
            self.under.append(Copy(job, Direction.LOAD, prints))

    def store(self, plan: StepPlan) -> None:
        """After the model ran."""
        for job in plan.stores:
            if self._misled or not self._exists(job):
                self._fail(job)
                continue
            prints = [self.gpu[block] for block in job.block_ids.tolist()]
            for slot in job.slots.tolist():
                self.host[slot] = TORN
            self.under.append(Copy(job, Direction.STORE, prints))

    def end(self, number: int, well: bool = True) -> None:
        """Let one of the copies under way end; only stores can still fail."""
        copy = self.under.pop(number % len(self.under))
        self._finished[copy.job.id] = 1
        if copy.direction is Direction.LOAD:
            assert [self.host[slot] for slot in copy.job.slots.tolist()] == copy.prints
            if copy.job.request_id is not None:
                self.arrived.append(copy.job.request_id)
                held = {self.gpu[block] for block in copy.job.block_ids.tolist()}
                assert held <= {TORN}, "a block was given away while a load filled it"
                self._bring(copy.job, copy.prints)
            return
        sources = [self.gpu[block] for block in copy.job.block_ids.tolist()]
        changed = [a for a, b in zip(copy.prints, sources, strict=True) if a != b]
        assert set(changed) <= {SPOILT}, "a block was given away while a store read it"
        if not well:
            self._failed.add(copy.job.id)
            return
        rows = zip(copy.job.slots.tolist(), copy.job.block_ids.tolist(), sources, strict=True)
        for slot, block, found in rows:
            assert self.host[slot] == TORN, "two stores into one slot"
            self.host[slot] = SPOILT if block in self.spoilt_ends else found

    def flip(self, slot: int) -> bool:
        """A bit of what a slot holds; False if it is being moved."""
        moves: list[Job | DiskMove] = [copy.job for copy in self.under]
        moves += [move.move for move in self.disk.under] if self.disk is not None else []
        if any(slot in move.slots for move in moves):
            return False
        self.host[slot] = FLIPPED
        return True

    def grow(self, more: int) -> None:
        """So many more slots were prepared."""
        self.ready_slots = min(len(self.host), self.ready_slots + more)

    def run_out(self) -> None:
        """There is no memory for the slots that are not ready."""
        if self.ready_slots < len(self.host):
            del self.host[self.ready_slots :]
            self._slots_to_tell = len(self.host)

    @property
    def has_told_its_size(self) -> bool:
        return self._slots_to_tell is None and not self._grows

    def report(self) -> StepReport:
        report = StepReport(
            self._finished,
            frozenset(self._failed),
            self._slots_to_tell,
            step=self._step,
            ready_slots=self.ready_slots if self._grows else None,
            disk=self.disk.report() if self.disk is not None else None,
            corrupt=self._corrupt,
        )
        self._finished, self._failed, self._slots_to_tell = {}, set(), None
        self._corrupt = {}
        self._grows = self.ready_slots < len(self.host)
        return report

    def take_bad_blocks(self) -> set[int]:
        bad, self.bad_blocks = self.bad_blocks, set()
        return bad

    def take_arrived(self) -> list[str]:
        arrived, self.arrived = self.arrived, []
        return arrived

    def _exists(self, job: Job) -> bool:
        return int(job.slots.max()) < self.ready_slots

    def _fail(self, job: Job) -> None:
        if job.request_id is not None:
            self.arrived.append(job.request_id)
        self._finished[job.id] = 1
        self._failed.add(job.id)

    def _bring(self, job: Job, prints: list[Print]) -> bool:
        """Let a load arrive; returns whether some of it is not what was stored."""
        blocks, bad = job.block_ids.tolist(), set()
        for position, (block, found) in enumerate(zip(blocks, prints, strict=True)):
            if found == FLIPPED:
                bad.add(position)
                self._spoil([block])
            else:
                self.write(block, found)
        if bad:
            self._corrupt[job.id] = frozenset(bad)
            self.corrupt |= {(job.id, position): int(job.slots[position]) for position in bad}
        return bool(bad)

    def _spoil(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.write(block, SPOILT)
            self.bad_blocks.add(block)


@dataclass(slots=True, eq=False)
class _Known:
    """What the runner keeps of a request; of its outputs, only how many if they stay on the GPU."""

    prompt: list[int]
    blocks: list[int]
    outputs: list[int]


@dataclass(slots=True, eq=False)
class _Row:
    """A request of a step: which of its tokens are computed, and into which blocks."""

    request_id: str
    blocks: list[int]
    text: list[int]
    """All tokens before `last`, and the one that is sampled if there is one."""
    first: int
    last: int

    def expected(self, epoch: int, position: int, last: int) -> Print:
        return (epoch, *self.text[: min((position + 1) * BLOCK, last)])


class SimulatedModel:
    """Runs a step on all ranks: reads every earlier token of a request and writes the new ones.

    What is not spoilt has to be right. `read_spoilt` are the requests that computed from spoilt
    blocks in the last step: what they sampled must not be kept.

    It knows of requests what vLLM's first model runner does. If that runs `ahead`, what it samples
    stays on the GPU, and is the last token that a request of the step before computes next.
    """

    def __init__(self, ranks: list[SimulatedRank], *, ahead: bool = False) -> None:
        self.epoch = 0
        self.read_spoilt: set[str] = set()
        self.taken_back = 0
        """Samples of requests that go on, but from what they were before."""
        self._ranks = ranks
        self._ahead = ahead
        self._known: dict[str, _Known] = {}
        self._batch: set[str] = set()
        self._sampled: dict[str, int] = {}

    def run(self, output: SchedulerOutput) -> dict[str, list[int]]:
        """The token that each request got, if any."""
        rows = self._rows(output)
        self.read_spoilt = {row.request_id for row in rows if self._begins_in_spoilt(row)}
        for row in rows:
            self._write(row)
        while spoilt := [row for row in rows if self._newly_spoilt(row)]:
            for row in spoilt:
                self.read_spoilt.add(row.request_id)
                self._write(row, SPOILT)
        return self._sample(rows)

    def _sample(self, rows: list[_Row]) -> dict[str, list[int]]:
        sampled = {row.request_id: row.text[row.last :] for row in rows}
        for name in self.read_spoilt:
            sampled[name] = [GARBAGE] * len(sampled[name])
        self._batch = set(sampled)
        self._sampled = {}
        for name, tokens in sampled.items():
            self._known[name].outputs += [-1] * len(tokens) if self._ahead else tokens
            if self._ahead and tokens:
                self._sampled[name] = tokens[0]
        return sampled

    def _rows(self, output: SchedulerOutput) -> list[_Row]:
        self._forget(output)
        for new in output.scheduled_new_reqs:
            prompt = list(new.prompt_token_ids or ())
            self._known[new.req_id] = _Known(prompt, list(new.block_ids[0]), [])
        cached = output.scheduled_cached_reqs
        for number, name in enumerate(cached.req_ids):
            self._update(cached, number, self._known[name])
        firsts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        firsts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        assert firsts.keys() == output.num_scheduled_tokens.keys()
        return [self._row(output, name, first) for name, first in firsts.items()]

    def _forget(self, output: SchedulerOutput) -> None:
        """Who does not go on from the step before: as new or resumed, not even if it was in it."""
        for name in output.finished_req_ids:
            self._known.pop(name, None)
        anew = {new.req_id for new in output.scheduled_new_reqs}
        anew |= output.scheduled_cached_reqs.resumed_req_ids
        self.taken_back += len(anew & self._sampled.keys() - output.finished_req_ids)
        self._batch &= output.num_scheduled_tokens.keys() - anew - output.finished_req_ids
        self._sampled = {name: self._sampled[name] for name in self._batch & self._sampled.keys()}

    def _update(self, cached: CachedRequestData, number: int, known: _Known) -> None:
        name, blocks = cached.req_ids[number], cached.new_block_ids[number]
        if name in cached.resumed_req_ids:
            known.blocks = []
        known.blocks += [] if blocks is None else blocks[0]
        num_outputs = cached.num_output_tokens[number]
        del known.outputs[num_outputs:]
        if self._ahead and num_outputs and name not in self._batch:
            known.outputs = cached.all_token_ids[name][-num_outputs:]
        assert len(known.outputs) == num_outputs

    def _row(self, output: SchedulerOutput, name: str, first: int) -> _Row:
        known = self._known[name]
        tokens = known.prompt + known.outputs
        last = first + output.num_scheduled_tokens[name]
        assert last <= len(tokens)
        read = tokens[first:last]
        if name in self._sampled:
            read[-1] = self._sampled[name]
        assert -1 not in read, "nobody knows this token"
        text = continued(known.prompt, first) + read
        end = last + (last == len(tokens))  # only behind the last known token is one sampled
        return _Row(name, known.blocks, continued(text, end), first, last)

    def _begins_in_spoilt(self, row: _Row) -> bool:
        """A block that is continued has to be right before it is written to."""
        if row.first % BLOCK == 0:
            return False
        return any(self._is_spoilt(row, row.first // BLOCK, rank) for rank in self._ranks)

    def _newly_spoilt(self, row: _Row) -> bool:
        """Whether it reads what is spoilt, and was not known to do so."""
        return row.request_id not in self.read_spoilt and any(
            self._is_spoilt(row, position, rank)
            for position in range(-(-row.first // BLOCK))
            for rank in self._ranks
        )

    def _is_spoilt(self, row: _Row, position: int, rank: SimulatedRank) -> bool:
        expected = row.expected(self.epoch, position, row.first)
        block = row.blocks[position]
        held = rank.gpu[block]
        if held == SPOILT or (block in rank.spoilt_ends and len(held) < len(expected)):
            return True
        assert held[: len(expected)] == expected, "wrong bytes are computed from"
        return False

    def _write(self, row: _Row, instead: str | None = None) -> None:
        for position in range(row.first // BLOCK, -(-row.last // BLOCK)):
            found = instead or row.expected(self.epoch, position, row.last)
            for rank in self._ranks:
                rank.write(row.blocks[position], found)


def plan_of(output: SchedulerOutput) -> StepPlan:
    from kvortex.connector.messages import PlanMessage

    message = output.kv_connector_metadata
    assert isinstance(message, PlanMessage)
    return message.plan


def merged(reports: Iterable[StepReport]) -> ReportMessage | None:
    """As vLLM merges what its workers tell."""
    from kvortex.connector.messages import ReportMessage

    messages = [ReportMessage(report) for report in reports if report]
    return reduce(ReportMessage.aggregate, messages) if messages else None
