"""A real vLLM in this process, and what tests ask of it."""

from __future__ import annotations

import gc
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvortex import KVortexConfig
from kvortex.core import Direction, TransferError
from kvortex.verification import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvortex.core import BlockIds

BLOCK = 32
LENGTHS = [
    1,
    31,
    32,
    33,
    63,
    64,
    65,
    96,
    97,
    128,
    150,
    200,
    255,
    256,
    257,
    333,
    400,
    512,
    777,
    1000,
]
LENGTHS += [1500, 2048]
"""Of the prompts whose outputs are the fixture `expected`."""


def prompts(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    return [{"prompt_token_ids": [draw.randrange(4, 260) for _ in range(n)]} for n in lengths]


@contextmanager
def running(
    model: str, ram_pool_gb: float | None, verify: Any = "always", **settings: Any
) -> Iterator[Any]:
    """An LLM, with KVortex unless `ram_pool_gb` is None; afterwards nothing of it is left."""
    from vllm import LLM

    config = None
    if ram_pool_gb:
        config = KVortexConfig(ram_pool_gb=ram_pool_gb, load="always", verify=verify)
    defaults = {
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "dtype": "float32",
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": BLOCK,
        "disable_log_stats": False,
        "seed": 0,
        "kv_transfer_config": config.kv_transfer_config() if config else None,
    }
    llm = LLM(model=model, **defaults | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def reset_gpu(llm: Any, *, reset_connector: bool = False) -> None:
    """Empty the GPU's prefix cache once no store reads from it: until then vLLM refuses."""
    for _ in range(100):
        if llm.reset_prefix_cache(reset_connector=reset_connector):
            return
        answers(llm, prompts([4]), tokens=2)  # the engine takes no step for nobody
    raise AssertionError("vLLM does not reset its prefix cache")


def connector(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.connector


def worker_of_this_process() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._worker.worker


def fail_copies(
    monkeypatch: Any, broken: Direction, when: Callable[[BlockIds, BlockIds], bool]
) -> None:
    """Have copies of one direction fail, whole or layer by layer, if `when(block_ids, slots)`."""
    engine = worker_of_this_process()._copy_engine
    copy, load_layers = engine.copy, engine.load_layers

    def maybe(direction: Direction, *where: Any) -> Any:
        if direction is broken and when(*where[:2]):
            raise TransferError("made to fail")
        return copy(direction, *where)

    def maybe_layers(*where: Any) -> Any:
        if broken is Direction.LOAD and when(*where[:2]):
            raise TransferError("made to fail")
        return load_layers(*where)

    monkeypatch.setattr(engine, "copy", maybe)
    monkeypatch.setattr(engine, "load_layers", maybe_layers)


def compares_nothing(monkeypatch: Any) -> None:
    """Have loads bring whatever the slots hold, as with verify="off"."""
    engine = worker_of_this_process()._copy_engine
    if hasattr(engine, "_sampling"):
        monkeypatch.setattr(engine, "_sampling", Sampling(None))
        return
    monkeypatch.setattr("kvortex.id_ring.IdRing.take_bad", lambda *_: [])


def counters(llm: Any) -> dict[str, float]:
    counted: dict[str, float] = connector(llm)._scheduler.offload.counters.as_dict()
    return counted


def answers(llm: Any, asked: list[Any], tokens: int = 40) -> tuple[list[list[int]], list[int]]:
    """Greedy output tokens and cached tokens of each prompt."""
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    outs = llm.generate(asked, greedy, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outs], [o.num_cached_tokens for o in outs]


def whole_blocks(lengths: list[int]) -> list[int]:
    return [(n - 1) // BLOCK * BLOCK for n in lengths]
