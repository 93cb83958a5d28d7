"""From tiles on disk to batches: pairs, masks, the cleaned list, splits, the packed store, folds and crops.

    key      what names a tile: the part of its file name that stands for {key} in data.images and data.masks
    group    slide or patient of a tile, found in its key by data.group; groups are never cut by a split or a fold
    store    tiles.u8, all kept tiles as (N, H, W, 4) uint8: red, green, blue and class, mapped into memory

ALL randomness is a function of seed, epoch, fold and a tile's place in the fold: every draw has a generator of its own,
made from these keys.
"""

import csv
import hashlib
import io
import json
import math
import re
import struct
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from common.console import Progress, UserError
from common.files import LOCK, locked, remove_leftovers, replacing

if TYPE_CHECKING:  # the filter and its worker processes need no torch, whose import takes seconds
    import torch
    from torch import Tensor

TILE_LIST = "tiles.csv"
STORE = "tiles.u8"
LOSSLESS = ("PNG", "TIFF", "BMP")  # formats of masks
SPLITS = ("train", "test")
DROPPED = ("sparse", "misregistered", "unmarked", "shifted", "duplicate", "corrupt", "excluded")  # the last: by hand
MAX_PIXELS = 64_000_000  # larger headers are refused before anything is decoded: a small file can hold a huge image
ORIENTATION = 0x0112  # the EXIF tag
STORE_FORMAT = "crc-unet tiles 2"
HEADER_BYTES = 4096  # of the store; one page, so that the pixels stay aligned
_pillows_limit = threading.Lock()


def generator(seed: int, epoch: int, fold: int, purpose: str) -> np.random.Generator:
    """A generator that depends on its keys alone, so that order, workers and restarts change nothing."""
    return np.random.default_rng(_entropy(seed, epoch, fold, purpose))


def torch_seed(seed: int, epoch: int, fold: int, purpose: str) -> int:
    """The same for `torch.manual_seed`: dropout and initial weights."""
    return int(np.random.SeedSequence(_entropy(seed, epoch, fold, purpose)).generate_state(1, np.uint64)[0] >> 1)


def _entropy(seed: int, epoch: int, fold: int, purpose: str) -> list[int]:
    return [seed, epoch, fold, int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")]


# ---------------------------------------------------------------------------------------------- files of a tile

@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever Pillow raises on a file, in one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; restore it, or run data_filter.py again") from None
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, struct.error) as error:
        raise UserError(f"{path}: not a readable image ({error}); replace or remove it") from None


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture with its header read and nothing decoded; the caller checks its size."""
    with _explained(path):
        with _pillows_limit:  # a global of Pillow, which its `open` alone looks at
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                picture = Image.open(path)
            finally:
                Image.MAX_IMAGE_PIXELS = before
        with picture:
            yield picture


def open_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture of at most `max_pixels` pixels and 8 bits a channel."""
    with _opened(path) as picture:
        if picture.width * picture.height > max_pixels:
            raise UserError(f"{path}: {picture.width} x {picture.height} pixels are more than fit here "
                            f"({max_pixels:,}); cut it into tiles")
        if picture.tile and "16" in str(np.ravel(picture.tile[0][3])[0]):  # Pillow would cut RGB to 8 bits unasked
            raise UserError(f"{path}: 16 bits a channel; expected 8. Convert it to 8 bits")
        if getattr(picture, "n_frames", 1) > 1 or picture.getexif().get(ORIENTATION, 1) != 1:
            raise UserError(f"{path}: several pages, or a rotation flag (EXIF) that some programs follow and some do "
                            "not; save it as a plain PNG")
        picture.load()
        return picture


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header alone."""
    with _opened(path) as picture:
        return picture.height, picture.width


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(H, W, 3) uint8. RGB and opaque RGBA are read exactly, every other mode is refused."""
    picture = open_picture(path, max_pixels)
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (255, 255):
        picture = picture.convert("RGB")
    if picture.mode != "RGB":
        raise UserError(f"{path}: an image must be 8-bit RGB, this one has mode {picture.mode}; convert it to RGB")
    return np.asarray(picture)


