"""Tiles on disk: pairs of image and mask, groups and split, the list tiles.csv. Needs no torch.

    key      names a tile: what stands for {key}, {group} and wildcards in data.images and data.masks
    group    slide or patient of a tile: what stands for {group}, or what data.group finds in the key; no split and no
             fold cuts a group
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from common.config import Config, Data
from common.console import UserError, warn
from common.files import write_csv, write_text, writing
from common.patterns import Found, composed, fill, find_files, pictures_below, reject_outside
from common.randomness import generator
from common.store import Pair

TILE_LIST = "tiles.csv"
FILTER_FOLDER = "filter"  # beside the list: the report of the filter
NEW_MASKS = "repaired"  # beside the list: the masks that the filter made
WRITTEN = ".written.json"  # in that folder: which files the filter wrote
CACHE_NOTE = "data_root.txt"  # in data.cache: the data folder whose list lies there
SPLITS = ("train", "test")
DROPPED = ("unlabelled", "sparse", "misregistered", "unmarked", "shifted", "disputed", "duplicate", "corrupt",
           "excluded")  # by hand
GIVEN, REPAIRED, MODEL = "given", "repaired", "model"  # in `mask_from`; the last is followed by the name of a run


@dataclass(frozen=True)
class Tile:
    """A row of tiles.csv: a pair of files, the measurements of the filter, its verdict. Paths are below data.root.

    All measurements but `ignored` are of the given mask; its pixels without a class (data.ignore) are left out.
    """

    key: str
    image: str
    mask: str
    group: str = ""
    foreground: float | None = None  # share of the mask that is not background
    blank: float | None = None  # share of the annotated tissue where the image shows glass (Algorithm 1)
    unmarked: float | None = None  # share of the tile where the image shows tissue and the mask says background
    shift_x: float | None = None  # pixels by which the mask lies too far right, at the centre of the tile
    shift_y: float | None = None  # pixels by which the mask lies too low
    angle: float | None = None  # degrees by which the mask is turned clockwise
    shift: float | None = None  # pixels by which the corner of the mask lies off that lies farthest off
    confidence: float | None = None  # in this move, from 0 to 1
    quality: float | None = None  # of the labels, from 0 to 1, according to a model; so are the next ones
    disagreement: float | None = None  # share of the labelled pixels where the model is sure of another class
    model_shift_x: float | None = None
    model_shift_y: float | None = None
    model_angle: float | None = None
    model_shift: float | None = None
    model_confidence: float | None = None
    ignored: float | None = None  # share of the pixels of the filter's new mask that have no class
    mask_from: str = GIVEN  # the mask in use, which a person may edit: given, repaired, or model RUN
    proposed: str = ""  # the filter's verdict
    split: str = ""  # the verdict in force, which a person may edit: train, test, or why the tile is dropped
    by_hand: str = ""  # the verdict that a person had set when the filter ran last
    reason: str = ""  # why the tile is corrupt, which tile shows the same image, how the mask was repaired or why not
    note: str = ""  # written by a person
    digest: str = ""  # of the image's pixels, from which a run's training tiles are known again

    @property
    def has_new_mask(self) -> bool:
        return self.mask_from != GIVEN

    @property
    def is_relabelled(self) -> bool:
        return self.mask_from.startswith(MODEL)

    @property
    def new_mask(self) -> str:
        """Where a mask in place of the given one lies, below data.list_folder."""
        return f"{NEW_MASKS}/{self.key}.png"

    @property
    def pair(self) -> Pair:
        """The files in use."""
        return Pair(self.image, self.new_mask, True) if self.has_new_mask else self.given_pair

    @property
    def given_pair(self) -> Pair:
        return Pair(self.image, self.mask)

    @property
    def manual_verdict(self) -> str:
        """The verdict that a person set, or "". Setting `split` back to `proposed` takes it back."""
        if not self.proposed:  # no filter wrote this list
            return ""
        if self.split != self.proposed:
            return self.split
        # the filter may agree with the person; a verdict on a corrupt tile waits until the tile can be read
        return self.by_hand if self.proposed in (self.by_hand, "corrupt") else ""


def digest_of(image: np.ndarray) -> str:
    """Return the digest of an image (H, W, 3) uint8 in the list of tiles."""
    return hashlib.sha256(image).hexdigest()[:16]


MEASUREMENTS = tuple(f.name for f in fields(Tile) if f.type == float | None)


# ---------------------------------------------------------------------------------------------- pairs

def find_pairs(data: Data) -> list[Tile]:
    """Return every image with its mask, in the natural order of the keys (2 before 10).

    Warn about pictures in the same folders, or in folders below them, that fit no pattern.
    """
    root = Path(data.root)
    ours = [(data.list_folder / FILTER_FOLDER).resolve()]
    if (data.list_folder / NEW_MASKS / WRITTEN).exists():
        ours.append((data.list_folder / NEW_MASKS).resolve())
    skip = {path.relative_to(root.resolve()).as_posix() for path in ours if path.is_relative_to(root.resolve())}
    images, masks = _images_or_masks(*(find_files(root, pattern, skip) for pattern in (data.images, data.masks)), data)
    if not images and not masks:
        raise UserError(f"{root.resolve()}: no tiles found; expected {root / data.images} and {root / data.masks}. Set "
                        "data.root, data.images and data.masks, or make tiles to try: `python -m tools.make_demo_data "
                        "data/demo` (then add data.root=data/demo)")
    found_images, found_masks = by_key(root, images, "image"), by_key(root, masks, "mask")
    for found, partners, what, pattern in ((found_images, found_masks, "mask", data.masks),
                                           (found_masks, found_images, "image", data.images)):
        alone = [file for key, file in found.items() if key not in partners]
        if alone:
            raise UserError(f"{root / alone[0].path}: its {what} {root / fill(pattern, alone[0])} is missing "
                            f"({len(alone)} of {len(found)} files have no {what}); add it or remove the file")
    reject_outside(root, [file.path for file in (*images, *masks)])
    pictures = {path for pattern in (data.images, data.masks) for path in pictures_below(root, pattern, skip)}
    unused = sorted(pictures - {file.path for file in (*images, *masks)})
    if unused:
        warn(f"{root}: pictures that fit neither data.images ({data.images}) nor data.masks ({data.masks}) are left "
             f"out: {len(unused)}, for example {', '.join(unused[:3])}")
    return [Tile(key, found_images[key].path, found_masks[key].path,
                 found_images[key].group or group_of(key, data.group)) for key in sorted(found_images, key=_natural)]


def _images_or_masks(images: list[Found], masks: list[Found], data: Data) -> tuple[list[Found], list[Found]]:
    """Decide for the files that fit both patterns: the suffix counts, then the longer pattern."""
    as_image, as_mask = ({file.path: file.same_suffix for file in files} for files in (images, masks))
    not_images, not_masks = set(), set()
    same_stem = data.images.rpartition(".")[0] == data.masks.rpartition(".")[0]
    for path in as_image.keys() & as_mask.keys():
        if as_image[path] != as_mask[path]:
            (not_masks if as_image[path] else not_images).add(path)
        elif same_stem:
            raise UserError(f"{Path(data.root) / path}: fits both data.images and data.masks; save it with the suffix "
                            "of one of them, or choose patterns that tell images from masks")
        else:
            (not_images if len(data.images) < len(data.masks) else not_masks).add(path)  # {key}.png, {key}_mask.png
    return ([file for file in images if file.path not in not_images],
            [file for file in masks if file.path not in not_masks])


def by_key(root: Path, files: Iterable[Found], what: str) -> dict[str, Found]:
    """Return the files by their keys; raise a `UserError` if two have the same key."""
    found: dict[str, Found] = {}
    for file in files:
        other = found.setdefault(file.key, file)
        if other is not file:
            reason = (f"both are the {what} of a tile with the key '{file.key}'" if composed(other.path) !=
                      composed(file.path) else "the names differ only in how accents are written")
            raise UserError(f"{root / other.path} and {root / file.path}: {reason}; rename or remove one of the files")
    return found


def _natural(key: str) -> tuple[list[tuple[int, int, str]], str]:
    parts = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", key) if part]
    return parts, key  # the key itself decides between 1 and 01


# ---------------------------------------------------------------------------------------------- groups and split

def found_in(key: str, pattern: str) -> str:
    """Return the first group of a regular expression in the key, or without groups all that it finds; "" if nothing."""
    match = re.search(pattern, key)
    return (match and match[1 if match.re.groups else 0]) or ""


def group_of(key: str, pattern: str) -> str:
    """Return what `pattern` finds in the key: its first group in parentheses, else the whole match."""
    if not pattern:
        return ""
    group = found_in(key, pattern)
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
        advice = "add tiles"
        if len(tiles) > 1:
            advice = ("add tiles of another slide or patient, or leave out data.group and {group} to split single "
                      "tiles; tiles of one slide are then on both sides, which makes scores too high")
        raise UserError(f"a training and a test set need at least two groups (slides, patients), but the {len(tiles)} "
                        f"tiles that can be kept are of one: {advice}")
    chosen = set(test)
    return ["test" if i in chosen else "train" for i in range(len(tiles))]


def places_by_group(names: Sequence[str]) -> list[list[int]]:
    """Return the places of each name, in the order in which the names occur first."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    return list(places.values())


