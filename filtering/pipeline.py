"""Run all tiles of a folder through the filter: check the masks, measure the images, split what is kept."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from common.config import Config, Data, Filter
from common.console import Progress, UserError
from common.masks import COLOUR, IGNORE, count_classes, count_codes, name_of, read_mask_file
from common.pictures import picture_size
from common.store import read_pair, reject_different_sizes
from common.workers import ParallelMap, worker_map, workers_for
from dataset import MODEL, REPAIRED, SPLITS, Tile, digest_of, find_pairs, places_by_group, split_by_group
from filtering import audit, manual_edits
from filtering.new_masks import encode, made_by_hand, reject_other_order
from filtering.repair import NewMask, relabel, repair

SHOWN = 8  # codes in a message, if there are more than MOST_LISTED
MOST_LISTED = 20  # with more codes, masks are taken to be smooth or smeared
REPAIRABLE = ("misregistered", "unmarked", "shifted", "disputed")
BY_HAND = "mask made or edited by hand"  # the reason of a tile
MOST_CODES = 256  # that are kept of one mask: a photograph has many thousands


@dataclass(frozen=True)
class FilterResult:
    """All tiles with their verdicts, and what the masks hold."""

    tiles: list[Tile]
    sizes: np.ndarray  # (N, 2) height and width; zeros for a tile that cannot be read
    pixels: np.ndarray  # (N, K) of each class in the mask in use; zeros once a tile is known to be corrupt
    codes: Counter[int]  # pixels of each code (common/masks.py) in all masks
    palette: dict[int, int] = field(default_factory=dict)  # the colour of each index that masks use
    contradiction: str = ""  # an index to which two masks give different colours
    copies: list[list[str]] = field(default_factory=list)  # keys that show the same image
    new_masks: dict[str, bytes] = field(default_factory=dict)  # by key, the files of masks that the filter made
    by_hand: frozenset[str] = frozenset()  # keys of the tiles whose new mask a person made or edited
    refused: frozenset[str] = frozenset()  # keys of those that are not used, because a person keeps the given mask

    @property
    def kept(self) -> list[int]:
        return [i for i, tile in enumerate(self.tiles) if tile.split in SPLITS]


class Model(Protocol):
    """Trained networks that are asked about tiles from which they have not learned."""

    def ask(self, tile: Tile) -> tuple[str, np.ndarray] | None:
        """Return the name of a model and its probabilities (H, W, K) uint8, 255 for 1; None if the image is unreadable.
        """


class Job(NamedTuple):
    """A tile to judge, and what a person decided about its mask."""

    tile: Tile
    made_by_hand: bool  # a person made or edited its new mask
    refused: bool  # a person wants the given mask
    model: str = ""  # the name of the model that was asked
    probs: np.ndarray | None = None  # (H, W, K) uint8, its probabilities, 255 for 1


class WithPredictions(Sequence):
    """Jobs with what a model says, which is computed only when they are taken."""

    def __init__(self, jobs: Sequence[Job], model: Model):
        self.jobs, self.model = jobs, model

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, which: int | slice) -> Job | list[Job]:
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(len(self)))]
        name, probs = self.model.ask(self.jobs[which].tile) or ("", None)
        return self.jobs[which]._replace(model=name, probs=probs)


def filter_tiles(config: Config, workers: int | None = None, before: Sequence[Tile] = (),
                 announce: Callable[[FilterResult], None] = lambda surveyed: None,
                 load_model: Callable[[Sequence[Tile]], Model | None] = lambda tiles: None) -> FilterResult:
    """Measure and judge every tile of data.root, and make new masks if the limits say so.

    What a person set in the list `before` stays in force. `announce` gets what the masks show, before any image is
    decoded. By default few tiles get few workers. `load_model` gets the tiles that were found; the model that it
    returns, if any, is asked about every tile that can be read.
    """
    data = config.data
    tiles = find_pairs(data)
    reject_unknown_groups(tiles, data)
    model = load_model(tiles)
    by_hand = frozenset(made_by_hand(tiles, data))
    refused = manual_edits.refused_masks(tiles, before)
    with worker_map(workers or workers_for(len(tiles))) as parallel_map:
        surveyed = survey_masks(tiles, config, parallel_map)
        announce(surveyed)
        tiles = list(surveyed.tiles)
        in_use = by_hand if config.filter.makes_masks else frozenset()
        undecided = [i for i, tile in enumerate(tiles) if not tile.proposed or (tile.proposed == "sparse" and model)
                     or (tile.key in in_use and tile.proposed != "corrupt")]
        jobs = [Job(tiles[i], tiles[i].key in in_use, tiles[i].key in refused) for i in undecided]
        asked = WithPredictions(jobs, model) if model else jobs
        results: dict[int, Audited] = {}
        with Progress("judge images", len(undecided), "tile") as progress:
            for i, result in zip(undecided, parallel_map(partial(audit_tile, data, config.filter), asked), strict=True):
                results[i], tiles[i] = result, result.tile
                progress.advance()
    drop = config.filter.drop_duplicates
    tiles, copies = mark_copies(tiles, drop)
    tiles = propose_split(tiles, data, config.seed)
    sides = {}
    if model:
        alone = manual_edits.apply_manual_edits(tiles, before)
        sides = dict.fromkeys(data.test_groups, "test") | manual_edits.sides(alone)
        tiles = with_model(tiles, alone, sides, results)
        tiles, _ = mark_copies(tiles, drop)
    tiles = manual_edits.apply_manual_edits(tiles, before, sides)
    new_masks = {}
    for i, result in results.items():
        if tiles[i].has_new_mask:
            surveyed.pixels[i] = result.pixels
            if result.new_mask:
                new_masks[tiles[i].key] = result.new_mask
    surveyed.pixels[[tile.proposed == "corrupt" for tile in tiles]] = 0
    return replace(surveyed, tiles=tiles, copies=copies, new_masks=new_masks, by_hand=by_hand - refused,
                   refused=by_hand & refused)


def with_model(tiles: Sequence[Tile], alone: Sequence[Tile], sides: Mapping[str, str],
               results: dict[int, "Audited"]) -> list[Tile]:
    """Return the tiles as the model judges them, but those on the test side as their images alone do.

    A model must not choose what it is tested on: with or without it, the test set is the same. `alone` are the tiles
    and `sides` their groups without the model, with what a person said. `results` are changed to those that count.
    """
    judged = list(tiles)
    for i, result in results.items():
        if result.asked and "test" not in (alone[i].split, sides.get(alone[i].group)):
            results[i], tile = result.asked, result.asked.tile
            judged[i] = replace(tile, proposed=tile.proposed or "train")
    return judged


def reject_unknown_groups(tiles: Sequence[Tile], data: Data) -> None:
    """Raise a `UserError` if data.test_groups names a group without tiles."""
    groups = list(dict.fromkeys(tile.group for tile in tiles if tile.group))
    unknown = [name for name in data.test_groups if name not in groups]
    if unknown:
        there = f"the groups are {', '.join(groups[:SHOWN])}{' …' if len(groups) > SHOWN else ''}" if groups else (
            "no tile has a group: set data.group or use {group} in data.images")
        raise UserError(f"data.test_groups: no tile is of {', '.join(unknown)}; {there}")


def survey_masks(tiles: Sequence[Tile], config: Config, parallel_map: ParallelMap) -> FilterResult:
    """Measure the foreground of each tile, and propose a verdict where the masks alone show it.

    Raise a `UserError` if most masks hold unknown values or colours, since then the config is wrong.
    """
    data, surveyed, unknown = config.data, [], 0
    pixels, sizes = np.zeros((len(tiles), len(data.classes)), np.int64), np.zeros((len(tiles), 2), np.int64)
    totals, masks = Counter(), Counter()  # of each code: pixels, masks that hold it
    palette: dict[int, tuple[int, str]] = {}  # of each index: its colour, and the first mask that uses it
    contradiction = ""
    with Progress("check masks", len(tiles), "tile") as progress:
        for i, (tile, checked) in enumerate(zip(tiles, parallel_map(partial(check_mask, data), tiles), strict=True)):
            totals.update(checked.codes)
            masks.update(checked.codes.keys())
            sizes[i] = checked.size or 0
            for index, colour in checked.palette.items():
                known, first = palette.setdefault(index, (colour, tile.mask))
                if known != colour and not contradiction:
                    contradiction = f"{index} is {name_of(known)} in {first}, but {name_of(colour)} in {tile.mask}"
            if checked.problem:
                tile = replace(tile, proposed="corrupt", reason=checked.problem)
                unknown += checked.size is not None
            else:
                pixels[i] = checked.pixels
                labelled = int(checked.pixels.sum())
                tile = replace(tile, foreground=1 - int(checked.pixels[0]) / labelled if labelled else None)
                tile = replace(tile, proposed=audit.verdict(tile, config.filter))
            surveyed.append(tile)
            progress.advance()
    colours = {index: colour for index, (colour, _) in sorted(palette.items())}
    readable = int((sizes[:, 0] > 0).sum())
    if not readable:
        raise UserError(f"{data.root}: none of {len(tiles)} pairs can be read; the first: {surveyed[0].reason}")
    if 2 * unknown > readable:
        raise UserError(f"{data.root}: {unknown} of {readable} masks hold "
                        + _describe_codes(totals, masks, int(sizes.prod(axis=1).sum()), data)
                        + (f". {describe_palette(colours)}" if colours else ""))
    return FilterResult(surveyed, sizes, pixels, totals, colours, contradiction)


@dataclass(frozen=True)
class CheckedMask:
    """What a mask holds, or why it cannot be used."""

    size: tuple[int, ...] | None = None  # height and width; None if it cannot be read
    codes: dict[int, int] = field(default_factory=dict)  # pixels of each code, at most MOST_CODES
    pixels: np.ndarray | None = None  # (K,) of each class
    palette: dict[int, int] = field(default_factory=dict)  # the colour of each index that it uses, if read by index
    problem: str = ""


def check_mask(data: Data, tile: Tile) -> CheckedMask:
    """Read a mask and the size of its image."""
    root = Path(data.root)
    try:
        mask, size = read_mask_file(root / tile.mask, data), picture_size(root / tile.image)
        reject_different_sizes(tile.pair, data, size, mask.codes.shape)
    except UserError as error:
        return CheckedMask(problem=str(error))
    codes, counts = count_codes(mask.codes)
    most = np.argsort(-counts, kind="stable")[:MOST_CODES]
    found = dict(zip(codes[most].tolist(), counts[most].tolist(), strict=True))
    palette = {index: mask.palette[index] for index in sorted(found)} if mask.palette else {}
    try:
        return CheckedMask(size, found, count_classes(root / tile.mask, codes, counts, data), palette)
    except UserError as error:
        return CheckedMask(size, found, palette=palette, problem=str(error))


def _describe_codes(totals: Counter[int], masks: Counter[int], pixels: int, data: Data) -> str:
    """Say which values or colours the masks hold, and which settings would read them."""
    expected = f"data.colours [{', '.join(data.colours)}]" if data.colours else (
        f"data.mask_values {list(data.mask_values)}")
    kind, setting = "values", "mask_values"
    if max(totals) >= COLOUR:
        kind = setting = "colours"
        totals, masks = (_by_colour(counts) for counts in (totals, masks))
    if data.threshold is not None:
        expected = f"the grey levels that data.threshold={data.threshold} divides"
    number = len(totals)
    codes = sorted(code for code, _ in totals.most_common(SHOWN if number > MOST_LISTED else MOST_LISTED))
    shares = ", ".join(f"{name_of(code)} ({totals[code] / pixels:.1%} of the pixels, in {masks[code]} masks)"
                       for code in codes)
    start = f"{kind} that are not in {expected}. "
    if number > MOST_LISTED:
        of_two = (". For two classes with smooth or smeared edges set data.threshold=128 and name the two in "
                  "data.classes" if kind == "values" else "")
        return (f"{start}The {SHOWN} most frequent of {number}: {shares}. A mask must have one of the {kind} for each "
                f"class; convert it{of_two}")
    return (f"{start}All {kind}: {shares}. Try data.{setting}=[{','.join(map(name_of, codes))}] with one of "
            "data.classes for each, background first, and data.ignore for one that means no class")


def _by_colour(counts: Counter[int]) -> Counter[int]:
    """Return the counts with the colour of each grey level in its place."""
    found = Counter()
    for code, count in counts.items():
        found[code if code >= COLOUR else COLOUR + code * 0x010101] += count
    return found


def describe_palette(palette: dict[int, int]) -> str:
    """Say which colour each index of the masks' palettes has."""
    colours = [f"{index} = {name_of(colour)}" for index, colour in palette.items()]
    return f"palette: {', '.join(colours[:SHOWN])}{', …' if len(colours) > SHOWN else ''}"


