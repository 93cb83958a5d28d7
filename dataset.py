"""Tiles on disk: pairs of image and mask, the cleaned list, the split, the packed store. Needs no torch.

    key      what names a tile: the part of its file name that stands for {key} in data.images and data.masks
    group    slide or patient of a tile, found in its key by data.group; groups are never cut by a split or a fold
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
from pathlib import Path

import numpy as np

from common.console import Progress, UserError
from common.files import LOCK, locked, remove_leftovers, replacing, write_csv
from common.pictures import picture_size, read_image, read_mask, reading
from common.randomness import generator

TILE_LIST = "tiles.csv"
STORE = "tiles.u8"
SPLITS = ("train", "test")
DROPPED = ("sparse", "misregistered", "unmarked", "shifted", "duplicate", "corrupt", "excluded")  # the last: by hand
STORE_FORMAT = "crc-unet tiles 2"
HEADER_BYTES = 4096  # of the store; one page, so that the pixels stay aligned


# ---------------------------------------------------------------------------------------------- the list of tiles

@dataclass(frozen=True)
class Tile:
    """A row of tiles.csv: a pair, what the filter measured, its verdict. Paths are below data.root."""

    key: str
    image: str
    mask: str
    group: str = ""
    foreground: float | None = None  # share of the mask that is not background
    blank: float | None = None  # share of the annotated tissue where the image shows glass (Algorithm 1)
    unmarked: float | None = None  # share of the tile where the image shows tissue and the mask says background
    shift_x: float | None = None  # pixels by which the mask lies too far right
    shift_y: float | None = None  # and too low
    confidence: float | None = None  # in this shift, from 0 to 1
    proposed: str = ""  # the filter's verdict
    split: str = ""  # the verdict in force: train, test, or why the tile is dropped; for a person to edit
    by_hand: str = ""  # the verdict that a person had set when the filter ran last
    reason: str = ""  # why the filter calls the tile corrupt, or which tile it is a copy of
    note: str = ""  # a person's

    @property
    def shift(self) -> float | None:
        """Pixels by which the mask lies off."""
        return None if self.shift_x is None or self.shift_y is None else math.hypot(self.shift_x, self.shift_y)

    @property
    def hand(self) -> str:
        """The verdict that a person set, if any; setting `split` back to what is proposed takes it back."""
        if not self.proposed:  # a list that no filter wrote
            return ""
        if self.split not in (self.proposed, self.by_hand):
            return self.split
        return self.by_hand if self.split == self.by_hand or self.proposed == "corrupt" else ""


NEEDED_COLUMNS = ("key", "image", "mask", "split")  # of tiles.csv
MEASUREMENTS = tuple(f.name for f in fields(Tile) if f.type == float | None)


def find_pairs(root: Path, images: str, masks: str, group: str = "") -> list[Tile]:
    """Every image with its mask, by key, in the keys' natural order (2 before 10).

    A key is in Unicode's composed form (NFC): of an image and a mask with the same name one may come from macOS, whose
    programs write an accent as a character of its own.
    """
    found_images, found_masks = files_by_key(root, images), files_by_key(root, masks)
    shared = set(found_images.values()) & set(found_masks.values())  # {key}.png finds the masks {key}_mask.png too
    loose = found_images if len(images) < len(masks) else found_masks
    for key in [key for key, path in loose.items() if path in shared]:
        del loose[key]
    if not found_images and not found_masks:
        raise UserError(f"{root.resolve()}: no tiles found: expected {root / images} and {root / masks}. Put your "
                        "tiles there, or set data.root, data.images and data.masks; `python -m tools.make_demo_data "
                        "data/demo` makes tiles to try (then add data.root=data/demo)")
    for here, there, what, pattern in ((found_images, found_masks, "mask", masks),
                                       (found_masks, found_images, "image", images)):
        lone = [key for key in here if key not in there]
        if lone:
            partner = root / pattern.replace("{key}", lone[0])
            raise UserError(f"{root / here[lone[0]]}: its {what} {partner} is missing ({len(lone)} of {len(here)} "
                            f"files have no {what}); add it or remove the file")
    reject_outside(root, [*found_images.values(), *found_masks.values()])
    return [Tile(key, found_images[key], found_masks[key], group_of(key, group))
            for key in sorted(found_images, key=_natural)]


def composed(name: str) -> str:
    """The name in Unicode's composed form (NFC), in which names that look the same are the same."""
    return unicodedata.normalize("NFC", name)


