"""Find files by a pattern such as {group}/images/{key}.png.

    {key}      what names a tile in its folder
    {group}    the slide or patient: a folder, or a part of a name
    *          any text inside one name
    **         any number of folders, also none
    .png       at the end: any of `SUFFIXES`, in small or capital letters

A file's key joins with "-", in this order, the texts of {group}, of * and ** in folders, and of {key}. So tiles of
equal names in different folders have different keys. A * in the name of the file itself is not part of the key.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.console import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")  # of pictures
SAME_KIND = {".jpeg": ".jpg", ".tiff": ".tif"}
TOKEN = re.compile(r"(\{key\}|\{group\}|\*)")


@dataclass(frozen=True)
class Found:
    """A file that fits a pattern."""

    path: str  # below the root
    key: str
    group: str  # the text of {group}, or ""
    same_suffix: bool  # as the pattern
    texts: tuple[str, ...]  # of the tokens in the folders and the name, in order


def find_files(root: Path, pattern: str, skip: Sequence[str] = ()) -> tuple[list[Found], list[str]]:
    """Return the files below `root` that fit, and the pictures beside them that do not fit; paths are sorted.

    Wildcards do not enter folders of `root` that `skip` names. Names that begin with a dot are left out.
    """
    *folders, last = composed(pattern).split("/")
    places: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [("", (), ())]  # path, tokens, texts
    for part in folders:
        places = [(_join(path, name), (*tokens, *more_tokens), (*texts, *more_texts)) for path, tokens, texts in places
                  for name, more_tokens, more_texts in _matching_folders(root / path, part, () if path else skip)]
    regex, last_tokens, suffix = _name_regex(last)
    found, others = {}, []
    for path, tokens, texts in places:
        for name in _names(root / path, last):
            match = regex.fullmatch(composed(name))
            if match:
                known = match[regex.groups].lower() if suffix else ""
                values = match.groups()[:len(last_tokens)]
                pairs = [*zip(tokens, texts, strict=True),
                         *(pair for pair in zip(last_tokens, values, strict=True) if pair[0] != "*")]
                found[_join(path, name)] = Found(
                    _join(path, name), "-".join(text.replace("/", "-") for _, text in pairs if text),
                    dict(pairs).get("{group}", ""), not suffix or suffix == ".*" or _kind(known) == _kind(suffix),
                    (*texts, *values))
            elif Path(name).suffix.lower() in SUFFIXES:
                others.append(_join(path, name))
    return list(found.values()), others


def fill(pattern: str, found: Found) -> str:
    """Return the pattern with the texts of another pattern's file in place of its tokens, as far as they go."""
    texts = iter(found.texts)
    return "".join(next(texts, part) if TOKEN.fullmatch(part) else part
                   for part in TOKEN.split(pattern.replace("**", "*")))


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


def _part_regex(part: str, text: str) -> tuple[str, list[str]]:
    """Return a regular expression with a group for each token of a part of a pattern; * matches `text`."""
    pieces = TOKEN.split(part)
    forms = {"{key}": "(.+)", "{group}": "(.+)", "*": f"({text})"}
    return "".join(forms.get(piece) or re.escape(piece) for piece in pieces), pieces[1::2]


def _name_regex(part: str) -> tuple[re.Pattern, list[str], str]:
    """Return the expression of a file's name, its tokens, and the suffix, which is the expression's last group.

    The suffix is "" if the pattern ends with something else than the suffix of a picture or ".*".
    """
    stem, dot, ending = part.rpartition(".")
    suffix = f".{ending.lower()}" if stem and dot and f".{ending.lower()}" in (*SUFFIXES, ".*") else ""
    regex, tokens = _part_regex(stem if suffix else part, ".*")
    known = "|".join(re.escape(suffix) for suffix in SUFFIXES)
    return re.compile(f"{regex}((?i:{known}))" if suffix else regex, re.DOTALL), tokens, suffix


def _matching_folders(folder: Path, part: str, skip: Sequence[str]) -> Iterator[tuple[str, Sequence, Sequence]]:
    """Yield the path below `folder` of each folder that fits a part of a pattern, with tokens and texts."""
    if part == "**":
        yield "", (), ()
        for name in _folders_below(folder, skip):
            yield name, ("**",), (name,)
    elif not TOKEN.search(part) and (folder / part).exists():  # ignores case where the file system does
        yield part, (), ()
    else:
        regex, tokens = _part_regex(part, ".+" if part == "*" else ".*")
        for name in _names(folder, part):
            match = re.fullmatch(regex, composed(name), re.DOTALL)
            if match and name not in skip:
                yield name, tokens, match.groups()


def _folders_below(folder: Path, skip: Sequence[str]) -> Iterator[str]:
    """Yield the paths below `folder` of all its folders; links are not followed, since they could lead in circles."""
    for name in _names(folder, "*"):
        if name not in skip and (folder / name).is_dir() and not (folder / name).is_symlink():
            yield name
            for below in _folders_below(folder / name, ()):
                yield f"{name}/{below}"


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
