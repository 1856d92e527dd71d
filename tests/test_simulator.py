"""Simulations: the figures known of a real trace, the bound, and what is refused."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import random
import threading
import tracemalloc
from pathlib import Path

import pytest
from budget import budget
from hypothesis import given
from hypothesis import strategies as st

from kvortex import simulation
from kvortex.cli import main
from kvortex.core import ConfigError
from kvortex.plugins import policy_names
from kvortex.policies import ADMISSIONS, BUILT_IN, LRU
from kvortex.simulator import CLAIRVOYANT, replay
from kvortex.trace import LONGEST_LINE, Request, Trace, read_trace

TRACE = Path(__file__).parents[2] / "shared" / "traces" / "mooncake_conversation_trace.jsonl"
REAL = pytest.mark.skipif(not TRACE.exists(), reason="the trace is not here")


@pytest.fixture(scope="module")
def conversations() -> Trace:
    return read_trace(TRACE)


def trace(*requests: str) -> Trace:
    """Each letter is a block of one token."""
    return Trace([Request(tuple(letter.encode() for letter in r), len(r)) for r in requests])


def test_a_hit_counts_only_in_an_unbroken_chain() -> None:
    outcome = replay(trace("abc", "abd", "xbc"), "lru", 99)
    assert outcome.block_hit_rate == round(2 / 9, 6)
    assert outcome.blocks_written == 5
    assert outcome.hit_tokens == 3  # of a request with fewer tokens than its blocks hold


def test_the_tail_leaves_first() -> None:
    assert replay(trace("abc", "x", "ab"), "lru", 3).block_hit_rate == round(2 / 6, 6)


@pytest.mark.fuzz
@given(
    requests=st.lists(
        st.text("abcdefgh", min_size=1, max_size=5).map(lambda t: "".join(dict.fromkeys(t))),
        min_size=1,
        max_size=40,
    ),
    capacity=st.integers(1, 6),
)
@budget(25)
def test_no_policy_passes_the_bound_of_single_blocks(requests: list[str], capacity: int) -> None:
    """With requests of one block each the clairvoyant is the best there is."""
    single = trace(*"".join(requests))
    bound = replay(single, CLAIRVOYANT, capacity).block_hit_rate
    for policy in policy_names():
        for admission in ADMISSIONS:
            assert replay(single, policy, capacity, admission).block_hit_rate <= bound


@REAL
@pytest.mark.parametrize(
    ("policy", "rates"),
    [
        ("lru", [0.0525, 0.1958]),
        ("arc", [0.0649, 0.2102]),
        ("mq", [0.0619, 0.2217]),
        ("s3fifo", [0.0750, 0.1882]),  # 0.1874 where orphans may stay
        ("sieve", [0.0582, 0.1276]),
        (CLAIRVOYANT, [0.2464, 0.3664]),
    ],
)
def test_figures_that_others_found_too(
    policy: str, rates: list[float], conversations: Trace
) -> None:
    blocks = conversations.distinct_blocks()
    for share, rate in zip((0.01, 0.05), rates, strict=True):
        assert round(replay(conversations, policy, int(blocks * share)).block_hit_rate, 4) == rate


@REAL
@pytest.mark.parametrize(
    ("share", "least_hits", "most_written"),
    [(0.01, 0.107, 0.5), (0.05, 0.217, 0.5), (0.10, 0.288, 1.0), (0.25, 0.350, 1.0)],
)
def test_the_default_is_ahead_at_every_size(
    share: float, least_hits: float, most_written: float, conversations: Trace
) -> None:
    capacity = int(conversations.distinct_blocks() * share)
    ours = replay(conversations, "lru_freq", capacity, "adaptive")
    plain = replay(conversations, "lru", capacity)
    assert ours.block_hit_rate >= max(least_hits, plain.block_hit_rate)
    assert ours.blocks_written <= most_written * plain.blocks_written


@pytest.mark.parametrize("policy", policy_names())
def test_the_default_admission_never_starves_a_pool_that_is_large_enough(policy: str) -> None:
    draw = random.Random(1)
    names = [tuple(f"{i}.{j}".encode() for j in range(draw.randrange(1, 9))) for i in range(3000)]
    requests = [Request(keys, 1) for keys in [*names, *names]]
    outcome = replay(Trace(requests), policy, 15_000, "adaptive")
    assert outcome.block_hit_rate == 0.5


def turns(prompts: int, rounds: int) -> list[Request]:
    """Prompts of 100 blocks that all return once in each round, in random order."""
    draw = random.Random(1)
    keys = [tuple(f"{prompt}.{i}".encode() for i in range(100)) for prompt in range(prompts)]
    return [
        Request(keys[n], 100) for _ in range(rounds) for n in draw.sample(range(prompts), prompts)
    ]


def test_of_prompts_that_take_turns_the_default_keeps_a_part() -> None:
    """If they are too many for the pool, recency keeps what was served and drops what is next."""
    requests = Trace(turns(prompts=40, rounds=12))
    ours = replay(requests, "lru_freq", 2500, "adaptive")
    recent, bound = (replay(requests, policy, 2500) for policy in ("lru", CLAIRVOYANT))
    assert ours.block_hit_rate > max(0.9 * bound.block_hit_rate, 1.3 * recent.block_hit_rate)
    assert ours.blocks_written < 0.3 * recent.blocks_written


def in_turn(name: str, prompts: int, requests: int) -> list[Request]:
    """Prompts of 20 blocks, one after the other."""
    keys = [tuple(f"{name}{n}.{i}".encode() for i in range(20)) for n in range(prompts)]
    return [Request(keys[n % prompts], 20) for n in range(requests)]


@pytest.mark.parametrize(
    ("then", "least"),
    [
        pytest.param(in_turn("same ", 5, 2000), 0.85, id="few of the same"),
        pytest.param(in_turn("new ", 8, 2000), 0.85, id="few others"),
        pytest.param(in_turn("new ", 20, 3000), 0.3, id="as many others"),
    ],
)
def test_the_default_keeps_up_when_other_prompts_take_turns(
    then: list[Request], least: float
) -> None:
    """What was kept is given up for what returns now, also where requests have the pool's beat."""
    before = in_turn("same ", 20, 1000)
    kept = replay(Trace(before, 1), "lru_freq", 200, "adaptive")
    assert kept.block_hit_rate > 0.4
    hits = replay(Trace(before + then, 1), "lru_freq", 200, "adaptive").hit_tokens - kept.hit_tokens
    assert hits / (20 * len(then)) > least