def files_by_key(root: Path, pattern: str) -> dict[str, str]:
    """What a pattern such as frames/frame#{key}.png names: the path below `root` of each key."""
    found = [("", "")]  # (path below root, key), one part of the pattern further each time
    for part in composed(pattern).split("/"):
        form = re.compile(re.escape(part).replace(re.escape("{key}"), "(.+)"), re.DOTALL)
        longer = []
        for path, key in found:
            for name in _names(root / path, part):
                match = form.fullmatch(composed(name))
                if match:
                    longer.append((f"{path}/{name}" if path else name, match[1] if form.groups else key))
        found = longer
    by_key: dict[str, str] = {}
    for path, key in found:
        if key in by_key:
            raise UserError(f"{root / by_key[key]} and {root / path}: the names differ only in how accents are "
                            "written; rename or remove one of the files")
        by_key[key] = path
    return by_key


def _names(folder: Path, part: str) -> list[str]:
    """The names in a folder that a part of a pattern may mean."""
    if "{key}" not in part and (folder / part).exists():  # ignores case where the file system does
        return [part]
    try:
        names = sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # how Python writes bytes that are no text
            raise UserError(f"{folder}: the name {name!r} is not valid Unicode; rename it")
    return [name for name in names if part.startswith(".") or not name.startswith(".")]  # macOS leaves ._NAME


def reject_outside(root: Path, paths: Iterable[str]) -> None:
    """A `UserError` if a path below `root` leads out of it: absolute, by `..` or through a link."""
    home, folders = root.resolve(), {}
    for path in paths:
        file = root / path
        if file.parent not in folders:
            folders[file.parent] = file.parent.resolve()
        real = file.resolve() if file.is_symlink() else folders[file.parent] / file.name
        if ".." in file.parts[len(root.parts):] or not real.is_relative_to(home):
            raise UserError(f"{file}: leads out of the data folder {home}, to {real}; move or copy the files below "
                            "it, or set data.root to the folder that holds them")


def _natural(key: str) -> tuple[list[tuple[int, int, str]], str]:
    parts = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", key) if part]
    return parts, key  # 1 and 01 in one order always


def group_of(key: str, pattern: str) -> str:
    """What `pattern` finds in the key: its first group in parentheses, else the whole match; "" without a pattern."""
    if not pattern:
        return ""
    match = re.search(pattern, key)
    group = (match.group(1) if match.groups() else match.group(0)) if match else None
    if not group:
        raise UserError(f"data.group '{pattern}' finds nothing in the key '{key}'; every key must hold its group")
    return group


def groups_are_missing(tiles: Sequence[Tile]) -> bool:
    """Whether no group has two tiles: none given, or a pattern that finds another in every key."""
    return len({tile.group or tile.key for tile in tiles}) == len(tiles)


def split_by_group(tiles: Sequence[Tile], test_fraction: float, seed: int) -> list[str]:
    """"train" or "test" for each tile; the tiles of a group stay together, a tile without a group is its own.

    Groups come in random order and go to the test set as long as they fit into `test_fraction` of the tiles, so that
    11,033 single tiles at 0.2 give the report's 8,827 and 2,206. A group that is larger than `test_fraction` of the
    tiles is therefore never tested on (unless no group is smaller): where slides are of very different sizes the test
    set leans to the small ones.
    """
    groups = places_by_group([tile.group or f"tile {i}" for i, tile in enumerate(tiles)])
    room = int(test_fraction * len(tiles))
    order = generator(seed, 0, 0, "split").permutation(len(groups))
    test: list[int] = []
    for members in (groups[i] for i in order):
        if len(test) + len(members) <= room:
            test.extend(members)
    if not test:
        test = list(min(groups, key=len))
    if len(test) == len(tiles) or not tiles:
        raise UserError(f"too few groups (slides, patients) for a training and a test set: {len(groups)}, with "
                        f"{len(tiles)} tiles that can be kept; at least two are needed")
    chosen = set(test)
    return ["test" if i in chosen else "train" for i in range(len(tiles))]


def places_by_group(names: Sequence[str]) -> list[list[int]]:
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    return list(members.values())


def write_tiles(path: Path, tiles: Sequence[Tile]) -> None:
    """Write the list whole or not at all."""
    rows = [{name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(tile).items()}
            for tile in tiles]
    write_csv(path, rows, [f.name for f in fields(Tile)])


