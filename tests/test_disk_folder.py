"""The folder of the disk cache: private, never shared, never another's; and `kvortex disk`."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
import time
from threading import Event, Thread
from typing import TYPE_CHECKING

import pytest
from disks import (
    KINDS,
    NAMESPACE,
    SLOT_BYTES,
    block_bytes,
    opened,
    read,
    verified_by,
    written,
)

import kvortex.disk.format
import kvortex.disk.neighbours
from kvortex.cli import main
from kvortex.core import ConfigError
from kvortex.disk import Namespace
from kvortex.disk.checksums import scheme_of
from kvortex.disk.format import PAGE, RECORD_BYTES
from kvortex.disk.tool import inspect

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OTHER = Namespace(b"other weights", {"model": "other"})
BLOCKS = {b"a": 0, b"b": 3}


def folder_of(path: Path, namespace: Namespace = NAMESPACE, rank: int = 0) -> Path:
    return path / namespace.digest(SLOT_BYTES).hex() / f"rank-{rank}"


def fill_disk(path: Path, namespace: Namespace = NAMESPACE, rank: int = 0) -> Path:
    with opened(path, namespace=namespace, rank=rank) as (store, pool):
        assert not written(store, pool, BLOCKS)
    return folder_of(path, namespace, rank)


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = fill_disk(tmp_path / "new" / "disk")
    finally:
        os.umask(before)
    for path in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (folder / "slots").chmod(0o644)
    folder.chmod(0o755)
    fill_disk(tmp_path / "new" / "disk")
    assert stat.S_IMODE((folder / "slots").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_disk_is_set_aside_and_no_more_than_that(tmp_path: Path) -> None:
    folder = fill_disk(tmp_path)
    size = 8 * SLOT_BYTES + PAGE  # for trials
    assert (folder / "slots").stat().st_size == size
    assert (folder / "slots").stat().st_blocks * 512 >= size
    assert (folder / "records").stat().st_size == 8 * 128


def test_a_folder_says_what_it_is(tmp_path: Path) -> None:
    about = json.loads((fill_disk(tmp_path) / "namespace.json").read_text())
    assert len(about.pop("life")) == 32
    assert about == {
        "format": "kvortex-disk-2",
        "rank": 0,
        "slot_bytes": SLOT_BYTES,
        "num_slots": 8,
        "checksums": {"kind": "xxh3", "fingerprint": 0, "word": 0, "stretches": []},
        "namespace": {"model": "tiny", "dtype": "bfloat16"},
    }


def test_a_second_server_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as (store, pool):
        written(store, pool, BLOCKS)
        with pytest.raises(ConfigError) as caught, opened(tmp_path):
            pass
        assert str(caught.value) == (
            f"disk_path={str(tmp_path)!r}: another server (process {os.getpid()}) keeps its cache "
            "of the same model there; give each server a disk_path of its own, or end what a "
            "killed one left behind"
        )
        assert read(store, pool, list(BLOCKS), [0, 3]) == [block_bytes(b"a"), block_bytes(b"b")]
    with opened(tmp_path) as (store, _):
        assert len(store.survivors.keys) == 2


def test_nobody_waits_for_ever_for_one_that_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that was stopped in the midst of opening its cache."""
    monkeypatch.setattr("kvortex.disk.folder.OPENING_S", 0.3)
    monkeypatch.setattr("kvortex.disk.folder.SILENT_S", 0.1)
    fill_disk(tmp_path)
    with (tmp_path / ".kvortex-lock").open("r+") as stuck:
        fcntl.flock(stuck, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another process has held \.kvortex-lock"):
            opened(tmp_path).__enter__()
    (told,) = caplog.messages
    assert "waiting up to" in told
    with opened(tmp_path) as (store, _):
        assert len(store.survivors.keys) == len(BLOCKS)


def test_two_models_and_two_ranks_never_meet(tmp_path: Path) -> None:
    with (
        opened(tmp_path) as (store, pool),
        opened(tmp_path, rank=1) as (second, second_pool),
        opened(tmp_path, namespace=OTHER) as (other, other_pool),
    ):
        written(store, pool, BLOCKS)
        written(second, second_pool, {b"a": 0}, version=1)
        written(other, other_pool, {b"a": 0}, version=2)
        assert read(store, pool, [b"a"], [0]) == [block_bytes(b"a")]
        assert read(second, second_pool, [b"a"], [0]) == [block_bytes(b"a", 1)]
        assert read(other, other_pool, [b"a"], [0]) == [block_bytes(b"a", 2)]
        assert store.counters.removed_caches == 0
    assert folder_of(tmp_path).exists()


@pytest.fixture
def short_of_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvortex.disk.neighbours, "SPARE_SHARE", 2.0)


