"""The settings of an experiment: a tree of frozen dataclasses whose defaults are the report's section 5.2.

    configs/ce.yaml                 holds only what differs from the defaults below
    loss.name=dice optim.lr=1e-3    overrides it on the command line

Whatever the tree does not know, or cannot hold, is refused: the error names key, file and the nearest known name.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from common.console import UserError


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class Data:
    """Where the tiles lie, what the masks' greys mean, how tiles are grouped and cut. Paths are relative to `root`."""

    root: str = "data/crc"
    images: str = "frames/frame#{key}.png"
    masks: str = "masks/mask#{key}.png"
    classes: tuple[str, ...] = ("background", "tissue", "tumour")  # the first one is the background
    greys: tuple[int, ...] = (26, 51, 77)  # a mask's value for each class
    group: str = ""  # regular expression on the key that finds the slide or patient; "" = every tile for itself
    test_fraction: float = 0.2
    crop: int = 256  # pixels, the side of a training window

    def __post_init__(self):
        for name in ("images", "masks"):
            pattern = getattr(self, name)
            _check(not {"", ".", ".."} & set(pattern.split("/")) and "\\" not in pattern, f"data.{name} must be a "
                   f"plain path below data.root, such as frames/frame#{{key}}.png; it is '{pattern}'")
            _check(pattern.count("{key}") == 1, f"data.{name} must contain {{key}} exactly once, "
                   f"e.g. frames/frame#{{key}}.png; it is '{pattern}'")
        _check(len(self.classes) >= 2, f"data.classes needs at least two names, it has {len(self.classes)}")
        _check(len(set(self.classes)) == len(self.classes), "data.classes names a class twice")
        for name, meaning in (("mean", "the average over classes"), ("all", "all classes together")):
            _check(name not in self.classes, f"data.classes: '{name}' names {meaning}; choose another name")
        _check(len(self.greys) == len(self.classes), f"data.greys needs one value for each of the {len(self.classes)} "
               f"classes, it has {len(self.greys)}")
        _check(len(set(self.greys)) == len(self.greys) and all(0 <= grey <= 255 for grey in self.greys),
               f"data.greys must be different values from 0 to 255; they are {list(self.greys)}")
        _check(0 < self.test_fraction < 1, f"data.test_fraction must lie between 0 and 1; it is {self.test_fraction}")
        _check(self.crop >= 1, f"data.crop must be a number of pixels; it is {self.crop}")
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
            _check(0 <= value <= 1, f"filter.{name} is a share from 0 to 1; it is {value}")
        _check(self.sigma > 0, f"filter.sigma must be positive; it is {self.sigma}")
        _check(0 <= self.blank_intensity <= 255, f"filter.blank_intensity is a grey from 0 to 255; it is "
               f"{self.blank_intensity}")
        for name in ("max_blank", "max_unmarked"):
            value = getattr(self, name)
            _check(value is None or 0 <= value <= 1, f"filter.{name} is a share from 0 to 1, or off; it is {value}")
        _check(self.max_shift is None or self.max_shift >= 0, "filter.max_shift is a number of pixels, or off; it is "
               f"{self.max_shift}")


@dataclass(frozen=True)
class Model:
    """The U-Net of section 4.2."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 512)  # channels of each level
    dropout: float = 0.5

    def __post_init__(self):
        _check(len(self.widths) >= 1 and all(width >= 1 for width in self.widths),
               f"model.widths needs a positive number of channels for each level; it is {list(self.widths)}")
        _check(0 <= self.dropout < 1, f"model.dropout is a probability below 1; it is {self.dropout}")

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
        _check(self.lr > 0, f"optim.lr must be positive; it is {self.lr}")
        _check(self.weight_decay >= 0, f"optim.weight_decay must not be negative; it is {self.weight_decay}")
        _check(0 < self.factor < 1, f"optim.factor must lie between 0 and 1; it is {self.factor}")
        _check(self.patience >= 0, f"optim.patience is a number of epochs; it is {self.patience}")
        _check(self.min_lr >= 0, f"optim.min_lr must not be negative; it is {self.min_lr}")
        _check(0 <= self.ema < 1, f"optim.ema must lie in [0, 1); it is {self.ema}")


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
            _check(getattr(self, name) >= 1, f"train.{name} must be at least 1; it is {getattr(self, name)}")
        _check(self.folds >= 2, f"train.folds must be at least 2; it is {self.folds}")
        _check(self.images_per_epoch % self.folds == 0, f"train.images_per_epoch ({self.images_per_epoch}) must be a "
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
        _check(re.fullmatch(r"[\w.+-]+", self.name) is not None and set(self.name) != {"."},
               f"name must be a folder's name of letters, digits, '_', '-', '+' and '.'; it is '{self.name}'")
        _check(0 <= self.seed < 2**32, f"seed must lie between 0 and 2^32 - 1; it is {self.seed}")
        multiple, crop = self.model.multiple, self.data.crop
        _check(crop % multiple == 0, f"data.crop ({crop}) must be a multiple of {multiple}, since model.widths has "
               f"{len(self.model.widths)} levels: try {max(1, crop // multiple) * multiple}")
        _check(crop >= 2 * multiple, f"data.crop ({crop}) leaves the deepest of {len(self.model.widths)} levels a "
               f"single pixel: use at least {2 * multiple}, or fewer model.widths")

    def to_yaml(self) -> str:
        return yaml.safe_dump(to_dict(self), sort_keys=False, allow_unicode=True)


def to_dict(config: Any) -> dict:
    """Nested dicts, lists, strings and numbers: the inverse of `from_dict`."""
    return {key: to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple)
            else value for key, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))}


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as ("section.key", value)."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def from_dict(values: dict, source: str) -> Config:
    """Build a `Config` from nested dicts; `source` is named in errors."""
    try:
        return _build(Config, values, "")
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides."""
    path = Path(path)
    values = _read_yaml(path)
    values.setdefault("name", path.stem)
    return apply_overrides(from_dict(values, str(path)), overrides)