class Audited(NamedTuple):
    """A judged tile."""

    tile: Tile
    pixels: np.ndarray | None = None  # (K,) of each class in a new mask
    new_mask: bytes = b""  # the file of a mask that the filter made
    asked: "Audited | None" = None  # the same tile as a model judges it, if one was asked


def audit_tile(data: Data, limits: Filter, job: Job) -> Audited:
    """Decode a tile, measure and judge it, and make a new mask if the limits and the person allow it."""
    tile, mask_by_hand = job.tile, None
    try:
        image, labels = read_pair(tile.given_pair, data)
        if job.made_by_hand and not job.refused:
            mask_by_hand = read_pair(replace(tile, mask_from=REPAIRED).pair, data)[1]
            reject_other_order(tile, data)
    except UserError as error:
        return Audited(replace(tile, proposed="corrupt", reason=str(error)))
    glass = audit.find_glass(audit.inverted_grey(image), limits)
    tile = replace(tile, digest=digest_of(image), **audit.measure_tile(image, labels, limits, glass))
    model = {}
    if job.probs is not None:
        probs = job.probs.astype(np.float32) / 255
        model = audit.ask_model(probs, labels, limits)
    if mask_by_hand is not None:
        tile = replace(tile, proposed="", mask_from=REPAIRED, ignored=float(np.mean(mask_by_hand == IGNORE)),
                       reason=BY_HAND, **model)
        if tile.ignored == 1:
            tile = replace(tile, proposed="unlabelled")
        return Audited(tile, _pixels(mask_by_hand, data))
    judged = judge(tile, image, labels, glass, data, limits, job.refused)
    if not model:
        return judged
    asked = judge(replace(tile, **model), image, labels, glass, data, limits, job.refused, probs, job.model)
    return judged._replace(tile=replace(judged.tile, **model), asked=asked)


