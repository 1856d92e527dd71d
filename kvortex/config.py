"""KVortexConfig: every setting of KVortex, checked once, frozen afterwards."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from kvortex.core import ConfigError, shown

GIB = 1 << 30
LARGEST_POOL_GB = 65536
CONNECTOR_NAME = "KVortexConnector"
CONNECTOR_MODULE = "kvortex.connector"
ROLE = "kv_both"
"""Of vLLM's: what is stored here is loaded here."""
LIMITS = {"gt": "more than", "ge": "at least", "le": "at most"}

NOT_ITS_BLOCKS = "leave it out, KVortex moves vLLM's own blocks"
FROM_ELSEWHERE = {
    # vLLM's OffloadingConnector and SimpleCPUOffloadConnector
    "cpu_bytes_to_use": "write ram_pool_gb={gib}",
    "cpu_bytes_to_use_per_rank": "write ram_pool_gb={gib} times the number of ranks",
    "num_cpu_blocks": "write ram_pool_gb=<GiB for all blocks>",
    "store_threshold": 'write admission="second_sight" for 2 and more, else "always"',
    "lazy_offload": "leave it out, blocks are stored as they fill",
    "offload_prompt_only": "leave it out, answers are stored, too; a request may be limited",
    "block_size": NOT_ITS_BLOCKS,
    "blocks_per_chunk": NOT_ITS_BLOCKS,
    "cache_policy_module_path": "write eviction_policy=<name of an installed policy>",
    # LMCache
    "max_local_cpu_size": "write ram_pool_gb={value} times the number of ranks",
    "local_cpu": "leave it out, host memory is always used",
    "chunk_size": NOT_ITS_BLOCKS,
    "cache_policy": "write eviction_policy=<its name in lower case>",
    "use_layerwise": "leave it out, layers are loaded one by one where that is faster",
}
"""What becomes of other connectors' settings, for those who come from there."""


class KVortexConfig(BaseModel):
    """Settings of an engine or a vLLM connector.

    Raises:
        ConfigError: an unknown key, or a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ram_pool_gb: float = Field(
        default=8.0,
        gt=0,
        le=LARGEST_POOL_GB,
        description="Host RAM for KV blocks, in GiB, shared by the ranks of one engine; with data "
        "parallelism every replica takes as much.",
    )
    num_cuda_streams: int = Field(
        default=4, ge=1, le=32, description="CUDA streams that carry transfers, per GPU."
    )
    numa_node: int | None = Field(
        default=None,
        ge=0,
        description="NUMA node for the pool, by default the one next to the GPU.",
    )
    eviction_policy: str = Field(
        default="lru_freq",
        min_length=1,
        description="Who chooses the block to forget: lru_freq, lru, lfu, arc, fifo, mq, s3fifo, "
        "sieve, wtinylfu, or an installed one.",
    )
    admission: str = Field(
        default="adaptive",
        min_length=1,
        description="Which new blocks are stored at all: adaptive, always, second_sight, tinylfu.",
    )
    load: Literal["auto", "always"] = Field(
        default="auto",
        description="auto loads a hit where that takes less time than to compute it, by what was "
        "measured of the link and of prefill; always loads every hit.",
    )
    min_load_tokens: int = Field(
        default=0, ge=0, description="A shorter hit is computed, whatever `load` says."
    )
    verify: Literal["always", "sampled", "off"] = Field(
        default="always",
        description="Which loads are compared with a checksum of what was stored: always all, "
        "sampled one copy in 16 until one is wrong, off none. What is not the same is computed "
        "again. With `disk_path` sampled is always.",
    )
    trace_path: str | None = Field(
        default=None,
        min_length=1,
        description="File into which a trace of requests is recorded, for `kvortex simulate`; it "
        "holds salted hashes, no prompts.",
    )

    disk_path: str | None = Field(
        default=None,
        min_length=1,
        description="Folder on a local drive for blocks that leave host RAM.",
    )
    disk_pool_gb: float | None = Field(
        default=None,
        gt=0,
        le=1 << 20,
        description="Disk for KV blocks, in GiB, shared by the ranks of one engine.",
    )
    disk_max_write_mb_s: float | None = Field(
        default=None,
        gt=0,
        le=1 << 20,
        description="Most that is written to the disk, in MB/s, all ranks together; flash wears.",
    )
    disk_read_deadline_ms: int = Field(
        default=1000,
        ge=1,
        le=600_000,
        description="A block that the disk has not delivered after so long is computed.",
    )

    def __init__(self, /, **settings: Any) -> None:  # noqa: ANN401  (pydantic's own signature)
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    @classmethod
    def from_extra_config(cls, extra: dict[str, Any] | None) -> Self:
        """Read vLLM's `kv_connector_extra_config`."""
        return cls(**{str(key): value for key, value in (extra or {}).items()})

    @field_validator(
        "ram_pool_gb",
        "num_cuda_streams",
        "numa_node",
        "min_load_tokens",
        "disk_pool_gb",
        "disk_max_write_mb_s",
        "disk_read_deadline_ms",
        mode="before",
    )
    @classmethod
    def _is_no_truth_value(cls, value: object) -> object:
        if isinstance(value, bool):
            raise PydanticCustomError("number_type", "Input should be a number")
        return value

    @field_validator("trace_path", "disk_path")
    @classmethod
    def _can_be_a_name(cls, value: str | None) -> str | None:
        if "\0" in (value or ""):
            raise PydanticCustomError("file_name", "Input should be the name of a file")
        return value

    @model_validator(mode="after")
    def _disk_is_whole(self) -> Self:
        if self.disk_path is not None and self.disk_pool_gb is None:
            raise ConfigError(
                f"disk_path={shown(self.disk_path)}: how much of it may be used? "
                "set disk_pool_gb too"
            )
        for name in ("disk_pool_gb", "disk_max_write_mb_s", "disk_read_deadline_ms"):
            default = type(self).model_fields[name].default
            if self.disk_path is None and getattr(self, name) != default:
                raise ConfigError(f"{name}={getattr(self, name)!r}: where? set disk_path too")
        return self

    @property
    def ram_pool_bytes(self) -> int:
        """Size of the host pool in bytes."""
        return int(self.ram_pool_gb * GIB)

    @property
    def disk_write_bytes_per_s(self) -> float | None:
        """What all ranks together may write to the disk; None is no limit."""
        return None if self.disk_max_write_mb_s is None else self.disk_max_write_mb_s * 1e6

    def kv_transfer_config(self) -> dict[str, Any]:
        """What vLLM takes as `kv_transfer_config`, ready for JSON.

        A failed load is computed again instead of failing its request: vLLM's own default
        ("fail") would turn a lost cache block into an error for the user.
        """
        return {
            "kv_connector": CONNECTOR_NAME,
            "kv_connector_module_path": CONNECTOR_MODULE,
            "kv_role": ROLE,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": self.model_dump(),
        }


