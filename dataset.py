"""Tiles on disk: pairs of image and mask, groups and split, the list tiles.csv, the packed store. Needs no torch.

    key      names a tile: the part of its file name that stands for {key} in data.images and data.masks
    group    slide or patient of a tile, found in its key by data.group; no split and no fold cuts a group
    store    tiles.u8, all kept tiles as (N, H, W, 4) uint8: red, green, blue and class, mapped into memory
"""

import csv
import hashlib
import io
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np

from common.console import Progress, UserError
from common.files import LOCK, locked, remove_leftovers, replacing, write_csv
from common.pictures import picture_size, read_image, read_mask, reading
from common.randomness import generator

TILE_LIST = "tiles.csv"
STORE = "tiles.u8"
SPLITS = ("train", "test")
DROPPED = ("sparse", "misregistered", "unmarked", "shifted", "duplicate", "corrupt", "excluded")  # excluded: by hand
STORE_FORMAT = "crc-unet tiles 2"
HEADER_BYTES = 4096  # of the store: one memory page, so that the pixels stay aligned


@dataclass(frozen=True)
class Tile:
    """A row of tiles.csv: a pair of files, the measurements of the filter, its verdict. Paths are below data.root."""

    key: str
    image: str
    mask: str
    group: str = ""
    foreground: float | None = None  # share of the mask that is not background
    blank: float | None = None  # share of the annotated tissue where the image shows glass (Algorithm 1)
    unmarked: float | None = None  # share of the tile where the image shows tissue and the mask says background
    shift_x: float | None = None  # pixels by which the mask lies too far right
    shift_y: float | None = None  # pixels by which the mask lies too low
    confidence: float | None = None  # in this shift, from 0 to 1
    proposed: str = ""  # the filter's verdict
    split: str = ""  # the verdict in force, which a person may edit: train, test, or why the tile is dropped
    by_hand: str = ""  # the verdict that a person had set when the filter ran last
    reason: str = ""  # why the tile is corrupt, or which tile shows the same image
    note: str = ""  # written by a person

    @property
    def shift(self) -> float | None:
        """Pixels by which the mask lies off."""
        return None if self.shift_x is None or self.shift_y is None else math.hypot(self.shift_x, self.shift_y)

    @property
    def manual_verdict(self) -> str:
        """The verdict that a person set, or "". Setting `split` back to `proposed` takes it back."""
        if not self.proposed:  # no filter wrote this list
            return ""
        if self.split != self.proposed:
            return self.split
        # the filter may agree with the person; a verdict on a corrupt tile waits until the tile can be read
        return self.by_hand if self.proposed in (self.by_hand, "corrupt") else ""


MEASUREMENTS = tuple(f.name for f in fields(Tile) if f.type == float | None)


# ---------------------------------------------------------------------------------------------- pairs

def find_pairs(root: Path, images: str, masks: str, group: str = "") -> list[Tile]:
    """Return every image with its mask, in the natural order of the keys (2 before 10)."""
    found_images, found_masks = files_by_key(root, images), files_by_key(root, masks)
    shared = set(found_images.values()) & set(found_masks.values())
    less_specific = found_images if len(images) < len(masks) else found_masks  # {key}.png finds {key}_mask.png too
    for key in [key for key, path in less_specific.items() if path in shared]:
        del less_specific[key]
    if not found_images and not found_masks:
        raise UserError(f"{root.resolve()}: no tiles found; expected {root / images} and {root / masks}. Set "
                        "data.root, data.images and data.masks, or make tiles to try: `python -m tools.make_demo_data "
                        "data/demo` (then add data.root=data/demo)")
    for found, partners, what, pattern in ((found_images, found_masks, "mask", masks),
                                           (found_masks, found_images, "image", images)):
        alone = [key for key in found if key not in partners]
        if alone:
            raise UserError(f"{root / found[alone[0]]}: its {what} {root / pattern.replace('{key}', alone[0])} is "
                            f"missing ({len(alone)} of {len(found)} files have no {what}); add it or remove the file")
    reject_outside(root, [*found_images.values(), *found_masks.values()])
    return [Tile(key, found_images[key], found_masks[key], group_of(key, group))
            for key in sorted(found_images, key=_natural)]