def judge(tile: Tile, image: np.ndarray, labels: np.ndarray, glass: np.ndarray, data: Data, limits: Filter,
          refused: bool, probs: np.ndarray | None = None, model: str = "") -> Audited:
    """Propose a verdict for a measured tile, or a new mask in its place, unless a person has `refused` that."""
    tile = replace(tile, proposed=audit.verdict(tile, limits))
    if tile.proposed not in REPAIRABLE or not limits.makes_masks:
        return Audited(tile)
    made, source = NewMask(None), REPAIRED
    if limits.repair:
        made = repair(image, labels, glass, audit.certain_moves(tile, limits), limits, probs)
    if made.labels is None and limits.relabel and probs is not None:
        failed = made.what
        made, source = relabel(labels, probs, limits), f"{MODEL} {model}"
        if made.labels is None and failed:
            made = replace(made, what=f"{failed}; from the prediction, {made.what}")
    if made.labels is None or refused:
        what = "repair refused by hand" if made.labels is not None else made.what
        return Audited(replace(tile, reason=what, ignored=made.ignored))
    tile = replace(tile, reason=f"{tile.proposed}: {made.what}", ignored=made.ignored, mask_from=source, proposed="")
    return Audited(tile, _pixels(made.labels, data), encode(made.labels, len(data.classes)))