def slots_in_pool(config: KVortexConfig, slot_bytes: int, num_ranks: int = 1) -> int:
    """How many slots each rank's share of the pool holds.

    Raises:
        ConfigError: not even one.
    """
    num_slots = config.ram_pool_bytes // num_ranks // slot_bytes
    if num_slots < 1:
        least = slot_bytes * num_ranks / GIB
        raise ConfigError(
            f"ram_pool_gb={config.ram_pool_gb:g}: one KV block takes {slot_bytes} bytes on each of "
            f"{num_ranks} rank(s); use at least ram_pool_gb={least * 1.01:.3g}"
        )
    return num_slots


def _one_line(error: ValidationError) -> str:
    """The first problem as `key=value: reason`, and what would do."""
    problem = error.errors()[0]
    if problem["type"] == "string_unicode" and not problem["loc"]:  # of a key, which it leaves out
        return f"a setting's name is no text: {_all_settings()}"
    if not problem["loc"]:  # settings that do not go together; the message is our own
        return str(problem["ctx"]["error"])
    key, value = ".".join(str(part) for part in problem["loc"]), problem["input"]
    if problem["type"] == "extra_forbidden":
        name = key if key.isidentifier() else shown(key)
        return f"unknown setting {name}={shown(value)}: {_what_instead(key, value)}"
    described = KVortexConfig.model_fields[key]
    reason = problem["msg"][0].lower() + problem["msg"][1:]
    limits = ", ".join(
        f"{words} {getattr(limit, name)}"
        for limit in described.metadata
        for name, words in LIMITS.items()
        if hasattr(limit, name)
    )
    allowed = f"{limits}; default" if limits else "default"
    return f"{key}={shown(value)}: {reason} ({allowed} {described.default!r})"


def _what_instead(key: str, value: object) -> str:
    """Of a setting that KVortex does not know."""
    hint = FROM_ELSEWHERE.get(key.removeprefix("lmcache."))
    if hint is None:
        return _all_settings()
    gib = "<GiB>"
    if isinstance(value, int | float) and 0 < value <= LARGEST_POOL_GB * GIB:
        gib = f"{value / GIB:.6g}"
    return hint.format(value=shown(value), gib=gib)


def _all_settings() -> str:
    return "the settings are " + ", ".join(KVortexConfig.model_fields)
