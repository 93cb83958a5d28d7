"""Find files by a pattern such as {group}/images/{key}.png.

    {key}      what names a tile in its folder
    {group}    the slide or patient: a folder, or the first part of a name
    *          any text inside one name
    **         any number of folders, also none
    .png       at the end: any of `SUFFIXES`, in small or capital letters; .* stands for the same

A file's key joins with "-" the texts of {group}, of * and ** in folders, and of {key}, in this order. So tiles of equal
names in different folders have different keys. A * in the name of the file itself is not part of the key. Where a name
can be divided in several ways, the earlier texts are as short as possible.
"""

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.console import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")  # of pictures
SAME_KIND = {".jpeg": ".jpg", ".tiff": ".tif"}
TOKEN = re.compile(r"(\{key\}|\{group\}|\*)")
Texts = tuple[tuple[str, str], ...]  # tokens and what stands for them


@dataclass(frozen=True)
class Found:
    """A file that fits a pattern."""

    path: str  # below the root
    group: str  # the text of {group}, or ""
    folders: tuple[str, ...]  # the texts of the wildcards in folders
    name: str  # the text of {key}
    same_suffix: bool  # as the pattern

    @property
    def key(self) -> str:
        return "-".join(text.replace("/", "-") for text in (self.group, *self.folders, self.name) if text)


def find_files(root: Path, pattern: str, skip: Collection[str] = ()) -> list[Found]:
    """Return the files below `root` that fit a pattern, sorted by path.

    Wildcards do not enter the folders `skip`, paths below `root`. Names that begin with a dot are left out.
    """
    *folders, last = composed(pattern).split("/")
    places: list[tuple[str, Texts]] = [("", ())]
    for part in folders:
        places = [(name, texts + more) for path, texts in places
                  for name, more in _matching_folders(root, path, part, skip)]
    regex, tokens, suffix = _name_regex(last)
    found = {}
    for path, texts in places:
        for name in _names(root / path, last):
            match = regex.fullmatch(composed(name))
            if match:
                *values, known = match.groups() if suffix else (*match.groups(), "")
                pairs = dict(zip(tokens, values, strict=True)) | {
                    token: text for token, text in texts if token.startswith("{")}
                same = not suffix or suffix == ".*" or _kind(known.lower()) == _kind(suffix)
                found[_join(path, name)] = Found(
                    _join(path, name), pairs.get("{group}", ""),
                    tuple(text for token, text in texts if not token.startswith("{")), pairs["{key}"], same)
    return [found[path] for path in sorted(found)]


def pictures_below(root: Path, pattern: str, skip: Collection[str]) -> Iterator[str]:
    """Yield the paths of all pictures below the folder of `root` where the first token of a pattern stands."""
    start = TOKEN.split(composed(pattern))[0].rpartition("/")[0]
    for folder, folders, names in os.walk(root / start):
        path = Path(folder).relative_to(root).as_posix()
        path = "" if path == "." else path
        folders[:] = [name for name in folders if name[0] != "." and _join(path, name) not in skip]
        yield from (_join(path, name) for name in names
                    if name[0] != "." and Path(name).suffix.lower() in SUFFIXES)


def fill(pattern: str, found: Found) -> str:
    """Return the path that a pattern gives to the key of a file that fits another one."""
    folders = iter(found.folders)
    *parts, last = TOKEN.sub(lambda token: {"{key}": found.name, "{group}": found.group}.get(token[0], token[0]),
                             pattern).split("/")
    parts = [re.sub(r"\*+", lambda wildcard: next(folders, wildcard[0]), part) for part in parts]
    return "/".join([*parts, last])


def folder_wildcards(pattern: str) -> list[str]:
    """Return the wildcards in the folders of a pattern, which are part of the key."""
    return [token for part in pattern.split("/")[:-1] for token in re.findall(r"\*+", part)]


def joins_folders(pattern: str) -> bool:
    """Return whether a key holds names of folders, so that files of different tiles may have one name."""
    return bool(folder_wildcards(pattern)) or "{group}" in pattern.rpartition("/")[0]


def composed(name: str) -> str:
    """Return the name in Unicode's composed form (NFC), since macOS programs may write an accent in another way."""
    return unicodedata.normalize("NFC", name)


def _kind(suffix: str) -> str:
    return SAME_KIND.get(suffix, suffix)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path and name else path or name


def _part_regex(part: str) -> tuple[str, list[str]]:
    """Return a regular expression with a group for each token of a part of a pattern, and the tokens."""
    pieces = TOKEN.split(part)
    forms = {"{key}": "(.+?)", "{group}": "(.+?)", "*": "(.*?)"}
    return "".join(forms.get(piece) or re.escape(piece) for piece in pieces), pieces[1::2]


def _name_regex(part: str) -> tuple[re.Pattern, list[str], str]:
    """Return the expression of a file's name, its tokens, and the suffix, for which the expression has a last group.

    The suffix is "" if the pattern ends with something else than the suffix of a picture or ".*".
    """
    stem, dot, ending = part.rpartition(".")
    suffix = f".{ending.lower()}" if stem and dot and f".{ending.lower()}" in (*SUFFIXES, ".*") else ""
    regex, tokens = _part_regex(stem if suffix else part)
    known = "|".join(re.escape(suffix) for suffix in SUFFIXES)
    return re.compile(f"{regex}((?i:{known}))" if suffix else regex, re.DOTALL), tokens, suffix


def _matching_folders(root: Path, path: str, part: str, skip: Collection[str]) -> Iterator[tuple[str, Texts]]:
    """Yield each folder below `path` that fits a part of a pattern, as a path below `root`, and its texts."""
    if part == "**":
        yield path, ()
        for below in _folders_below(root, path, skip):
            yield below, (("**", below.removeprefix(f"{path}/") if path else below),)
    elif not TOKEN.search(part) and (root / path / part).exists():  # ignores case where the file system does
        yield _join(path, part), ()
    else:
        regex, tokens = _part_regex(part)
        for name in _names(root / path, part):
            match = re.fullmatch(regex, composed(name), re.DOTALL)
            if match and _join(path, name) not in skip:
                yield _join(path, name), tuple(zip(tokens, match.groups(), strict=True))


def _folders_below(root: Path, path: str, skip: Collection[str]) -> Iterator[str]:
    """Yield the paths of all folders below `path`; links are not followed, since they could lead in circles."""
    for name in _names(root / path, "*"):
        below = _join(path, name)
        if below not in skip and (root / below).is_dir() and not (root / below).is_symlink():
            yield below
            yield from _folders_below(root, below, skip)


def _names(folder: Path, part: str) -> list[str]:
    """Return the names in a folder that may fit a part of a pattern."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    for name in names:
        if re.search("[\ud800-\udfff]", name):  # Python's signs for bytes that are not text
            raise UserError(f"{folder}: the name {name!r} is not valid Unicode; rename it")
    return [name for name in names if part.startswith(".") or not name.startswith(".")]  # macOS leaves ._NAME


def reject_outside(root: Path, paths: Iterable[str]) -> None:
    """Raise a `UserError` if a path leads out of `root`: because it is absolute, by `..` or through a link."""
    home, resolved = root.resolve(), cache(Path.resolve)  # few folders hold many files
    for file in (root / path for path in paths):
        real = file.resolve() if file.is_symlink() else resolved(file.parent) / file.name
        if ".." in file.parts[len(root.parts):] or not real.is_relative_to(home):
            raise UserError(f"{file}: leads out of the data folder {home}, to {real}; move or copy the files below "
                            "it, or set data.root to the folder that holds them")
