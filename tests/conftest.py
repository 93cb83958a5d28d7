"""Options and fixtures that several tests share."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import tiny_config, write_pairs

from common.workers import THREAD_VARIABLES


def pytest_addoption(parser):
    parser.addoption("--real-data", default=os.environ.get("CRC_REAL_DATA"), metavar="DIR",
                     help="folder with ebhi/ and report_tiles/ (default: CRC_REAL_DATA); without it those tests skip")


def pytest_xdist_setupnodes():
    """Give each process of pytest-xdist, and those that it starts, one thread, because they share the cores."""
    for name in THREAD_VARIABLES:
        os.environ.setdefault(name, "1")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(scope="session")
def built_once(tmp_path_factory):
    """Return a function that builds the folder of a name, unless this or another process of the run has built it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def build(name, fill):
        with FileLock(root / f"{name}.lock"):
            folder, partial = root / name, root / f"{name}.partial"
            if not folder.exists():
                shutil.rmtree(partial, ignore_errors=True)  # of a try that failed
                fill(partial)
                partial.rename(folder)
        return folder
    return build


@pytest.fixture(scope="session")
def real_data(pytestconfig) -> Path:
    folder = pytestconfig.getoption("--real-data")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real tissue: give --real-data DIR or CRC_REAL_DATA")
    return Path(folder).resolve()


@pytest.fixture
def here(monkeypatch, capsys):
    """Run a script as `script` does, but in this process, which saves the seconds to import torch."""
    from common import console

    def call(name, *arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            console.run(importlib.import_module(name.removesuffix(".py")).main)
        except SystemExit as end:
            code = end.code
        output = capsys.readouterr()
        return subprocess.CompletedProcess([name, *arguments], code, output.out, output.err)
    return call


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """The current folder of a test: runs are written to runs/ below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiles_root(tmp_path) -> Path:
    """12 tiles of 48 x 40 pixels on 6 slides, not filtered yet."""
    write_pairs(tmp_path / "tiles", 12, slides=6)
    return tmp_path / "tiles"


@pytest.fixture
def tiny(tiles_root):
    """The config of `tiny_config`, on `tiles_root`."""
    return tiny_config(tiles_root)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> Path:
    """A folder with tiles, and the run of `tiny_config` after one epoch."""
    import train
    from common.config_files import apply_overrides

    folder = tmp_path_factory.mktemp("trained")
    write_pairs(folder / "tiles", 12, slides=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.start(apply_overrides(tiny_config(folder / "tiles"), ["train.epochs=1"]))
    return folder


@pytest.fixture
def trained(tmp_path, trained_once, monkeypatch) -> Path:
    """The run folder of a copy of `trained_once`, in the current folder."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    settings = tmp_path / "runs/tiny/config.yaml"
    settings.write_text(settings.read_text().replace(str(trained_once), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/tiny"
