"""common/result_folders.py: a folder is replaced whole or not at all, and only if it holds nothing but results."""

import errno
import multiprocessing
from pathlib import Path
from shutil import copytree

import pytest

from common.console import UserError
from common.files import WriteError, replacing
from common.result_folders import MANIFEST, check_replaceable, names_in, replacing_folder


def test_a_folder_is_replaced_whole_or_left_whole(tmp_path):
    folder, lock = tmp_path / "report", tmp_path / ".report.lock"
    with replacing_folder(folder) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(RuntimeError), replacing_folder(folder) as partial:
        (partial / "b").write_text("2")
        raise RuntimeError
    assert names_in(folder) == "a" and {*tmp_path.iterdir()} == {folder, lock}
    folder.rename(tmp_path / ".report.being-replaced")  # left by a process that was killed between its two renames
    (tmp_path / ".report.being-written/b").mkdir(parents=True)
    with pytest.raises(RuntimeError), replacing_folder(folder):
        raise RuntimeError
    assert names_in(folder) == "a" and {*tmp_path.iterdir()} == {folder, lock}
    (tmp_path / ".report.being-written/b").mkdir(parents=True)
    (tmp_path / ".report.old").mkdir()  # belongs to somebody else
    with replacing_folder(folder) as partial:
        (partial / "c").write_text("3")
        with pytest.raises(UserError, match="report.*another process"), replacing_folder(folder):
            pytest.fail("both processes write")
        assert (partial / "c").exists()
    assert names_in(folder) == "c" and {*tmp_path.iterdir()} == {folder, lock, tmp_path / ".report.old"}


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
        with pytest.raises(UserError, match=f"report.*{mine}"):
            write()
        assert (folder / mine).exists()
        (folder / mine).unlink()
    (folder / "inner/link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="report.*inner/link"):
        write()
    (folder / "inner/link").unlink()
    with pytest.raises(UserError, match="inner.*report"):
        check_replaceable(folder, [folder / "inner"])
    check_replaceable(folder, [tmp_path], [tmp_path / "a"])
    with pytest.raises(UserError, match="report.*/a;"):
        check_replaceable(folder, [], [tmp_path / "b"])
    moved = copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-moved"))
    check_replaceable(moved / "report", [], [moved / "a"])
    (folder / ".written.json").write_text("[]")
    with pytest.raises(UserError, match="report.*.written.json and 1 more"):
        write()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file.*is a file"), replacing_folder(tmp_path / "file"):
        pytest.fail("replaces a file")


def test_a_folder_that_cannot_be_moved_keeps_old_and_new_results(tmp_path, monkeypatch):
    """Windows does not move a folder while one of its files is open in another program."""
    folder, rename = tmp_path / "report", Path.replace
    with replacing_folder(folder) as partial:
        (partial / "old").touch()

    def replace(self, target):
        if self == folder:
            raise PermissionError(13, "Access is denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    for name in ("report-new", "report-new1"):
        with (pytest.raises(UserError, match=f"report.*Access is denied.*{name}$"),
              replacing_folder(folder) as partial):
            (partial / "new").touch()
        assert names_in(tmp_path / name) == "new" and names_in(folder) == "old"


def test_nobody_else_writes_a_folder_while_it_is_renamed(tmp_path, monkeypatch):
    """Another process tries to write before each of the two renames. It must be rejected, and our results must stay."""
    folder, rename, tries = tmp_path / "report", Path.replace, []
    with replacing_folder(folder) as partial:
        (partial / "old").touch()

    def replace(self, target):
        if self.is_dir() and self.parent == tmp_path:
            tries.append(self.name)
            with pytest.raises(UserError, match="report.*another process"), replacing_folder(folder) as theirs:
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
            assert "another process" in str(error)


def test_of_several_writers_one_wins_and_its_results_are_whole(tmp_path):
    folder, context = tmp_path / "report", multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(folder, writer, 60)) for writer in range(3)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    assert [process.exitcode for process in writers] == [0, 0, 0]
    contents = {path.name: path.read_text() for path in folder.iterdir() if path.name != MANIFEST}
    assert sorted(contents) == list("01234567") and len(set(contents.values())) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"report", ".report.lock"}


def test_results_of_no_source_are_not_replaced_by_those_of_another(tmp_path):
    with replacing_folder(tmp_path / "report"):
        pass
    check_replaceable(tmp_path / "report", sources=[])
    with pytest.raises(UserError, match="report.*something else"):
        check_replaceable(tmp_path / "report", sources=[tmp_path / "b"])


# ---------------------------------------------------------------------------------------------- errors of the system

def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="report: cannot be written .*No space"), replacing_folder(tmp_path / "report"):
        raise OSError(errno.ENOSPC, "No space left on device")  # writing to an open file gives no name
    with (pytest.raises(WriteError, match="report/y: cannot be written .*No space"),
          replacing_folder(tmp_path / "report") as partial, replacing(partial / "y")):
        raise OSError(errno.ENOSPC, "No space left on device")
    with (pytest.raises(WriteError, match="report: cannot be written .*No such file"),
          replacing_folder(tmp_path / "report") as partial):
        (partial / "missing/y").write_text("")
    with pytest.raises(WriteError, match="file/report: cannot be written"), replacing_folder(tmp_path / "file/report"):
        pytest.fail("file is not a folder")
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".report.lock"}


@pytest.mark.parametrize("source", ["source.png", "report/source.png", ".report.old"])
def test_an_error_of_reading_another_file_is_not_blamed_on_the_folder(tmp_path, source):
    with pytest.raises(FileNotFoundError) as error, replacing_folder(tmp_path / "report"):
        (tmp_path / source).read_bytes()
    assert error.value.filename == str(tmp_path / source) and not (tmp_path / "report").exists()


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "report").symlink_to(tmp_path / "disk/results")
    with replacing_folder(tmp_path / "report") as partial:
        (partial / "a").touch()
    assert (tmp_path / "report").is_symlink() and names_in(tmp_path / "disk/results") == "a"
