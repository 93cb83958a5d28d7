"""Files that appear whole or not at all, and folders that one process holds at a time."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from console import UserError, warn


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if the block ends well, and vanishes if it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place if the block ends well, and vanishes if it does not."""
    folder = folder.resolve()  # of a link, what it leads to
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    refusal = f"{folder} is being written by another process; wait for it or stop it first"

    def clear() -> None:
        if old.exists() and not folder.exists():  # stopped between the two renames
            old.replace(folder)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)

    if partial.exists():
        with held(partial, refusal):
            pass
    clear()
    partial.mkdir(parents=True)
    try:
        with held(partial, refusal):
            yield partial
        (partial / ".lock").unlink()
        if folder.exists():
            folder.replace(old)
        partial.replace(folder)
    finally:
        clear()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete what killed processes left of `replacing` the file `name`; only for whoever holds the folder."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        if leftover.name.split(".")[-2].isdecimal():
            leftover.unlink()


@contextmanager
def held(folder: Path, refusal: str = "") -> Iterator[None]:
    """Hold `folder` for this process; the system frees it however the process ends.

    While another one holds it: a `UserError` that says `refusal`, or without one wait.
    """
    with (folder / ".lock").open("w") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK if refusal else msvcrt.LK_LOCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except (BlockingIOError, PermissionError):
            raise UserError(refusal or f"{folder} is held by another process; try again when it has ended") from None
        except OSError as error:  # some network file systems cannot lock
            warn(f"{folder}: cannot be held for this process alone ({error.strerror}); do not use it twice at a time")
        yield