def read_greys(path: Path) -> np.ndarray:
    """(H, W) uint8, the values of a mask as they stand in its file.

    Grey and RGB with three equal channels are read exactly. A palette is refused, since its indices and its colours
    are both candidates, and so are JPEG and other formats that smear labels.
    """
    picture = open_picture(path)
    if picture.format not in LOSSLESS or picture.info.get("compression") == "jpeg":
        raise UserError(f"{path}: {picture.format} may change the values of a mask; save masks as PNG")
    if picture.mode not in ("L", "RGB"):
        raise UserError(f"{path}: a mask must be 8-bit grey, this one has mode {picture.mode}; convert it so that "
                        "every pixel is one of data.greys")
    mask = np.asarray(picture)
    if mask.ndim == 3:
        if (mask != mask[..., :1]).any():
            raise UserError(f"{path}: a mask must be grey, this one is coloured; convert it so that every pixel is "
                            "one of data.greys")
        mask = mask[..., 0]
    return mask


def count_classes(path: Path, counts: np.ndarray, greys: Sequence[int]) -> np.ndarray:
    """Pixels of each class (K,) from those of each grey (256,); a grey that is not in `greys` is an error."""
    unknown = np.setdiff1d(np.flatnonzero(counts), greys)
    if unknown.size:
        found = ", ".join(f"{value} ({counts[value]} pixel{'s' if counts[value] > 1 else ''})" for value in unknown[:5])
        raise UserError(f"{path}: grey {found}{', …' if unknown.size > 5 else ''} is none of data.greys {list(greys)}; "
                        "fix the mask or set data.greys and data.classes")
    return counts[list(greys)]


def read_mask(path: Path, greys: Sequence[int]) -> np.ndarray:
    """(H, W) uint8 class indices; class k is the grey `greys[k]`, and any other grey is an error."""
    mask = read_greys(path)
    lookup = np.full(256, 255, np.uint8)
    lookup[list(greys)] = np.arange(len(greys))
    labels = lookup[mask]
    if labels.max() == 255:
        count_classes(path, np.bincount(mask.ravel(), minlength=256), greys)
    return labels


