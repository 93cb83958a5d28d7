"""Imports run one way: from the scripts to their folders, and from there to what all share."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import REPOSITORY

SCRIPTS = ("data_filter", "train", "evaluate", "receptive_field")
SHARED = {"common", "dataset", "unet", "losses"}
ARROWS = {  # room: the rooms that its files may import
    "common": {"common"},
    "dataset": {"common"},
    "unet": {"common"},
    "losses": {"common"},
    "filtering": {"common", "dataset", "filtering"},
    "training": SHARED | {"training"},
    "evaluation": SHARED | {"training", "evaluation"},
    "fields": SHARED | {"training", "evaluation", "fields"},
    "data_filter": {"common", "dataset", "filtering", "evaluation"},  # the last only with --model
    "train": SHARED | {"training"},
    "evaluate": SHARED | {"training", "evaluation"},
    "receptive_field": SHARED | {"training", "evaluation", "fields"},
}
ROOMS = [room for room in ARROWS if (REPOSITORY / room).is_dir()]
FILES = sorted([*REPOSITORY.glob("*.py"), *(path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))])


def name_of(path: Path) -> str:
    """The module's name, e.g. training.crops."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def statements(tree: ast.AST, with_types: bool):
    """All import statements, also those inside functions; those for type hints alone only `with_types`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif with_types or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from statements(node, with_types)


def imports_of(path: Path, with_types: bool = True) -> set[str]:
    """The modules of this repository that a file imports."""
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), with_types):
        assert not getattr(node, "level", 0), f"{path}: a relative import"
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {node.module}
    return {module for module in found if module in MODULES}


def test_the_root_holds_the_commands_and_what_all_of_them_share():
    assert {path.stem for path in REPOSITORY.glob("*.py")} == {*SCRIPTS, "dataset", "unet", "losses"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    room = module.partition(".")[0]
    for other in imports_of(MODULES[module]):
        assert other.partition(".")[0] in ARROWS[room], f"{module} imports {other}"


def test_no_module_imports_itself_through_others():
    graph = {module: imports_of(path, with_types=False) for module, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_imports_within_functions_and_of_submodules_are_seen(tmp_path):
    (tmp_path / "x.py").write_text("import dataset\ndef f():\n    from training import crops\n    import torch\n")
    assert imports_of(tmp_path / "x.py") == {"dataset", "training.crops"}


@pytest.mark.parametrize("script", ["data_filter", "dataset", "filtering.pipeline", "common.geometry"])
def test_the_filter_needs_no_torch(script):
    program = f"import {script}, sys; assert 'torch' not in sys.modules and 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def test_every_folder_says_what_it_is_for():
    for room in ROOMS:
        assert ast.get_docstring(ast.parse((REPOSITORY / room / "__init__.py").read_text(encoding="utf-8"))), room
