"""Draw synthetic tiles that look like H&E-stained colorectal tissue, so that everyone can run the project.

    python -m tools.make_demo_data data/demo                          # 240 tiles, about half a minute
    python -m tools.make_demo_data data/small --tiles 60 --slides 6 --size 256 --seed 3
    python -m tools.make_demo_data data/labs --slides 40 --other-lab 10   # the last 10 slides look as from elsewhere

A tile is drawn in three steps: a layout (where glass, stroma, crypts and tumour glands lie), maps of how much
haematoxylin and eosin each pixel contains, and the absorption of light by these stains (Beer-Lambert).

Classes and mask values: background 26 (glass), tissue 51 (stroma, normal crypts, clefts), tumour 77 (its epithelium).
The central lumen of a tumour gland is tissue, because the epithelium only surrounds it. The pinholes in the epithelium
are tumour.

Some tiles have a planted defect, like masks that were made by image registration: no tissue at all (`empty`), a mask
that is `shifted`, `rotated` or `deformed`, tissue annotated on glass (`over_glass`) or tissue left out (`left_out`).
OUT/truth/ holds the clean masks, and OUT/truth.csv says of every mask

    defect      what was done to it
    dx, dy      px by which it lies too far right and too low, at the centre of the tile
    angle       degrees by which it is turned clockwise around this centre
    bend        px by which its most displaced point lies off, if it is deformed
    foreground  share of the clean mask that is not background
    wrong       share of its pixels that are wrong
    visible     share of its pixels that are wrong about what is background

A tile depends on the seed, its slide, its number and the size, but not on the number of tiles or slides.
"""

import argparse
import csv
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

from common.console import Progress, UserError, argument_parser, command, run, table
from common.files import new_folder
from common.workers import cores, worker_map

CLASSES = ("background", "tissue", "tumour")
MASK_VALUES = np.array([26, 51, 77], np.uint8)
DEFECTS = {"empty": 0.125, "shifted": 0.07, "rotated": 0.05, "over_glass": 0.055, "left_out": 0.055, "deformed": 0.05}
COLUMNS = ("key", "slide", "defect", "dx", "dy", "angle", "bend", "foreground", "wrong", "visible")

MARGIN = 160  # px around a tile that are laid out too, because a mask that lies off shows them
STEP = 4  # px between the points where a layout is computed; finer details are texture
TILES_BETWEEN_SLIDES = 19  # so that the plans of 20 tiles on each slide continue those of the slide before
SLIDE, LAYOUT, PAINT, SPOIL = range(4)  # random streams: a change to one step does not change the others

HAEMATOXYLIN, EOSIN, BLOOD = (0.62, 0.70, 0.33), (0.11, 0.90, 0.42), (0.12, 0.76, 0.62)


@dataclass(frozen=True)
class Slide:
    """What all tiles of one slide have in common."""

    stains: np.ndarray  # (3, 3): absorbance of red, green, blue by haematoxylin, eosin and red blood cells
    light: np.ndarray  # (3,): red, green, blue of the bare glass
    blur: float
    noise: float
    spacing: float  # px between the centres of tumour glands
    wall: float  # px of epithelium around the lumen of a tumour gland
    grade: float  # 0 to 1: how large, dark and unequal the tumour's nuclei are
    goblets: float  # share of the cells of a crypt that contain mucin
    inflamed: float  # density of lymphocytes


@dataclass(frozen=True)
class Plan:
    """What one tile shall contain."""

    defect: str
    glass: float  # share of the tile
    tumour: float  # share of the tissue


@dataclass(frozen=True)
class Layout:
    """Distances to borders in px (size, size), positive inside, and the classes of the tile and its margin."""

    tissue: np.ndarray
    gland: np.ndarray
    lumen: np.ndarray
    crypts: np.ndarray  # (n, 5): y, x, radius, elongation, angle
    field: np.ndarray  # (size + 2 * MARGIN,) * 2: class index


@dataclass(frozen=True)
class DemoTile:
    """A finished tile: image (size, size, 3), masks of class indices (size, size) and its row of truth.csv."""

    image: np.ndarray
    written: np.ndarray
    clean: np.ndarray
    row: dict


def stream(*ids: int) -> Generator:
    """Return the random generator of one step of one tile; ids are (seed, slide, number, step)."""
    return np.random.default_rng(ids)


