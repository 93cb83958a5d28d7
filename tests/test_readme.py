"""The documentation is true: commands parse, links lead somewhere, settings, files and modules exist, diffs apply."""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import REPOSITORY
from torch.distributed.run import get_args_parser as torchrun_parser

from common.config import Config
from train import configs_of_seeds

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md",
         *sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").glob("*.md"))]
FOLDERS = ("common", "filtering", "training", "evaluation", "fields", "tools")
SCRIPTS = ("data_filter", "train", "evaluate", "receptive_field", "tools.make_demo_data", "tools.cross_fit",
           "tools.benchmark.__main__", "tools.results.__main__", "tools.show_field", "tools.other_networks")
MOST_LINES, MOST_LETTERS = 220, 120  # of the README; of a line outside tables and blocks
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:python3?|make|pip|ruff|pytest|pre-commit) ")
SETTING = re.compile(r"((?:data|train|optim|model|loss|filter)\.(?!py\b)\w+)(=.*)?")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"[\w{}.-]+\.(?:py|yaml|yml|toml|txt|md|cff|html|csv|json|png|jpg|pt|u8)")


@cache
def text(file: str) -> str:
    return (REPOSITORY / file).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """The page without its blocks."""
    return BLOCK.sub("", text(page))


def codes_in(prose: str) -> list[str]:
    """What stands in backticks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def codes(page: str) -> list[str]:
    return codes_in(prose(page))


def settings_in(prose: str) -> list[str]:
    return [code for code in codes_in(prose) if SETTING.fullmatch(code)]


def commands(page: str) -> list[str]:
    lines = [line.strip() for kind, block in BLOCK.findall(text(page)) if not kind for line in block.splitlines()]
    return [line for line in [*lines, *codes(page)] if COMMAND.match(line)]


def headings(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


# ---------------------------------------------------------------------------------------------- commands

class Parsed(Exception):
    """Ends a script's `main` as soon as its parser has read the arguments."""


@pytest.fixture
def parse(monkeypatch, tmp_path) -> Callable[[str, list[str]], tuple[argparse.ArgumentParser, argparse.Namespace]]:
    """Let a module's own parser read the words of a command line: the parser and what it read."""
    def stopping(original):
        def parse_and_stop(self, *arguments):
            raise Parsed(self, original(self, *arguments))
        return parse_and_stop

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
    monkeypatch.chdir(tmp_path)  # nothing is written into the repository, whatever happens

    def call(module, words):
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(module).main()
        return parsed.value.args
    return call


def test_there_are_commands():
    assert {"make demo", "python train.py --resume runs/mine"} <= set(commands("README.md"))
    assert sum(len(commands(page)) for page in PAGES) >= 40


@pytest.mark.parametrize("page, command", [pytest.param(page, command, id=f"{page}: {command}") for page in PAGES
                                           for command in dict.fromkeys(commands(page))])
def test_a_command_parses(page, command, parse):
    words = shlex.split(command)
    while "=" in words[0]:  # an environment variable
        words.pop(0)
    program, *words = words
    if program.startswith("python"):
        script = words.pop(0) if words[0] != "-m" else words[1]
        program, words = script, words if script.endswith(".py") else words[2:]
    if program.endswith(".py") or program.startswith("tools."):
        module = program.removesuffix(".py") if program.endswith(".py") else program
        package = (REPOSITORY / module.replace(".", "/")).is_dir()
        _, read = parse(f"{module}.__main__" if package else module, words)
        settings = [word for word in words if re.match(r"[\w.]+=", word) and word not in getattr(read, "merge", ())]
        assert set(settings) <= {*getattr(read, "overrides", ()), *getattr(read, "runs", ())}
        configs_of_seeds(REPOSITORY / (getattr(read, "config", None) or "configs/dice_ce.yaml"), settings)
    elif program in ("pytest", "ruff"):
        markers = re.findall(r'^    "(\w+):', text("pyproject.toml"), re.MULTILINE)
        assert all(word in markers for option, word in pairwise(words) if option == "-m")
        assert all((REPOSITORY / word).exists() for word in words if "/" in word)
    elif program == "make":
        assert len(words) == 1 and re.search(rf"^{words[0]}:", text("Makefile"), re.MULTILINE)
    elif program == "pip":
        assert words[:2] == ["install", "-r"] and (REPOSITORY / words[2]).is_file()
    else:
        assert [program, *words] in (["venv", ".venv"], ["pre-commit", "install"])


def test_the_benchmark_knows_what_the_pages_ask_for(parse):
    from tools.benchmark.__main__ import benchmarks

    asked = {name for page in PAGES for command in commands(page) if "tools.benchmark" in command
             for name in parse("tools.benchmark.__main__", shlex.split(command)[3:])[1].only or ()}
    assert asked and asked <= set(benchmarks("cpu"))


def test_options_exist(parse):
    known = {"--ignore", *torchrun_parser()._option_string_actions}  # of pytest and torchrun
    known |= set(re.findall(r"^#SBATCH (--[\w-]+)", text("slurm/train.sbatch"), re.MULTILINE))
    for module in SCRIPTS:
        known |= set(parse(module, {"data_filter": ["--config", "x"], "train": ["--config", "x"],
                                    "tools.make_demo_data": ["x"],
                                    "tools.cross_fit": ["--config", "x"],
                                    "tools.show_field": ["--out", "x"],
                                    "tools.other_networks": ["smp-resnet18", "--config", "x"],
                                    "tools.results.__main__": ["x"]}.get(module, []))[0]._option_string_actions)
    named = {(page, option) for page in PAGES for code in codes(page)
             for option in re.findall(r"(?:^|\s)(--[a-z][\w-]*)", code)}
    assert len(named) >= 20
    assert not {(page, option) for page, option in named if option not in known}


