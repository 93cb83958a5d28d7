"""Read the settings of an experiment from a YAML file and the command line, and write them back.

    configs/ce.yaml                 holds only what differs from the defaults
    loss.name=dice optim.lr=1e-3    overrides it on the command line

An unknown key or a value that does not fit is an error that names the file, the key and the nearest known key.
"""

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from common.config import Config
from common.console import UserError, check, warn

RENAMED = {"data.greys": "data.mask_values"}  # settings of earlier versions and their names today


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides."""
    path = Path(path)
    values = read_yaml(path)
    values.setdefault("name", path.stem)
    return apply_overrides(from_dict(values, str(path)), overrides)


def apply_overrides(config: Config, overrides: Iterable[str], allowed: Sequence[str] | None = None) -> Config:
    """Return `config` with each `section.key=value` replaced. With `allowed`, any other setting is an error."""
    values, current = to_dict(config), dict(leaves(config))
    for override in overrides:
        name, separator, text = override.partition("=")
        check(bool(separator), f"'{override}' is neither an option nor an override of the form section.key=value")
        name = _current_name(name)
        if name not in current:
            raise UserError(f"command line: {_unknown(name)}")
        if allowed is not None and name not in allowed:
            raise UserError(f"command line: {name} belongs to what was trained; here only {', '.join(allowed)} may "
                            "change. To use another setting, start a new run with name=NAME")
        section, _, key = name.rpartition(".")
        target = values[section] if section else values
        try:
            target[key] = text if isinstance(current[name], str) else yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError):
            hint = "; write colours without #, such as 00ff00" if "#" in text else ""
            raise UserError(f"command line: {name}: cannot read the value '{text}'{hint}") from None
    return from_dict(values, "command line" if overrides else "config")


def to_yaml(config: Any) -> str:
    """Return the text of a YAML file that `load_config` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def to_dict(config: Any) -> dict:
    """Return nested dicts of lists, strings and numbers: the inverse of `from_dict`."""
    return asdict(config, dict_factory=lambda items: {
        key: list(value) if isinstance(value, tuple) else value for key, value in items})


def from_dict(values: dict, source: str) -> Config:
    """Build a `Config` from nested dicts; errors name `source`."""
    try:
        return _build(Config, values, "")
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting as ("section.key", value)."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


class _Loader(yaml.SafeLoader):
    """PyYAML, but a key that occurs twice is an error, and only plain whole numbers become numbers.

    PyYAML would keep the last of such keys and read 010 as 8 (YAML 1.1). `_convert` reads the other numbers, because it
    knows the types.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML declares it)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            check(isinstance(key_node, yaml.ScalarNode), f"line {line}: a key must be a plain word")
            check(key_node.value not in seen, f"line {line}: key '{key_node.value}' occurs twice; remove one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))


def read_yaml(path: Path) -> dict:
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none"
        raise UserError(f"{path}: no such config file (in its folder: {known})")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist, or bytes that are not text
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    check(values is None or isinstance(values, dict), f"{path}: expected 'key: value' lines, found {values!r}")
    return values or {}


@cache  # so that the warning appears once
def _current_name(name: str) -> str:
    """Return today's name of a setting, and warn if the given one is older."""
    if name in RENAMED:
        warn(f"the setting '{name}' is now called '{RENAMED[name]}'; the old name still works")
    return RENAMED.get(name, name)


def _unknown(name: str) -> str:
    known = [leaf for leaf, _ in leaves(Config())]
    same_ending = [leaf for leaf in known if leaf.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same_ending or difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "common/config.py lists all keys"
    return f"unknown key '{name}'; {hint}"


def _build(cls: type, values: Any, prefix: str) -> Any:
    """Build the dataclass `cls` from a dict; `prefix` is its place in the config, such as "data."."""
    check(isinstance(values, dict), f"'{prefix.rstrip('.')}' is a section: expected keys below it, found {values!r}")
    hints, settings = typing.get_type_hints(cls), {}
    for key, value in values.items():
        name = _current_name(f"{prefix}{key}")
        current_key = name.removeprefix(prefix)
        check(current_key == str(key) or current_key not in values,
              f"'{prefix}{key}' is the old name of '{name}', and both are given; remove it")
        if current_key not in hints:
            raise UserError(_unknown(name))
        expected = hints[current_key]
        settings[current_key] = (_build(expected, value, f"{name}.") if is_dataclass(expected) else
                                 _convert(expected, value, name))
    return cls(**settings)


def _convert(expected: Any, value: Any, name: str) -> Any:
    """Return `value` as the type `expected`, or raise a `UserError`: nothing is rounded, truncated or guessed."""
    form, arguments = typing.get_origin(expected), typing.get_args(expected)
    if form is Literal:
        near = difflib.get_close_matches(str(value), arguments, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        check(value in arguments, f"{name} must be one of {', '.join(arguments)}; it is {value!r}{hint}")
        return value
    if form is types.UnionType and types.NoneType not in arguments:  # int | str
        check(type(value) in arguments, f"{name} must be a whole number or text; it is {value!r}")
        return value
    if form is types.UnionType:  # float | None
        is_off = value is None or value is False or value == "none"  # YAML 1.1 reads `off` as false
        return None if is_off else _convert(arguments[0], value, name)
    if form is tuple:
        if typing.get_origin(arguments[0]) is types.UnionType and type(value) in typing.get_args(arguments[0]):
            value = [value]  # data.ignore=255
        check(isinstance(value, list | tuple), f"{name} must be a list such as [1, 2]; it is {value!r}")
        return tuple(_convert(arguments[0], item, name) for item in value)
    if expected is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, str):  # from a file or the command line, see `_Loader`
            is_number = re.fullmatch(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", value) is not None
        check(is_number and abs(float(value)) < float("inf"), f"{name} must be a number; it is {value!r}")
        return float(value)
    wanted = {int: "a whole number", str: "text (in YAML put it in quotes)", bool: "true or false"}[expected]
    check(type(value) is expected, f"{name} must be {wanted}; it is {value!r}")
    return value
