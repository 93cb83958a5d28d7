"""All settings of an experiment with their checks. The defaults are those of the report's section 5.2."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from common import geometry
from common.console import UserError, check
from common.patterns import folder_wildcards

MOST_CLASSES = 254  # two numbers of a byte are needed for pixels without a class (common/masks.py)
MASK_SETTINGS = ("mask_values", "colours", "masks_by", "threshold", "ignore")  # of `Data`: how masks are read


@dataclass(frozen=True)
class Data:
    """Where the tiles lie, what the values of a mask mean, how tiles are grouped and cropped."""

    root: str = "data/crc"
    cache: str = ""  # the folder of tiles.csv, the packed store and the filter's report; "" = root
    images: str = "frames/frame#{key}.png"  # below root; common/patterns.py lists what a pattern may hold
    masks: str = "masks/mask#{key}.png"  # below root
    classes: tuple[str, ...] = ("background", "tissue", "tumour")  # the first one is the background
    mask_values: tuple[int, ...] = (26, 51, 77)  # the grey level or palette index of each class in a mask
    colours: tuple[int | str, ...] = ()  # rrggbb of each class in a mask, in place of mask_values
    masks_by: Literal["auto", "index", "colour"] = "auto"  # palettes; auto: index, without colours and threshold
    threshold: int | None = None  # of two classes, the second begins at this grey level; in place of mask_values
    ignore: tuple[int | str, ...] = ()  # mask values or colours of pixels without a class
    group: str = ""  # regular expression that finds the slide or patient in the key; "" = every tile for itself
    test_fraction: float = 0.2
    test_groups: tuple[str, ...] = ()  # slides or patients that form the test set; in place of test_fraction
    crop: int = 256  # pixels, the side of a training crop

    def __post_init__(self):
        self._check_patterns()
        count = len(self.classes)
        check(len(set(self.classes)) == count >= 2, "data.classes must be at least two names, all different; it is "
              f"{list(self.classes)}")
        for name, meaning in (("mean", "the average over classes"), ("all", "all classes together")):
            check(name not in self.classes, f"data.classes: '{name}' means {meaning}; choose another name")
        check(count <= MOST_CLASSES, f"data.classes: at most {MOST_CLASSES} classes are possible; there are {count}")
        self._check_mask_codes()
        check(0 < self.test_fraction < 1, f"data.test_fraction must lie between 0 and 1; it is {self.test_fraction}")
        check(self.crop >= 1, f"data.crop must be a number of pixels; it is {self.crop}")
        try:
            re.compile(self.group)
        except re.error as error:
            raise UserError(f"data.group '{self.group}' is not a regular expression: {error}") from None

    def _check_patterns(self) -> None:
        for name in ("images", "masks"):
            pattern = getattr(self, name)
            *folders, last = pattern.split("/")
            is_plain = not {"", ".", ".."} & {*folders, last} and "\\" not in pattern
            check(is_plain and pattern.count("{key}") == 1, f"data.{name} must be a plain path below data.root that "
                  f"contains {{key}} exactly once, such as frames/frame#{{key}}.png; it is '{pattern}'")
            check(pattern.count("{group}") <= 1 and "**" not in last and all(
                  part == "**" or "**" not in part for part in folders), f"data.{name} may contain {{group}} once, and "
                  f"** only in place of a whole folder, such as **/{{key}}.png; it is '{pattern}'")
        of_images, of_masks = ((folder_wildcards(pattern), "{group}" in pattern) for pattern in
                               (self.images, self.masks))
        check(of_images == of_masks, f"data.images '{self.images}' and data.masks '{self.masks}' must have the same "
              "wildcards in their folders, and {group} in both or in neither, since all of these are part of the key")
        check(not (self.group and of_images[1]), "data.group and {group} in data.images both say what the group is; "
              "leave out one of them")

    def _check_mask_codes(self) -> None:
        """Check what the settings say about the values or colours of masks; write colours as rrggbb."""
        count = len(self.classes)
        if self.threshold is not None:
            check(count == 2 and 1 <= self.threshold <= 255, "data.threshold is a grey level from 1 to 255 and needs "
                  f"two classes; it is {self.threshold}, and data.classes is {list(self.classes)}")
            check(not self.colours and not self.ignore, "data.threshold reads every grey level as one of two classes; "
                  "leave out data.colours and data.ignore")
            if self.mask_values == Data.mask_values:
                object.__setattr__(self, "mask_values", (0, 255))
            check(len(self.mask_values) == 2 and self.mask_values[0] < self.threshold <= self.mask_values[1],
                  f"data.mask_values, in which predictions are written, must be one value below data.threshold and one "
                  f"from it on; it is {list(self.mask_values)}, and data.threshold is {self.threshold}")
        values = self.mask_values
        if self.colours:
            check(values == Data.mask_values, "data.colours takes the place of data.mask_values; leave out one of them")
            check(self.masks_by != "index", "data.masks_by=index reads indices of palettes, not data.colours; leave "
                  "out one of them")
            for name in ("colours", "ignore"):
                given = [str(colour).lower().removeprefix("#") for colour in getattr(self, name)]
                check(all(re.fullmatch("[0-9a-f]{6}", colour) for colour in given), f"data.{name} must be colours such "
                      f"as 00ff00 (red, green, blue from 00 to ff); it is {list(getattr(self, name))}")
                object.__setattr__(self, name, tuple(given))
            check(len(set(self.colours)) == len(self.colours) == count, f"data.colours must be {count} different "
                  f"colours, one for each class; it is {list(self.colours)}")
        else:
            check(len(set(values)) == len(values) == count and all(0 <= value <= 255 for value in values),
                  f"data.mask_values must be {count} different values from 0 to 255, one for each class; it is "
                  f"{list(values)}")
            check(all(type(value) is int and 0 <= value <= 255 for value in self.ignore), "data.ignore must be mask "
                  f"values from 0 to 255, or with data.colours colours; it is {list(self.ignore)}")
        both = sorted({*self.ignore} & {*(self.colours or values)}, key=str)
        check(not both, f"data.ignore: {', '.join(map(str, both))} stands for a class, so it cannot be ignored")

    @property
    def palettes_by_colour(self) -> bool:
        """Whether a palette's colours stand for classes, and not its indices."""
        by_default = bool(self.colours) or self.threshold is not None  # a threshold is a grey level
        return by_default if self.masks_by == "auto" else self.masks_by == "colour"

    @property
    def of_new_masks(self) -> "Data":
        """How the filter's own masks are read: the index of each class, 255 without one."""
        return replace(self, mask_values=tuple(range(len(self.classes))), colours=(), masks_by="index", threshold=None,
                       ignore=(255,))

    @property
    def list_folder(self) -> Path:
        """The folder of tiles.csv, the packed store and the filter's report."""
        return Path(self.cache or self.root)