def test_the_default_keeps_up_when_prompts_no_longer_take_turns() -> None:
    keys = [tuple(f"once {n}.{i}".encode() for i in range(20)) for n in range(1000)]
    twice = [Request(prompt, 20) for prompt in keys for _ in range(2)]
    before = in_turn("same ", 20, 1000)
    kept = replay(Trace(before, 1), "lru_freq", 200, "adaptive").hit_tokens
    hits = replay(Trace(before + twice, 1), "lru_freq", 200, "adaptive").hit_tokens - kept
    assert hits / 20 > 0.8 * 1000


def test_the_disk_serves_what_the_host_evicted() -> None:
    twice = trace("abcd", "efgh", "abcd")
    assert replay(twice, "lru", 4).block_hit_rate == 0
    both = replay(twice, "lru", 4, disk_blocks=8)
    assert both.block_hit_rate == both.disk_hit_rate == round(4 / 12, 6)
    assert (both.blocks_written, both.disk_blocks_written) == (12, 8)
    assert replay(twice, "lru", 4, disk_blocks=4).block_hit_rate == 0  # both hold the newest four


def test_a_policy_that_fails_is_not_shown_with_the_figures_of_lru(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Boom(LRU):
        def insert(self, key: bytes) -> None:
            raise KeyError(key)

    monkeypatch.setitem(BUILT_IN, "lru", Boom)
    monkeypatch.setattr("kvortex.plugins.entry_points", lambda **_: ())
    with pytest.raises(ConfigError, match="policy 'lru' fails, LRU would serve instead: KeyError"):
        replay(trace("abcd"), "lru", 4)


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.fuzz
@given(
    requests=st.lists(
        st.text("abcdefgh", min_size=1, max_size=5).map(lambda t: "".join(dict.fromkeys(t))),
        min_size=1,
        max_size=40,
    )
)
@budget(10)
def test_two_tiers_that_hold_all_lose_nothing(policy: str, requests: list[str]) -> None:
    everything = trace(*requests)
    whole = replay(everything, policy, 8)
    split = replay(everything, policy, 1, disk_blocks=8)
    assert split.block_hit_rate == whole.block_hit_rate


def written(folder: Path, *lines: str) -> str:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


LINES = [json.dumps({"hash_ids": [0, i % 7, 9], "input_length": 1300}) for i in range(40)]


def test_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", written(tmp_path, *LINES), "--capacity", "3,50%", "--policy", "lru"]
    assert main([*command, "clairvoyant", "--prefill-tokens-per-s", "1000"]) == 0
    shown = capsys.readouterr()
    assert [line.split()[:2] for line in shown.out.splitlines()[1:]] == [
        ["lru", "3"], ["lru", "4"], ["clairvoyant", "3"], ["clairvoyant", "4"],
    ]  # fmt: skip
    assert "4 of 4" in shown.err


def test_capacities_in_bytes_and_a_second_tier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["simulate", written(tmp_path, *LINES), "--policy", "lru", "--disk", "90%"]
    command += ["--capacity", "2MiB,0.003GB", "--block-bytes", "1MiB"]
    assert main([*command, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["capacity_blocks"], row["disk_blocks"]) for row in rows] == [(2, 7)]
    assert all(row["disk_hit_rate"] > 0 for row in rows)
    assert main(command) == 0
    assert "disk" in capsys.readouterr().out


def test_command_prints_one_object_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", written(tmp_path, *LINES), "--json", "--capacity", "5"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["policy"] for row in rows] == [*policy_names(), CLAIRVOYANT]
    assert all(row["capacity_blocks"] == 5 and row["admission"] in ("", "always") for row in rows)
    assert {"capacity_share", "block_hit_rate", "token_hit_rate", "blocks_written"} <= set(rows[0])


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (["nonsense"], [], ["trace.jsonl:1: not a request", "hash_ids"]),
        ([LINES[0], '{"hash_ids": [-1]}'], [], ["trace.jsonl:2"]),
        (["[1, 2]"], [], ["trace.jsonl:1"]),
        ([], [], ["no request in it has blocks"]),
        (LINES, ["--capacity", "0"], ["--capacity 0", "like 5%"]),
        (LINES, ["--capacity", "much"], ["--capacity much"]),
        (LINES, ["--capacity", "8GiB"], ["--capacity 8GiB", "--block-bytes"]),
        (LINES, ["--block-bytes", "3"], ["--block-bytes 3", "64MiB"]),
        (LINES, ["--capacity", "3", "--disk", "x"], ["--disk x", "like 5%"]),
        (LINES, ["--capacity", "1KB", "--block-bytes", "1MiB"], ["--capacity 1KB", "holds"]),
        (LINES, ["--policy", "mru"], ["eviction_policy='mru'", "lru_freq"]),
        (LINES, ["--admission", "no"], ["admission='no'", "adaptive"]),
    ],
)
def test_command_refuses_in_one_line(
    lines: list[str],
    options: list[str],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["simulate", written(tmp_path, *lines), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words)


def test_a_share_of_a_short_trace_is_a_block_at_least(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", written(tmp_path, *LINES), "--policy", "lru", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["capacity_blocks"] for row in rows] == [1, 2]  # once each


def test_ctrl_c_ends_replays_that_are_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replay_or_hang(_: Trace, policy: str, *__: object) -> None:
        if policy != "lru":
            threading.Event().wait()

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulation, "replay", replay_or_hang)
    others = multiprocessing.active_children()
    path = Path(written(tmp_path, *LINES))
    with pytest.raises(KeyboardInterrupt):
        simulation.simulate(path, ["lru", "fifo", "arc"], ["3", "4"], "always", interrupt)
    assert multiprocessing.active_children() == others


DEEP = '{"hash_ids": ' + "[" * 100_000 + "]" * 100_000 + "}"
HEADER = {"format": "kvortex-trace-1", "block_tokens": 16, "block_bytes": 4096}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([DEEP], "trace.jsonl:1: not a request"),
        ([LINES[0], '{"hash_ids": [1], "input_length": 1e300}'], "trace.jsonl:2: not a request"),
        (['{"hash_ids": [1], "timestamp": -1}'], "-1 is no number from 0"),
        (['{"hash_ids": [1], "timestamp": 9' + "0" * 400 + "}"], "trace.jsonl:1: not a request"),
        (['{"hash_ids": [1], "hits": {"host": "x"}}'], "'x' is no number"),
        (['{"hash_ids": [1], "hits": [[1, 2]]}'], "trace.jsonl:1: not a request"),
        ([json.dumps(HEADER | {"block_bytes": "4 KiB"}), *LINES], "what a block is: '4 KiB'"),
        ([json.dumps(HEADER | {"block_tokens": 0}), *LINES], "what a block is: 0 is no number"),
        ([json.dumps(HEADER | {"format": ["\n"] * 99}), *LINES], r"format \['\\n', .*; this"),
    ],
)
def test_a_trace_that_says_nonsense_is_refused(
    lines: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_trace(Path(written(tmp_path, *lines)))
    assert len(str(caught.value)) < 500


def test_a_compressed_trace_with_a_wrong_byte_is_refused(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress("\n".join(LINES).encode()))
    packed[10] |= 6  # a kind of block that there is not
    path = tmp_path / "trace.gz"
    path.write_bytes(packed)
    with pytest.raises(ConfigError, match="cannot be read as a trace"):
        read_trace(path)


def test_a_few_bytes_do_not_become_a_line_of_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "trace.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(LONGEST_LINE >> 19):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"trace\.gz:1: too long for a line"):
        read_trace(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2.5 * LONGEST_LINE


def test_a_missing_trace_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "/nowhere.jsonl"]) == 2
    assert "/nowhere.jsonl: cannot be read as a trace" in capsys.readouterr().err


def test_no_requests_no_hits() -> None:
    with pytest.raises(ConfigError, match="no request in it has blocks"):
        read_trace(Path("/dev/null"))