def read_tiles(root: Path) -> list[Tile]:
    """The cleaned list of a data root, checked: names, verdicts, paths, and no group on both sides of the split.

    It comes in the natural order of the keys, whichever order a spreadsheet left: training depends on it.
    """
    path = root / TILE_LIST
    if not path.is_file():
        hint = ("`python data_filter.py --config configs/NAME.yaml` writes it" if root.is_dir() else
                f"the folder {root.resolve()} is missing too. `python -m tools.make_demo_data data/demo` makes tiles "
                "that work, `python -m tools.prepare_ebhi SOURCE data/ebhi` prepares real ones; then run "
                "data_filter.py")
        raise UserError(f"{path}: the cleaned list of tiles is missing; {hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
        rows = rows_of(text)
        missing = [name for name in NEEDED_COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: expected the columns {', '.join(f.name for f in fields(Tile))}; missing: "
                            f"{', '.join(missing)}. Restore the first line, or delete the file and run data_filter.py")
        tiles = [_tile_of(row, f"{path} line {rows.line_num}") for row in rows if any(row.values())]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as CSV UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a readable CSV file ({error}); look for a stray quotation mark") from None
    for name in ("key", "image", "mask"):
        value, count = Counter(getattr(tile, name) for tile in tiles).most_common(1)[0] if tiles else ("", 0)
        if count > 1:
            raise UserError(f"{path}: the {name} '{value}' stands in {count} rows; keep one")
    reject_outside(root, [path for tile in tiles for path in (tile.image, tile.mask)])
    in_test = {tile.group for tile in tiles if tile.split == "test"} - {""}
    both = in_test & {tile.group for tile in tiles if tile.split == "train"}
    if both:
        raise UserError(f"{path}: group '{min(both)}' has tiles in train and in test; a group belongs to one of them")
    return sorted(tiles, key=lambda tile: _natural(tile.key))


def identity(tiles: Iterable[Tile]) -> str:
    """A sha256 of what a run depends on: key, files, group and split of every tile that is kept.

    Notes, measurements, dropped tiles, the order of the rows and the way a spreadsheet writes them are not in it.
    """
    kept = sorted((tile.key, tile.image, tile.mask, tile.group, tile.split) for tile in tiles if tile.split in SPLITS)
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def rows_of(text: str) -> csv.DictReader:
    """The rows of a list, whichever of comma, semicolon and tab a spreadsheet saved it with."""
    return csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=text.partition("\n")[0].count))


def _tile_of(row: dict, where: str) -> Tile:
    if None in row.values() or None in row:
        raise UserError(f"{where}: expected {len(row) - (None in row)} columns, as in the first line")
    values = {f.name: row[f.name] for f in fields(Tile) if f.name in row}
    for name in ("split", "proposed", "by_hand"):
        value = values.get(name, "")
        if value not in SPLITS + DROPPED and (name == "split" or value):
            raise UserError(f"{where}: {name} is '{value}'; expected one of {', '.join(SPLITS + DROPPED)}")
    if values["split"] == "corrupt" != values.get("proposed", "corrupt"):
        raise UserError(f"{where}: only the filter calls a tile corrupt; to drop it write 'excluded'")
    if values["key"] in ("", ".", "..") or set(values["key"]) & set("/\\"):
        raise UserError(f"{where}: the key '{values['key']}' names files; expected a name without slashes")
    for name in ("image", "mask"):
        if Path(values[name]).is_absolute() or ".." in Path(values[name]).parts:
            raise UserError(f"{where}: {name} '{values[name]}' leaves the data folder; give a path below it")
    for name in MEASUREMENTS:
        try:  # 0,5 in some spreadsheets
            values[name] = float(values[name].replace(",", ".")) if values.get(name) else None
        except ValueError:
            raise UserError(f"{where}: {name} must be a number or empty; it is '{values[name]}'") from None
    return Tile(**values)