def apply_overrides(config: Config, overrides: Iterable[str], allowed: Sequence[str] = ()) -> Config:
    """A copy of `config` with each `section.key=value` replaced; only the keys `allowed`, where any are named."""
    values, kinds = to_dict(config), dict(_leaves(Config))
    for override in overrides:
        name, separator, text = override.partition("=")
        _check(bool(separator), f"'{override}' is neither an option nor an override of the form section.key=value")
        if name not in kinds:
            raise UserError(f"command line: {_unknown(name)}")
        if allowed and name not in allowed:
            raise UserError(f"command line: {name} belongs to what was trained; here only {', '.join(allowed)} may "
                            "change. For another setting start a new run with name=NAME")
        *section, key = name.split(".")
        target = values[section[0]] if section else values
        try:
            as_text = kinds[name] is str or _is_literal(kinds[name])
            target[key] = text if as_text else yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"command line: {name}: cannot read the value '{text}'") from None
    return from_dict(values, "command line" if overrides else "config")


class _Loader(yaml.SafeLoader):
    """PyYAML without its surprises: a key that stands twice is an error, and 010, 1:30 and 1_0 are no numbers.

    PyYAML keeps the last of duplicate keys without a word, and reads these three as 8, 90 and 10 (YAML 1.1). Numbers
    but whole ones stay text here: `_convert` reads them, which knows what a setting is to be.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"line {key_node.start_mark.line + 1}: a key must be a plain word")
            if key_node.value in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: key '{key_node.value}' stands twice; remove one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none"
        raise UserError(f"{path}: no such config file (in its folder: {known})")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist, bytes that are no text
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    _check(values is None or isinstance(values, dict), f"{path}: expected 'key: value' lines, found {values!r}")
    return values or {}


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _unknown(name: str) -> str:
    known = [leaf for leaf, _ in _leaves(Config)]
    same_ending = [leaf for leaf in known if leaf.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same_ending or difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "common/config.py lists all that there are"
    return f"unknown key '{name}'; {hint}"


def _build(cls: type, values: Any, prefix: str) -> Any:
    _check(isinstance(values, dict), f"'{prefix.rstrip('.')}' is a section: expected keys below it, found {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(_unknown(f"{prefix}{key}"))
    return cls(**{key: _build(hints[key], value, f"{prefix}{key}.") if dataclasses.is_dataclass(hints[key])
                  else _convert(hints[key], value, prefix + key) for key, value in values.items()})


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is Literal


def _convert(kind: Any, value: Any, name: str) -> Any:
    """`value` as `kind`, or a `UserError`: nothing is rounded, truncated or guessed."""
    if _is_literal(kind):
        allowed = typing.get_args(kind)
        near = difflib.get_close_matches(str(value), allowed, n=1)
        _check(value in allowed, f"{name} must be one of {', '.join(allowed)}; it is {value!r}"
               + (f" (did you mean '{near[0]}'?)" if near else ""))
        return value
    if isinstance(kind, types.UnionType):  # float | None
        off = value is None or value is False or value == "none"  # YAML 1.1 reads `off` as false
        return None if off else _convert(typing.get_args(kind)[0], value, name)
    if isinstance(kind, types.GenericAlias):
        _check(isinstance(value, list | tuple), f"{name} must be a list such as [1, 2]; it is {value!r}")
        return tuple(_convert(typing.get_args(kind)[0], item, name) for item in value)
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, str):  # as a file or the command line has it
            is_number = re.fullmatch(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", value) is not None
        _check(is_number and abs(float(value)) < float("inf"), f"{name} must be a number; it is {value!r}")
        return float(value)
    wanted = {int: "a whole number", str: "text (in YAML put it in quotes)", bool: "true or false"}[kind]
    _check(type(value) is kind, f"{name} must be {wanted}; it is {value!r}")
    return value