def test_blocks_of_another_size_are_another_cache(tmp_path: Path) -> None:
    fill_disk(tmp_path)
    with opened(tmp_path, slot_bytes=2 * SLOT_BYTES) as (store, _):
        assert store.survivors.keys == []
    with opened(tmp_path) as (store, _):
        assert len(store.survivors.keys) == 2


def test_models_that_take_turns_keep_their_caches(tmp_path: Path) -> None:
    for _ in range(2):
        for model in (NAMESPACE, OTHER):
            fill_disk(tmp_path, model)
    for model in (NAMESPACE, OTHER):
        with opened(tmp_path, namespace=model) as (store, _):
            assert len(store.survivors.keys) == 2
            assert store.counters.removed_caches == 0


@pytest.mark.usefixtures("short_of_room")
def test_what_no_server_holds_makes_room(tmp_path: Path) -> None:
    fill_disk(tmp_path, OTHER)
    fill_disk(tmp_path, OTHER, rank=1)
    (tmp_path / "notes.txt").write_text("mine")
    with opened(tmp_path) as (store, _):
        assert store.counters.removed_caches == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [".kvortex-lock", "notes.txt", NAMESPACE.digest(SLOT_BYTES).hex()]
    )


@pytest.mark.usefixtures("short_of_room")
def test_a_cache_with_one_rank_in_use_stays_whole(tmp_path: Path) -> None:
    fill_disk(tmp_path, OTHER)
    with opened(tmp_path, namespace=OTHER, rank=1):
        fill_disk(tmp_path)
        assert (folder_of(tmp_path, OTHER) / "slots").exists()