def reject_different_sizes(root: Path, tile: "Tile", image: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """The sizes are (height, width)."""
    if image != mask:
        raise UserError(f"{root / tile.mask}: the mask is {mask[0]} x {mask[1]} pixels (height x width), its image "
                        f"{root / tile.image} is {image[0]} x {image[1]}; they must agree")


def read_pair(root: Path, tile: "Tile", mask_values: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) and class indices (H, W), both uint8 and of one size."""
    image, mask = read_image(root / tile.image), read_mask(root / tile.mask, mask_values)
    reject_different_sizes(root, tile, image.shape[:2], mask.shape)
    return image, mask


# ---------------------------------------------------------------------------------------------- the packed store

@dataclass(frozen=True)
class Store:
    """The packed tiles, and sums over each of them, from which the statistics of any selection follow at once."""

    pixels: np.memmap  # (N, H, W, 4) uint8, read-only: red, green, blue and class
    sums: np.ndarray  # (N, 6 + K) int64: red, green, blue, their squares, pixels of each class


def open_store(root: Path, tiles: Sequence[Tile], mask_values: Sequence[int]) -> Store:
    """The tiles mapped into memory from tiles.u8, which is packed anew where it is absent or stale.

    Stale means: another list, order, file size, modification time or greys than when it was packed, or packed in
    another format.
    """
    path = root / STORE
    signature = _signature(root, tiles, mask_values)
    store = _read_store(path, signature)
    if store is None:
        busy = f"{root}: another process packs {STORE} or writes {TILE_LIST}"
        with locked(root / LOCK, path, busy, wait=True):
            remove_leftovers(root, STORE)
            store = _read_store(path, signature)  # another process may have packed meanwhile
            if store is None:
                _pack(path, root, tiles, mask_values, signature)
                store = _read_store(path, signature)
    if store is None:
        raise UserError(f"{path}: was changed by another program as soon as it was packed; run the command again")
    return store


def _signature(root: Path, tiles: Sequence[Tile], mask_values: Sequence[int]) -> str:
    digest = hashlib.sha256(repr(list(mask_values)).encode())
    for tile in tiles:
        for name in (tile.image, tile.mask):
            with reading(root / name):
                stat = (root / name).stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _read_store(path: Path, signature: str) -> Store | None:
    """The store, if it is whole, of today's format and of this signature; all from one open file.

    Another process may put a new store in its place at any time, whose pixels must not meet this one's header.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
            shape, sums = tuple(header["shape"]), tuple(header["sums"])
            size = HEADER_BYTES + math.prod(shape) + 8 * math.prod(sums)
            if (header["format"], header["signature"], file.seek(0, 2)) != (STORE_FORMAT, signature, size):
                return None
            file.seek(HEADER_BYTES + math.prod(shape))
            totals = np.frombuffer(file.read(), "<i8").reshape(sums)
            return Store(np.memmap(file, np.uint8, mode="r", offset=HEADER_BYTES, shape=shape), totals)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _pack(path: Path, root: Path, tiles: Sequence[Tile], mask_values: Sequence[int], signature: str) -> None:
    height, width = picture_size(root / tiles[0].image)
    sums = np.empty((len(tiles), 6 + len(mask_values)), "<i8")
    header = {"format": STORE_FORMAT, "shape": [len(tiles), height, width, 4], "sums": sums.shape,
              "signature": signature}
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(json.dumps(header).encode().ljust(HEADER_BYTES))
        with Progress("pack tiles", len(tiles), "tile") as progress:
            for i, tile in enumerate(tiles):
                image, mask = read_pair(root, tile, mask_values)
                if mask.shape != (height, width):
                    raise UserError(f"{root / tile.image}: {mask.shape[0]} x {mask.shape[1]} pixels, but "
                                    f"{root / tiles[0].image} has {height} x {width}; tiles must be of one size")
                file.write(np.dstack([image, mask]).tobytes())
                sums[i] = sums_of(image, mask, len(mask_values))
                progress.advance()
        file.write(sums.tobytes())


def sums_of(image: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    """(6 + K,) int64 of an image (H, W, 3) and its class indices (H, W): a row of `Store.sums`."""
    values = image.reshape(-1, 3).astype(np.uint32)
    return np.concatenate([values.sum(0, np.int64), (values * values).sum(0, np.int64),
                           np.bincount(mask.ravel(), minlength=classes)])


# ---------------------------------------------------------------------------------------------- statistics

@dataclass(frozen=True)
class Statistics:
    """What training learns about its tiles before it starts; travels in the checkpoint."""

    mean: list[float]  # of red, green, blue, in [0, 1]
    std: list[float]
    frequencies: list[float]  # share of the pixels of each class (section 6.1.1)

    def equals(self, other: "Statistics") -> bool:
        """Whether both are of the same tiles; another processor may round the last bit otherwise."""
        return all(np.allclose(ours, theirs, rtol=1e-9, atol=0) for ours, theirs in
                   zip(asdict(self).values(), asdict(other).values(), strict=True))


def statistics_of(sums: np.ndarray) -> Statistics:
    """Channel mean, standard deviation and class frequencies of the tiles whose `Store.sums` (n, 6 + K) are given."""
    total = [int(number) for number in sums.sum(axis=0)]  # exact, however many tiles there are
    values, squares, counts = total[:3], total[3:6], total[6:]
    pixels = sum(counts)
    variances = [(pixels * square - value**2) / (255 * pixels)**2 for value, square in
                 zip(values, squares, strict=True)]
    return Statistics([value / (255 * pixels) for value in values],
                      [math.sqrt(max(variance, 1e-12)) for variance in variances],
                      [count / pixels for count in counts])
