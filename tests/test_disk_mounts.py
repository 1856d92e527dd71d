"""Real file systems that fill up, become read-only or disappear under a store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from disks import block_bytes, opened, read, written

import kvortex.disk.breaker
from kvortex.core import ConfigError
from kvortex.disk import Namespace
from kvortex.disk.file import DiskFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvortex.disk import DiskStore
    from kvortex.host_pool import HostPool

MIB = 1 << 20
SHUT_DOWN = 0x8004587D  # FS_IOC_SHUTDOWN
BIG = {b"a": 0, b"b": 1}


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def mounted(path: Path, *options: str) -> Iterator[Path]:
    """A file system there, for those who may mount."""
    path.mkdir()
    try:
        run("mount", *options, str(path))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False, capture_output=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """4 MiB of memory."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=4m", "kvortex") as path:
        yield path


@pytest.fixture
def looped(tmp_path: Path) -> Iterator[Path]:
    """32 MiB of ext4 in a file."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    try:
        run("mkfs.ext4", "-q", str(image))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no ext4 can be made here")
    with mounted(tmp_path / "looped", "-o", "loop", str(image)) as path:
        yield path


class Sparse(DiskFile):
    """On a file system that sets nothing aside."""

    def allocate(self, size: int) -> bool:
        os.ftruncate(self._fd, size)
        return False


def test_a_pool_that_the_disk_cannot_hold_is_refused(small: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"0\.00 GiB are free there.*lower disk_pool_gb"),
        opened(small, slot_bytes=MIB),
    ):
        pass
    with opened(small, 2, slot_bytes=MIB) as (store, pool):  # which left no file behind
        assert not written(store, pool, BIG)


@pytest.mark.parametrize("file_system", ["small", "looped"])
def test_a_disk_that_others_filled_up_serves_the_next_life(
    file_system: str, request: pytest.FixtureRequest
) -> None:
    """All that a cache needs is set aside already."""
    path: Path = request.getfixturevalue(file_system)
    with opened(path, 2, slot_bytes=MIB) as (store, pool):
        assert not written(store, pool, BIG)
    with (path / "others").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    for _ in range(2):
        with opened(path, 2, slot_bytes=MIB) as (store, pool):
            found = read(store, pool, list(BIG), [0, 1])
        assert found == [block_bytes(key, slot_bytes=MIB) for key in BIG]
    (folder,) = path.glob("*/rank-0")
    assert sorted(one.name for one in folder.iterdir()) == [
        "lock",
        "namespace.json",
        "records",
        "slots",
    ]


def test_other_models_caches_go_the_longest_unused_first_once_there_is_no_room(
    tmp_path: Path,
) -> None:
    models = [Namespace(b"%d" % n, {}) for n in range(6)]
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "kvortex") as path:

        def use(model: int, num_slots: int = 2) -> int:
            with opened(path, num_slots, namespace=models[model], slot_bytes=MIB) as (store, pool):
                found = len(store.survivors.keys)
                assert not written(store, pool, BIG)
                return found

        def there() -> set[int]:
            names = [model.digest(MIB).hex() for model in models]
            return {names.index(one.name) for one in path.iterdir() if one.is_dir()}

        for model in (0, 1, 2, 0, 1, 2):
            use(model)
        assert there() == {0, 1, 2}
        assert use(0) == 2
        use(3)  # for which there would be room, but none to spare
        assert there() == {0, 2, 3}
        with opened(path, 2, namespace=models[2], slot_bytes=MIB) as (store, _):
            use(4, 5)  # which cannot be set aside before others go
            assert there() == {2, 4}
            with pytest.raises(ConfigError, match="lower disk_pool_gb"):
                use(5, 7)
            assert there() == {2, 5}  # which tried
            assert len(store.survivors.keys) == 2


def test_where_nothing_is_set_aside_no_other_model_stays(small: Path) -> None:
    with opened(small, 2, namespace=Namespace(b"other", {})) as (store, pool):
        assert not written(store, pool, BIG)
    with opened(small, 2, open_file=Sparse) as (store, _):
        assert store.counters.removed_caches == 1


def test_a_disk_that_fills_up_keeps_what_it_has(
    small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(small, 8, slot_bytes=MIB, open_file=Sparse) as (store, pool):
        assert "share of disk_pool_gb is 0.01 GiB; blocks will be refused" in caplog.text
        assert not written(store, pool, BIG)
        (small / "other").write_bytes(bytes(3 * MIB // 2))
        failed = written(store, pool, {b"c": 2, b"d": 3, b"e": 4})
        assert len(failed) == 3
        assert read(store, pool, list(BIG), [0, 1]) == [
            block_bytes(key, slot_bytes=MIB) for key in BIG
        ]
        assert store.counters.write_errors == 3
        (small / "other").unlink()


def test_a_file_system_that_can_neither_bypass_its_cache_nor_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        mounted(tmp_path / "plain", "-t", "ramfs", "kvortex") as plain,
        opened(plain, 4, slot_bytes=MIB) as (store, pool),
    ):
        assert not store.direct
        assert not written(store, pool, BIG)
        assert read(store, pool, [b"a"], [0]) == [block_bytes(b"a", slot_bytes=MIB)]
    assert "no O_DIRECT and no fallocate" in caplog.text


def test_a_file_that_is_cut_off_under_a_store_costs_hits_only(tmp_path: Path) -> None:
    with opened(tmp_path, 4, slot_bytes=MIB) as (store, pool):
        assert not written(store, pool, BIG)
        (slots,) = tmp_path.rglob("slots")
        os.truncate(slots, MIB + MIB // 2)
        found = read(store, pool, [b"a", b"b"], [0, 1])
        assert found == [block_bytes(b"a", slot_bytes=MIB), None]
        assert not written(store, pool, {b"b": 1}, version=1)
        assert read(store, pool, [b"b"], [1]) == [block_bytes(b"b", 1, MIB)]


def test_a_disk_that_becomes_read_only_is_still_read(looped: Path) -> None:
    with opened(looped, 8, slot_bytes=MIB) as (store, pool):
        assert store.direct
        assert not written(store, pool, BIG)
        os.sync()
        # what a file system does to itself when its drive fails
        run("mount", "-o", "remount,abort", str(looped))
        assert written(store, pool, {b"c": 2}) == {0}
        assert read(store, pool, [b"a"], [0]) == [block_bytes(b"a", slot_bytes=MIB)]


def test_a_disk_that_is_read_only_is_refused(looped: Path) -> None:
    with opened(looped, 4, slot_bytes=MIB) as (store, pool):
        assert not written(store, pool, BIG)
    run("mount", "-o", "remount,ro", str(looped))
    with (
        pytest.raises(ConfigError, match=r"disk_path=.*: Read-only file system; name"),
        opened(looped),
    ):
        pass


def test_a_disk_that_disappears_is_missed_and_no_more(looped: Path) -> None:
    with opened(looped, 4, slot_bytes=MIB) as (store, pool):
        assert not written(store, pool, BIG)
        run("umount", "--lazy", str(looped))  # open files go on
        assert not written(store, pool, {b"c": 2})
        assert read(store, pool, [b"c"], [2]) == [block_bytes(b"c", slot_bytes=MIB)]
    with opened(looped, 4, slot_bytes=MIB) as (store, _):  # the folder below the mount
        assert store.survivors.keys == []


def test_a_drive_that_is_pulled_out(looped: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(looped, 8, slot_bytes=MIB) as (store, pool):
        assert not written(store, pool, BIG)
        shut_down(looped)
        for slot in range(2, 8):
            assert written(store, pool, {b"c": slot}) == {0}
            assert read(store, pool, [b"a"], [0]) == [None]
        assert store.counters.times_off == 2
    assert len([record for record in caplog.records if "is off after" in record.getMessage()]) == 2


def test_a_drive_that_was_pulled_out_and_put_back_is_used_again(
    looped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvortex.disk.breaker, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(kvortex.disk.breaker, "LONGEST_PAUSE_S", 0.2)
    right = [block_bytes(key, slot_bytes=MIB) for key in BIG]
    with opened(looped, 8, slot_bytes=MIB) as (store, pool):
        assert not written(store, pool, BIG)
        os.sync()
        fail_both_ways(store, pool, looped)
        run("umount", "--lazy", str(looped))
        until_tried(store)
        assert list(looped.iterdir()) == []  # nothing is made in the folder below the mount
        with put_back(looped, tmp_path / "image"):
            until_on(store)
            assert read(store, pool, list(BIG), [0, 1]) == right
            assert not written(store, pool, {b"c": 2})
            store.close()
            with opened(looped, 8, slot_bytes=MIB) as (second, second_pool):
                assert second.survivors.keys == [b"a", b"b", b"c"]
                assert read(second, second_pool, list(BIG), [0, 1]) == right


def test_a_drive_that_another_server_had_meanwhile_is_left_alone(
    looped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvortex.disk.breaker, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(kvortex.disk.breaker, "LONGEST_PAUSE_S", 0.2)
    with opened(looped, 8, slot_bytes=MIB) as (store, pool):
        assert not written(store, pool, BIG)
        os.sync()
        fail_both_ways(store, pool, looped)
        run("umount", "--lazy", str(looped))
        until_tried(store)
        with put_back(tmp_path / "elsewhere", tmp_path / "image") as elsewhere:
            with opened(elsewhere, 8, slot_bytes=MIB) as (other, other_pool):
                assert not written(other, other_pool, {b"d": 3})
            run("mount", "--bind", str(elsewhere), str(looped))
            until_tried(store)
            assert store.poll().reading_off
            run("umount", str(looped))
            with opened(elsewhere, 8, slot_bytes=MIB) as (other, _):
                assert other.survivors.keys == [b"a", b"b", b"d"]


@contextmanager
def put_back(path: Path, image: Path) -> Iterator[Path]:
    """As another device, as drives are."""
    path.mkdir(exist_ok=True)
    device = subprocess.run(
        ["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        run("mount", device, str(path))
        try:
            yield path
        finally:
            run("umount", "--lazy", str(path))
    finally:
        run("losetup", "--detach", device)


def fail_both_ways(store: DiskStore, pool: HostPool, path: Path) -> None:
    """Until neither reading nor writing is on."""
    shut_down(path)
    for slot in (3, 4, 5):
        assert written(store, pool, {b"x": slot}) == {0}
        assert read(store, pool, [b"a"], [0]) == [None]
    told = store.poll()
    assert (told.reading_off, told.writing_off) == (True, True)


def until_on(store: DiskStore) -> None:
    deadline = time.monotonic() + 20
    while (told := store.poll()).reading_off or told.writing_off:
        assert time.monotonic() < deadline
        store.wait(0.01)


def until_tried(store: DiskStore) -> None:
    """Both ways, twice and in vain."""
    for breaker in (store._health.reading, store._health.writing):
        for _ in range(2):
            before = breaker._next_trial
            while breaker._next_trial == before:
                store.poll()
                store.wait(0.01)
        assert breaker.is_off


def shut_down(path: Path) -> None:
    """From now on, every use of this file system is an I/O error."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, SHUT_DOWN, struct.pack("I", 2))
    except OSError:
        pytest.skip("this file system cannot be shut down")
    finally:
        os.close(fd)