def warn_about_small_tiles(sizes: np.ndarray, config: Config) -> None:
    """Warn about tiles of these sizes (N, 2) that are smaller than a training crop."""
    crop, multiple, smallest = config.data.crop, config.model.multiple, int(sizes.min())
    small = np.count_nonzero(sizes.min(axis=1) < crop)
    if small:
        fitting = smallest // multiple * multiple
        advice = f"; with data.crop={fitting} none would be" if fitting >= 2 * multiple else ""
        warn(f"tiles smaller than data.crop={crop} on a side: {small} of {len(sizes)}. Training mirrors them at their "
             f"borders up to this size, and no loss counts the mirrored pixels{advice}")


# ---------------------------------------------------------------------------------------------- tiles.csv

def write_tiles(path: Path, tiles: Sequence[Tile]) -> None:
    """Write the list whole or not at all."""
    rows = [{name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(tile).items()}
            for tile in tiles]
    write_csv(path, rows, [f.name for f in fields(Tile)])


def read_tiles(data: Data) -> list[Tile]:
    """Read and check the list of tiles. It comes in the natural order of the keys, on which training depends."""
    check_list_folder(data)
    tiles = read_list(data.list_folder / TILE_LIST)
    reject_outside(Path(data.root), [path for tile in tiles for path in (tile.image, tile.mask)])
    return tiles