@dataclass(frozen=True)
class Filter:
    """Limits of the report's section 3.2 (1 % rule, Algorithm 1), and of filtering/audit.py. `off` means no limit."""

    min_foreground: float = 0.01  # below this share of non-background a tile is sparse
    sigma: float = 10.0  # pixels, the Gaussian that closes the gaps in tissue
    blank_intensity: float = 40.0  # smoothed inverted grey below this (of 255) is glass
    blank_reference: Literal["absolute", "maximum"] = "absolute"  # 255 (the text) or the tile's maximum (the code)
    max_blank: float | None = 0.075  # misregistered: a tile with at least this share of glass in its annotated tissue
    max_unmarked: float | None = None  # unmarked: at least this share of the tile is tissue that the mask leaves out
    max_shift: float | None = None  # shifted: a corner of the mask is off by at least these pixels, with min_confidence
    min_confidence: float = 0.25  # a shift with less confidence is ignored
    max_disagreement: float | None = None  # disputed: a model (--model) is sure of other classes in this share
    sure: float = 0.9  # probability from which a model is sure of a class
    drop_duplicates: bool = False  # keep only the first of the tiles that show the same image
    repair: bool = False  # give a tile that the limits drop for its mask a repaired mask, if possible
    relabel: bool = False  # give one that cannot be repaired what a model (--model) predicts, never in the test set
    max_ignored: float = 0.5  # a new mask that takes the class of more than this share of a mask's pixels is no repair

    def __post_init__(self):
        for name in ("min_foreground", "min_confidence", "max_blank", "max_unmarked", "max_disagreement", "sure",
                     "max_ignored"):
            value = getattr(self, name)
            or_off = ", or off" if getattr(Filter, name) is None or name == "max_blank" else ""
            check(value is None or 0 <= value <= 1, f"filter.{name} must be a share from 0 to 1{or_off}; it is {value}")
        check(not self.relabel or self.sure > 0.5, "filter.relabel needs filter.sure above 0.5; it is "
              f"{self.sure}")
        check(self.sigma > 0, f"filter.sigma must be positive; it is {self.sigma}")
        check(0 <= self.blank_intensity <= 255, "filter.blank_intensity must be a grey level from 0 to 255; it is "
              f"{self.blank_intensity}")
        check(self.max_shift is None or self.max_shift >= 0, "filter.max_shift must be a number of pixels, or off; it "
              f"is {self.max_shift}")

    @property
    def makes_masks(self) -> bool:
        return self.repair or self.relabel


