"""The folder DATA/repaired/ with the masks that take the place of given ones: KEY.png for each tile.

A file is a palette image: the index of a class, 255 for pixels without one. A person may edit the files or add some.
Files that the filter did not write are never changed; `.written.json` tells them from its own, by their sha256.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.config import Data
from common.console import UserError
from common.files import replacing, write_text, writing
from common.masks import IGNORE, colour_codes, name_of, read_mask_file
from common.palette import IGNORED, class_colours, rgb
from common.patterns import SUFFIXES
from common.pictures import encoded
from dataset import NEW_MASKS, WRITTEN, Tile


def encode(labels: np.ndarray, classes: int) -> bytes:
    """Return the file of a mask (H, W) uint8 of classes or IGNORE."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:classes], colours[IGNORE] = class_colours(classes), rgb(IGNORED)
    picture = Image.fromarray(labels).convert("P")
    picture.putpalette(colours.tobytes())
    return encoded(picture, "PNG")


def made_by_hand(tiles: Sequence[Tile], data: Data) -> set[str]:
    """Return the keys of the tiles whose file in the folder the filter did not write."""
    folder = data.list_folder / NEW_MASKS
    if not folder.is_dir():
        return set()
    if any(path.resolve().is_relative_to(folder.resolve()) for tile in tiles for path in tile.given_pair.paths(data)):
        raise UserError(f"{folder}: holds tiles, but the filter writes its own masks there; rename the folder")
    written = _read_manifest(folder)
    keys = {f"{tile.key}.png": tile.key for tile in tiles}
    return {keys[path.name] for path in folder.iterdir() if path.name in keys and not _is_ours(path, written)}


def without_tile(tiles: Sequence[Tile], data: Data) -> list[str]:
    """Return the names of the pictures in the folder that are the mask of no tile."""
    folder = data.list_folder / NEW_MASKS
    known = {f"{tile.key}.png" for tile in tiles}
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(name for name in names
                  if name not in known and name[0] != "." and Path(name).suffix.lower() in SUFFIXES)


def reject_other_order(tile: Tile, data: Data) -> None:
    """Raise a `UserError` if a program has put the colours of a new mask into another order, which changes classes.

    Some programs do so when they save a picture with a palette. Palettes of other colours say nothing.
    """
    path = data.list_folder / tile.new_mask
    file = read_mask_file(path, data.of_new_masks)
    if not file.palette:
        return
    ours = colour_codes(np.stack([*class_colours(len(data.classes)), rgb(IGNORED)])).tolist()
    indices = [*range(len(data.classes)), IGNORE]
    for index in np.unique(file.codes).tolist():
        colour = file.palette[index]
        if colour in ours and colour != ours[indices.index(index)]:
            right = indices[ours.index(colour)]
            raise UserError(f"{path}: the colour {name_of(colour)} stands for {right}, but has the index {index} in "
                            "this file. The program that saved it has changed the order of the colours. Save the mask "
                            "as a grey image that holds the index of a class, or 255 for none")


def decode(contents: bytes) -> np.ndarray:
    """Return the mask (H, W) uint8 of a file of the filter."""
    return np.asarray(Image.open(io.BytesIO(contents)))


def write(masks: Mapping[str, bytes], data: Data) -> None:
    """Write the files of masks, by the keys of their tiles.

    The manifest comes first, so that a file of a run that is killed does not pass for a person's. Files that stay the
    same are not touched, so that the packed store stays valid.
    """
    folder = data.list_folder / NEW_MASKS
    if not masks:
        return
    with writing(folder):
        folder.mkdir(exist_ok=True)
    digests = _read_manifest(folder)
    for key, contents in masks.items():
        digests.setdefault(f"{key}.png", []).append(hashlib.sha256(contents).hexdigest())
    _write_manifest(folder, digests)
    for key, contents in masks.items():
        path = folder / f"{key}.png"
        if not path.is_file() or (path.read_bytes() != contents and _is_ours(path, digests)):
            with replacing(path) as temporary:
                temporary.write_bytes(contents)


def remove_others(masks: Mapping[str, bytes], data: Data) -> None:
    """Remove the files of earlier runs of the filter, but not those that a person edited."""
    folder = data.list_folder / NEW_MASKS
    if not folder.is_dir():
        return
    written = _read_manifest(folder)
    if not written and not masks:
        return
    for name in written.keys() - {f"{key}.png" for key in masks}:
        path = folder / name
        if path.is_file() and _is_ours(path, written):
            with writing(path):
                path.unlink()
    edited = {name: digests for name, digests in written.items() if (folder / name).is_file()}
    ours = {f"{key}.png": [hashlib.sha256(contents).hexdigest()] for key, contents in masks.items()}
    _write_manifest(folder, edited | ours)


def _is_ours(path: Path, written: Mapping[str, list[str]]) -> bool:
    """Return whether the filter wrote what the file holds."""
    return hashlib.sha256(path.read_bytes()).hexdigest() in written.get(path.name, ())


def _read_manifest(folder: Path) -> dict[str, list[str]]:
    try:
        contents = json.loads((folder / WRITTEN).read_text(encoding="utf-8"))
        return {name: list(digests) for name, digests in contents.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write_manifest(folder: Path, digests: Mapping[str, list[str]]) -> None:
    write_text(folder / WRITTEN, json.dumps(digests, indent=1, sort_keys=True) + "\n")
