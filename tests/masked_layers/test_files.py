"""Files and folders that are complete or absent, and the remains of killed processes."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest

from masked_layers import files

pytestmark = pytest.mark.once

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs locks of the system on any file")

# Stops in the middle of writing `a.npz` and of the folder `1`, until it is killed.
WRITER = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.scratch_folder(pathlib.Path("1"), frozenset(["variables"])) as folder:
    (folder / "variables").mkdir()
    with files.replacing("a.npz") as file:
        file.write(b"half")
        file.flush()
        print("written", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is writing in `tmp_path`."""
    command = [sys.executable, "-c", WRITER, files.__file__]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path)
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


@posix
def test_remains_of_a_killed_process_are_removed_by_the_next_one(writer, tmp_path):
    (tmp_path / ".1.notmine_").mkdir()
    (tmp_path / ".1.notmine_" / "thesis.txt").touch()
    (tmp_path / ".1.too_long_").mkdir()
    theirs = {".1.notmine_", ".1.too_long_"}

    def write():
        with files.replacing(tmp_path / "a.npz") as file:
            file.write(b"whole")
        with files.scratch_folder(tmp_path / "1", frozenset(["variables"])) as folder:
            assert folder.parent == tmp_path
        return {path.name for path in tmp_path.glob(".*")} - theirs

    # Its files are its own as long as the process lives.
    assert len(write()) == 2
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len({path.name for path in tmp_path.glob(".*")} - theirs) == 2
    assert write() == set()
    assert (tmp_path / "a.npz").read_bytes() == b"whole"
    assert all((tmp_path / name).is_dir() for name in theirs)


@posix
def test_the_owner_of_a_folder_removes_all_that_was_left_in_it(writer, tmp_path):
    files.remove_abandoned(tmp_path, "b.npz")
    writer.kill()
    writer.wait()
    assert len(list(tmp_path.glob(".a.npz.*.part"))) == 1
    files.remove_abandoned(tmp_path)
    assert not list(tmp_path.glob(".a.npz.*.part"))


@pytest.mark.parametrize("name", ["plain", "a[1]*?"])
def test_an_error_leaves_the_existing_file_unchanged(name, tmp_path):
    (tmp_path / name).write_text("before")

    def fail():
        with files.replacing(tmp_path / name) as file:
            file.write(b"after")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "before"


@posix
def test_new_content_is_on_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    happened = []

    def note(name, function):
        def noted(*args):
            happened.append(name)
            return function(*args)

        monkeypatch.setattr(os, name, noted)

    note("fsync", os.fsync)
    note("replace", os.replace)
    with files.replacing(tmp_path / "a") as file:
        file.write(b"content")
    assert happened == ["fsync", "replace", "fsync"]  # The last one is for the name.
    happened.clear()
    (tmp_path / "new" / "inside").mkdir(parents=True)
    (tmp_path / "new" / "inside" / "b").touch()
    files.replace_folder(tmp_path / "new", tmp_path / "old")
    assert happened == ["fsync"] * 4  # The file, both folders, and the folder around them.


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_full_disk_leaves_the_existing_file_unchanged(fails, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("before")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write():
        with files.replacing(tmp_path / "a") as file:
            file.write(b"after")
            if fails == "write":
                full()

    if fails == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*a'"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_a_folder_that_vanishes_ends_in_an_error_of_the_system(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()

    def write():
        with files.replacing(folder / "a") as file:
            file.write(b"content")
            shutil.rmtree(folder)

    with pytest.raises(FileNotFoundError):
        write()
    assert not folder.exists()


@posix
def test_writers_of_the_same_path_leave_each_others_files_alone(monkeypatch, tmp_path):
    lock, replace = files._lock, os.replace
    late = []  # Whether another process looks before the next lock.

    def look():
        files.remove_abandoned(tmp_path)
        files._remove_abandoned_folders(tmp_path / "1", frozenset())

    def lock_late(descriptor, **kwargs):
        if late and late.pop():
            look()
        return lock(descriptor, **kwargs)

    def replace_late(*args):
        look()
        replace(*args)

    monkeypatch.setattr(files, "_lock", lock_late)
    monkeypatch.setattr(os, "replace", replace_late)
    late.append(True)
    with files.replacing(tmp_path / "a") as one:
        one.write(b"one")
        with files.replacing(tmp_path / "a") as other:
            other.write(b"other")
    assert (tmp_path / "a").read_bytes() == b"one"
    late.append(True)
    with files.scratch_folder(tmp_path / "1", frozenset()) as folder:
        look()
        assert folder.is_dir()
    assert not late
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_paths_that_cannot_be_files_are_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder\. Expected the path of a file"):
        files.check_target(tmp_path)
    with (
        pytest.raises(FileNotFoundError, match=r"no folder '.*missing'. Create it first"),
        files.replacing(tmp_path / "missing" / "a"),
    ):
        pass


@pytest.mark.parametrize("exchange", [True, False])
def test_folders_are_replaced_where_exchange_works_and_where_not(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    elif not sys.platform.startswith(("linux", "darwin")):
        pytest.skip("needs an atomic exchange of folders")
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "saved_model.pb").write_text(name)
    files.replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "saved_model.pb").read_text() == "new"
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_without_a_library_of_the_process_nothing_is_exchanged(tmp_path, monkeypatch):
    def windows(name):
        raise TypeError("argument of type 'NoneType' is not iterable")

    monkeypatch.setattr(files.ctypes, "CDLL", windows)
    assert files._exchange(tmp_path / "a", tmp_path / "b") is False


def test_a_failed_replacement_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    (tmp_path / "old").mkdir()
    with pytest.raises(FileNotFoundError):
        files.replace_folder(tmp_path / "missing", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@posix
def test_a_folder_in_place_has_the_permissions_of_a_new_one(tmp_path, monkeypatch):
    # The mask belongs to all threads, which would create files without one.
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("changes the mask of the process"))
    with files.scratch_folder(tmp_path / "out", frozenset()) as scratch:
        scratch.chmod(0o2700)
        files.replace_folder(scratch, tmp_path / "out")
    (tmp_path / "new").mkdir()
    wanted = (tmp_path / "new").stat().st_mode | 0o2000
    assert (tmp_path / "out").stat().st_mode == wanted


@posix
def test_errors_of_the_system_name_the_target_and_not_the_hidden_file(tmp_path):
    target = tmp_path / ("a" * 250)  # The name of its temporary file is too long.
    for opened in (files.replacing(target), files.scratch_folder(target, frozenset())):
        with pytest.raises(OSError) as caught, opened:  # noqa: PT011
            pass
        assert caught.value.filename == str(target)
    assert not list(tmp_path.iterdir())