NEEDED = {"loss.q": "loss.name=gce", "loss.border_as": "loss.border=1"}  # settings that others have no effect without


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page):
    """The settings in a row of a table belong together; those of the text stand alone."""
    lines = prose(page).splitlines()
    rows = [settings_in(line) for line in lines if line.startswith("|")]
    alone = settings_in("\n".join(line for line in lines if not line.startswith("|")))
    for together in [*rows, *([code] for code in alone)]:
        values = [code for code in together if "=" in code and "..." not in code]
        values += [needed for name, needed in NEEDED.items() if any(code.startswith(f"{name}=") for code in values)]
        configs_of_seeds(REPOSITORY / "configs/dice_ce.yaml", values)
        for code in together:
            section, _, name = SETTING.fullmatch(code)[1].partition(".")
            assert hasattr(getattr(Config(), section), name) or code == "data.greys", code  # the old name


# ---------------------------------------------------------------------------------------------- links and files

@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not re.match(r"https?://", link):
            path, _, anchor = link.partition("#")
            target = ((REPOSITORY / page).parent / path).resolve() if path else REPOSITORY / page
            assert target.exists() and target.is_relative_to(REPOSITORY), link
            assert not anchor or anchor in headings(target.relative_to(REPOSITORY).as_posix()), link


@cache
def sources() -> str:
    """The scripts and what they import."""
    paths = [*REPOSITORY.glob("*.py"), *(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


@cache
def written() -> list[re.Pattern]:
    """The names of files in the sources; {...} and words in capitals stand for anything, but not for all of a name."""
    forms = [re.sub(r"\\\{[^}]*\\\}|(?<![A-Za-z])[A-Z]{3,}(?![A-Za-z])", ".+", re.escape(name))
             for name in set(FILE.findall(sources()))]
    return [re.compile(form) for form in forms if not form.startswith(".+")]


def exists(name: str, page: str) -> bool:
    """Whether a file or folder in backticks is in the repository, or is one that the scripts write."""
    path = Path(name)
    places = [REPOSITORY, (REPOSITORY / page).parent, *(REPOSITORY / folder for folder in FOLDERS)]
    if any((place / name).exists() for place in places):
        return True
    if name.endswith("/"):
        return f'"{path.name}"' in sources() or f"{path.name}/" in sources()
    top = name.partition("/")[0]
    is_code = path.suffix == ".py" or (top not in (name, "data", "runs") and (REPOSITORY / top).is_dir())
    return not is_code and any(form.fullmatch(path.name) for form in written())


@pytest.mark.parametrize("page", PAGES)
def test_files_in_backticks_exist(page):
    for code in codes(page):
        is_name = re.fullmatch(r"[\w./-]+", code) and not re.search(r"KEY|NAME|RUN|mine", code)  # which readers choose
        if is_name and (FILE.fullmatch(Path(code).name) or re.fullmatch(r"[\w-]+/", code)):
            assert exists(code, page), code


# ---------------------------------------------------------------------------------------------- form

def test_the_readme_is_short():
    assert len(text("README.md").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page):
    assert not [line for line in prose(page).splitlines() if len(line) > MOST_LETTERS and not line.startswith("|")]


def layout() -> dict[str, str]:
    """What the README's layout says of each folder, and under "" of the root."""
    section = re.search(r"^## Layout\n(.*?)^## ", text("README.md"), re.MULTILINE | re.DOTALL)[1]
    entries = {"": ""}
    for entry in re.split(r"^- ", section, flags=re.MULTILINE):
        folder = re.match(r"\[(\w+)/\]\(\1\): ", entry)
        entries[folder[1] if folder else ""] = entry if folder else entries[""] + entry
    return entries


def test_the_layout_links_the_modules_of_the_root():
    for path in REPOSITORY.glob("*.py"):
        assert f"[{path.name}]({path.name})" in layout()[""]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_layout_names_the_modules_of_a_folder_and_no_others(folder):
    path = REPOSITORY / folder
    there = {file.name for pattern in ("[!_]*.py", "*.html") for file in path.glob(pattern)}
    there |= {f"{package.parent.name}/" for package in path.glob("*/__init__.py")}
    assert set(re.findall(r"`(\w+(?:\.\w+|/))`", layout()[folder])) == there


def test_every_config_is_in_the_table_of_results():
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        assert f"\n| [{path.stem}](configs/{path.name}) |" in text("README.md")


# ---------------------------------------------------------------------------------------------- diffs

def hunks(page: str) -> list[tuple[str, str]]:
    """(file, the lines that a hunk expects there) of the diffs on a page."""
    found = []
    for kind, block in BLOCK.findall(text(page)):
        for part in re.split(r"^--- a/", block, flags=re.MULTILINE)[1:] if kind == "diff" else []:
            header, *bodies = re.split(r"^@@\n", part, flags=re.MULTILINE)
            found += [(header.splitlines()[0], "\n".join(line[1:] for line in body.splitlines() if line[0] in " -"))
                      for body in bodies]
    return found


def test_there_are_diffs():
    assert len(hunks("CONTRIBUTING.md")) >= 15


@pytest.mark.parametrize("file, expected", hunks("CONTRIBUTING.md"))
def test_a_hunk_fits_its_file(file, expected):
    assert expected.strip() and f"\n{text(file)}".count(f"\n{expected}\n") == 1