@lru_cache(maxsize=64)
def spline_basis(size: int, scale: float) -> np.ndarray:
    """Return the cubic B-spline weights (size, knots); knot k lies at pixel (k - 1) * scale."""
    at = np.arange(size) / scale
    first, f = np.floor(at).astype(int), at % 1
    weights = np.stack([(1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3], 1) / 6
    basis = np.zeros((size, first[-1] + 4), np.float32)
    np.put_along_axis(basis, first[:, None] + np.arange(4), weights.astype(np.float32), 1)
    return basis


def cloud(rng: Generator, size: int, scale: float) -> np.ndarray:
    """Return smooth noise (size, size) with mean 0, deviation about 1 and bumps about `scale` px apart."""
    basis = spline_basis(size, scale)
    return 2 * basis @ rng.standard_normal((basis.shape[1],) * 2, np.float32) @ basis.T


def ramp(distance: np.ndarray, width: float = 1.0) -> np.ndarray:
    """Return a smooth edge that rises from 0 outside to 1 inside over `width` px."""
    return np.clip(distance / width + 0.5, 0, 1)


def make_slide(seed: int, slide: int, other_lab: bool = False) -> Slide:
    """Draw stain, optics and biology of a slide, which differ moderately between slides.

    Of another laboratory, haematoxylin is paler and redder and eosin stronger; its scanner is less sharp, has more
    noise and yellower light.
    """
    rng = stream(seed, slide, 0, SLIDE)
    stains = np.array([HAEMATOXYLIN, EOSIN, BLOOD]) + rng.normal(0, 0.025, (3, 3))
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    strength = rng.uniform(0.88, 1.14, 3)
    look = Slide(
        stains=(stains * strength[:, None]).clip(0.02).astype(np.float32),
        light=(rng.uniform(239, 244) + np.array([0.5, -2, 0.5]) + rng.normal(0, 1, 3)).astype(np.float32),
        blur=rng.uniform(0.5, 0.7), noise=rng.uniform(1.2, 2.2), spacing=rng.uniform(140, 185),
        wall=rng.uniform(38, 52), grade=rng.uniform(0, 1), goblets=rng.uniform(0.6, 0.95),
        inflamed=rng.uniform(0.25, 1),
    )
    if not other_lab:
        return look
    change = np.array([[0.55, 0.78, 0.9], [1.2, 1.2, 1.2], [1, 1, 1]], np.float32)
    return replace(look, stains=look.stains * change, light=look.light * np.float32([0.99, 0.95, 0.88]),
                   blur=look.blur + 0.5, noise=2 * look.noise)


def make_plan(seed: int, slide: int, number: int, visible: bool = False) -> Plan:
    """Spread shares and defects evenly over any number of tiles. Tile 0 of a slide is clean and has all classes.

    `visible`: every tile whose mask has a defect shows both glass and tissue.
    """
    if number == 0:
        return Plan("none", 0.45, 0.5)
    index = seed * 7919 + slide * TILES_BETWEEN_SLIDES + number
    which, glass, tumour = (index * np.array([0.8191725, 0.6710436, 0.5497005])) % 1
    defect = [*DEFECTS, "none"][np.searchsorted(np.cumsum(list(DEFECTS.values())), which, "right")]
    tumour = 0.0 if tumour < 0.26 else float(np.interp(tumour, [0.26, 0.74, 1], [0.2, 0.8, 1]))
    if defect == "empty":
        return Plan(defect, 1.0, 0.0)
    if defect == "left_out":
        return Plan(defect, 0.4 * glass, tumour)
    if defect == "over_glass" or (visible and defect != "none"):
        return Plan(defect, 0.3 + 0.4 * glass, tumour)
    return Plan(defect, 0.0 if glass < 0.14 else float(np.interp(glass, [0.14, 1], [0.25, 0.94])), tumour)


def hillside(rng: Generator, y: np.ndarray, x: np.ndarray, size: int, rough: float) -> np.ndarray:
    """Return a rounded, noisy slope of about 1 per px at the knots of the layout; its level lines are borders."""
    angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.6) * size
    slope = -np.hypot(y - size / 2 - away * np.sin(angle), x - size / 2 - away * np.cos(angle))
    for scale, height in ((200, 45), (70, 12), (26, 4)):
        slope += rough * height * cloud(rng, len(slope), scale / STEP)
    return slope.astype(np.float32)


def gland_cells(rng: Generator, y: np.ndarray, x: np.ndarray, spacing: float) -> np.ndarray:
    """Return the distance to the border of warped, stretched glands without gaps, at the knots of the layout."""
    angle, stretch, n = rng.uniform(0, np.pi), rng.uniform(1, 1.5), len(y)
    y, x = y + 24 * cloud(rng, n, 110 / STEP), x + 24 * cloud(rng, n, 110 / STEP)
    along, across = x * np.cos(angle) + y * np.sin(angle), (y * np.cos(angle) - x * np.sin(angle)) * stretch
    low, high = (along.min(), across.min()), (along.max(), across.max())
    nearest, second = np.full((2, *y.shape), 1e4, np.float32)
    for a in np.arange(low[0], high[0] + spacing, spacing):
        for b in np.arange(low[1], high[1] + spacing, spacing):
            da, db = rng.uniform(-0.36, 0.36, 2) * spacing
            distance = np.hypot(along - a - da, across - b - db)
            second = np.minimum(second, np.maximum(nearest, distance))
            nearest = np.minimum(nearest, distance)
    return ndimage.gaussian_filter((second - nearest) / 2, 7 / STEP)


