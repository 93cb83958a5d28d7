"""Read a plan: which settings are trained with which seeds, and which of them are compared."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.config import Config
from common.config_files import leaves, load_config, read_yaml
from common.console import UserError, check

PLANS = Path("configs/results")
NOT_SETTINGS = ("name", "seed", "device", "data.root", "data.cache")  # what a row may be without being another one
KNOWN = {"title": str, "config": str, "settings": str, "seeds": list, "merge": list, "data": str, "rows": dict,
         "comparisons": dict}


@dataclass(frozen=True)
class Run:
    """One training of a row."""

    config: Config
    arguments: tuple[str, ...]  # of train.py

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def folder(self) -> Path:
        return Path("runs") / self.name


@dataclass(frozen=True)
class Comparison:
    """Rows that are compared with the first of them."""

    name: str
    question: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The contents of a file such as configs/results/demo.yaml."""

    name: str
    path: Path
    title: str
    config: str  # the file that all rows begin with
    settings: str  # of all rows
    seeds: tuple[int, ...]
    rows: dict[str, str]  # the settings of each row, after those of all
    comparisons: tuple[Comparison, ...]
    merge: tuple[str, ...] = ()  # --merge of evaluate.py
    data: str = ""  # the command that makes the tiles

    @property
    def word(self) -> str:
        """What `load_plan` takes to find it."""
        return self.name if self.path == PLANS / self.path.name else str(self.path)

    def run(self, row: str, seed: int) -> Run:
        own = f"{self.settings} {self.rows[row]} seed={seed} name={self.name}-{row}-seed{seed}"
        arguments = ("--config", self.config, *shlex.split(own))
        return Run(load_config(self.config, arguments[2:]), arguments)

    @cached_property
    def runs(self) -> dict[str, list[Run]]:
        """The runs of each row, one for each seed."""
        return {row: [self.run(row, seed) for seed in self.seeds] for row in self.rows}

    def settings_of(self, row: str) -> dict[str, Any]:
        """Return what differs from the defaults of common/config.py, as config.yaml writes it."""
        defaults = dict(leaves(Config()))
        return {name: list(value) if isinstance(value, tuple) else value
                for name, value in leaves(self.runs[row][0].config)
                if value != defaults[name] and name not in NOT_SETTINGS}


def load_plan(name: str) -> Plan:
    """Read the plan of a name, such as demo, or a YAML file. Raise a `UserError` for what does not fit."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PLANS / f"{name}.yaml"
    values = read_yaml(path)
    for key, value in values.items():
        check(key in KNOWN, f"{path}: unknown key '{key}'; a plan has {', '.join(KNOWN)}")
        check(isinstance(value, KNOWN[key]), f"{path}: {key} must be a {KNOWN[key].__name__}; it is {value!r}")
    for key in ("config", "rows", "comparisons"):
        check(bool(values.get(key)), f"{path}: {key} is missing; configs/results/demo.yaml is an example")
    seeds = tuple(values.get("seeds", [0, 1, 2]))
    check(bool(seeds) and len(set(seeds)) == len(seeds) and all(isinstance(seed, int) for seed in seeds),
          f"{path}: seeds must be different whole numbers; it is {list(seeds)}")
    rows = {str(row): settings or "" for row, settings in values["rows"].items()}
    for row in rows:
        check(re.fullmatch(r"[\w.+-]+", row) is not None, f"{path}: rows: '{row}' must be letters, digits, _, -, +, .")
    comparisons = tuple(_comparison(path, name, found, rows) for name, found in values["comparisons"].items())
    plan = Plan(path.stem, path, values.get("title", path.stem), values["config"], values.get("settings") or "", seeds,
                rows, comparisons, tuple(values.get("merge", ())), values.get("data", ""))
    try:
        _reject_equal_rows(plan)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return plan


def _comparison(path: Path, name: str, values: Any, rows: Sequence[str]) -> Comparison:
    check(isinstance(values, dict) and {*values} == {"question", "rows"} and bool(values["rows"]),
          f"{path}: comparisons: {name} must have a question and rows")
    for row in values["rows"]:
        check(row in rows, f"{path}: comparisons: {name}: there is no row '{row}'; rows are {', '.join(rows)}")
    return Comparison(str(name), values["question"], tuple(values["rows"]))


def _reject_equal_rows(plan: Plan) -> None:
    """Also reads the settings of every row."""
    found: dict[str, str] = {}
    for row, (first, *_) in plan.runs.items():
        other = found.setdefault(repr([*leaves(first.config)][2:]), row)
        check(other == row, f"rows: {other} and {row} have the same settings; use one of them in all comparisons")
