"""Write files so that they appear whole or not at all, and lock what two processes must not write at once."""

import csv
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from common.console import UserError, warn

LOCK = ".lock"  # name of the lock file in a folder that is never moved: a run, the tiles
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from network file systems without locks
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
SECONDS_BETWEEN_TRIES = 0.2


class WriteError(UserError):
    """A file that cannot be written, because the disk is full or the system does not allow it."""


@contextmanager
def writing(path: Path, only_in: Path | None = None) -> Iterator[None]:
    """Turn an error of the system while `path` is written (disk full, not allowed) into a `WriteError` that names it.

    With `only_in`, an error that names a file outside this folder is passed on, because it comes from reading.
    """
    try:
        yield
    except BrokenPipeError:  # comes from the terminal, not from the file
        raise
    except OSError as error:
        if only_in and isinstance(error.filename, str) and not Path(error.filename).is_relative_to(only_in):
            raise
        advice = "look at this place"
        if error.errno in FULL:
            advice = "free some space"
        elif error.errno in FORBIDDEN:
            advice = "allow writing there, or choose another place"
        raise WriteError(f"{path}: cannot be written ({error.strerror or error}); {advice}. The earlier contents are "
                         "kept") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path`. It replaces `path` if the block succeeds, and is removed if it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            yield temporary
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict], columns: Sequence[str] = ()) -> None:
    """Write rows by their keys, under `columns` or else the keys of the first row; None becomes an empty cell."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder, which becomes `path` if the block succeeds, and is removed if it fails.

    Raise a `UserError` if `path` exists, unless it is an empty folder. If it is filled while the block runs, the error
    says where the new files are.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder; remove it or choose another")
    target = path.resolve()
    partial = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with writing(path):
        partial.mkdir(parents=True)
    try:
        with writing(path, only_in=partial):
            yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        if target.is_dir():
            target.rmdir()  # Windows does not replace an empty folder
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{path}: cannot be created ({error.strerror}). What was written is in {partial}") from error


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete the temporary files of `name` that killed processes left. The caller must hold the folder's lock."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        if leftover.name.split(".")[-2].isdecimal():
            leftover.unlink()


def file_name(name: str) -> str:
    """Return the name without characters that have a meaning in paths or shells."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "_"


@contextmanager
def locked(path: Path, what: Path, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which stays on disk. The system frees the lock however this process ends.

    If another process holds it: wait and say so, or raise a `UserError`. `busy` says what the other process does, and
    `what` is the file or folder to write, which an error names.
    """
    lock = FileLock(path)
    with writing(what):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise UserError(f"{busy}; wait for it or stop it first") from None
            print(f"{busy}; waiting until it has ended", file=sys.stderr, flush=True)
            lock.acquire(poll_interval=SECONDS_BETWEEN_TRIES)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warn(f"{path.parent}: its file system has no locks; make sure that only one process writes there")
    try:
        yield
    finally:
        lock.release()