def place_crypts(rng: Generator, free: np.ndarray, size: int) -> np.ndarray:
    """Return crypts (n, 5): y, x, radius, elongation, angle, where `free` (px to a border, at knots) leaves room."""
    radius, angle, stretch = rng.uniform(46, 58), rng.uniform(0, np.pi), rng.uniform(1, 1.35)
    points = lattice(rng, size + 2 * MARGIN, 2.25 * radius, 0.07) - MARGIN
    crypts = np.column_stack([points, radius * rng.uniform(0.86, 1.08, len(points)),
                              stretch * rng.uniform(0.9, 1.1, len(points)), angle + rng.normal(0, 0.2, len(points))])
    knots = np.clip(((points + MARGIN) / STEP + 1).astype(int), 0, len(free) - 1)
    return crypts[free[knots[:, 0], knots[:, 1]] > 1.08 * crypts[:, 2]]


def lay_out(rng: Generator, slide: Slide, plan: Plan, size: int) -> Layout:
    """Decide where glass, tumour glands, lumina and crypts lie, in the tile and in a margin around it."""
    whole = spline_basis(size + 2 * MARGIN, STEP)
    y, x = np.meshgrid(*[(np.arange(whole.shape[1], dtype=np.float32) - 1) * STEP - MARGIN] * 2, indexing="ij")
    in_tile = (y >= 0) & (y < size) & (x >= 0) & (x < size)
    tissue = hillside(rng, y, x, size, 1)
    beyond = {0: -60, 1: 60}.get(plan.glass, 0)  # px: no border comes near a tile that has none
    tissue -= np.quantile(tissue[in_tile], plan.glass) + beyond
    tumour = hillside(rng, y, x, size, 1.4)
    tumour -= np.quantile(tumour[in_tile & (tissue > 0)], 1 - plan.tumour) if plan.tumour else 1e4
    septum = np.clip(4 + 4 * cloud(rng, len(y), 90 / STEP), 0.5, None)
    cells = gland_cells(rng, y, x, slide.spacing) - septum
    gland = ndimage.gaussian_filter(np.minimum(cells, np.minimum(tumour, tissue)), 5 / STEP)
    lumen = gland - slide.wall - 7 * cloud(rng, len(y), 60 / STEP) + 2.5 * cloud(rng, len(y), 16 / STEP)
    crypts = place_crypts(rng, np.minimum(tissue - 8, -tumour - 12), size)[: None if rng.random() < 0.6 else 0]
    tissue, gland, lumen = (whole @ values @ whole.T for values in (tissue, gland, lumen))
    field = (tissue > 0).astype(np.uint8) + ((gland > 0) & (lumen < 0) & (tissue > 0))
    crop = np.s_[MARGIN : MARGIN + size, MARGIN : MARGIN + size]
    return Layout(tissue[crop], gland[crop], lumen[crop], crypts, field)


def lattice(rng: Generator, size: int, pitch: float, jitter: float) -> np.ndarray:
    """Return points (n, 2) y, x of a jittered hexagonal lattice that covers the tile and a little more."""
    rows, columns = np.arange(-pitch, size + pitch, 0.866 * pitch), np.arange(-pitch, size + pitch, float(pitch))
    y, x = np.meshgrid(rows, columns, indexing="ij")
    x[1::2] += pitch / 2
    return np.column_stack([y.ravel(), x.ravel()]) + rng.normal(0, jitter * pitch, (y.size, 2))


def look_up(values: np.ndarray, points: np.ndarray, dy: int = 0, dx: int = 0) -> np.ndarray:
    """Return the values (n,) at the points; a point outside the tile reads the nearest pixel."""
    last = len(values) - 1
    y, x = np.rint(points).astype(int).T
    return values[np.clip(y + dy, 0, last), np.clip(x + dx, 0, last)]


