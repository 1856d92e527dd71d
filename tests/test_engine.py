"""KVortexEngine: every sentence of its docstrings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from doubles import CommandedCopyEngine, open_commanded
from geometries import dense, memory_of

import kvortex.engine
from kvortex import (
    BlockNotFoundError,
    ClosedError,
    ConfigError,
    InvalidBlockError,
    KVortexConfig,
    KVortexEngine,
    LayoutError,
    PoolAllocationError,
    TransferError,
)
from kvortex.config import GIB
from kvortex.core import MAX_KEY_BYTES
from kvortex.layout import make_layout
from kvortex.metrics import Counters

if TYPE_CHECKING:
    from kvortex.host_pool import HostPool

A, B, C, D = b"a", b"b", b"c", b"d"
Open = Callable[..., KVortexEngine]
NUM_BLOCKS = 8


def config(num_slots: int, slot_bytes: int, policy: str = "lru") -> KVortexConfig:
    return KVortexConfig(ram_pool_gb=num_slots * slot_bytes / GIB, eviction_policy=policy)


def kv_tensors(device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "first": dense((NUM_BLOCKS, 2, 3, 8), torch.bfloat16, device, seed=1),
        "second": dense((NUM_BLOCKS, 5), torch.float32, device, seed=2).t().contiguous().t(),
    }


@pytest.fixture
def kv(device: torch.device) -> dict[str, torch.Tensor]:
    return kv_tensors(device)


@pytest.fixture
def open_engine(kv: dict[str, torch.Tensor]) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda num_slots=4: stack.enter_context(
            KVortexEngine(config(num_slots, make_layout(kv).slot_bytes), kv)
        )


class Commanded:
    """An engine on the CPU whose copies end on command."""

    def __init__(self, num_slots: int, patch: pytest.MonkeyPatch) -> None:
        self.kv = kv_tensors(torch.device("cpu"))
        patch.setattr(kvortex.worker, "open_copy_engine", open_commanded)
        self.engine = KVortexEngine(config(num_slots, make_layout(self.kv).slot_bytes), self.kv)
        copies = self.engine._worker._copy_engine
        assert isinstance(copies, CommandedCopyEngine)
        self.copies = copies

    def saved(self, *keys: bytes) -> None:
        self.engine.save_blocks(keys, range(len(keys)))
        self.copies.tickets[-1].finish()
        assert all(self.engine.check_blocks(keys))


@pytest.fixture
def commanded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Commanded]]:
    with ExitStack() as stack:

        def opened(num_slots: int = 4) -> Commanded:
            made = Commanded(num_slots, monkeypatch)
            stack.enter_context(made.engine)
            return made

        yield opened


Make = Callable[..., Commanded]


def block_bytes(kv: dict[str, torch.Tensor], number: int) -> list[list[float]]:
    return [tensor[number].float().flatten().tolist() for tensor in kv.values()]


def test_a_disk_is_refused() -> None:
    config = KVortexConfig(ram_pool_gb=0.01, disk_path="/d", disk_pool_gb=1)
    with pytest.raises(ConfigError, match="disk_path='/d': only the vLLM connector"):
        KVortexEngine(config, {"layer": torch.zeros(4, 64)})


def test_saved_bytes_come_back_anywhere(open_engine: Open, kv: dict[str, torch.Tensor]) -> None:
    engine = open_engine()
    before = {
        name: tensor.cpu().view(torch.uint8).clone()
        for name, tensor in kv.items()
        if name == "first"
    }
    second = kv["second"].clone()
    assert engine.save_blocks([A, B], [1, 6]).wait() == 2
    for tensor in kv.values():
        memory_of(tensor).fill_(0xA5)
    assert engine.load_blocks([B, A], [0, 3]).wait() == 2
    first = kv["first"].cpu().view(torch.uint8)
    assert torch.equal(first[[0, 3]], before["first"][[6, 1]])
    assert torch.equal(kv["second"][[0, 3]], second[[6, 1]])
    for untouched in (1, 2, 4, 5, 6, 7):
        assert first[untouched].eq(0xA5).all()
        assert kv["second"][untouched].contiguous().view(torch.uint8).eq(0xA5).all()


def test_loads_follow_the_current_stream(open_engine: Open, kv: dict[str, torch.Tensor]) -> None:
    engine = open_engine()
    engine.save_blocks([A], [1]).wait()
    saved = kv["first"][1].clone()
    kv["first"].zero_()
    transfer = engine.load_blocks([A], [1])
    read = kv["first"][1].clone()  # behind the load, without waiting for it here
    assert transfer.wait() == 1
    assert torch.equal(read.view(torch.uint8), saved.view(torch.uint8))
    assert kv["first"][0].eq(0).all()


def test_one_key_into_several_blocks(open_engine: Open, kv: dict[str, torch.Tensor]) -> None:
    engine = open_engine()
    engine.save_blocks([A], [1]).wait()
    assert engine.load_blocks([A, A], [4, 5]).wait() == 2
    for tensor in kv.values():
        for number in (4, 5):
            ours, theirs = tensor[number].contiguous(), tensor[1].contiguous()
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_saving_again_replaces(open_engine: Open, kv: dict[str, torch.Tensor]) -> None:
    engine = open_engine()
    engine.save_blocks([A], [1]).wait()
    engine.save_blocks([A], [2]).wait()
    engine.load_blocks([A], [0]).wait()
    assert torch.equal(kv["second"][0], kv["second"][2])
    assert engine.stats()["resident_slots"] == 1


def test_a_full_pool_evicts(open_engine: Open) -> None:
    engine = open_engine(num_slots=2)
    for number, key in enumerate((A, B, C)):
        assert engine.save_blocks([key], [number]).wait() == 1
    assert engine.check_blocks([A, B, C]) == [False, True, True]
    assert engine.stats()["evicted_blocks"] == 1


def test_a_load_is_a_use(open_engine: Open) -> None:
    engine = open_engine(num_slots=2)
    engine.save_blocks([A], [0]).wait()
    engine.save_blocks([B], [1]).wait()
    engine.load_blocks([A], [3]).wait()
    engine.check_blocks([B])  # only a look
    engine.save_blocks([C], [2]).wait()
    assert engine.check_blocks([A, B, C]) == [True, False, True]


def test_more_keys_than_slots(open_engine: Open) -> None:
    engine = open_engine(num_slots=2)
    transfer = engine.save_blocks([A, B, C], [0, 1, 2])
    assert transfer.blocks == 2
    assert transfer.wait() == 2
    assert engine.check_blocks([A, B, C]) == [True, True, False]
    assert engine.stats()["refused_stores"] == 1


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_ids_of_any_sequence(open_engine: Open, kind: Callable[[list[int]], list[int]]) -> None:
    engine = open_engine()
    assert engine.save_blocks([A, B], kind([0, 7])).wait() == 2
    assert engine.load_blocks([A, B], kind([1, 2])).wait() == 2


def test_empty_lists(open_engine: Open) -> None:
    engine = open_engine()
    for transfer in (engine.save_blocks([], []), engine.load_blocks([], [])):
        assert transfer.done
        assert (transfer.blocks, transfer.wait()) == (0, 0)
    assert engine.check_blocks([]) == []


LONGEST = b"k" * MAX_KEY_BYTES
BAD_REQUESTS: dict[str, tuple[list[object], object, str]] = {
    "empty key": ([b""], [0], "key b''"),
    "long key": ([LONGEST + b"k"], [0], "1 to 64 bytes"),
    "text as key": (["a"], [0], "key 'a': a key is 1 to 64 bytes"),
    "number as key": ([7], [0], "key 7"),
    "negative id": ([A], [-1], "block id -1 is out of range: the ids are 0 to 7"),
    "id too large": ([A, B], [0, 8], "block id 8 is out of range: the ids are 0 to 7"),
    "id beyond int64": ([A], [1 << 63], "out of range"),
    "id beyond any": ([A], [1 << 70], "integers"),
    "fraction as id": ([A], [1.5], "float64: ids are integers"),
    "more keys": ([A, B], [0], "2 keys for block ids of shape (1,)"),
    "more ids": ([A], [0, 1], "1 keys for block ids of shape (2,)"),
    "ids in a table": ([A, B], [[0], [1]], "shape (2, 1)"),
}


@pytest.mark.parametrize("verb", ["save_blocks", "load_blocks"])
@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests(open_engine: Open, verb: str, name: str) -> None:
    keys, ids, reason = BAD_REQUESTS[name]
    engine = open_engine()
    engine.save_blocks([A, B], [0, 1]).wait()
    before = engine.stats()
    with pytest.raises(InvalidBlockError, match=re.escape(reason)) as caught:
        getattr(engine, verb)(keys, ids)
    assert isinstance(caught.value, ValueError)
    assert engine.stats() == before


def test_a_key_twice_in_one_save(open_engine: Open) -> None:
    engine = open_engine()
    with pytest.raises(InvalidBlockError, match="key appears twice"):
        engine.save_blocks([A, A], [0, 1])
    assert engine.check_blocks([A]) == [False]
    assert engine.save_blocks([A, B], [1, 1]).wait() == 2


def test_an_id_twice_in_one_load(open_engine: Open) -> None:
    engine = open_engine()
    engine.save_blocks([A, B], [0, 1]).wait()
    with pytest.raises(InvalidBlockError, match="id appears twice"):
        engine.load_blocks([A, B], [3, 3])


def test_the_longest_key(open_engine: Open) -> None:
    engine = open_engine()
    engine.save_blocks([LONGEST], [0]).wait()
    assert engine.check_blocks([LONGEST, LONGEST[:-1]]) == [True, False]


@pytest.mark.parametrize("key", [b"", "a", LONGEST + b"k"])
def test_check_of_a_bad_key(open_engine: Open, key: bytes) -> None:
    with pytest.raises(InvalidBlockError, match="1 to 64 bytes"):
        open_engine().check_blocks([A, key])


def test_load_of_a_missing_key_copies_nothing(
    open_engine: Open, kv: dict[str, torch.Tensor]
) -> None:
    engine = open_engine()
    engine.save_blocks([A], [0]).wait()
    before = [memory_of(tensor).clone() for tensor in kv.values()]
    with pytest.raises(BlockNotFoundError) as caught:
        engine.load_blocks([A, b"\xab\xcd"], [4, 5])
    assert str(caught.value) == "key abcd is not saved; nothing was loaded"
    assert isinstance(caught.value, KeyError)
    for tensor, old in zip(kv.values(), before, strict=True):
        assert torch.equal(memory_of(tensor), old)
    assert engine.stats()["loaded_blocks"] == 0


def test_readable_only_when_done(commanded: Make) -> None:
    made = commanded()
    transfer = made.engine.save_blocks([A], [1])
    assert not transfer.done
    assert made.engine.check_blocks([A]) == [False]
    with pytest.raises(BlockNotFoundError):
        made.engine.load_blocks([A], [0])
    made.copies.tickets[0].finish()
    assert transfer.done
    assert made.engine.check_blocks([A]) == [True]
    assert transfer.wait() == 1


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_wait_may_time_out_and_be_repeated(commanded: Make, timeout: float) -> None:
    made = commanded()
    transfer = made.engine.save_blocks([A], [1])
    for _ in range(2):
        with pytest.raises(TimeoutError, match=rf"the save of 1 blocks takes over {timeout} s"):
            transfer.wait(timeout)
    made.copies.tickets[0].finish()
    assert transfer.wait(timeout) == 1
    assert transfer.wait() == 1


def test_full_of_transfers(commanded: Make) -> None:
    """Reserved and pinned slots are in use: what is left is a leading part, or nothing."""
    made = commanded(4)
    made.saved(A, B)
    load = made.engine.load_blocks([A], [7])
    first = made.engine.save_blocks([C], [2])
    second = made.engine.save_blocks([D, b"e", b"f"], [3, 4, 5])
    assert second.blocks == 2
    assert made.engine.check_blocks([A, B]) == [True, False]
    nothing = made.engine.save_blocks([b"g"], [6])
    assert (nothing.blocks, nothing.done, nothing.wait()) == (0, True, 0)
    assert made.engine.stats()["refused_stores"] == 2
    for ticket in made.copies.waiting:
        ticket.finish()
    assert (load.wait(), first.wait(), second.wait()) == (1, 1, 2)
    keys = [A, B, C, D, b"e", b"f", b"g"]
    assert made.engine.check_blocks(keys) == [True, False, True, True, True, False, False]


def test_a_load_reads_what_was_there_when_it_began(commanded: Make) -> None:
    made = commanded(2)
    made.saved(A)
    load = made.engine.load_blocks([A], [7])
    made.engine.save_blocks([A], [3])
    made.copies.tickets[-1].finish()
    assert made.engine.check_blocks([A]) == [True]
    assert (
        made.engine.save_blocks([B], [4]).blocks == 1
    )  # evicts the new bytes, never the read ones
    made.copies.tickets[-1].finish()
    made.copies.tickets[1].finish()
    assert load.wait() == 1
    assert block_bytes(made.kv, 7) == block_bytes(made.kv, 0)


def test_a_failed_save(commanded: Make) -> None:
    made = commanded()
    made.saved(A)
    transfer = made.engine.save_blocks([A, B], [2, 3])
    made.copies.tickets[-1].fail()
    assert transfer.done
    for _ in range(2):
        with pytest.raises(TransferError, match="the save of 2 blocks failed"):
            transfer.wait()
    assert made.engine.check_blocks([A, B]) == [True, False]
    made.engine.load_blocks([A], [7])
    made.copies.tickets[-1].finish()
    assert block_bytes(made.kv, 7) == block_bytes(made.kv, 0)
    assert made.engine.stats()["failed_stores"] == 2


def test_a_failed_load(commanded: Make) -> None:
    made = commanded()
    made.saved(A, B)
    transfer = made.engine.load_blocks([A], [7])
    made.copies.tickets[-1].fail()
    with pytest.raises(TransferError, match="the load of 1 blocks failed"):
        transfer.wait(timeout=9)
    assert made.engine.check_blocks([A, B]) == [False, True]
    assert made.engine.stats()["failed_loads"] == 1


def test_changed_bytes_are_no_load(
    kv: dict[str, torch.Tensor], open_engine: Open, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine()
    engine.save_blocks([A, B], [0, 1]).wait()
    block = engine._scheduler.tier.lookup(A)
    assert block is not None
    engine._pool.bytes[block.slot, 3] ^= 1
    with pytest.raises(TransferError, match="the load of 2 blocks failed"):
        engine.load_blocks([A, B], [2, 3]).wait()
    assert engine.check_blocks([A, B]) == [False, True]
    stats = engine.stats()
    assert (stats["corrupt_blocks"], stats["quarantined_slots"], stats["total_slots"]) == (1, 1, 3)
    engine.load_blocks([B], [4]).wait()
    assert block_bytes(kv, 4) == block_bytes(kv, 1)
    assert caplog.text.count("other bytes than were stored") == 1


@pytest.mark.parametrize("verb", ["save", "load"])
def test_a_copy_that_cannot_start(commanded: Make, verb: str) -> None:
    made = commanded()
    made.saved(A)
    made.copies.refuse = True
    transfer = getattr(made.engine, f"{verb}_blocks")([A], [3])
    assert transfer.done
    with pytest.raises(TransferError, match=f"the {verb} of 1 blocks failed"):
        transfer.wait()
    made.copies.refuse = False
    made.saved(B)


def test_a_save_is_no_victim_of_an_earlier_failed_load(commanded: Make) -> None:
    made = commanded()
    made.saved(A)
    made.engine.load_blocks([A], [7])
    made.copies.tickets[-1].fail()
    made.saved(B)


def test_a_save_under_way_when_a_load_fails_says_so(commanded: Make) -> None:
    """It is not kept, so its transfer must not claim that it was."""
    made = commanded()
    made.saved(A)
    save = made.engine.save_blocks([B], [1])
    made.engine.load_blocks([A], [7])
    made.copies.tickets[-1].fail()
    made.copies.tickets[-2].finish()
    with pytest.raises(TransferError, match="the save of 1 blocks failed"):
        save.wait()
    assert made.engine.check_blocks([B]) == [False]


STATS = {f"{state}_slots" for state in ("total", "free", "reserved", "resident", "quarantined")}
STATS |= {"slot_bytes", *Counters().as_dict()}


def test_stats(commanded: Make) -> None:
    made = commanded(4)
    assert made.engine.stats().keys() == STATS
    made.saved(A, B)
    made.engine.save_blocks([C], [2])
    made.engine.load_blocks([A, B], [3, 4])
    stats = made.engine.stats()
    assert stats["slot_bytes"] == 96 + 32
    slots = {name: stats[f"{name}_slots"] for name in ("total", "free", "reserved", "resident")}
    assert slots == {"total": 4, "free": 1, "reserved": 1, "resident": 2}
    assert (stats["stored_blocks"], stats["loaded_blocks"]) == (2, 0)
    for ticket in made.copies.waiting:
        ticket.finish()
    stats = made.engine.stats()
    assert (stats["stored_blocks"], stats["loaded_blocks"]) == (3, 2)
    assert (stats["reserved_slots"], stats["resident_slots"]) == (0, 3)
    assert (stats["stored_bytes"], stats["loaded_bytes"]) == (3 * 128, 2 * 128)
    assert stats["store_seconds"] > 0
    assert stats["load_seconds"] > 0


def test_closed(open_engine: Open) -> None:
    engine = open_engine()
    engine.save_blocks([A], [0]).wait()
    engine.shutdown()
    engine.shutdown()
    calls: list[Callable[[], object]] = [
        lambda: engine.save_blocks([A], [0]),
        lambda: engine.load_blocks([A], [0]),
        lambda: engine.check_blocks([A]),
        engine.stats,
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="shut down") as caught:
            call()
        assert isinstance(caught.value, RuntimeError)


def test_shutdown_lets_transfers_end(commanded: Make) -> None:
    made = commanded()
    made.saved(A)
    transfers = [made.engine.save_blocks([B], [1]), made.engine.load_blocks([A], [7])]
    made.engine.shutdown()
    assert [transfer.done for transfer in transfers] == [True, True]
    assert [transfer.wait() for transfer in transfers] == [1, 1]
    assert block_bytes(made.kv, 7) == block_bytes(made.kv, 0)


def test_with_shuts_down_also_after_an_error(kv: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ZeroDivisionError), KVortexEngine(config(2, 128), kv) as engine:
        assert engine.stats()["total_slots"] // 0
    with pytest.raises(ClosedError):
        engine.stats()


def test_a_pool_below_one_block_names_what_would_do(kv: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ConfigError) as caught:
        KVortexEngine(KVortexConfig(ram_pool_gb=1e-9), kv)
    message = str(caught.value)
    assert message.startswith("ram_pool_gb=1e-09: one KV block takes 128 bytes")
    least = float(message.rpartition("=")[2])
    with KVortexEngine(KVortexConfig(ram_pool_gb=least), kv) as engine:
        assert engine.stats()["total_slots"] == 1


def test_a_pool_above_the_machine() -> None:
    with pytest.raises(ConfigError, match=r"ram_pool_gb=65536: this machine has"):
        KVortexEngine(KVortexConfig(ram_pool_gb=65536), {"a": torch.zeros(4, 16)})


def test_memory_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvortex.free_memory.free_memory_bytes", lambda: 1 << 62)
    monkeypatch.setattr(
        "kvortex.host_memory.mmap.mmap", lambda *_, **__: (_ for _ in ()).throw(OSError(12))
    )
    with pytest.raises(PoolAllocationError, match="lower ram_pool_gb"):
        KVortexEngine(KVortexConfig(), {"a": torch.zeros(4, 16)})


def test_bad_tensors() -> None:
    with pytest.raises(LayoutError, match="empty"):
        KVortexEngine(KVortexConfig(), {})


def test_a_gpu_that_cannot_copy_leaves_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[HostPool] = []

    def broken(_layout: object, pool: HostPool, *_: object) -> None:
        pools.append(pool)
        raise TransferError("no kernel for this GPU")

    monkeypatch.setattr(kvortex.worker, "open_copy_engine", broken)
    with pytest.raises(TransferError, match="no kernel for this GPU"):
        KVortexEngine(config(2, 64), {"a": torch.zeros(4, 16)})
    assert pools[0].bytes.numel() == 0
