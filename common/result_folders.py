"""Folders of results, such as RUN/evaluation: replaced whole, and only if nothing else lies in them."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.console import UserError
from common.files import LOCK, WriteError, locked, writing

MANIFEST = ".written.json"
NOBODYS = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave


@contextmanager
def replacing_folder(folder: Path, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place if the block ends well, and vanishes if it does not.

    A hidden list of its files and of the `sources` it was made of goes with it: see `check_replaceable`. The lock file
    lies beside the folder, since a lock inside it would move away with it. It is held until the folder is in its place.
    """
    named, folder = folder, folder.resolve()  # of a link, what it leads to
    partial, old = (folder.with_name(f".{folder.name}.being-{state}") for state in ("written", "replaced"))
    with writing(named):
        folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}{LOCK}")
    with locked(lock, named, f"{named} is being written by another process"), writing(named):
        try:
            if old.exists() and not folder.exists():  # an earlier process was stopped between the two renames
                old.replace(folder)
            check_replaceable(named)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            written = sorted(path.relative_to(partial).as_posix() for path in _files(partial))
            contents = {"sources": _relative(sources, folder), "files": written}
            (partial / MANIFEST).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
            _exchange(folder, partial, old)
        except WriteError as error:  # of a file in it
            raise WriteError(str(error).replace(str(partial), str(named))) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _exchange(folder: Path, partial: Path, old: Path) -> None:
    """Put `partial` in the place of `folder`; where the system refuses, the new one gets a name beside it."""
    shutil.rmtree(old, ignore_errors=True)
    try:
        if folder.exists():
            folder.replace(old)
        partial.replace(folder)
    except OSError as error:  # Windows: a file in it is open in another program
        new = next(name for name in (folder.with_name(f"{folder.name}-new{number or ''}") for number in range(10**6))
                   if not name.exists())
        partial.replace(new)
        raise UserError(f"{folder}: cannot be replaced ({error.strerror}); one of its files may be open in another "
                        f"program. The new results are in {new}") from error
    finally:
        if old.exists() and not folder.exists():
            old.replace(folder)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path, reads: Iterable[Path] = (), sources: Sequence[Path] | None = None) -> None:
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
    try:
        there = _files(folder) if written else list(folder.iterdir())  # without a list one look is enough
    except FileNotFoundError:  # another process replaces it right now; `replacing_folder` looks again
        return
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


def names_in(folder: Path) -> str:
    """What is in a folder, hidden files left out."""
    return ", ".join(sorted(path.name for path in folder.iterdir() if path.name[0] != "."))