def uphill(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the angle (n,) of the steepest rise at the points."""
    return np.arctan2(look_up(values, points, dy=3) - look_up(values, points, dy=-3),
                      look_up(values, points, dx=3) - look_up(values, points, dx=-3))


def crypt_frame(y: np.ndarray, x: np.ndarray, crypt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates, shaped like y and x, in which the crypt is a circle around 0."""
    cy, cx, _, stretch, angle = crypt
    y, x = y - cy, x - cx
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return along / stretch**0.5, across * stretch**0.5


def outside_crypts(points: np.ndarray, crypts: np.ndarray, gap: float) -> np.ndarray:
    """Return whether the points (n,) keep a distance of `gap` px from every crypt."""
    free = np.ones(len(points), bool)
    for crypt in crypts:
        free &= np.hypot(*crypt_frame(points[:, 0], points[:, 1], crypt)) > crypt[2] + gap
    return free


def stroma_nuclei(rng: Generator, slide: Slide, layout: Layout, *maps: np.ndarray) -> np.ndarray:
    """Return spindle cells along fibres and lymphocytes in patches, none on blood: (n, 7), columns as in `stamp`."""
    across, patches, blood = maps
    size = len(across)
    points = lattice(rng, size, 24, 0.3)
    points = points[rng.random(len(points)) < 0.62]
    n = len(points)
    spindles = np.column_stack([points, rng.uniform(6, 10, n), rng.uniform(1.8, 3.2, n),
                                uphill(across, points) + np.pi / 2 + rng.normal(0, 0.15, n),
                                rng.uniform(0.9, 1.35, n), rng.uniform(0, 0.4, n)])
    points = lattice(rng, size, 13, 0.28)
    crowd = 0.10 + slide.inflamed * (0.10 + 0.22 * look_up(patches, points)) + 0.2 * (len(layout.crypts) > 0)
    points = points[rng.random(len(points)) < crowd]
    n = len(points)
    radius = rng.uniform(3.3, 4.8, n)
    lymphocytes = np.column_stack([points, radius * rng.uniform(1, 1.3, n), radius, rng.uniform(0, 3, n),
                                   rng.uniform(1.2, 1.6, n), rng.uniform(0, 0.25, n)])
    cells = np.concatenate([spindles, lymphocytes])
    keep = (look_up(layout.tissue, cells[:, :2]) > 3) & (look_up(layout.gland, cells[:, :2]) < -3)
    keep &= look_up(blood, cells[:, :2]) < 1.7
    return cells[keep & outside_crypts(cells, layout.crypts, 3)]


def tumour_nuclei(rng: Generator, slide: Slide, layout: Layout) -> np.ndarray:
    """Return crowded, unequal nuclei that lie across the wall of their gland: (n, 7), columns as in `stamp`."""
    points = lattice(rng, len(layout.gland), 13.2 + 2.2 * slide.grade, 0.13)
    depth, to_lumen = look_up(layout.gland, points), -look_up(layout.lumen, points)
    points = points[(depth > 4) & (to_lumen > 5) & (rng.random(len(points)) < np.clip(to_lumen / 18 - 0.3, 0.05, 0.96))]
    n = len(points)
    width = rng.normal(4.9 + 0.9 * slide.grade, 0.4 + 0.5 * slide.grade, n).clip(3.6, 8)
    length = width * rng.uniform(1.15, 1.8 - 0.3 * slide.grade, n)
    angle = uphill(layout.gland, points) + rng.normal(0, 0.25 + 0.4 * slide.grade, n)
    dark = rng.normal(1.15, 0.12 + 0.1 * slide.grade, n) + 0.5 * (rng.random(n) < 0.05)
    return np.column_stack([points, length.clip(max=11), width, angle, dark, rng.uniform(0.3, 1, n) ** 0.7])


def crypt_nuclei(rng: Generator, crypt: np.ndarray) -> np.ndarray:
    """Return a regular ring of small nuclei at the base of a crypt: (n, 7), columns as in `stamp`."""
    y, x, radius, stretch, angle = crypt
    n = int(2 * np.pi * radius / 8.6)
    phi = (np.arange(n) + rng.normal(0, 0.12, n)) * 2 * np.pi / n
    inner = radius - 7 - np.abs(rng.normal(0, 1.5, n))
    u, v = inner * np.cos(phi) * stretch**0.5, inner * np.sin(phi) / stretch**0.5
    return np.column_stack([y + u * np.sin(angle) + v * np.cos(angle), x + u * np.cos(angle) - v * np.sin(angle),
                            rng.uniform(4.2, 5.6, n), rng.uniform(3.2, 4.1, n), phi + angle + rng.normal(0, 0.3, n),
                            rng.uniform(1.1, 1.45, n), rng.uniform(0.1, 0.5, n)])


def stamp(cells: np.ndarray, wobble: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw ellipses with uneven outlines. Cells (n, 7): y, x, half length, half width, angle, darkness, vesicular.

    Returns two maps (size, size): radius relative to the outline of the nearest cell (9 if there is none), its index.
    """
    size, reach = len(wobble), np.arange(-12, 13)
    y, x, length, width, angle = cells[:, :5].astype(np.float32).T[:, :, None, None]
    rows, columns = np.rint(y).astype(int) + reach[:, None], np.rint(x).astype(int) + reach
    dy, dx = (rows - y).astype(np.float32), (columns - x).astype(np.float32)
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    radius = np.sqrt((u / length) ** 2 + (v / width) ** 2)
    near = (radius < 1.5) & (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    pixel = (rows * size + columns)[near]
    radius = radius[near] * (1 + 0.1 * wobble.ravel()[pixel])
    # radius and index share one integer, so that one minimum finds the nearest cell of every pixel
    packed = (np.clip(radius, 0, 8) * 2**20).astype(np.int64) << 20 | np.nonzero(near)[0]
    nearest = np.full(size * size, 9 << 40, np.int64)
    np.minimum.at(nearest, pixel, packed)
    nearest = nearest.reshape(size, size)
    return (nearest >> 20).astype(np.float32) / 2**20, nearest & (2**20 - 1)


def paint_nuclei(rng: Generator, stains: np.ndarray, cells: np.ndarray, wobble: np.ndarray, grain: np.ndarray) -> None:
    """Add nuclei with dark membranes, clumped chromatin and paler centres to stains (3, size, size)."""
    if not len(cells):
        return
    radius, index = stamp(cells, wobble)
    width, dark, vesicle = cells[:, [3, 5, 6]].astype(np.float32).T[:, index * (radius < 9)]
    depth = (1 - radius) * width
    inside, rim = ramp(depth, 1.4), np.exp(-((depth - 0.6) ** 2) / 1.6)
    chromatin = dark * (1 - 0.55 * vesicle * (1 - rim) + (0.14 + 0.16 * vesicle) * grain)
    stains[0] += inside * (chromatin - stains[0])
    stains[1] += inside * (0.38 - 0.12 * vesicle * (1 - rim) - stains[1])
    stains[0] *= 1 - 0.25 * vesicle * np.exp(-((depth + 1.8) ** 2)) * (1 - inside)


def paint_crypt(rng: Generator, stains: np.ndarray, crypt: np.ndarray, slide: Slide, wobble: np.ndarray) -> None:
    """Add one normal crypt: thin sheath, basal cytoplasm, cells with or without mucin, a small lumen."""
    size, (cy, cx, radius, stretch, _) = stains.shape[1], crypt
    reach = radius * stretch**0.5 + 8
    top, left, bottom, right = np.clip([cy - reach, cx - reach, cy + reach, cx + reach], 0, size).astype(int)
    window = np.s_[top:bottom, left:right]
    u, v = crypt_frame(*np.mgrid[window], crypt)
    local = wobble[window]
    rho = np.hypot(u, v) + 1.2 * local
    n = int(2 * np.pi * radius / rng.uniform(17, 22))
    turn = (np.arctan2(v, u) / (2 * np.pi) + 0.5) * n + 0.09 * local + 0.15 * np.sin(rho / 11 + rng.uniform(0, 6))
    cell = turn.astype(int) % n
    to_side = (0.5 - np.abs(turn % 1 - 0.5)) * 2 * np.pi * rho / n
    lumen = radius * rng.uniform(0.1, 0.2)
    mucin, tint = rng.random(n) < slide.goblets, rng.uniform(0.08, 0.2, n)
    low, high = lumen + 2 + rng.uniform(0, 0.35, n) * radius, radius - rng.uniform(11, 16, n)
    across, along = 1 - to_side * n / (np.pi * rho + 1), (2 * rho - low[cell] - high[cell]) / (high - low)[cell]
    vacuole = mucin[cell] * ramp((1.0 - np.abs(across) ** 3 - np.abs(along) ** 3.5) * (2 + rho / 14) - 0.5, 1.2)
    base = ramp(rho - radius + 13, 14)
    side = 1 - ramp(to_side - 0.8, 1.4)
    haema = 0.26 + 0.24 * base + 0.12 * side + 0.04 * local
    eosin = 0.42 + 0.06 * side
    haema += vacuole * (tint[cell] + 0.03 * local - haema)
    eosin += vacuole * (0.22 - tint[cell] / 2 - eosin)
    hollow = rng.choice([0.3, 0.9]) * ramp(lumen + 2 * local - rho, 4)
    for channel, amount, empty in ((0, haema, 0.03), (1, eosin, 0.07)):
        amount = amount + hollow * (empty - amount)
        stains[channel][window] += ramp(radius - rho, 1.5) * (amount - stains[channel][window])
    sheath = np.exp(-((rho - radius - 2) ** 2) / 3)
    stains[1][window] += sheath * 0.18


def paint_gaps(rng: Generator, stains: np.ndarray, layout: Layout, *noise: np.ndarray) -> None:
    """Remove stain where cutting and shrinking leave gaps: clefts between fibres and at glands, pinholes in glands."""
    streaks, broad, wobble = noise
    cleft = ramp(streaks - 2.5, 0.7) * ramp(broad + 0.3, 0.6) * ramp(-layout.gland - 3, 3)
    cleft = np.maximum(cleft, np.exp(-((layout.gland + 3 + wobble) / 2.2) ** 2) * ramp(broad - 0.6, 0.5))
    points = lattice(rng, len(wobble), 30, 0.3)
    points = points[(look_up(layout.gland, points) > 10) & (look_up(layout.lumen, points) < -8)]
    points = points[rng.random(len(points)) < 0.16]
    radius = rng.uniform(2, 5, len(points))
    if len(points):
        holes, index = stamp(np.column_stack([points, radius * 1.2, radius, 0 * radius]), wobble)
        cleft = np.maximum(cleft, ramp((1 - holes) * radius.astype(np.float32)[index * (holes < 9)], 1.5))
    for y, x, radius, stretch, _ in layout.crypts:
        reach = int(radius * stretch + 3)
        cleft[max(0, int(y) - reach) : max(0, int(y) + reach), max(0, int(x) - reach) : max(0, int(x) + reach)] = 0
    stains *= 1 - 0.93 * cleft


def paint_blood(rng: Generator, stains: np.ndarray, layout: Layout, where: np.ndarray, wobble: np.ndarray) -> None:
    """Add red cells in small pools of the stroma, where the noise map `where` is high."""
    points = lattice(rng, len(where), 8.5, 0.15)
    points = points[(look_up(where, points) > 1.9) & (look_up(layout.gland, points) < -5)
                    & (look_up(layout.tissue, points) > 5) & outside_crypts(points, layout.crypts, 5)]
    points = points[rng.random(len(points)) < 0.8]
    if not len(points):
        return
    radius = rng.uniform(3.2, 4.4, len(points))
    distance, _ = stamp(np.column_stack([points, radius * 1.15, radius, rng.uniform(0, 3, len(points))]), wobble)
    inside = ramp((1 - distance) * 4, 1.5)
    around = ramp(where - 1.8, 0.4) * ramp(-layout.gland - 3, 3)
    stains[:2] *= 1 - np.maximum(inside, 0.5 * around * (distance < 2))
    stains[2] += 1.02 * inside


def fibre_map(rng: Generator, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return the position across the fibres in px, and a streaky texture with mean 0 and deviation about 1."""
    size, angle = len(layout.tissue), rng.uniform(0, np.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    across = y * np.cos(angle) - x * np.sin(angle) + 26 * cloud(rng, size, 140) + 5 * cloud(rng, size, 45)
    across += 0.9 * np.clip(-layout.gland, 0, 60)  # bends the fibres around the glands
    along = x * np.cos(angle) + y * np.sin(angle) + 20 * cloud(rng, size, 120)
    grid = rng.standard_normal((256, 256), np.float32)
    streaks = sum(ndimage.map_coordinates(grid, [across / wide, along / long], order=1, mode="grid-wrap")
                  for wide, long in ((2.4, 26), (6, 60)))
    return across, streaks


def paint(rng: Generator, slide: Slide, layout: Layout, size: int) -> np.ndarray:
    """Return how much haematoxylin, eosin and blood each pixel contains: (3, size, size)."""
    stains = np.zeros((3, size, size), np.float32)
    if layout.tissue.max() < -5:
        return stains
    across, streaks = fibre_map(rng, layout)
    wobble, grain, broad, patches = (cloud(rng, size, scale) for scale in (6, 2.6, 60, 90))
    stains[0] = 0.13 + 0.04 * streaks + 0.04 * grain
    stains[1] = 0.62 + 0.13 * streaks + 0.08 * broad + 0.05 * wobble
    for crypt in layout.crypts:
        paint_crypt(rng, stains, crypt, slide, wobble)
    gland, lumen = ramp(layout.gland + 0.8 * wobble, 2), ramp(layout.lumen + wobble, 3)
    apical = np.exp(np.minimum(layout.lumen, 0) / 16)
    stains[0] += gland * (0.47 - 0.28 * apical + 0.07 * grain + 0.07 * wobble - stains[0])
    stains[1] += gland * (0.55 + 0.12 * apical + 0.05 * grain - 0.06 * wobble - stains[1])
    debris = np.maximum(ramp(patches + 0.4, 0.5), ramp(layout.lumen - 13 + 3 * wobble, 8))
    stains[0] += lumen * (debris * (0.15 + 0.3 * np.maximum(grain - 1, 0)) - stains[0])
    stains[1] += lumen * (debris * (0.45 + 0.12 * wobble) + 0.02 - stains[1])
    blood = cloud(rng, size, 34) + 0.5 * patches
    paint_gaps(rng, stains, layout, streaks + 0.5 * wobble, broad, wobble)
    paint_blood(rng, stains, layout, blood, wobble)
    cells = [stroma_nuclei(rng, slide, layout, across, patches, blood), tumour_nuclei(rng, slide, layout),
             *(crypt_nuclei(rng, crypt) for crypt in layout.crypts)]
    paint_nuclei(rng, stains, np.concatenate(cells), wobble, grain)
    stains *= 1 + 0.11 * rng.standard_normal((size, size), np.float32)
    stains = stains.clip(0) * ramp(layout.tissue + 1.2 * wobble + broad, 2)
    dust = rng.integers(0, size, (2, 4))
    stains[0, dust[0], dust[1]] += 0.7
    return stains


def develop(rng: Generator, slide: Slide, stains: np.ndarray) -> np.ndarray:
    """Return the image (size, size, 3) uint8: light through the stains (Beer-Lambert), then optics and sensor."""
    size = stains.shape[1]
    light = slide.light * (1 + 0.006 * cloud(rng, size, size / 2))[..., None]
    image = light * np.exp(-np.tensordot(stains, slide.stains, (0, 0)) * 1.55)
    for channel in range(3):
        image[..., channel] = ndimage.gaussian_filter(image[..., channel], slide.blur)
    image += slide.noise * rng.standard_normal(image.shape, np.float32)
    return np.rint(image).clip(0, 255).astype(np.uint8)


def spoil(rng: Generator, defect: str, layout: Layout, size: int, visible: bool) -> tuple[np.ndarray, dict]:
    """Return the mask to write (size, size), and what was done to it, by the columns of truth.csv.

    `visible`: of a shift and its opposite, plant the one that lays more tissue on glass.
    """
    clean = layout.field[MARGIN : MARGIN + size, MARGIN : MARGIN + size]
    y, x = np.meshgrid(*[np.arange(size)] * 2, indexing="ij")
    if defect == "shifted":
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(45, 135)
        dx, dy = round(length * np.cos(angle)), round(length * np.sin(angle))
        shifts = [(layout.field[MARGIN - b :, MARGIN - a :][:size, :size], {"dx": a, "dy": b, "angle": 0})
                  for a, b in ((dx, dy), (-dx, -dy))]
        return max(shifts, key=lambda shift: np.sum((shift[0] > 0) & (clean == 0))) if visible else shifts[0]
    if defect == "rotated":
        angle = round(rng.uniform(8, 25) * rng.choice([-1, 1]), 1)
        cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        turn, pivot = np.array([[cos, -sin], [sin, cos]]), rng.uniform(0.25, 0.75, 2) * size
        from_centre = pivot - (size - 1) / 2
        dy, dx = from_centre - turn.T @ from_centre  # of the tile's centre, because the pivot stays
        mask = ndimage.affine_transform(layout.field, turn, pivot + MARGIN - turn @ pivot, (size, size), order=0,
                                        mode="nearest")
        return mask, {"dx": f"{dx:.1f}", "dy": f"{dy:.1f}", "angle": angle}
    if defect == "deformed":
        bend, offsets = rng.uniform(10, 25), [cloud(rng, size, size / 3) for _ in range(2)]
        offsets = [offset * bend / np.hypot(*offsets).max() for offset in offsets]
        places = [MARGIN + place + offset for place, offset in zip((y, x), offsets, strict=True)]
        return ndimage.map_coordinates(layout.field, places, order=0), {"bend": f"{bend:.1f}"}
    if defect == "over_glass":
        depth = np.quantile(layout.tissue[clean == 0], rng.uniform(0.03, 0.25))
        return np.where((clean == 0) & (layout.tissue > depth), 1, clean).astype(np.uint8), {}
    if defect == "left_out":
        angle = rng.uniform(0, 2 * np.pi)
        slope = x * np.cos(angle) + y * np.sin(angle) + 0.08 * size * cloud(rng, size, size / 5)
        return np.where(slope < np.quantile(slope[clean > 0], rng.uniform(0.35, 0.65)), 0, clean).astype(np.uint8), {}
    return clean, {}


def make_tile(seed: int, slide: int, number: int, size: int, visible: bool = False,
              other_lab: bool = False) -> DemoTile:
    """Draw one tile; the same arguments give the same bytes."""
    look, plan = make_slide(seed, slide, other_lab), make_plan(seed, slide, number, visible)
    layout = lay_out(stream(seed, slide, number, LAYOUT), look, plan, size)
    paint_rng = stream(seed, slide, number, PAINT)
    image = develop(paint_rng, look, paint(paint_rng, look, layout, size))
    clean = layout.field[MARGIN : MARGIN + size, MARGIN : MARGIN + size]
    written, change = spoil(stream(seed, slide, number, SPOIL), plan.defect, layout, size, visible)
    row = {"key": f"s{slide:02d}-{number:04d}", "slide": f"s{slide:02d}", "defect": plan.defect, **change,
           "foreground": f"{np.mean(clean > 0):.6f}", "wrong": f"{np.mean(written != clean):.6f}",
           "visible": f"{np.mean((written > 0) != (clean > 0)):.6f}"}
    return DemoTile(image, written, clean, row)


def write_tile(out: Path, seed: int, size: int, visible: bool, from_slide: int,
               place: tuple[int, int]) -> tuple[dict, np.ndarray]:
    """Write the tile (slide, number); slides `from_slide` and later are of another laboratory.

    Returns its row of truth.csv and the shares (3,) of its clean mask.
    """
    tile = make_tile(seed, *place, size, visible, other_lab=place[0] >= from_slide)
    key = tile.row["key"]
    for name, pixels in ((f"frames/frame#{key}.png", tile.image), (f"masks/mask#{key}.png", MASK_VALUES[tile.written]),
                         (f"truth/mask#{key}.png", MASK_VALUES[tile.clean])):
        Image.fromarray(pixels).save(out / name, compress_level=3)
    return tile.row, np.bincount(tile.clean.ravel(), minlength=3) / size**2


def write_data_set(out: Path, tiles: int, slides: int, size: int, seed: int, visible: bool = False,
                   other_lab: int = 0) -> list[tuple[dict, np.ndarray]]:
    """Write all tiles into the existing folder `out`. Returns what `write_tile` returns, in the order of the keys."""
    for name in ("frames", "masks", "truth"):
        (out / name).mkdir()
    jobs = sorted((index % slides, index // slides) for index in range(tiles))
    written = []
    with worker_map(min(cores(), tiles)) as parallel_map, Progress("draw", total=tiles, unit="tile") as progress:
        for row_and_shares in parallel_map(partial(write_tile, out, seed, size, visible, slides - other_lab), jobs):
            written.append(row_and_shares)
            progress.advance()
    with (out / "truth.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row, _ in written)
    return written


def report(out: Path, written: list[tuple[dict, np.ndarray]], other_lab: int = 0) -> str:
    """Return what was written, as text."""
    settings = [] if out == Path("data/demo") else [f"data.root={out}"]
    if other_lab:
        slides = sorted({row["slide"] for row, _ in written})
        settings.append(f"data.test_groups=[{','.join(slides[-other_lab:])}]")
    counts = Counter(row["defect"] for row, _ in written)
    shares = np.mean([share for _, share in written], 0)
    return "\n\n".join([
        f"{len(written)} tiles in {out}: frames/ and masks/, clean masks in truth/, planted defects in truth.csv",
        table(["defect", "tiles"], [[name, str(counts[name])] for name in ("none", *DEFECTS)]),
        table(["class", "share of the clean masks"], [[n, f"{v:.3f}"] for n, v in zip(CLASSES, shares, strict=True)]),
        "next: " + command("python", "data_filter.py", "--config", "configs/demo.yaml", *settings),
    ])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("out", type=Path, help="the folder to write, e.g. data/demo")
    limits = {"tiles": (1, 99_999), "slides": (1, 99), "size": (128, 1024), "seed": (0, 2**31)}
    for (name, (low, high)), default in zip(limits.items(), (240, 12, 500, 0), strict=True):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{low} to {high} (default: {default})")
    parser.add_argument("--visible-defects", action="store_true", help="move masks only on tiles with 30 to 70 %% of "
                        "glass, and of a shift and its opposite plant the one that lays more tissue on glass: what a "
                        "filter sees best (default: on any tile, either shift)")
    parser.add_argument("--other-lab", type=int, default=0, metavar="N", help="give the last N slides the look of "
                        "another laboratory and scanner, to test how a model bears it (default: 0)")
    args = parser.parse_args(arguments)
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} {getattr(args, name)}: expected {low} to {high}")
    if args.tiles < args.slides:
        raise UserError(f"--tiles {args.tiles}: expected at least one tile for each of the {args.slides} slides")
    if not 0 <= args.other_lab < args.slides:
        raise UserError(f"--other-lab {args.other_lab}: expected 0 to {args.slides - 1}, fewer than all slides")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with new_folder(args.out) as folder:
        written = write_data_set(folder, args.tiles, args.slides, args.size, args.seed, args.visible_defects,
                                 args.other_lab)
    print(report(args.out, written, args.other_lab))


if __name__ == "__main__":
    run(main)