def check_list_folder(data: Data) -> None:
    """Raise a `UserError` if data.cache is a file or holds the list of another data folder."""
    note = data.list_folder / CACHE_NOTE
    if data.cache and data.list_folder.exists() and not data.list_folder.is_dir():
        raise UserError(f"data.cache={data.cache} is a file; give a folder")
    if data.cache and note.is_file():
        other = Path(note.read_text(encoding="utf-8").strip())
        if other.is_dir() and not (Path(data.root).is_dir() and other.samefile(data.root)):
            raise UserError(f"data.cache={data.cache} belongs to the tiles of {other}, but data.root is {data.root}; "
                            "give each data folder a cache of its own")


def make_list_folder(data: Data) -> None:
    with writing(data.list_folder):
        data.list_folder.mkdir(parents=True, exist_ok=True)


def claim_list_folder(data: Data) -> None:
    """Note in data.cache to which data folder it belongs. The caller must hold the folder's lock."""
    check_list_folder(data)
    if data.cache:
        write_text(data.list_folder / CACHE_NOTE, f"{Path(data.root).resolve()}\n")


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
    source = values.setdefault("mask_from", GIVEN) or GIVEN
    if source not in (GIVEN, REPAIRED) and not source.startswith(f"{MODEL} "):
        raise UserError(f"{where}: mask_from is '{source}'; expected {GIVEN}, {REPAIRED} or {MODEL} RUN")
    if source.startswith(MODEL) and values["split"] == "test":
        raise UserError(f"{where}: the labels of tile '{values['key']}' are predictions ({source}), which are no truth "
                        "to test on; set split to train or excluded")
    values["mask_from"] = source
    for name in MEASUREMENTS:
        try:  # some spreadsheets write 0,5
            values[name] = float(values[name].replace(",", ".")) if values.get(name) else None
        except ValueError:
            raise UserError(f"{where}: {name} must be a number or empty; it is '{values[name]}'") from None
    return Tile(**values)


def identity(tiles: Iterable[Tile], data: Data) -> str:
    """Return a sha256 of what a run depends on: key, files, group and split of the kept tiles, in any order.

    The contents of the filter's new masks count, too, since every run of the filter may change them.
    """
    kept = sorted((tile.key, tile.image, tile.mask, tile.group, tile.split, *_origin(tile, data))
                  for tile in tiles if tile.split in SPLITS)
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def _origin(tile: Tile, data: Data) -> list[str]:
    """Return where a new mask comes from, and the sha256 of its file; nothing for a given mask."""
    if not tile.has_new_mask:
        return []
    path = tile.pair.paths(data)[1]
    try:
        return [tile.mask_from, hashlib.sha256(path.read_bytes()).hexdigest()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run data_filter.py again") from None