def files_by_key(root: Path, pattern: str) -> dict[str, str]:
    """Return the path below `root` of each key that fits a pattern such as frames/frame#{key}.png."""
    found = [("", "")]  # path and key; each part of the pattern makes the paths longer
    for part in composed(pattern).split("/"):
        regex = re.compile(re.escape(part).replace(re.escape("{key}"), "(.+)"), re.DOTALL)
        matches = [(path, key, name, regex.fullmatch(composed(name))) for path, key in found
                   for name in _names(root / path, part)]
        found = [(f"{path}/{name}" if path else name, match[1] if regex.groups else key)
                 for path, key, name, match in matches if match]
    by_key: dict[str, str] = {}
    for path, key in found:
        if key in by_key:
            raise UserError(f"{root / by_key[key]} and {root / path}: the names differ only in how accents are "
                            "written; rename or remove one of the files")
        by_key[key] = path
    return by_key


def composed(name: str) -> str:
    """Return the name in Unicode's composed form (NFC), since macOS programs may write an accent in another way."""
    return unicodedata.normalize("NFC", name)


def _names(folder: Path, part: str) -> list[str]:
    """Return the names in a folder that may fit a part of a pattern."""
    if "{key}" not in part and (folder / part).exists():  # ignores case where the file system does
        return [part]
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


def _natural(key: str) -> tuple[list[tuple[int, int, str]], str]:
    parts = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", key) if part]
    return parts, key  # the key itself decides between 1 and 01


# ---------------------------------------------------------------------------------------------- groups and split

def group_of(key: str, pattern: str) -> str:
    """Return what `pattern` finds in the key: its first group in parentheses, else the whole match."""
    if not pattern:
        return ""
    match = re.search(pattern, key)
    group = match and match[1 if match.re.groups else 0]
    if not group:
        raise UserError(f"data.group '{pattern}' finds nothing in the key '{key}'; every key must hold its group")
    return group


def groups_are_missing(tiles: Sequence[Tile]) -> bool:
    """Return whether every tile stands alone: there are no groups, or each group has one tile."""
    return len({tile.group or tile.key for tile in tiles}) == len(tiles)


def split_by_group(tiles: Sequence[Tile], test_fraction: float, seed: int) -> list[str]:
    """Return "train" or "test" for each tile. A group stays together; a tile without a group is its own group.

    Groups come in random order. Each one that still fits into `test_fraction` of the tiles goes to the test set. Single
    tiles give the report's split: 8,827 and 2,206 of 11,033 at 0.2. A larger group is never in the test set, unless no
    group is smaller: where slides differ much in size, the test set leans to the small ones.
    """
    groups = places_by_group([tile.group or f"tile {i}" for i, tile in enumerate(tiles)])
    room = int(test_fraction * len(tiles))
    test: list[int] = []
    for i in generator(seed, 0, 0, "split").permutation(len(groups)):
        if len(test) + len(groups[i]) <= room:
            test.extend(groups[i])
    if not test:
        test = list(min(groups, key=len, default=[]))
    if len(test) == len(tiles):
        raise UserError(f"too few groups (slides, patients) for a training and a test set: {len(groups)}, with "
                        f"{len(tiles)} tiles that can be kept; at least two are needed")
    chosen = set(test)
    return ["test" if i in chosen else "train" for i in range(len(tiles))]


