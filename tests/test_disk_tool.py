"""`kvortex disk` where something is wrong: it says what, and ends with 0 only if all is well."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from disks import SLOT_BYTES, opened, written

from kvortex.cli import main
from kvortex.disk import Namespace, tool
from kvortex.disk.folder import RECORDS, SLOTS
from kvortex.disk.format import RECORD_BYTES
from kvortex.disk.tool import clear, verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvortex.disk.cache_info import Inspection

BLOCKS = {b"a": 0, b"b": 3}


def filled(path: Path) -> Path:
    """The folder of a cache with two blocks in eight slots."""
    with opened(path) as (store, pool):
        assert not written(store, pool, BLOCKS)
    return next(path.glob("*/rank-0"))


def asked(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    capsys.readouterr()
    code = main(["disk", *command])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Have reads of a file fail from a byte on."""
    preadv = os.preadv

    def fail(name: str, start: int) -> None:
        def read(fd: int, memory: list[memoryview], offset: int) -> int:
            if Path(f"/proc/self/fd/{fd}").readlink().name == name:
                if offset >= start:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                memory = [memory[0][: start - offset]]
            return preadv(fd, memory, offset)

        monkeypatch.setattr(os, "preadv", read)

    return fail


@pytest.mark.parametrize("start", [0, RECORD_BYTES])
def test_a_table_that_the_drive_does_not_give_is_no_empty_one(
    start: int,
    tmp_path: Path,
    failing: Callable[[str, int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = (filled(tmp_path) / RECORDS).relative_to(tmp_path)
    failing(RECORDS, start)
    told = f"kvortex: {place} cannot be read: Input/output error\n"
    code, out, err = asked(capsys, "inspect", str(tmp_path))
    assert (code, err) == (1, told)
    assert "not known" in out
    code, out, err = asked(capsys, "verify", str(tmp_path))
    assert (code, out, err) == (1, "0 blocks are good, 0 are corrupt\n", told)


@pytest.mark.parametrize("start", [0, SLOT_BYTES // 2])
def test_a_block_that_the_drive_does_not_give_is_not_called_corrupt(
    start: int,
    tmp_path: Path,
    failing: Callable[[str, int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = (filled(tmp_path) / SLOTS).relative_to(tmp_path)
    failing(SLOTS, 3 * SLOT_BYTES + start)
    code, out, err = asked(capsys, "verify", str(tmp_path))
    assert out == "1 blocks are good, 0 are corrupt, 1 could not be read\n"
    assert (code, err) == (1, f"kvortex: {place} cannot be read: Input/output error\n")


def test_a_table_of_garbage_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (filled(tmp_path) / RECORDS).write_bytes(os.urandom(8 * RECORD_BYTES))
    code, out, _ = asked(capsys, "verify", str(tmp_path))
    told = "0 blocks are good, 0 are corrupt; 8 records are damaged, whose blocks are lost\n"
    assert (code, out) == (1, told)
    code, out, _ = asked(capsys, "inspect", str(tmp_path))
    assert code == 1
    assert "(rank 0): 8 records are damaged" in out


@pytest.mark.parametrize("left", [0, 1, 7])
def test_records_that_were_cut_off_are_missed(
    left: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = filled(tmp_path) / RECORDS
    os.truncate(records, left * RECORD_BYTES + 5)
    for command in ("inspect", "verify"):
        code, _, err = asked(capsys, command, str(tmp_path))
        told = f"kvortex: {records.relative_to(tmp_path)} ends after {left} of 8 records\n"
        assert (code, err) == (1, told)


@pytest.mark.parametrize("slots", [3, 8, 20])
def test_a_cache_that_changed_its_size_is_whole(
    slots: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path)
    with opened(tmp_path, slots):
        assert asked(capsys, "inspect", str(tmp_path))[0] == 0
    assert asked(capsys, "verify", str(tmp_path))[0] == 0


def test_a_record_in_the_place_of_another_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = filled(tmp_path) / RECORDS
    table = records.read_bytes()
    records.write_bytes(table[-RECORD_BYTES:] + table[3 * RECORD_BYTES :][:RECORD_BYTES] * 7)
    code, out, _ = asked(capsys, "verify", "--json", str(tmp_path))
    found = json.loads(out)
    assert (code, found["good"], found["damaged_records"], found["not_served"]) == (1, 1, 6, 0)


def test_what_was_written_after_a_reset_is_not_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path) as (store, pool):
        store.clear()
        store.poll()
        left = store._erasures
        while left._to_wipe or left._wiping:  # which would take what is written with it
            store.wait(1)
            store.poll()
        assert not written(store, pool, BLOCKS)
    code, out, _ = asked(capsys, "verify", "--json", str(tmp_path))
    found = json.loads(out)
    assert (code, found["damaged_records"], found["not_served"]) == (0, 0, 2)


def test_folders_that_cannot_be_opened_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rank = filled(tmp_path)
    linked = rank.relative_to(tmp_path)
    rank.rename(tmp_path / "elsewhere")
    rank.symlink_to(tmp_path / "elsewhere")
    (tmp_path / ("a" * 32)).write_text("")
    for command in ("inspect", "verify"):
        code, _, err = asked(capsys, command, str(tmp_path))
        told = {f"kvortex: {'a' * 32} is no folder", f"kvortex: {linked} is a link"}
        assert (code, set(err.splitlines())) == (1, told)


def test_a_start_that_was_cut_off_left_nothing_to_be_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = filled(tmp_path)
    (folder / RECORDS).unlink()
    (folder / SLOTS).unlink()
    for command in ("inspect", "verify"):
        code, _, err = asked(capsys, command, str(tmp_path))
        assert (code, err) == (0, "")


def test_a_drive_that_lists_nothing_has_not_no_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def listdir(_: int) -> list[str]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "listdir", listdir)
    for command in ("inspect", "verify", "clear"):
        code, _, err = asked(capsys, command, str(tmp_path))
        told = f"kvortex: {tmp_path}: its caches cannot be listed: Input/output error\n"
        assert (code, err) == (1, told)


DISTURBED = "a server opened a cache meanwhile, or removed one to make room"


def test_a_server_that_starts_while_blocks_are_read_makes_none_corrupt(tmp_path: Path) -> None:
    filled(tmp_path)
    with ExitStack() as stack:

        def progress(done: int, _: int) -> None:
            if done == 1:
                store, pool = stack.enter_context(opened(tmp_path))
                assert not written(store, pool, BLOCKS, 1)

        found = verify(tmp_path, progress)
    told = "1 blocks are good, 0 are corrupt, 1 were changed before they were compared"
    assert str(found) == f"{told}\n{DISTURBED}"
    assert not found.is_whole
    again = verify(tmp_path, lambda *_: None)
    assert str(again) == "2 blocks are good, 0 are corrupt"


@pytest.mark.parametrize("stays", [False, True])
def test_a_server_that_starts_and_changes_nothing_is_told_of(tmp_path: Path, stays: bool) -> None:
    filled(tmp_path)
    with ExitStack() as stack:

        def progress(done: int, _: int) -> None:
            if done == 1:
                stack.enter_context(opened(tmp_path))
                if not stays:
                    stack.close()

        found = verify(tmp_path, progress)
    assert str(found) == f"2 blocks are good, 0 are corrupt\n{DISTURBED}"
    assert found.is_whole


@pytest.fixture
def when_found_idle(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something done once, right after a folder was found idle."""
    idle = tool.require_idle

    def arrange(act: Callable[[], object]) -> None:
        def require_idle(path: Path, **how: bool) -> Inspection:
            monkeypatch.setattr(tool, "require_idle", idle)
            found = idle(path, **how)
            act()
            return found

        monkeypatch.setattr(tool, "require_idle", require_idle)

    return arrange


def test_a_server_that_starts_with_a_larger_pool_cuts_off_nothing(tmp_path: Path) -> None:
    filled(tmp_path)

    def progress(done: int, _: int) -> None:
        if done == 1:
            with opened(tmp_path, 20):
                pass

    found = verify(tmp_path, progress)
    assert (found.good, found.disturbed, found.unreadable) == (2, True, {})


def test_a_server_that_was_there_before_the_first_block_is_told_of(
    tmp_path: Path, when_found_idle: Callable[[Callable[[], object]], None]
) -> None:
    filled(tmp_path)
    with ExitStack() as stack:
        when_found_idle(lambda: stack.enter_context(opened(tmp_path)))
        assert verify(tmp_path, lambda *_: None).disturbed


def test_a_cache_that_is_removed_before_the_first_block_is_told_of(
    tmp_path: Path, when_found_idle: Callable[[Callable[[], object]], None]
) -> None:
    filled(tmp_path)
    when_found_idle(lambda: clear(tmp_path))
    found = verify(tmp_path, lambda *_: None)
    assert (found.blocks, found.disturbed) == (0, True)


def test_a_cache_that_is_removed_meanwhile_is_not_called_unreadable(tmp_path: Path) -> None:
    filled(tmp_path)

    def progress(done: int, _: int) -> None:
        if done == 1:
            clear(tmp_path)

    found = verify(tmp_path, progress)
    assert (found.good, found.changed, found.disturbed) == (1, 1, True)
    assert not found.unreadable


def test_a_record_that_is_half_written_is_not_damaged(tmp_path: Path) -> None:
    records = filled(tmp_path) / RECORDS
    whole = records.read_bytes()
    records.write_bytes(whole[:RECORD_BYTES] + whole[RECORD_BYTES:].replace(b"b", b"c", 1))
    assert verify(tmp_path, lambda *_: None).damaged_records == 1

    def progress(*_: int) -> None:
        records.write_bytes(whole)

    found = verify(tmp_path, progress)
    assert (found.good, found.damaged_records) == (1, 0)


@pytest.fixture
def another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be one."""
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files opened as on a mount that is read-only."""
    open_file = os.open

    def opened_there(name: str | Path, flags: int, *args: int, **kwargs: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))
        return open_file(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened_there)


@pytest.mark.parametrize("who", ["another_user", "read_only"])
def test_who_cannot_try_the_lock_does_not_say_that_it_is_free(
    who: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    user = os.geteuid()
    why = {
        "another_user": f"belongs to user {user}",
        "read_only": "cannot be opened: Read-only file system",
    }[who]
    with opened(tmp_path) as (store, pool):
        assert not written(store, pool, BLOCKS)
        place = next(tmp_path.glob("*/rank-0/lock")).relative_to(tmp_path)
        request.getfixturevalue(who)
        code, out, _ = asked(capsys, "inspect", str(tmp_path))
        assert code == 0
        assert out.splitlines()[1].endswith("not known")
        assert out.splitlines()[-1] == f"a server may use it, nobody can tell: {place} {why}"
        code, out, _ = asked(capsys, "inspect", "--json", str(tmp_path))
        found = json.loads(out)
        assert found["caches"][0]["in_use"] is None
        assert found["untried"] == {str(place): why}
        code, out, _ = asked(capsys, "verify", str(tmp_path))
        told = f"a server may be writing, nobody can tell: {place} {why}\n"
        assert (code, out) == (0, f"2 blocks are good, 0 are corrupt\n{told}")
        for answer in ([], ["--yes"]):
            code, _, err = asked(capsys, "clear", *answer, str(tmp_path))  # before it asks
            assert code == 2
            assert err == (
                f"kvortex: {tmp_path}: nothing was removed, as a server may be using it: {place} "
                f"{why}; run this as the user of the servers, where the drive can be written, or "
                "stop them and remove the folder yourself\n"
            )
    assert len(list(tmp_path.glob("*/rank-0/*"))) == 4


def test_a_file_system_without_locks_tells_nothing_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(_fd: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    place = next(filled(tmp_path).glob("lock")).relative_to(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    code, _, err = asked(capsys, "clear", "--yes", str(tmp_path))
    assert code == 2
    assert f"{place} cannot be tried;" in err


@pytest.mark.parametrize("lock", ["*/rank-0/lock", ".kvortex-lock"])
def test_clear_advises_nobody_to_remove_a_lock(
    lock: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path)
    file = next(tmp_path.glob(lock))
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    code, _, err = asked(capsys, "clear", "--yes", str(tmp_path))
    assert code == 2
    told = f"a server may be using it: {file.relative_to(tmp_path)} is a link, or no file; run this"
    assert told in err
    assert len(list(tmp_path.glob("*/rank-0/*"))) == 4


def spoil(name: str, folder: Path) -> None:
    """Have something there that clear does not remove."""
    if name == "a file":
        (folder / "thesis.tex").write_text("mine")
    elif name == "a file beside the ranks":
        (folder.parent / "a\x1bb").write_text("mine")
    elif name == "many":
        for at in range(7):
            (folder / f"{at}.tex").write_text("mine")
    elif name == "a folder":
        (folder / "namespace.json.new").mkdir()
    elif name == "a link":
        folder.rename(folder.parent.parent / "elsewhere")
        folder.symlink_to(folder.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a file", "{rank}/thesis.tex is not KVortex's"),
        ("a file beside the ranks", r"{cache}/a\x1bb is not KVortex's"),
        (
            "many",
            ", ".join(f"{{rank}}/{at}.tex is not KVortex's" for at in range(5)) + ", and 2 more",
        ),
        ("a folder", "{rank}/namespace.json.new is a folder"),
        ("a link", "{rank} is a link"),
    ],
)
def test_clear_names_what_it_leaves(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = filled(tmp_path)
    with opened(tmp_path, namespace=Namespace(b"other", {})):
        pass
    spoil(name, folder)
    code, _, err = asked(capsys, "clear", "--yes", str(tmp_path))
    rank = folder.relative_to(tmp_path)
    told = told.format(rank=rank, cache=rank.parent)
    assert (code, err) == (1, f"kvortex: {tmp_path}: 1 of 2 caches removed; {told}\n")


@pytest.mark.parametrize("call", ["unlink", "rmdir"])
def test_clear_says_what_the_system_says(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rank = filled(tmp_path).relative_to(tmp_path)
    remove = getattr(os, call)

    def fail(name: str, *, dir_fd: int) -> None:
        if name in {SLOTS, "rank-0"}:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        remove(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, call, fail)
    code, _, err = asked(capsys, "clear", "--yes", str(tmp_path))
    place = rank if call == "rmdir" else rank / SLOTS
    told = f"0 of 1 caches removed; {place} cannot be removed: Input/output error"
    assert (code, err) == (1, f"kvortex: {tmp_path}: {told}\n")


def test_clear_says_which_lock_the_drive_does_not_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path)
    open_file = os.open

    def fail(name: str | Path, flags: int, *args: int, **kwargs: int) -> int:
        if name == ".kvortex-lock":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_file(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", fail)
    code, _, err = asked(capsys, "clear", "--yes", str(tmp_path))
    assert code == 2
    assert ".kvortex-lock cannot be opened: Input/output error;" in err


def test_clear_that_waited_in_vain_for_a_server_that_starts_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def held(*_: object, **__: object) -> None:
        raise BlockingIOError

    filled(tmp_path)
    monkeypatch.setattr(tool, "held", held)
    code, _, err = asked(capsys, "clear", "--yes", str(tmp_path))
    assert code == 2
    assert err.endswith("another server is making or removing caches there; try again\n")
