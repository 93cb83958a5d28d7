"""What is written appears whole or not at all, whoever else is at work and whatever the system refuses."""

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
from helpers import REPOSITORY

from common import result_folders
from common.console import UserError
from common.files import WriteError, locked, replacing
from common.result_folders import check_replaceable, names_in, replacing_folder


def test_a_folder_is_replaced_whole_or_left_whole(tmp_path):
    folder, lock = tmp_path / "report", tmp_path / ".report.lock"
    with replacing_folder(folder) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(RuntimeError), replacing_folder(folder) as partial:
        (partial / "b").write_text("2")
        raise RuntimeError
    assert names_in(folder) == "a" and {*tmp_path.iterdir()} == {folder, lock}
    folder.rename(tmp_path / ".report.being-replaced")  # what a process killed between the two renames leaves
    (tmp_path / ".report.being-written/b").mkdir(parents=True)
    with pytest.raises(RuntimeError), replacing_folder(folder):
        raise RuntimeError
    assert names_in(folder) == "a" and {*tmp_path.iterdir()} == {folder, lock}
    (tmp_path / ".report.being-written/b").mkdir(parents=True)
    (tmp_path / ".report.old").mkdir()  # somebody's
    with replacing_folder(folder) as partial:
        (partial / "c").write_text("3")
        with pytest.raises(UserError, match="report is being written by another process"), replacing_folder(folder):
            pytest.fail("both write")
        assert (partial / "c").exists()
    assert names_in(folder) == "c" and {*tmp_path.iterdir()} == {folder, lock, tmp_path / ".report.old"}


# ---------------------------------------------------------------------------------------------- two processes at once

def test_nobody_writes_a_folder_while_it_is_put_in_its_place(tmp_path, monkeypatch):
    """Another process comes before each of the renames; it must be refused, and what was finished must arrive."""
    folder, rename, tries = tmp_path / "report", Path.replace, []
    with replacing_folder(folder) as partial:
        (partial / "old").touch()

    def replace(self, target):
        if self.is_dir() and self.parent == tmp_path:
            tries.append(self.name)
            with pytest.raises(UserError, match="being written by another process"), replacing_folder(folder) as theirs:
                (theirs / "half").touch()
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with replacing_folder(folder) as partial:
        (partial / "new").touch()
    assert len(tries) == 2 and names_in(folder) == "new"


def write_often(folder, writer, rounds):
    """Write 8 files that name their writer and round, again and again."""
    for number in range(rounds):
        try:
            with replacing_folder(folder) as partial:
                for i in range(8):
                    (partial / str(i)).write_text(f"{writer} {number}")
        except UserError as error:
            assert "being written by another process" in str(error)


def test_of_several_writers_one_wins_and_its_results_are_whole(tmp_path):
    folder, context = tmp_path / "report", multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(folder, writer, 60)) for writer in range(3)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    assert [process.exitcode for process in writers] == [0, 0, 0]
    contents = {path.name: path.read_text() for path in folder.iterdir() if path.name != result_folders.MANIFEST}
    assert sorted(contents) == list("01234567") and len(set(contents.values())) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"report", ".report.lock"}


WAIT = """
from pathlib import Path
from common.files import locked

with locked(Path("x.lock"), Path("x"), "tiles: another process packs", wait=True):
    print("mine", flush=True)
"""


def test_a_process_that_waits_says_for_what_and_goes_on_afterwards(tmp_path):
    with locked(tmp_path / "x.lock", tmp_path / "x", "busy"):
        process = subprocess.Popen([sys.executable, "-c", WAIT], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
        assert process.stderr.readline() == "tiles: another process packs; waiting until it has ended\n"
        assert process.poll() is None
    assert process.communicate()[0] == "mine\n" and process.returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="network file systems of other systems")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, capsys, number):
    import fcntl

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "x.lock", tmp_path / "x", "busy"):
        pass
    assert "has no locks; make sure that only one process writes there" in capsys.readouterr().err


def test_a_lock_that_cannot_be_made_names_what_it_is_for(tmp_path):
    (tmp_path / "file").touch()
    with (pytest.raises(WriteError, match="tiles.u8: cannot be written"),
          locked(tmp_path / "file/.lock", tmp_path / "tiles.u8", "busy")):
        pytest.fail("there is no such folder")


# ---------------------------------------------------------------------------------------------- what the system refuses

def test_a_folder_that_cannot_be_moved_keeps_old_and_new_results(tmp_path, monkeypatch):
    """Windows moves no folder while one of its files is open in a viewer."""
    folder, rename = tmp_path / "report", Path.replace
    with replacing_folder(folder) as partial:
        (partial / "old").touch()

    def replace(self, target):
        if self == folder:
            raise PermissionError(13, "Access is denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    for name in ("report-new", "report-new1"):
        with (pytest.raises(UserError, match=rf"report: cannot be replaced \(Access is denied\).*{name}$"),
              replacing_folder(folder) as partial):
            (partial / "new").touch()
        assert names_in(tmp_path / name) == "new" and names_in(folder) == "old"


def test_what_cannot_be_written_is_named_and_the_old_file_stays(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with (pytest.raises(WriteError, match=r"x: cannot be written \(No space left on device\); free some space"),
          replacing(path) as temporary):
        temporary.write_text("half")
        full()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with (pytest.raises(WriteError, match=r"report: cannot be written \(No space"),
          replacing_folder(tmp_path / "report")):
        full()
    with (pytest.raises(WriteError, match=r"report/y: cannot be written \(No space"),
          replacing_folder(tmp_path / "report") as partial, replacing(partial / "y") as temporary):
        full()
    assert not (tmp_path / "report").exists()
    with pytest.raises(WriteError, match="x/report: cannot be written"), replacing_folder(path / "report"):
        pytest.fail("x is a file")


def test_the_reader_of_our_output_may_leave(tmp_path):
    with pytest.raises(BrokenPipeError), replacing(tmp_path / "x"):
        raise BrokenPipeError


# ---------------------------------------------------------------------------------------------- what is replaced

def test_only_what_was_written_is_replaced(tmp_path):
    folder = tmp_path / "report"

    def write():
        with replacing_folder(folder, [tmp_path / "a"]) as partial:
            (partial / "inner").mkdir()
            (partial / "inner/x").touch()

    write()
    for leftover in (".DS_Store", "inner/Thumbs.db"):
        (folder / leftover).touch()
    (folder / "inner/x").write_text("changed")
    write()
    assert (folder / "inner/x").read_text() == "" and not (folder / ".DS_Store").exists()
    for mine in ("notes.txt", "inner/notes.txt", ".hidden", "x"):
        (folder / mine).touch()
        with pytest.raises(UserError, match=rf"holds {mine}, which no earlier run wrote"):
            write()
        assert (folder / mine).exists()
        (folder / mine).unlink()
    (folder / "inner/link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="holds inner/link"):
        write()
    (folder / "inner/link").unlink()
    with pytest.raises(UserError, match="inner lies in .*report, which this would replace"):
        check_replaceable(folder, [folder / "inner"])
    check_replaceable(folder, [tmp_path], [tmp_path / "a"])
    with pytest.raises(UserError, match=r"holds results of .*/a; move it away"):
        check_replaceable(folder, [], [tmp_path / "b"])
    moved = copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-moved"))
    check_replaceable(moved / "report", [], [moved / "a"])
    (folder / ".written.json").write_text("[]")
    with pytest.raises(UserError, match="holds .written.json and 1 more"):
        write()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"), replacing_folder(tmp_path / "file"):
        pytest.fail("replaces a file")


def test_replacing_leaves_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
