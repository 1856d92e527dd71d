"""Recorder and the traces it writes: read again they say the same; bounded; nothing private."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING

import pytest

import kvortex.recorder
from kvortex import KVortexConfig
from kvortex.cli import main
from kvortex.core import ConfigError
from kvortex.recorder import FLUSH_EVERY, Recorder
from kvortex.trace import read_trace

if TYPE_CHECKING:
    from pathlib import Path

KEYS = [bytes([n]) * 33 for n in range(6)]


def recorded(path: Path, *, count: int = 2, most_bytes: int = 1 << 20) -> Recorder:
    recorder = Recorder(path, block_tokens=16, block_bytes=4096, most_bytes=most_bytes)
    for number in range(count):
        keys = KEYS[: 2 + number % 4]
        recorder.record(f"req-{number}", keys, {"gpu": 1, "host": number % 2}, 40, 1.5 * number)
    return recorder


def test_what_was_recorded_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.gz"
    with recorded(path) as recorder:
        pass
    trace = read_trace(path)
    assert (trace.block_tokens, trace.block_bytes, recorder.left_out) == (16, 4096, 0)
    first, second = trace.requests
    assert first.keys == second.keys[:2]
    assert len(set(second.keys)) == 3
    assert (first.tokens, first.time_ms, second.time_ms) == (40, 0, 1500)
    assert (first.hits, second.hits) == ({"gpu": 1, "host": 0}, {"gpu": 1, "host": 1})


def test_the_command_prints_what_lets_vllm_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "record", "trace.gz", "--ram-pool-gb", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    path = str(tmp_path / "trace.gz")
    assert printed == KVortexConfig(ram_pool_gb=2, trace_path=path).kv_transfer_config()


def test_the_command_wants_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["trace.gz", "--trace-path", "other.gz"]):
        with pytest.raises(SystemExit, match="2"):
            main(["trace", "record", *arguments])
        assert "see kvortex trace record --help" in capsys.readouterr().err


def test_neither_keys_nor_names_are_in_the_file(tmp_path: Path) -> None:
    import gzip

    told = []
    for name in ("a", "b"):
        recorded(tmp_path / name).close()
        told.append(gzip.decompress((tmp_path / name).read_bytes()))
        assert b"req-" not in told[-1]
        assert str(int.from_bytes(KEYS[1][:7], "big")).encode() not in told[-1]
    assert told[0] != told[1]  # another salt


def test_what_came_a_second_ago_outlives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvortex.recorder, "FLUSH_S", 0.01)
    path = tmp_path / "trace.gz"
    recorder = recorded(path, count=3)
    deadline, found = time.monotonic() + 10, 0
    while found < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
        with contextlib.suppress(ConfigError):  # nothing is there yet
            found = len(read_trace(path).requests)
    assert found == 3
    recorder.close()


def test_the_file_is_bounded(tmp_path: Path) -> None:
    recorder = recorded(tmp_path / "trace.gz", count=3 * FLUSH_EVERY, most_bytes=100)
    recorder.close()
    assert len(read_trace(tmp_path / "trace.gz").requests) == FLUSH_EVERY
    recorder.record("late", KEYS, {}, 1, 0)
    assert recorder.left_out > 0
    recorder.close()


def test_a_slow_disk_costs_records_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvortex.recorder, "WAITING", 0)
    with recorded(tmp_path / "trace.gz", count=5) as recorder:
        assert recorder.left_out == 5


def test_a_full_disk_ends_the_trace_only(caplog: pytest.LogCaptureFixture) -> None:
    from pathlib import Path

    with recorded(Path("/dev/full"), count=3 * FLUSH_EVERY) as recorder:
        pass
    recorder.record("late", KEYS, {}, 1, 0)
    assert recorder.left_out > 0
    assert "The trace ends here" in caplog.text


def test_a_trace_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "trace.gz"
    recorded(path, count=2 * FLUSH_EVERY).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    assert FLUSH_EVERY <= len(read_trace(path).requests) < 2 * FLUSH_EVERY


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written as a trace"):
        Recorder(tmp_path / "no" / "trace", 16, 1)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text('{"format": "kvortex-trace-9"}\n{"hash_ids": [1]}')
    with pytest.raises(ConfigError, match="kvortex-trace-9"):
        read_trace(path)


def test_commands_read_what_was_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.gz"
    recorded(path, count=40).close()
    assert main(["trace", "info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["requests"] == 40
    assert (facts["distinct_blocks"], facts["block_tokens"]) == (5, 16)
    assert (facts["hits_gpu"], facts["hits_host"]) == (40, 20)
    assert main(["trace", "info", str(path)]) == 0
    assert "distinct_blocks  5" in capsys.readouterr().out
    path.with_name("mooncake").write_text('{"hash_ids": [1], "input_length": 512}')
    assert main(["trace", "info", str(path.with_name("mooncake"))]) == 0
    assert "block_bytes      not told" in capsys.readouterr().out
    assert main(["simulate", str(path), "--policy", "lru", "--capacity", "8KiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["capacity_blocks"] == 2