@dataclass(frozen=True)
class Augment:
    """How training crops are varied (training/augmentation.py); the default is the flips of section 5.1.1.

    Numbers are the largest change. Each crop draws its own from the whole range; 0 is off.
    """

    flips: bool = True  # upside down, and left and right swapped, each for half of the crops
    right_angles: bool = False  # rows and columns swapped for half of the crops; with flips, the 8 turns and flips
    rotate: float = 0.0  # degrees, to either side
    scale: float = 0.0  # 0.25: from 1/1.25 to 1.25 times as large
    elastic: float = 0.0  # pixels, deviation of the moves of 3 x 3 points (Ronneberger et al. 2015: 10)
    stain: float = 0.0  # haematoxylin and eosin (Tellez et al. 2019: 0.05 is light, 0.2 strong)
    brightness: float = 0.0  # 0.2: from 0.8 to 1.2 times as bright
    contrast: float = 0.0  # 0.2: from 0.8 to 1.2 times the contrast
    blur: float = 0.0  # pixels, sigma of a Gaussian
    noise: float = 0.0  # grey levels of 255, deviation

    def __post_init__(self):
        for name, most in (("rotate", 180), ("scale", 1), ("elastic", 100), ("stain", 0.9), ("brightness", 0.9),
                           ("contrast", 0.9), ("blur", 10), ("noise", 100)):
            value = getattr(self, name)
            check(0 <= value <= most, f"augment.{name} must lie between 0 and {most}; it is {value}")

    @property
    def needs_views(self) -> bool:
        """Whether crops are changed by more than flips and right angles."""
        return any(value for value in vars(self).values() if not isinstance(value, bool))


