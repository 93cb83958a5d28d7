"""common/files.py: files appear whole or not at all, errors name what cannot be written, locks keep processes apart."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

from common.console import UserError
from common.files import WriteError, file_name, locked, new_folder, remove_leftovers, replacing, write_csv


def test_the_old_file_stays_if_the_block_fails(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "space"), (errno.EACCES, "allow"), (errno.EIO, "look")])
def test_what_cannot_be_written_is_named_with_advice_and_the_old_file_stays(tmp_path, number, advice):
    path = tmp_path / "x"
    path.write_text("old")
    with (pytest.raises(WriteError, match=f"x: cannot be written .*{os.strerror(number)}.*{advice}"),
          replacing(path) as temporary):
        temporary.write_text("half")
        raise OSError(number, os.strerror(number))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_rows_become_csv_under_the_given_or_their_own_columns(tmp_path):
    write_csv(tmp_path / "x.csv", [{"a": 1, "b": None}, {"a": 0.5, "b": "x, y"}])
    assert (tmp_path / "x.csv").read_bytes() == b'a,b\r\n1,\r\n0.5,"x, y"\r\n'
    write_csv(tmp_path / "x.csv", [], ["a", "b"])
    assert (tmp_path / "x.csv").read_bytes() == b"a,b\r\n"


def test_only_leftovers_of_replacing_are_removed(tmp_path):
    for name in (".x.123.tmp", ".y.123.tmp", ".x.mine.tmp", "x"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "x")
    assert {path.name for path in tmp_path.iterdir()} == {".y.123.tmp", ".x.mine.tmp", "x"}


@pytest.mark.parametrize(("name", "expected"), [("a b/c", "a-b-c"), ("prüfung_1.2", "prüfung_1.2"), ("../x", "x"),
                                                ("..", "_")])
def test_a_file_name_has_no_special_characters(name, expected):
    assert file_name(name) == expected


def test_a_broken_pipe_is_not_blamed_on_the_file(tmp_path):
    with pytest.raises(BrokenPipeError), replacing(tmp_path / "x"):
        raise BrokenPipeError


WAIT = """
from pathlib import Path
from common.files import locked

with locked(Path("x.lock"), Path("x"), "tiles: another process packs", wait=True):
    print("mine", flush=True)
"""


def test_a_busy_lock_is_an_error_unless_the_process_waits(tmp_path):
    arguments = tmp_path / "x.lock", tmp_path / "x", "x is being packed"
    with locked(*arguments), pytest.raises(UserError, match="x is being packed"), locked(*arguments):
        pytest.fail("two processes hold one lock")
    with locked(*arguments):
        pass


def test_a_process_that_waits_for_a_lock_says_so_and_continues_afterwards(tmp_path):
    with locked(tmp_path / "x.lock", tmp_path / "x", "busy"):
        process = subprocess.Popen([sys.executable, "-c", WAIT], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
        assert process.stderr.readline().startswith("tiles: another process packs; waiting")
        assert process.poll() is None
    assert process.communicate()[0] == "mine\n" and process.returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="flock is not used on Windows")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys, number):
    import fcntl

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "x.lock", tmp_path / "x", "busy"):
        pass
    assert f"{tmp_path}: its file system has no locks" in capsys.readouterr().err


def test_a_lock_that_cannot_be_made_names_what_was_to_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (pytest.raises(WriteError, match="tiles.u8: cannot be written"),
          locked(tmp_path / "file/.lock", tmp_path / "tiles.u8", "busy")):
        pytest.fail("there is no such folder")


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep/out"
    with new_folder(out) as folder:
        (folder / "a.txt").write_text("a")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"] and (out / "a.txt").read_text() == "a"
    with pytest.raises(UserError, match="exists and is not an empty folder"), new_folder(out):
        raise AssertionError("not reached")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(KeyboardInterrupt), new_folder(empty) as folder:
        (folder / "b.txt").write_text("b")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty"] and not any(empty.iterdir())
    with new_folder(empty) as folder:
        (folder / "b.txt").write_text("b")
    assert (empty / "b.txt").exists()


def test_what_was_written_is_kept_if_another_process_was_faster(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="What was written is in ") as error, new_folder(out) as folder:
        (folder / "a.txt").write_text("mine")
        out.mkdir()
        (out / "b.txt").write_text("theirs")
    assert (out / "b.txt").read_text() == "theirs"
    assert (Path(str(error.value).rpartition(" in ")[2]) / "a.txt").read_text() == "mine"
