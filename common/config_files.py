"""Settings from YAML files and the command line to `Config`, and back.

    configs/ce.yaml                 holds only what differs from the defaults
    loss.name=dice optim.lr=1e-3    overrides it on the command line

Unknown keys and values that do not fit are rejected: the error names the key, the file and the nearest known name.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from common.config import Config
from common.console import UserError, check, warn

RENAMED = {"data.greys": "data.mask_values"}  # settings of earlier versions, and what they are called today


def to_dict(config: Any) -> dict:
    """Nested dicts, lists, strings and numbers: the inverse of `from_dict`."""
    return {key: to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple)
            else value for key, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))}


def to_yaml(config: Any) -> str:
    """The text of a YAML file that `load_config` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


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
        check(bool(separator), f"'{override}' is neither an option nor an override of the form section.key=value")
        name = _current_name(name)
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
    check(values is None or isinstance(values, dict), f"{path}: expected 'key: value' lines, found {values!r}")
    return values or {}


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


@cache
def _current_name(name: str) -> str:
    """The name that a setting has today; says so once if an older one was used."""
    if name in RENAMED:
        warn(f"the setting '{name}' is now called '{RENAMED[name]}'; the old name still works")
    return RENAMED.get(name, name)


def _unknown(name: str) -> str:
    known = [leaf for leaf, _ in _leaves(Config)]
    same_ending = [leaf for leaf in known if leaf.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same_ending or difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "common/config.py lists all that there are"
    return f"unknown key '{name}'; {hint}"


def _build(cls: type, values: Any, prefix: str) -> Any:
    check(isinstance(values, dict), f"'{prefix.rstrip('.')}' is a section: expected keys below it, found {values!r}")
    hints = typing.get_type_hints(cls)
    for key in [key for key in values if f"{prefix}{key}" in RENAMED]:
        new = _current_name(f"{prefix}{key}").rpartition(".")[2]
        check(new not in values, f"'{prefix}{key}' is the old name of '{prefix}{new}', and both are given; remove it")
        values = {new if name == key else name: value for name, value in values.items()}
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
        check(value in allowed, f"{name} must be one of {', '.join(allowed)}; it is {value!r}"
              + (f" (did you mean '{near[0]}'?)" if near else ""))
        return value
    if isinstance(kind, types.UnionType):  # float | None
        off = value is None or value is False or value == "none"  # YAML 1.1 reads `off` as false
        return None if off else _convert(typing.get_args(kind)[0], value, name)
    if isinstance(kind, types.GenericAlias):
        check(isinstance(value, list | tuple), f"{name} must be a list such as [1, 2]; it is {value!r}")
        return tuple(_convert(typing.get_args(kind)[0], item, name) for item in value)
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, str):  # as a file or the command line has it
            is_number = re.fullmatch(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", value) is not None
        check(is_number and abs(float(value)) < float("inf"), f"{name} must be a number; it is {value!r}")
        return float(value)
    wanted = {int: "a whole number", str: "text (in YAML put it in quotes)", bool: "true or false"}[kind]
    check(type(value) is kind, f"{name} must be {wanted}; it is {value!r}")
    return value
