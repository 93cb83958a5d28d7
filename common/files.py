"""Files and folders that appear whole or not at all, and locks, so that two processes never spoil each other's work."""

import csv
import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from common.console import UserError, warn

LOCK = ".lock"  # in a folder that stays where it is: a run, the tiles
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what network file systems without locks answer
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
SECONDS_BETWEEN_TRIES = 0.2


class WriteError(UserError):
    """A file that cannot be written: the disk is full, or the system does not allow it."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says while `path` is written (disk full, not allowed) into a `WriteError` that names it."""
    try:
        yield
    except BrokenPipeError:  # of the terminal, not of the file
        raise
    except OSError as error:
        advice = ("free some space" if error.errno in FULL else "allow writing there, or choose another place"
                  if error.errno in FORBIDDEN else "look at this place")
        raise WriteError(f"{path}: cannot be written ({error.strerror or error}); {advice}. What was there before is "
                         "kept") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if the block ends well, and vanishes if it does not."""
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


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete what killed processes left of `replacing` the file `name`; only for whoever holds the folder."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        if leftover.name.split(".")[-2].isdecimal():
            leftover.unlink()


def file_name(name: str) -> str:
    """The name with every character replaced that has a meaning in paths or shells."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "_"


@contextmanager
def locked(path: Path, what: Path, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`; the system frees it however the process ends. The file itself stays.

    While another process holds it: wait, having said so, or raise a `UserError`. `busy` says what the other one does,
    and `what` is the file or folder that is to be written, which an error names_in.
    """
    lock = FileLock(path)
    with writing(what):
        try:
            _acquire(lock, busy, wait)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warn(f"{path.parent}: its file system has no locks; make sure that only one process writes there")
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, busy: str, wait: bool) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise UserError(f"{busy}; wait for it or stop it first") from None
        print(f"{busy}; waiting until it has ended", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=SECONDS_BETWEEN_TRIES)
    except NotImplementedError as error:  # how older versions of filelock say it
        raise OSError(errno.ENOSYS, str(error)) from None
