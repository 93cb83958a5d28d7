"""Read a plan: which settings are trained with which seeds, and which of them are compared."""

import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common.config import Config, Data
from common.config_files import apply_overrides, leaves, load_config, read_yaml
from common.console import UserError, check
from evaluation.arguments import MAY_CHANGE
from tools.other_networks import NETWORKS

PLANS = Path("configs/results")
NOT_SETTINGS = ("name", "seed", "device", "data.root", "data.cache")  # what a row may be without being another one
KNOWN = {"title": str, "config": str, "settings": str, "seeds": list, "merge": list, "test": str, "prepare": dict,
         "networks": dict, "rows": dict, "comparisons": dict}
SHOWN = ("curves", "predictions", "fields", "blank")  # what a comparison may show beside its scores


@dataclass(frozen=True)
class Run:
    """One training of a row."""

    config: Config
    arguments: tuple[str, ...]  # of train.py, or of tools.other_networks
    network: str = ""  # of another library (tools/other_networks.py); "" is ours

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
    labels: tuple[str, ...]  # what the page calls each row
    show: tuple[str, ...] = ()  # of `SHOWN`


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
    test: str = ""  # settings of tiles that are scored, all of them, in place of the test tiles of each run
    prepare: dict[str, list[str]] = field(default_factory=dict)  # folders, and the commands that make them
    networks: dict[str, str] = field(default_factory=dict)  # rows of networks of other libraries

    @property
    def word(self) -> str:
        """What `load_plan` takes to find it."""
        return self.name if self.path == PLANS / self.path.name else str(self.path)

    def run(self, row: str, seed: int) -> Run:
        own = f"{self.settings} {self.rows[row]} seed={seed} name={self.name}-{row}-seed{seed}"
        arguments = ("--config", self.config, *shlex.split(own))
        network = self.networks.get(row, "")
        if network and self.test:
            arguments = (*arguments, "--test", self.test)
        return Run(load_config(self.config, shlex.split(own)), arguments, network)

    @cached_property
    def runs(self) -> dict[str, list[Run]]:
        """The runs of each row, one for each seed."""
        return {row: [self.run(row, seed) for seed in self.seeds] for row in self.rows}

    def settings_of(self, row: str) -> dict[str, Any]:
        """Return what differs from the defaults of common/config.py, as config.yaml writes it."""
        defaults, network = dict(leaves(Config())), self.networks.get(row)
        return {name: list(value) if isinstance(value, tuple) else value
                for name, value in leaves(self.runs[row][0].config)
                if value != defaults[name] and name not in NOT_SETTINGS
                and not (network and name.startswith("model."))} | ({"network": network} if network else {})

    def tested(self, row: str) -> Data:
        """Return where the tiles lie on which a row is scored."""
        return apply_overrides(self.runs[row][0].config, shlex.split(self.test), allowed=MAY_CHANGE).data

    @property
    def test_words(self) -> list[str]:
        """What evaluate.py and receptive_field.py have to know of the tiles that are scored."""
        return ["--split", "all", *shlex.split(self.test)] if self.test else []


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
    networks, prepare = values.get("networks", {}), values.get("prepare", {})
    comparisons = tuple(_comparison(path, str(name), found, rows, networks)
                        for name, found in values["comparisons"].items())
    for row, network in networks.items():
        check(row in rows, f"{path}: networks: there is no row '{row}'; rows are {', '.join(rows)}")
        check(network in NETWORKS, f"{path}: networks: {row}: unknown network '{network}'; known are "
              f"{', '.join(NETWORKS)}")
    for folder, commands in prepare.items():
        check(isinstance(commands, list) and all(isinstance(each, str) for each in commands),
              f"{path}: prepare: {folder} must be a list of commands; it is {commands!r}")
    plan = Plan(path.stem, path, values.get("title", path.stem), values["config"], values.get("settings") or "", seeds,
                rows, comparisons, tuple(values.get("merge", ())), values.get("test") or "", prepare, networks)
    try:
        _reject_equal_rows(plan)
        plan.tested(next(iter(rows)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return plan


def _comparison(path: Path, name: str, values: Any, rows: Sequence[str], networks: Collection[str]) -> Comparison:
    where = f"{path}: comparisons: {name}"
    check(isinstance(values, dict) and {"question", "rows"} <= {*values} <= {"question", "rows", "show"}
          and bool(values["rows"]), f"{where} must have a question and rows, and may have show")
    found = values["rows"] if isinstance(values["rows"], dict) else {row: row for row in values["rows"]}
    for row in found.values():
        check(row in rows, f"{where}: there is no row '{row}'; rows are {', '.join(rows)}")
    others = [row in networks for row in found.values()]
    check(others == sorted(others), f"{where}: rows of other networks must come after all of ours")
    show = values.get("show", [])
    for part in show:
        check(part in SHOWN, f"{where}: show: unknown '{part}'; known are {', '.join(SHOWN)}")
    return Comparison(name, values["question"], tuple(found.values()), tuple(map(str, found)), tuple(show))


def _reject_equal_rows(plan: Plan) -> None:
    """Also reads the settings of every row."""
    found: dict[str, str] = {}
    for row, (first, *_) in plan.runs.items():
        other = found.setdefault(repr([first.network, *[*leaves(first.config)][2:]]), row)
        check(other == row, f"rows: {other} and {row} have the same settings; use one of them in all comparisons")