def _pixels(labels: np.ndarray, data: Data) -> np.ndarray:
    return np.bincount(labels.ravel(), minlength=256)[:len(data.classes)]


def mark_copies(tiles: Sequence[Tile], drop: bool) -> tuple[list[Tile], list[list[str]]]:
    """Note which tiles show the same image, and return the keys of each such image. Without a digest none is known.

    If `drop`, propose `duplicate` for all but one of those that are kept. A test tile stays rather than a training
    tile, then one with a mask made by hand, then one with its given mask, then the first. The notes name the one that
    stays, else the first.
    """
    def rank(i: int) -> tuple[bool, bool, bool]:
        return marked[i].proposed != "test", not marked[i].reason.startswith(BY_HAND), marked[i].has_new_mask

    marked = list(tiles)
    copies = [places for places in places_by_group([tile.digest for tile in tiles])
              if len(places) > 1 and tiles[places[0]].digest]
    for places in copies:
        kept = sorted((i for i in places if drop and marked[i].proposed in ("", *SPLITS)), key=rank)
        for i in kept[1:]:
            marked[i] = replace(marked[i], proposed="duplicate")
        first = kept[0] if kept else places[0]
        for i in (i for i in places if i != first):
            note = f"same image as {marked[first].key}"
            if note not in marked[i].reason:
                marked[i] = replace(marked[i], reason="; ".join(filter(None, [marked[i].reason, note])))
    return marked, [[marked[i].key for i in places] for places in copies]


def propose_split(tiles: Sequence[Tile], data: Data, seed: int) -> list[Tile]:
    """Propose train or test for all tiles that are not to be dropped."""
    kept = [tile for tile in tiles if not tile.proposed]
    if data.test_groups:
        splits = iter(["test" if tile.group in data.test_groups else "train" for tile in kept])
    else:
        splits = iter(split_by_group(kept, data.test_fraction, seed) if kept else [])
    return [tile if tile.proposed else replace(tile, proposed=next(splits)) for tile in tiles]