def places_by_group(names: Sequence[str]) -> list[list[int]]:
    """Return the places of each name, in the order in which the names occur first."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    return list(places.values())


# ---------------------------------------------------------------------------------------------- tiles.csv

def write_tiles(path: Path, tiles: Sequence[Tile]) -> None:
    """Write the list whole or not at all."""
    rows = [{name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(tile).items()}
            for tile in tiles]
    write_csv(path, rows, [f.name for f in fields(Tile)])


def read_tiles(root: Path) -> list[Tile]:
    """Read and check the list of a data root. It comes in the natural order of the keys, on which training depends."""
    tiles = read_list(root / TILE_LIST)
    reject_outside(root, [path for tile in tiles for path in (tile.image, tile.mask)])
    return tiles


def read_list(path: Path) -> list[Tile]:
    """Read tiles.csv and check what it says, without a look at the files that it names."""
    root = path.parent
    if not path.is_file():
        hint = "" if root.is_dir() else (f" (the folder {root.resolve()} is missing too; `python -m "
                                         "tools.make_demo_data data/demo` makes tiles to try)")
        raise UserError(f"{path}: the cleaned list of tiles is missing; write it with data_filter.py{hint}")
    try:
        rows = rows_of(path.read_text(encoding="utf-8-sig"))  # spreadsheets put a byte order mark in front
        missing = [name for name in ("key", "image", "mask", "split") if name not in (rows.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: expected the columns {', '.join(f.name for f in fields(Tile))}; missing: "
                            f"{', '.join(missing)}. Restore the first line, or delete the file and run data_filter.py")
        tiles = [_tile_of(row, f"{path} line {rows.line_num}") for row in rows if any(row.values())]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as CSV UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a readable CSV file ({error}); look for a stray quotation mark") from None
    for name in ("key", "image", "mask"):
        for value, count in Counter(getattr(tile, name) for tile in tiles).most_common(1):
            if count > 1:
                raise UserError(f"{path}: {count} rows have the {name} '{value}'; keep one")
    train, test = ({tile.group for tile in tiles if tile.split == split} - {""} for split in SPLITS)
    if train & test:
        raise UserError(f"{path}: group '{min(train & test)}' has tiles in train and in test; keep it on one side")
    return sorted(tiles, key=lambda tile: _natural(tile.key))


def rows_of(text: str) -> csv.DictReader:
    """Return the rows of a list with commas, semicolons or tabs, as spreadsheets save it."""
    return csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=text.partition("\n")[0].count))


def _tile_of(row: dict, where: str) -> Tile:
    if None in row.values() or None in row:  # csv's signs for too few and too many cells
        raise UserError(f"{where}: expected {len(row) - (None in row)} columns, as in the first line")
    values = {f.name: row[f.name] for f in fields(Tile) if f.name in row}
    for name in ("split", "proposed", "by_hand"):
        value = values.get(name, "")
        if value not in SPLITS + DROPPED and (name == "split" or value):
            raise UserError(f"{where}: {name} is '{value}'; expected one of {', '.join(SPLITS + DROPPED)}")
    if values["split"] == "corrupt" and values.get("proposed", "corrupt") != "corrupt":
        raise UserError(f"{where}: only the filter sets split to 'corrupt'; to drop a tile write 'excluded'")
    if values["key"] in ("", ".", "..") or set(values["key"]) & set("/\\"):
        raise UserError(f"{where}: the key '{values['key']}' names files; expected a name without slashes")
    for name in ("image", "mask"):
        if Path(values[name]).is_absolute() or ".." in Path(values[name]).parts:
            raise UserError(f"{where}: {name} '{values[name]}' leaves the data folder; give a path below it")
    for name in MEASUREMENTS:
        try:  # some spreadsheets write 0,5
            values[name] = float(values[name].replace(",", ".")) if values.get(name) else None
        except ValueError:
            raise UserError(f"{where}: {name} must be a number or empty; it is '{values[name]}'") from None
    return Tile(**values)


def identity(tiles: Iterable[Tile]) -> str:
    """Return a sha256 of what a run depends on: key, files, group and split of the kept tiles, in any order."""
    kept = sorted((tile.key, tile.image, tile.mask, tile.group, tile.split) for tile in tiles if tile.split in SPLITS)
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- the packed store

@dataclass(frozen=True)
class Store:
    """The packed tiles, and sums over each tile from which the statistics of any selection follow at once."""

    pixels: np.memmap  # (N, H, W, 4) uint8, read-only: red, green, blue and class
    sums: np.ndarray  # (N, 6 + K) int64: red, green, blue, their squares, pixels of each class


def open_store(root: Path, tiles: Sequence[Tile], mask_values: Sequence[int]) -> Store:
    """Map the tiles of tiles.u8 into memory. Pack the file first if it is absent or stale.

    It is stale if its format, the list, its order, `mask_values`, or the size or time of a file has changed.
    """
    path, signature = root / STORE, _signature(root, tiles, mask_values)
    store = _read_store(path, signature)
    if store is None:
        busy = f"{root}: another process packs {STORE} or writes {TILE_LIST}"
        with locked(root / LOCK, path, busy, wait=True):
            remove_leftovers(root, STORE)
            store = _read_store(path, signature)  # another process may have packed it meanwhile
            if store is None:
                _pack(path, root, tiles, mask_values, signature)
                store = _read_store(path, signature)
    if store is None:
        raise UserError(f"{path}: another program changed it as soon as it was packed; run the command again")
    return store


def _signature(root: Path, tiles: Sequence[Tile], mask_values: Sequence[int]) -> str:
    digest = hashlib.sha256(repr(list(mask_values)).encode())
    for name in (name for tile in tiles for name in (tile.image, tile.mask)):
        with reading(root / name):
            stat = (root / name).stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _read_store(path: Path, signature: str) -> Store | None:
    """Return the store, or None if the file is not whole or has another format or signature.

    Everything is read from one open file, because another process may replace the store between two calls of `open`.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
            shape, sums_shape = tuple(header["shape"]), tuple(header["sums"])
            end_of_pixels = HEADER_BYTES + math.prod(shape)
            size = end_of_pixels + 8 * math.prod(sums_shape)
            if (header["format"], header["signature"], file.seek(0, 2)) != (STORE_FORMAT, signature, size):
                return None
            file.seek(end_of_pixels)
            sums = np.frombuffer(file.read(), "<i8").reshape(sums_shape)
            return Store(np.memmap(file, np.uint8, mode="r", offset=HEADER_BYTES, shape=shape), sums)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _pack(path: Path, root: Path, tiles: Sequence[Tile], mask_values: Sequence[int], signature: str) -> None:
    """Write header, pixels and sums of the tiles into one file."""
    height, width = picture_size(root / tiles[0].image)
    sums = np.empty((len(tiles), 6 + len(mask_values)), "<i8")
    header = {"format": STORE_FORMAT, "shape": [len(tiles), height, width, 4], "sums": sums.shape,
              "signature": signature}
    with (replacing(path) as temporary, temporary.open("wb") as file,
          Progress("pack tiles", len(tiles), "tile") as progress):
        file.write(json.dumps(header).encode().ljust(HEADER_BYTES))
        for i, tile in enumerate(tiles):
            image, mask = read_pair(root, tile, mask_values)
            if mask.shape != (height, width):
                raise UserError(f"{root / tile.image}: {mask.shape[0]} x {mask.shape[1]} pixels, but "
                                f"{root / tiles[0].image} has {height} x {width}; all tiles must have one size")
            file.write(np.dstack([image, mask]).tobytes())
            sums[i] = sums_of(image, mask, len(mask_values))
            progress.advance()
        file.write(sums.tobytes())