@dataclass(frozen=True)
class Model:
    """The U-Net of section 4.2."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 512)  # channels of each level
    dropout: float = 0.5

    def __post_init__(self):
        check(len(self.widths) >= 1 and all(width >= 1 for width in self.widths),
              f"model.widths must be a positive number of channels for each level; it is {list(self.widths)}")
        check(0 <= self.dropout < 1, f"model.dropout must be a probability below 1; it is {self.dropout}")

    @property
    def multiple(self) -> int:
        """The network takes heights and widths that are multiples of this: each level but the first halves them."""
        return geometry.multiple(len(self.widths))


@dataclass(frozen=True)
class Loss:
    """One of the losses of section 6.1, or a robust one, and what becomes of the borders of classes (losses.py)."""

    name: Literal["ce", "wce", "dice", "dice_ce", "log_dice_ce", "gce"] = "dice_ce"
    q: float = 0.7  # of gce: near 0 it is the cross-entropy, at 1 wrong labels count least
    border: int = 0  # pixels; labels as near as this to another class are treated as `border_as` says
    border_as: Literal["ignore", "soften"] = "ignore"

    def __post_init__(self):
        check(0 < self.q <= 1, f"loss.q must be above 0 and at most 1; it is {self.q}")
        check(self.border >= 0, f"loss.border must be a number of pixels; it is {self.border}")
        check(self.q == Loss.q or self.name == "gce", f"loss.q={self.q} has no effect on loss.name={self.name}; leave "
              "it out, or set loss.name=gce")
        check(self.border_as == Loss.border_as or self.border, f"loss.border_as={self.border_as} has no effect without "
              "a border; leave it out, or set loss.border=2, for example")


@dataclass(frozen=True)
class Optim:
    """Adam and ReduceLROnPlateau of sections 5.1.3 and 5.2; `ema` is alpha of equation 1."""

    lr: float = 5e-4
    weight_decay: float = 3e-5
    factor: float = 0.2
    patience: int = 5
    min_lr: float = 1e-6
    ema: float = 0.9

    def __post_init__(self):
        check(self.lr > 0, f"optim.lr must be positive; it is {self.lr}")
        for name in ("weight_decay", "patience", "min_lr"):
            check(getattr(self, name) >= 0, f"optim.{name} must not be negative; it is {getattr(self, name)}")
        check(0 < self.factor < 1, f"optim.factor must lie between 0 and 1; it is {self.factor}")
        check(0 <= self.ema < 1, f"optim.ema must lie in [0, 1); it is {self.ema}")


@dataclass(frozen=True)
class Train:
    """How long training lasts and what an epoch consists of (sections 5.1.2 and 5.2)."""

    scheme: Literal["kfold", "plain"] = "kfold"  # k models in each epoch, or one that a fixed fold validates
    epochs: int = 250
    folds: int = 5
    images_per_epoch: int = 4000
    batch_size: int = 16
    early_stop: int = 50  # epochs without a new minimum of the survivor's validation loss
    precision: Literal["auto", "bf16", "float32"] = "auto"
    compile: bool = False  # torch.compile, with CUDA graphs on a GPU
    leave_out: str = ""  # j/k: do not learn from part j of k of the groups (tools/cross_fit.py); "" = learn from all

    def __post_init__(self):
        part, _, parts = self.leave_out.partition("/")
        check(not self.leave_out or (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts) >= 2),
              f"train.leave_out must be such as 2/5, the second of five parts; it is '{self.leave_out}'")
        for name, least in (("epochs", 1), ("folds", 2), ("images_per_epoch", 1), ("batch_size", 1), ("early_stop", 1)):
            check(getattr(self, name) >= least, f"train.{name} must be at least {least}; it is {getattr(self, name)}")
        check(self.images_per_epoch % self.folds == 0, f"train.images_per_epoch ({self.images_per_epoch}) must be a "
              f"multiple of train.folds ({self.folds}), so that all folds have one size")

    @property
    def is_plain(self) -> bool:
        """Whether one model is trained, which the first of fixed folds validates."""
        return self.scheme == "plain"

    @property
    def models(self) -> int:
        """The number of models that are trained in an epoch."""
        return 1 if self.is_plain else self.folds

    @property
    def images(self) -> int:
        """The number of images that the models of an epoch see, to learn or to be validated."""
        return self.models * self.images_per_epoch


@dataclass(frozen=True)
class Config:
    """One experiment. `name` is the run's folder below runs/; by default it is the name of the config file."""

    name: str = "default"
    seed: int = 0
    device: str = "auto"  # auto = CUDA, else MPS, else CPU
    data: Data = field(default_factory=Data)
    filter: Filter = field(default_factory=Filter)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)

    def __post_init__(self):
        check(re.fullmatch(r"[\w.+-]+", self.name) is not None and set(self.name) != {"."},
              f"name must be a folder's name of letters, digits, '_', '-', '+' and '.'; it is '{self.name}'")
        check(0 <= self.seed < 2**32, f"seed must lie between 0 and 2^32 - 1; it is {self.seed}")
        levels, multiple, crop = len(self.model.widths), self.model.multiple, self.data.crop
        check(crop % multiple == 0, f"data.crop ({crop}) must be a multiple of {multiple}, because model.widths has "
              f"{levels} levels; try {max(1, crop // multiple) * multiple}")
        check(crop >= 2 * multiple, f"data.crop ({crop}) leaves the deepest of {levels} levels a single pixel; use at "
              f"least {2 * multiple}, or fewer model.widths")
