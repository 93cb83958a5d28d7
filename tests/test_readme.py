"""The README's commands exist and parse, its links lead somewhere, and its settings are settings."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from helpers import REPOSITORY

from common.config import load_config

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = sorted({line.strip() for block in BLOCKS for line in block.splitlines()
                   if re.match(r"(python|make|pip|ruff|pytest) ", line)} | set(re.findall(r"`(python [^`]+)`", README)))


ROOMS = ("common", "filtering", "training", "evaluation", "fields")


def test_there_are_commands():
    assert len(COMMANDS) >= 12 and {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    program, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        assert (REPOSITORY / words[-1]).is_file()
    elif program == "python" and words[0] == "-m":
        spec = importlib.util.find_spec(words[1])
        if spec.submodule_search_locations is not None:  # a package
            spec = importlib.util.find_spec(f"{words[1]}.__main__")
        source = spec.origin
        text = Path(source).read_text(encoding="utf-8")
        assert all(f'"{word}"' in text or word[2:] in text for word in words if word.startswith("--"))
    elif program == "python":
        source = (REPOSITORY / words[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
        overrides = [word for word in words if "=" in word]
        config = words[words.index("--config") + 1] if "--config" in words else "configs/dice_ce.yaml"
        load_config(REPOSITORY / config, overrides)


def test_settings_in_the_text_exist():
    settings = re.findall(r"`((?:data|train|optim|model|loss|filter)\.\w+=[^`]+)`", README)
    assert len(settings) >= 6
    load_config(REPOSITORY / "configs/dice_ce.yaml",
                [setting.replace("'", "") for setting in settings if "..." not in setting])


def test_links_lead_to_files_and_headings():
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("http"):
            assert (REPOSITORY / link).exists(), link


def test_the_layout_names_every_module():
    for path in [*REPOSITORY.glob("*.py"), *(path for room in ROOMS for path in (REPOSITORY / room).glob("[!_]*.py"))]:
        name = path.relative_to(REPOSITORY).as_posix()
        assert f"]({name})" in README


def test_every_config_is_in_the_table():
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        assert f"[{path.stem}](configs/{path.name})" in README