def read_pair(root: Path, tile: Tile, mask_values: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return image (H, W, 3) and class indices (H, W), both uint8 and of one size."""
    image, mask = read_image(root / tile.image), read_mask(root / tile.mask, mask_values)
    reject_different_sizes(root, tile, image.shape[:2], mask.shape)
    return image, mask


def reject_different_sizes(root: Path, tile: Tile, image: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """Raise a `UserError` unless the sizes (height, width) of a tile's image and mask agree."""
    if image != mask:
        raise UserError(f"{root / tile.mask}: the mask is {mask[0]} x {mask[1]} pixels (height x width), its image "
                        f"{root / tile.image} is {image[0]} x {image[1]}; they must agree")


# ---------------------------------------------------------------------------------------------- statistics

@dataclass(frozen=True)
class Statistics:
    """What training learns about its tiles before it starts. Part of each checkpoint."""

    mean: list[float]  # of red, green, blue, in [0, 1]
    std: list[float]
    frequencies: list[float]  # share of the pixels of each class (section 6.1.1)

    def equals(self, other: "Statistics") -> bool:
        """Return whether both come from the same tiles; another processor may round the last bit differently."""
        return all(np.allclose(ours, theirs, rtol=1e-9, atol=0) for ours, theirs in
                   zip(asdict(self).values(), asdict(other).values(), strict=True))


def sums_of(image: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    """Return (6 + K,) int64 of an image (H, W, 3) and its class indices (H, W): a row of `Store.sums`."""
    values = image.reshape(-1, 3).astype(np.uint32)
    return np.concatenate([values.sum(0, np.int64), (values * values).sum(0, np.int64),
                           np.bincount(mask.ravel(), minlength=classes)])


def statistics_of(sums: np.ndarray) -> Statistics:
    """Return the statistics of the tiles whose rows of `Store.sums` (n, 6 + K) are given."""
    total = [int(number) for number in sums.sum(axis=0)]  # Python's integers are exact
    values, squares, counts = total[:3], total[3:6], total[6:]
    pixels = sum(counts)
    variances = [(pixels * square - value**2) / (255 * pixels)**2 for value, square in
                 zip(values, squares, strict=True)]
    return Statistics([value / (255 * pixels) for value in values],
                      [math.sqrt(max(variance, 1e-12)) for variance in variances],
                      [count / pixels for count in counts])
