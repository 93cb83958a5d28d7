"""Folders of results, such as RUN/evaluation, that are replaced as a whole, and only if they hold nothing else."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.console import UserError
from common.files import LOCK, WriteError, locked, writing

MANIFEST = ".written.json"  # lists the files of a folder and the sources of its results
IGNORED = (".DS_Store", "Thumbs.db", "desktop.ini")  # file managers leave them


@contextmanager
def replacing_folder(folder: Path, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """Give an empty folder. It replaces `folder` if the block succeeds, and is removed if it fails.

    A hidden manifest lists its files and the `sources` of the results; `check_replaceable` reads it the next time.
    The lock file lies beside the folder, because a lock inside would move away with it.
    """
    target = folder.resolve()  # a link stays, and the folder to which it leads is replaced
    partial, old, lock = (target.with_name(f".{target.name}{ending}")
                          for ending in (".being-written", ".being-replaced", LOCK))
    with writing(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock, folder, f"{folder} is being written by another process"):
        try:
            with writing(folder):
                if old.exists() and not target.exists():  # a process was killed between its two renames
                    old.replace(target)
                check_replaceable(folder)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            with writing(folder, only_in=partial):
                yield partial
            with writing(folder):
                files = sorted(path.relative_to(partial).as_posix() for path in _files(partial))
                contents = {"sources": _relative(sources, target), "files": files}
                (partial / MANIFEST).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
                _exchange(target, partial, old)
        except WriteError as error:  # it may name a file in `partial`, which the user does not know
            raise WriteError(str(error).replace(str(partial), str(folder))) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _exchange(target: Path, partial: Path, old: Path) -> None:
    """Replace `target` by `partial`. If the system refuses, the new results get a free name beside `target`."""
    shutil.rmtree(old, ignore_errors=True)
    try:
        if target.exists():
            target.replace(old)
        partial.replace(target)
    except OSError as error:  # on Windows if another program has one of the files open
        names = (target.with_name(f"{target.name}-new{number or ''}") for number in range(10**6))
        new = next(name for name in names if not name.exists())
        partial.replace(new)
        raise UserError(f"{target}: cannot be replaced ({error.strerror}); one of its files may be open in another "
                        f"program. The new results are in {new}") from error
    finally:
        if old.exists() and not target.exists():
            old.replace(target)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path, reads: Iterable[Path] = (), sources: Sequence[Path] | None = None) -> None:
    """Raise a `UserError` unless `replacing_folder` wrote every file in `folder`, from `sources` if they are given.

    `reads` are the inputs of the caller; none of them may lie in the folder.
    """
    advice = "move it away or choose another folder"
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; {advice}")
    target = folder.resolve()
    for path in reads:
        if path.resolve().is_relative_to(target):
            raise UserError(f"{path} lies in {folder}, which this would replace; choose another folder")
    written, earlier_sources = _read_manifest(folder)
    try:
        found = _files(folder) if written else list(folder.iterdir())  # without a manifest the first level is enough
    except FileNotFoundError:  # another process is replacing the folder; `replacing_folder` checks again
        return
    foreign = sorted({path.relative_to(folder).as_posix() for path in found if path.name not in IGNORED} - written)
    if foreign:
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(f"{folder} would be replaced, but holds {foreign[0]}{others}, which no earlier run wrote; "
                        f"{advice}")
    if sources is not None and written and earlier_sources != _relative(sources, target):
        names = ", ".join(os.path.normpath(folder.parent / source) for source in earlier_sources) or "something else"
        raise UserError(f"{folder} would be replaced, but holds results of {names}; {advice}")


def _read_manifest(folder: Path) -> tuple[set[str], list[str]]:
    """Return the files that `replacing_folder` wrote, and the sources; both are empty without a valid manifest."""
    try:
        contents = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {*contents["files"], MANIFEST}, contents["sources"]
    except (OSError, ValueError, LookupError, TypeError):
        return set(), []


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _relative(paths: Sequence[Path], folder: Path) -> list[str]:
    """Return the paths seen from the folder's parent, so that they stay valid when all is moved together."""
    try:
        return [Path(os.path.relpath(path.resolve(), folder.parent)).as_posix() for path in paths]
    except ValueError:  # on another drive of Windows
        return [path.resolve().as_posix() for path in paths]


def names_in(folder: Path) -> str:
    """Return the names in a folder without hidden files, as one text."""
    return ", ".join(sorted(path.name for path in folder.iterdir() if path.name[0] != "."))