def refuse_different_sizes(root: Path, tile: "Tile", image: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """The sizes are (height, width)."""
    if image != mask:
        raise UserError(f"{root / tile.mask}: the mask is {mask[0]} x {mask[1]} pixels (height x width), its image "
                        f"{root / tile.image} is {image[0]} x {image[1]}; they must agree")


def read_pair(root: Path, tile: "Tile", greys: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) and class indices (H, W), both uint8 and of one size."""
    image, mask = read_image(root / tile.image), read_mask(root / tile.mask, greys)
    refuse_different_sizes(root, tile, image.shape[:2], mask.shape)
    return image, mask


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
    refuse_outside(root, [*found_images.values(), *found_masks.values()])
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


def refuse_outside(root: Path, paths: Iterable[str]) -> None:
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
    groups = _tiles_by_group([tile.group or f"tile {i}" for i, tile in enumerate(tiles)])
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


def _tiles_by_group(names: Sequence[str]) -> list[list[int]]:
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    return list(members.values())


def write_tiles(path: Path, tiles: Sequence[Tile]) -> None:
    """Write the list whole or not at all."""
    names = [f.name for f in fields(Tile)]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for tile in tiles:
            writer.writerow({name: "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
                             for name, value in asdict(tile).items()})


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
    refuse_outside(root, [path for tile in tiles for path in (tile.image, tile.mask)])
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


# ---------------------------------------------------------------------------------------------- the packed store

@dataclass(frozen=True)
class Store:
    """The packed tiles, and sums over each of them, from which the statistics of any selection follow at once."""

    pixels: np.memmap  # (N, H, W, 4) uint8, read-only: red, green, blue and class
    sums: np.ndarray  # (N, 6 + K) int64: red, green, blue, their squares, pixels of each class


def open_store(root: Path, tiles: Sequence[Tile], greys: Sequence[int]) -> Store:
    """The tiles mapped into memory from tiles.u8, which is packed anew where it is absent or stale.

    Stale means: another list, order, file size, modification time or greys than when it was packed, or packed in
    another format.
    """
    path = root / STORE
    signature = _signature(root, tiles, greys)
    store = _read_store(path, signature)
    if store is None:
        busy = f"{root}: another process packs {STORE} or writes {TILE_LIST}"
        with locked(root / LOCK, path, busy, wait=True):
            remove_leftovers(root, STORE)
            store = _read_store(path, signature)  # another process may have packed meanwhile
            if store is None:
                _pack(path, root, tiles, greys, signature)
                store = _read_store(path, signature)
    if store is None:
        raise UserError(f"{path}: was changed by another program as soon as it was packed; run the command again")
    return store


def _signature(root: Path, tiles: Sequence[Tile], greys: Sequence[int]) -> str:
    digest = hashlib.sha256(repr(list(greys)).encode())
    for tile in tiles:
        for name in (tile.image, tile.mask):
            with _explained(root / name):
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


def _pack(path: Path, root: Path, tiles: Sequence[Tile], greys: Sequence[int], signature: str) -> None:
    height, width = picture_size(root / tiles[0].image)
    sums = np.empty((len(tiles), 6 + len(greys)), "<i8")
    header = {"format": STORE_FORMAT, "shape": [len(tiles), height, width, 4], "sums": sums.shape,
              "signature": signature}
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(json.dumps(header).encode().ljust(HEADER_BYTES))
        with Progress("pack tiles", len(tiles), "tile") as progress:
            for i, tile in enumerate(tiles):
                image, mask = read_pair(root, tile, greys)
                if mask.shape != (height, width):
                    raise UserError(f"{root / tile.image}: {mask.shape[0]} x {mask.shape[1]} pixels, but "
                                    f"{root / tiles[0].image} has {height} x {width}; tiles must be of one size")
                file.write(np.dstack([image, mask]).tobytes())
                sums[i] = sums_of(image, mask, len(greys))
                progress.advance()
        file.write(sums.tobytes())


def sums_of(image: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    """(6 + K,) int64 of an image (H, W, 3) and its class indices (H, W): a row of `Store.sums`."""
    values = image.reshape(-1, 3).astype(np.uint32)
    return np.concatenate([values.sum(0, np.int64), (values * values).sum(0, np.int64),
                           np.bincount(mask.ravel(), minlength=classes)])


# ---------------------------------------------------------------------------------------------- the training set

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


def measure(sums: np.ndarray) -> Statistics:
    """Channel mean, standard deviation and class frequencies of the tiles whose `Store.sums` (n, 6 + K) are given."""
    total = [int(number) for number in sums.sum(axis=0)]  # exact, however many tiles there are
    values, squares, counts = total[:3], total[3:6], total[6:]
    pixels = sum(counts)
    variances = [(pixels * square - value**2) / (255 * pixels)**2 for value, square in
                 zip(values, squares, strict=True)]
    return Statistics([value / (255 * pixels) for value in values],
                      [math.sqrt(max(variance, 1e-12)) for variance in variances],
                      [count / pixels for count in counts])


def normalise(pixels: "Tensor", statistics: Statistics) -> "Tensor":
    """Images (B, H, W, 3) uint8 to the network's input (B, 3, H, W) in the device's memory layout (section 5.1.1)."""
    from common.devices import memory_format

    shares = pixels / 255
    mean, std = _constants(*map(tuple, (statistics.mean, statistics.std)), shares.dtype, shares.device)
    return ((shares - mean) / std).movedim(-1, 1).contiguous(memory_format=memory_format(pixels.device))


@lru_cache(maxsize=16)
def _constants(mean: tuple, std: tuple, dtype: "torch.dtype", device: "torch.device") -> "tuple[Tensor, Tensor]":
    """Made once: a GPU would have to wait for every copy."""
    import torch

    return torch.tensor(mean, dtype=dtype, device=device), torch.tensor(std, dtype=dtype, device=device)


def draw_folds(groups: Sequence[str], folds: int, images_per_epoch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """`folds` arrays of `images_per_epoch / folds` row numbers each; no group is in two of them (section 5.1.2).

    The groups ("" = the tile alone) are dealt in random order, each to the fold with the fewest tiles. A fold with
    more tiles than it needs takes a random part of them; one with fewer repeats them, which gives them other crops.
    """
    members = _tiles_by_group([group or f"tile {i}" for i, group in enumerate(groups)])
    if len(members) < folds:
        raise UserError(f"{len(groups)} training tiles of {len(members)} groups cannot fill {folds} folds without "
                        f"cutting a group: set train.folds to at most {len(members)}, or add slides or patients")
    random = generator(seed, epoch, 0, "folds")
    dealt: list[list[int]] = [[] for _ in range(folds)]
    for i in random.permutation(len(members)):
        min(dealt, key=len).extend(members[i])
    return [np.resize(random.permutation(rows), images_per_epoch // folds) for rows in dealt]


@dataclass(frozen=True)
class Crops:
    """Windows into the store, one for each image that passes through the network; all arrays (n,)."""

    rows: np.ndarray
    top: np.ndarray
    left: np.ndarray
    flip_vertical: np.ndarray  # upside down
    flip_horizontal: np.ndarray  # left and right swapped
    size: int

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, store: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """(B, size, size, 4) uint8 batches in order; the last one may be smaller."""
        for part in self._parts(batch_size):
            batch = np.empty((len(part), self.size, self.size, 4), np.uint8)
            self.cut(store, part, batch)
            yield batch

    def cut(self, store: np.ndarray, part: range, batch: np.ndarray) -> None:
        """Fill a batch (B, size, size, 4) uint8 with the crops `part`."""
        pixels = store.view(np.uint32)[..., 0]  # (N, H, W): one number is copied faster than four
        for target, i in zip(batch.view(np.uint32)[..., 0], part, strict=True):
            top, left = self.top[i], self.left[i]
            window = pixels[self.rows[i], top:top + self.size, left:left + self.size]
            step = (-1 if self.flip_vertical[i] else 1), (-1 if self.flip_horizontal[i] else 1)
            target[:] = window[::step[0], ::step[1]]

    def batches_on(self, device: "torch.device", store: "np.ndarray | Tensor", batch_size: int) -> "Iterator[Tensor]":
        """The same batches on a device: made there where the store lies there, else copied without waiting."""
        import torch

        if isinstance(store, torch.Tensor):
            yield from self._gather(store, batch_size)
            return
        page_locked = device.type == "cuda"  # memory that a GPU copies from by itself; torch keeps it until it has
        for part in self._parts(batch_size):
            batch = torch.empty((len(part), self.size, self.size, 4), dtype=torch.uint8, pin_memory=page_locked)
            self.cut(store, part, batch.numpy())
            yield batch.to(device, non_blocking=page_locked)

    def _gather(self, store: "Tensor", batch_size: int) -> "Iterator[Tensor]":
        import torch

        def lines(first: np.ndarray, flip: np.ndarray) -> "Tensor":                  # (n, size) of the tile
            line = np.arange(self.size)
            return torch.from_numpy(first[:, None] + np.where(flip[:, None], line[::-1], line)).to(store.device)

        pixels = store.view(torch.int32)[..., 0]                                     # (N, H, W)
        rows = torch.from_numpy(self.rows).to(store.device)[:, None, None]
        y, x = lines(self.top, self.flip_vertical)[:, :, None], lines(self.left, self.flip_horizontal)[:, None]
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield pixels[rows[part], y[part], x[part]][..., None].view(torch.uint8)

    def _parts(self, batch_size: int) -> list[range]:
        return [range(len(self))[start:start + batch_size] for start in range(0, len(self), batch_size)]


def store_on(device: "torch.device", store: np.ndarray) -> "np.ndarray | Tensor":
    """The store on a GPU where a quarter of its free memory holds it; else the memory-mapped one as it is."""
    import torch

    if device.type != "cuda" or 4 * store.nbytes > torch.cuda.mem_get_info(device)[0]:
        return store
    return copied_to(device, store)


def copied_to(device: "torch.device", store: np.ndarray, at_once: int = 64) -> "Tensor":
    """(N, H, W, 4) uint8 on a device, some tiles at a time."""
    import torch

    copy = torch.empty(store.shape, dtype=torch.uint8, device=device)
    with Progress("copy tiles to the GPU", len(store), "tile") as progress:
        for start in range(0, len(store), at_once):
            tiles = np.array(store[start:start + at_once])
            copy[start:start + at_once] = torch.from_numpy(tiles)
            progress.advance(len(tiles))
    return copy


def training_crops(folds: Sequence[np.ndarray], fold: int, tile_size: tuple[int, int], size: int,
                   seed: int, epoch: int) -> Crops:
    """All folds but `fold`, shuffled, with random windows and independent flips (section 5.1.1)."""
    random = generator(seed, epoch, fold, "training crops")
    rows = random.permutation(np.concatenate([rows for i, rows in enumerate(folds) if i != fold]))
    top, left = _windows(random, len(rows), tile_size, size)
    flips = random.random((2, len(rows))) < 0.5
    return Crops(rows, top, left, flips[0], flips[1], size)


def validation_crops(folds: Sequence[np.ndarray], fold: int, tile_size: tuple[int, int], size: int,
                     seed: int, epoch: int) -> Crops:
    """The fold itself: one random window an image, no flips."""
    top, left = _windows(generator(seed, epoch, fold, "validation crops"), len(folds[fold]), tile_size, size)
    upright = np.zeros(len(folds[fold]), bool)
    return Crops(folds[fold], top, left, upright, upright, size)


def _windows(random: np.random.Generator, count: int, tile_size: tuple[int, int],
             size: int) -> tuple[np.ndarray, np.ndarray]:
    height, width = tile_size
    return random.integers(0, height - size + 1, count), random.integers(0, width - size + 1, count)
