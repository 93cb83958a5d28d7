"""Files that appear whole or not at all, and folders that one process holds at a time."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from console import UserError, warn

LOCK = ".lock"
MANIFEST = ".written.json"
NOBODYS = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave


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
def replacing_folder(folder: Path, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place if the block ends well, and vanishes if it does not.

    A hidden list of its files and of the `sources` it was made of goes with it: see `refuse_loss`.
    """
    refuse_loss(folder)
    folder = folder.resolve()  # of a link, what it leads to
    partial, old = (folder.with_name(f".{folder.name}.being-{state}") for state in ("written", "replaced"))

    def settle() -> None:
        if old.exists() and not folder.exists():  # stopped between the two renames
            old.replace(folder)
        shutil.rmtree(old, ignore_errors=True)

    partial.mkdir(parents=True, exist_ok=True)
    with held(partial, f"{folder} is being written by another process; wait for it or stop it first"):
        try:
            settle()
            for leftover in partial.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != LOCK:
                    leftover.unlink()
            yield partial
            written = sorted(path.relative_to(partial).as_posix() for path in _files(partial) if path.name != LOCK)
            contents = {"sources": _relative(sources, folder), "files": written}
            (partial / MANIFEST).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    (partial / LOCK).unlink()
    try:
        if folder.exists():
            folder.replace(old)
        partial.replace(folder)
    finally:
        settle()


def refuse_loss(folder: Path, reads: Iterable[Path] = (), sources: Sequence[Path] | None = None) -> None:
    """Refuse to replace `folder` unless `replacing_folder` wrote every file in it, and of these `sources` if given.

    Nor may one of the paths that are to be read lie in it.
    """
    choose = "move it away or choose another folder"
    root = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; {choose}")
    if not folder.is_dir():
        return
    for path in reads:
        if path.resolve().is_relative_to(root):
            raise UserError(f"{path} lies in {folder}, which this would replace; choose another folder")
    try:
        contents = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        written, before = {*contents["files"], MANIFEST}, contents["sources"]
    except (OSError, ValueError, LookupError, TypeError):
        written, before = set(), []
    there = _files(folder) if written else folder.iterdir()  # without a list one look is enough
    foreign = sorted({path.relative_to(folder).as_posix() for path in there if path.name not in NOBODYS} - written)
    if foreign:
        others = f" and {len(foreign) - 1} more" * (len(foreign) > 1)
        raise UserError(f"{folder} would be replaced, but holds {foreign[0]}{others}, which no earlier run wrote; "
                        f"{choose}")
    if sources is not None and written and before != _relative(sources, root):
        of = ", ".join(os.path.normpath(folder.parent / source) for source in before) or "something else"
        raise UserError(f"{folder} would be replaced, but holds results of {of}; {choose}")


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _relative(paths: Sequence[Path], folder: Path) -> list[str]:
    """As seen from where `folder` stands, so that they stay the same when all is moved together."""
    try:
        return [Path(os.path.relpath(path.resolve(), folder.parent)).as_posix() for path in paths]
    except ValueError:  # another drive of Windows
        return [path.resolve().as_posix() for path in paths]


def names(folder: Path) -> str:
    """What is in a folder, hidden files left out."""
    return ", ".join(sorted(path.name for path in folder.iterdir() if path.name[0] != "."))


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
    with (folder / LOCK).open("w") as file:
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
