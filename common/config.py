"""The settings of an experiment: a tree of frozen dataclasses whose defaults are the report's section 5.2."""

import re
from dataclasses import dataclass, field
from typing import Literal

from common.console import UserError, check


@dataclass(frozen=True)
class Data:
    """Where the tiles lie, what the masks' greys mean, how tiles are grouped and cut. Paths are relative to `root`."""

    root: str = "data/crc"
    images: str = "frames/frame#{key}.png"
    masks: str = "masks/mask#{key}.png"
    classes: tuple[str, ...] = ("background", "tissue", "tumour")  # the first one is the background
    mask_values: tuple[int, ...] = (26, 51, 77)  # a mask's value for each class
    group: str = ""  # regular expression on the key that finds the slide or patient; "" = every tile for itself
    test_fraction: float = 0.2
    crop: int = 256  # pixels, the side of a training window

    def __post_init__(self):
        for name in ("images", "masks"):
            pattern = getattr(self, name)
            check(not {"", ".", ".."} & set(pattern.split("/")) and "\\" not in pattern, f"data.{name} must be a "
                  f"plain path below data.root, such as frames/frame#{{key}}.png; it is '{pattern}'")
            check(pattern.count("{key}") == 1, f"data.{name} must contain {{key}} exactly once, "
                  f"e.g. frames/frame#{{key}}.png; it is '{pattern}'")
        check(len(self.classes) >= 2, f"data.classes needs at least two names, it has {len(self.classes)}")
        check(len(set(self.classes)) == len(self.classes), "data.classes names a class twice")
        for name, meaning in (("mean", "the average over classes"), ("all", "all classes together")):
            check(name not in self.classes, f"data.classes: '{name}' names {meaning}; choose another name")
        values = self.mask_values
        check(len(values) == len(self.classes), f"data.mask_values needs one value for each of the {len(self.classes)} "
              f"classes, it has {len(values)}")
        check(len(set(values)) == len(values) and all(0 <= value <= 255 for value in values),
              f"data.mask_values must be different values from 0 to 255; they are {list(values)}")
        check(0 < self.test_fraction < 1, f"data.test_fraction must lie between 0 and 1; it is {self.test_fraction}")
        check(self.crop >= 1, f"data.crop must be a number of pixels; it is {self.crop}")
        try:
            re.compile(self.group)
        except re.error as error:
            raise UserError(f"data.group '{self.group}' is not a regular expression: {error}") from None


@dataclass(frozen=True)
class Filter:
    """The report's section 3.2, the 1 % rule and Algorithm 1, and limits for what filtering/audit.py adds.

    `off` is no limit.
    """

    min_foreground: float = 0.01  # below this share of non-background a tile is sparse
    sigma: float = 10.0  # pixels, the Gaussian that closes the gaps in tissue
    blank_intensity: float = 40.0  # smoothed inverted grey below this (of 255) is glass
    blank_reference: Literal["absolute", "maximum"] = "absolute"  # 255 (the text) or the tile's maximum (the code)
    max_blank: float | None = 0.075  # from this share of glass in the annotated tissue on, a tile is misregistered
    max_unmarked: float | None = None  # from this share of the tile that is tissue called background on: unmarked
    max_shift: float | None = None  # pixels; from this offset of the mask on, if it is certain, a tile is shifted
    min_confidence: float = 0.5  # from here on an offset is certain
    drop_duplicates: bool = False  # keep only the first of the tiles that show the same image

    def __post_init__(self):
        for name in ("min_foreground", "min_confidence"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"filter.{name} is a share from 0 to 1; it is {value}")
        check(self.sigma > 0, f"filter.sigma must be positive; it is {self.sigma}")
        check(0 <= self.blank_intensity <= 255, f"filter.blank_intensity is a grey from 0 to 255; it is "
              f"{self.blank_intensity}")
        for name in ("max_blank", "max_unmarked"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= 1, f"filter.{name} is a share from 0 to 1, or off; it is {value}")
        check(self.max_shift is None or self.max_shift >= 0, "filter.max_shift is a number of pixels, or off; it is "
              f"{self.max_shift}")


@dataclass(frozen=True)
class Model:
    """The U-Net of section 4.2."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 512)  # channels of each level
    dropout: float = 0.5

    def __post_init__(self):
        check(len(self.widths) >= 1 and all(width >= 1 for width in self.widths),
              f"model.widths needs a positive number of channels for each level; it is {list(self.widths)}")
        check(0 <= self.dropout < 1, f"model.dropout is a probability below 1; it is {self.dropout}")

    @property
    def multiple(self) -> int:
        """Heights and widths that the network takes are multiples of this: each level but the first halves them."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class Loss:
    """One of the losses of section 6.1 (losses.py)."""

    name: Literal["ce", "wce", "dice", "dice_ce", "log_dice_ce"] = "dice_ce"


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
        check(self.weight_decay >= 0, f"optim.weight_decay must not be negative; it is {self.weight_decay}")
        check(0 < self.factor < 1, f"optim.factor must lie between 0 and 1; it is {self.factor}")
        check(self.patience >= 0, f"optim.patience is a number of epochs; it is {self.patience}")
        check(self.min_lr >= 0, f"optim.min_lr must not be negative; it is {self.min_lr}")
        check(0 <= self.ema < 1, f"optim.ema must lie in [0, 1); it is {self.ema}")


@dataclass(frozen=True)
class Train:
    """How an epoch is cut and when training ends (sections 5.1.2 and 5.2)."""

    epochs: int = 250
    folds: int = 5
    images_per_epoch: int = 4000
    batch_size: int = 16
    early_stop: int = 50  # epochs without a new minimum of the survivor's validation loss
    precision: Literal["auto", "bf16", "float32"] = "auto"
    compile: bool = False  # torch.compile, with CUDA graphs on a GPU

    def __post_init__(self):
        for name in ("epochs", "images_per_epoch", "batch_size", "early_stop"):
            check(getattr(self, name) >= 1, f"train.{name} must be at least 1; it is {getattr(self, name)}")
        check(self.folds >= 2, f"train.folds must be at least 2; it is {self.folds}")
        check(self.images_per_epoch % self.folds == 0, f"train.images_per_epoch ({self.images_per_epoch}) must be a "
              f"multiple of train.folds ({self.folds}), so that all folds are of one size")


@dataclass(frozen=True)
class Config:
    """One experiment. `name` is the run's folder below runs/; where no file sets it, it is the file's own name."""

    name: str = "default"
    seed: int = 0
    device: str = "auto"  # auto = CUDA, else MPS, else CPU
    data: Data = field(default_factory=Data)
    filter: Filter = field(default_factory=Filter)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)

    def __post_init__(self):
        check(re.fullmatch(r"[\w.+-]+", self.name) is not None and set(self.name) != {"."},
              f"name must be a folder's name of letters, digits, '_', '-', '+' and '.'; it is '{self.name}'")
        check(0 <= self.seed < 2**32, f"seed must lie between 0 and 2^32 - 1; it is {self.seed}")
        multiple, crop = self.model.multiple, self.data.crop
        check(crop % multiple == 0, f"data.crop ({crop}) must be a multiple of {multiple}, since model.widths has "
              f"{len(self.model.widths)} levels: try {max(1, crop // multiple) * multiple}")
        check(crop >= 2 * multiple, f"data.crop ({crop}) leaves the deepest of {len(self.model.widths)} levels a "
              f"single pixel: use at least {2 * multiple}, or fewer model.widths")