@pytest.mark.usefixtures("short_of_room")
def test_foreign_files_stay(tmp_path: Path) -> None:
    folder = fill_disk(tmp_path, OTHER)
    (folder / "thesis.tex").write_text("mine")
    fill_disk(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.usefixtures("short_of_room")
def test_a_cache_of_which_a_foreign_file_stays_has_made_room_once(tmp_path: Path) -> None:
    folder = fill_disk(tmp_path, OTHER)
    fill_disk(tmp_path, OTHER, rank=1)
    (folder / "thesis.tex").write_text("mine")
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        others = kvortex.disk.neighbours.Neighbours(root, NAMESPACE.digest(SLOT_BYTES).hex())
        assert (others.make_room(), others.make_room(), others.removed) == (True, False, 1)
        assert [path.name for path in folder.parent.rglob("*")] == ["rank-0", "thesis.tex"]
        others = kvortex.disk.neighbours.Neighbours(root, NAMESPACE.digest(SLOT_BYTES).hex())
        assert (others.make_room(), others.removed) == (False, 0)
    finally:
        os.close(root)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def make_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def make_hard_link(path: Path, target: Path) -> None:
    path.hardlink_to(target)


def make_pipe(path: Path, _target: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path, _target: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("name", ["slots", "records", "namespace.json.new", "lock"])
@pytest.mark.parametrize("make", [make_link, make_hard_link, make_pipe, make_folder])
def test_links_and_what_is_no_file_are_refused(
    tmp_path: Path, name: str, make: Callable[[Path, Path], None]
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = fill_disk(tmp_path / "disk")
    (folder / name).unlink(missing_ok=True)
    make(folder / name, victim)
    with (
        pytest.raises(ConfigError, match=f"{name} is a link, or not a file"),
        opened(tmp_path / "disk"),
    ):
        pass
    assert victim.read_text() == "precious"


def test_folders_that_are_links_are_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = folder_of(tmp_path / "disk")
    folder.parent.parent.mkdir()
    folder.parent.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="is a link or no folder"), opened(tmp_path / "disk"):
        pass
    assert list(elsewhere.iterdir()) == []


@pytest.mark.usefixtures("short_of_room")
def test_a_link_among_the_caches_is_not_followed_when_making_room(tmp_path: Path) -> None:
    fill_disk(tmp_path / "elsewhere", OTHER)
    (tmp_path / "disk").mkdir()
    link = folder_of(tmp_path / "disk", OTHER).parent
    link.symlink_to(folder_of(tmp_path / "elsewhere", OTHER).parent)
    fill_disk(tmp_path / "disk")
    assert link.is_symlink()
    assert (folder_of(tmp_path / "elsewhere", OTHER) / "slots").exists()


@pytest.mark.parametrize(
    "about", ["", "{", "[]", "[" * 100_000, '{"slot_bytes": -1}', '{"slot_bytes": 4096}']
)
def test_a_spoiled_description_is_written_anew(
    tmp_path: Path, about: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "0 blocks are good, 0 are corrupt, 2 are not verifiable\n"
    folder = fill_disk(tmp_path)
    (folder / "namespace.json").write_text(about)
    assert main(["disk", "inspect", "--json", str(tmp_path)]) == 0
    (info,) = json.loads(capsys.readouterr().out)["caches"]
    assert (info["slot_bytes"], info["used"], info["invalid"]) == (SLOT_BYTES, 2, 0)
    assert main(["disk", "verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out == told
    with opened(tmp_path) as (store, _):
        assert len(store.survivors.keys) == 2
    assert json.loads((folder / "namespace.json").read_text())["num_slots"] == 8


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = r"^disk_path='.*file.*': Not a directory; name a folder of a local drive that you may"
    for path in (tmp_path / "file", tmp_path / "file" / "disk"):
        with pytest.raises(ConfigError, match=told), opened(path):
            pass


def test_more_than_the_disk_has_is_refused(tmp_path: Path) -> None:
    from kvortex.disk import DiskStore
    from kvortex.host_pool import HostPool

    with (
        HostPool(1, 1 << 20, pinned=False) as pool,
        pytest.raises(ConfigError, match=r"GiB are free there, .*; lower disk_pool_gb$"),
    ):
        DiskStore(tmp_path, NAMESPACE, 0, 1 << 24, pool)
    used = sum(file.stat().st_blocks for file in tmp_path.rglob("slots"))
    assert used == 0


def test_inspect_and_verify_and_clear(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    folder = fill_disk(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1_007_200.0)
    assert main(["disk", "inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "2 h" in shown
    assert "model tiny, dtype bfloat16" in shown
    assert main(["disk", "inspect", "--json", str(tmp_path)]) == 0
    (cache,) = json.loads(capsys.readouterr().out)["caches"]
    assert cache.pop("disk_bytes") >= 8 * SLOT_BYTES
    assert cache == {
        "namespace": NAMESPACE.digest(SLOT_BYTES).hex(),
        "rank": 0,
        "in_use": False,
        "slot_bytes": SLOT_BYTES,
        "slots": 8,
        "used": 2,
        "stale": 0,
        "invalid": 0,
        "damaged": 0,
        "newest_age": 7200,
        "oldest_age": 7200,
        "description": {"model": "tiny", "dtype": "bfloat16"},
    }
    assert main(["disk", "verify", "--json", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "caches_read": 1,
        "good": 2,
        "corrupt": 0,
        "not_verifiable": 0,
        "unread": 0,
        "changed": 0,
        "damaged_records": 0,
        "not_served": 0,
        "disturbed": False,
        "unreadable": {},
        "untried": {},
    }
    with (folder / "slots").open("r+b") as file:
        file.seek(3 * SLOT_BYTES + 77)
        file.write(b"spoiled")
    assert main(["disk", "verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "1 blocks are good, 1 are corrupt\n"
    with (folder / "records").open("r+b") as file:
        file.seek(3 * RECORD_BYTES + 40)
        file.write(b"spoiled")
    assert main(["disk", "verify", str(tmp_path)]) == 1
    told = "1 blocks are good, 0 are corrupt; 1 records are damaged, whose blocks are lost\n"
    assert capsys.readouterr().out == told
    assert main(["disk", "clear", "--yes", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "1 caches removed\n"
    assert [path.name for path in tmp_path.iterdir()] == [".kvortex-lock"]
    assert main(["disk", "inspect", str(tmp_path)]) == 0
    assert "no caches" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot_bytes", [SLOT_BYTES, 999, (2 << 20) + 8])
def test_whoever_counted_checksums_verify_compares_them(
    kind: str, slot_bytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = verified_by(kind, slot_bytes)
    with opened(tmp_path, slot_bytes=slot_bytes, verification=how) as (store, pool):
        assert not written(store, pool, BLOCKS, verification=how)
        assert not written(store, pool, {b"c": 1}, verification=how)
    assert main(["disk", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "3 blocks are good, 0 are corrupt\n"
    folder = tmp_path / NAMESPACE.digest(slot_bytes, scheme_of(how)).hex() / "rank-0"
    with (folder / "slots").open("r+b") as file:
        file.seek(slot_bytes - 1)
        (last,) = file.read(1)
        file.seek(slot_bytes - 1)
        file.write(bytes([last ^ 1]))
    assert main(["disk", "verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "2 blocks are good, 1 are corrupt\n"


GOOD = {"kind": "sum of words of 8 bytes", "fingerprint": 3, "word": 8, "stretches": [[0, 8192]]}


@pytest.mark.parametrize(
    "told",
    [
        None,
        [],
        {},
        {**GOOD, "kind": 5},
        {**GOOD, "kind": ["xxh3"]},
        {**GOOD, "kind": "crc32"},
        {**GOOD, "kind": "sum of words of 4 bytes"},
        {**GOOD, "kind": "sum of words of 0 bytes", "word": 0},
        {**GOOD, "kind": "sum of words of 3 bytes", "word": 3},
        {**GOOD, "word": "8"},
        {**GOOD, "word": 8.0},
        {**GOOD, "word": [8]},
        {**GOOD, "kind": "sum of words of True bytes", "word": True},
        {**GOOD, "fingerprint": 1 << 63},
        {**GOOD, "fingerprint": -1 << 200},
        {**GOOD, "fingerprint": 0.5},
        {**GOOD, "fingerprint": True},
        {**GOOD, "stretches": None},
        {**GOOD, "stretches": {"0": 8}},
        {**GOOD, "stretches": [8]},
        {**GOOD, "stretches": [[0, 8, 16]]},
        {**GOOD, "stretches": [[0, "8"]]},
        {**GOOD, "stretches": [[-8, 8]]},
        {**GOOD, "stretches": [[8, -8]]},
        {**GOOD, "stretches": [[4, 8]]},
        {**GOOD, "stretches": [[0, 12]]},
        {**GOOD, "stretches": [[0, 8200]]},
        {**GOOD, "stretches": [[8, 8192]]},
        {**GOOD, "stretches": [[0, 1 << 70]]},
        {**GOOD, "stretches": [[0, 8192]] * 1000},
        {**GOOD, "stretches": [[16, 8], [0, 8]]},
    ],
)
def test_what_a_cache_says_of_its_checksums_is_not_trusted(
    told: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = fill_disk(tmp_path) / "namespace.json"
    for says, unknown, corrupt in ((told, 2, 0), (GOOD, 0, 2)):
        about.write_text(json.dumps(json.loads(about.read_text()) | {"checksums": says}))
        assert main(["disk", "verify", "--json", str(tmp_path)]) == 1
        found = json.loads(capsys.readouterr().out)
        assert (found["good"], found["corrupt"], found["not_verifiable"]) == (0, corrupt, unknown)
        assert found["damaged_records"] == 0
    about.write_text(json.dumps(json.loads(about.read_text()) | {"checksums": told}))
    assert main(["disk", "verify", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert shown == "0 blocks are good, 0 are corrupt, 2 are not verifiable\n"


def test_a_cache_of_the_first_format_is_another_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kvortex.disk.format, "FORMAT", "kvortex-disk-1")
    monkeypatch.setattr(kvortex.disk.format, "MAGIC", b"KVXSLOT1")
    old = fill_disk(tmp_path)
    about = json.loads((old / "namespace.json").read_text())
    del about["checksums"]
    (old / "namespace.json").write_text(json.dumps(about))
    monkeypatch.undo()
    with opened(tmp_path) as (store, _):
        assert store.survivors.keys == []
        assert store.survivors.invalid == 0
    assert folder_of(tmp_path) != old
    assert [info.invalid for info in inspect(tmp_path).caches] in ([2, 0], [0, 2])
    assert main(["disk", "verify", str(tmp_path)]) == 0  # nothing of it is a record, or damaged
    told = "0 blocks are good, 0 are corrupt; 2 records are of no server's any more, and were left"
    assert told in capsys.readouterr().out
    monkeypatch.setattr(kvortex.disk.neighbours, "SPARE_SHARE", 2.0)
    with opened(tmp_path):
        assert not old.exists()  # it made room
    assert main(["disk", "clear", "--yes", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("1 caches removed\n")


def test_clear_removes_a_cache_of_the_first_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvortex.disk.format, "FORMAT", "kvortex-disk-1")
    monkeypatch.setattr(kvortex.disk.format, "MAGIC", b"KVXSLOT1")
    old = fill_disk(tmp_path)
    monkeypatch.undo()
    assert main(["disk", "clear", "--yes", str(tmp_path)]) == 0
    assert not old.exists()


def test_clear_asks(tmp_path: Path) -> None:
    fill_disk(tmp_path)
    command = [sys.executable, "-m", "kvortex", "disk", "clear", str(tmp_path)]
    for answer, code in (("\n", 1), ("no\n", 1), ("", 1), ("y\n", 0)):
        done = subprocess.run(command, input=answer, capture_output=True, text=True, check=False)
        assert "remove 2 blocks" in done.stderr
        assert done.returncode == code
        assert folder_of(tmp_path).exists() == bool(code)


@pytest.mark.parametrize("command", ["inspect", "verify", "clear"])
def test_where_no_cache_is_every_command_says_so(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also `verify`: "0 blocks are good" would be taken for a verdict, of a path mistyped."""
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["disk", command, str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"no caches in {tmp_path}\n", "")


def test_clear_asks_nothing_where_nothing_is_and_leaves_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["disk", "clear", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"no caches in {tmp_path}\n", "")
    assert main(["disk", "clear", "--json", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_verify_and_clear_refuse_a_folder_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path) as (store, pool):
        written(store, pool, BLOCKS)
        for command in (["clear", "--yes"], ["clear"], ["verify"]):
            assert main(["disk", *command, str(tmp_path)]) == 2  # before it asks
            (line,) = capsys.readouterr().err.splitlines()
            assert line.endswith("stop it first")
        assert main(["disk", "inspect", "--json", str(tmp_path)]) == 0
        assert json.loads(capsys.readouterr().out)["caches"][0]["in_use"] is True
    assert folder_of(tmp_path).exists()


def test_to_look_does_not_refuse_a_server_that_starts(tmp_path: Path) -> None:
    fill_disk(tmp_path)
    ended = Event()

    def look() -> None:
        while not ended.is_set():
            inspect(tmp_path)

    looking = Thread(target=look)
    looking.start()
    try:
        for _ in range(20):
            fill_disk(tmp_path)
    finally:
        ended.set()
        looking.join()


def test_the_tools_tell_of_a_wrong_path_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("inspect", "verify", "clear"):
        assert main(["disk", command, str(tmp_path / "nowhere")]) == 2
        assert capsys.readouterr().err.endswith("nowhere: No such file or directory\n")


@pytest.mark.parametrize("other", ["gone", "a folder", "a link"])
@pytest.mark.parametrize("name", ["namespace.json", "records", "slots"])
def test_the_tools_stand_whatever_is_in_the_place_of_a_file(
    name: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = fill_disk(tmp_path) / name
    file.unlink()
    if other == "a folder":
        file.mkdir()
    elif other == "a link":
        file.symlink_to("/etc/passwd")
    why = {"gone": "is not there", "a folder": "is no file", "a link": "is a link"}[other]
    told = {f"{file.relative_to(tmp_path)}": why}
    assert main(["disk", "inspect", str(tmp_path), "--json"]) == (name == "records")
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["unreadable"] == (told if name == "records" else {})
    assert shown.err == (f"kvortex: {file.relative_to(tmp_path)} {why}\n" * (name == "records"))
    (info,) = found["caches"]
    assert info["used"] == (None if name == "records" else len(BLOCKS))
    assert main(["disk", "verify", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["unreadable"] == (told if name != "namespace.json" else {})
    assert found["unread"] == (len(BLOCKS) if name == "slots" else 0)
    assert found["not_verifiable"] == (len(BLOCKS) if name == "namespace.json" else 0)
    assert found["damaged_records"] == 0
    assert (found["good"], found["corrupt"]) == (0, 0)


def test_a_description_does_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_disk(tmp_path, Namespace(b"", {"model": "\x1b[2J\n\ud800"}))
    assert main(["disk", "inspect", str(tmp_path)]) == 0
    assert r"model \x1b[2J\n\ud800" in capsys.readouterr().out
