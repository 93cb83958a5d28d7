"""The packed store: all kept tiles, of any sizes, in one file that is mapped into memory.

The file holds a header, the pixels of the tiles one after another, their sizes, and their sums (common/statistics.py).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.config import MASK_SETTINGS, Data
from common.console import Progress, UserError
from common.files import LOCK, locked, remove_leftovers, replacing
from common.masks import read_mask
from common.pictures import read_image, reading
from common.statistics import sums_of

if TYPE_CHECKING:  # the filter does without torch
    from torch import Tensor

STORE = "tiles.u8"
FORMAT = "crc-unet tiles 3"
HEADER_BYTES = 4096  # one memory page, so that the pixels stay aligned


class Pair(NamedTuple):
    """The files of a tile: the image below data.root, and so the mask, unless it is a new one of the filter."""

    image: str
    mask: str
    is_new: bool = False  # the mask lies below data.list_folder and is read by data.of_new_masks

    def paths(self, data: Data) -> tuple[Path, Path]:
        return Path(data.root) / self.image, (data.list_folder if self.is_new else Path(data.root)) / self.mask


@dataclass(frozen=True)
class Store:
    """The pixels of N tiles, and sums over each tile from which the statistics of any selection follow at once."""

    pixels: "np.ndarray | Tensor"  # (P, 4) uint8: red, green, blue and class of all pixels, tile by tile, read-only
    sizes: np.ndarray  # (N, 2) int64: height and width
    sums: np.ndarray  # (N, 6 + K) int64: red, green, blue, their squares, pixels of each class

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def starts(self) -> np.ndarray:
        """The first pixel of each tile, and behind them the number of all pixels, (N + 1,) int64."""
        return np.concatenate([[0], np.cumsum(self.sizes.prod(axis=1))])

    def tile(self, i: int) -> np.ndarray:
        """Return a tile (H, W, 4), which is not copied."""
        return self.pixels[self.starts[i]:self.starts[i + 1]].reshape(*self.sizes[i], 4)

    def counts(self, rows: Sequence[int]) -> np.ndarray:
        """Return the pixels of each class in some tiles (n, K)."""
        return self.sums[rows, 6:]


def open_store(pairs: Sequence[Pair], data: Data) -> Store:
    """Map the tiles of tiles.u8 into memory. Pack the file first if it is absent or stale.

    It is stale if its format, the list, its order, how masks are read, or the size or time of a file has changed.
    """
    folder = data.list_folder
    path, signature = folder / STORE, _signature(pairs, data)
    store = _read_store(path, signature)
    if store is None:
        busy = f"{folder}: another process packs {STORE} or writes the list of tiles"
        with locked(folder / LOCK, path, busy, wait=True):
            remove_leftovers(folder, STORE)
            store = _read_store(path, signature)  # another process may have packed it meanwhile
            if store is None:
                _pack(path, pairs, data, signature)
                store = _read_store(path, signature)
    if store is None:
        raise UserError(f"{path}: another program changed it as soon as it was packed; run the command again")
    return store


def _signature(pairs: Sequence[Pair], data: Data) -> str:
    settings = [getattr(data, name) for name in ("classes", *MASK_SETTINGS)]
    digest = hashlib.sha256(repr(settings).encode())
    for pair in pairs:
        for name, path in zip(pair[:2], pair.paths(data), strict=True):
            with reading(path):
                stat = path.stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _read_store(path: Path, signature: str) -> Store | None:
    """Return the store, or None if the file is not whole or has another format or signature.

    Everything is read from one open file, because another process may replace the store between two calls of `open`.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
            tiles, pixels, columns = header["tiles"], header["pixels"], header["columns"]
            size = HEADER_BYTES + 4 * pixels + 8 * tiles * (2 + columns)
            if (header["format"], header["signature"], file.seek(0, 2)) != (FORMAT, signature, size):
                return None
            file.seek(HEADER_BYTES + 4 * pixels)
            table = np.frombuffer(file.read(), "<i8").astype(np.int64)
            return Store(np.memmap(file, np.uint8, mode="r", offset=HEADER_BYTES, shape=(pixels, 4)),
                         table[:2 * tiles].reshape(tiles, 2), table[2 * tiles:].reshape(tiles, columns))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _pack(path: Path, pairs: Sequence[Pair], data: Data, signature: str) -> None:
    """Write header, pixels, sizes and sums of the tiles into one file."""
    sizes, sums = np.empty((len(pairs), 2), "<i8"), np.empty((len(pairs), 6 + len(data.classes)), "<i8")
    with (replacing(path) as temporary, temporary.open("wb") as file,
          Progress("pack tiles", len(pairs), "tile") as progress):
        file.write(bytes(HEADER_BYTES))
        for i, pair in enumerate(pairs):
            image, labels = read_pair(pair, data)
            file.write(np.dstack([image, labels]).tobytes())
            sizes[i], sums[i] = labels.shape, sums_of(image, labels, len(data.classes))
            progress.advance()
        file.write(sizes.tobytes() + sums.tobytes())
        header = {"format": FORMAT, "signature": signature, "tiles": len(pairs), "columns": sums.shape[1],
                  "pixels": int(sizes.prod(axis=1).sum())}
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(HEADER_BYTES))


def read_pair(pair: Pair, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Return image (H, W, 3) and classes (H, W), both uint8 and of one size."""
    image_path, mask_path = pair.paths(data)
    image, labels = read_image(image_path), (read_new_mask if pair.is_new else read_mask)(mask_path, data)
    reject_different_sizes(pair, data, image.shape[:2], labels.shape)
    return image, labels


def read_new_mask(path: Path, data: Data) -> np.ndarray:
    """Return (H, W) uint8 of a mask in place of a given one: its values are classes, 255 is IGNORE."""
    try:
        return read_mask(path, data.of_new_masks)
    except UserError as error:
        problem = re.split("; fix|, but data", str(error))[0]  # the rest is about settings of given masks
        raise UserError(f"{problem}. A mask in {path.parent.name}/ is grey or has a palette, and holds the index of a "
                        f"class, 0 to {len(data.classes) - 1}, or 255 for none. Fix it, or delete it and run "
                        "data_filter.py again") from None


def reject_different_sizes(pair: Pair, data: Data, image: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """Raise a `UserError` unless the sizes (height, width) of a tile's image and mask agree."""
    if image != mask:
        image_path, mask_path = pair.paths(data)
        raise UserError(f"{mask_path}: the mask is {mask[0]} x {mask[1]} pixels (height x width), its image "
                        f"{image_path} is {image[0]} x {image[1]}; they must agree")
