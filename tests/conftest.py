"""Options and small data that several tests share."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from parallel import ONE_THREAD

REPOSITORY = Path(__file__).parent.parent
GREYS = np.array([26, 51, 77], np.uint8)


def pytest_addoption(parser):
    parser.addoption("--real-data", default=os.environ.get("CRC_REAL_DATA"), metavar="DIR",
                     help="folder with ebhi/ and report_tiles/ (default: CRC_REAL_DATA); without it those tests skip")


def pytest_xdist_setupnodes():
    """The processes of pytest-xdist share the cores: one thread each, and for what they start."""
    for name in ONE_THREAD:
        os.environ.setdefault(name, "1")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(scope="session")
def real_data(pytestconfig) -> Path:
    folder = pytestconfig.getoption("--real-data")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real tissue: give --real-data DIR or CRC_REAL_DATA")
    return Path(folder).resolve()


def script(*arguments, cwd, **environment) -> subprocess.CompletedProcess:
    """Run a script or `-m tools.x` of this repository as a user does, however long this machine takes."""
    name, *rest = map(str, arguments)
    command = ["-m", name] if name.startswith("tools.") else [str(REPOSITORY / name)]
    return subprocess.run([sys.executable, *command, *rest], cwd=cwd, capture_output=True, text=True,
                          encoding="utf-8", env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment)


@pytest.fixture
def here(monkeypatch, capsys):
    """Like `script`, but in this process, which spares the seconds that importing torch takes."""
    import console

    def call(name, *arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            console.run(importlib.import_module(name.removesuffix(".py")).main)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return subprocess.CompletedProcess([name, *arguments], code, said.out, said.err)
    return call


def write_pairs(root: Path, count: int, size: tuple[int, int] = (48, 40), seed: int = 0, slides: int = 0) -> list[str]:
    """Random tiles in the raw layout that pass the filter; keys are 0, 1, ... or s0-0, s1-1, ... with slides."""
    random = np.random.default_rng(seed)
    keys = [f"s{i % slides}-{i}" if slides else str(i) for i in range(count)]
    for folder in ("frames", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for key in keys:
        labels = random.integers(0, 3, size)
        image = random.integers(60, 160, (*size, 3)).astype(np.uint8)
        Image.fromarray(image).save(root / f"frames/frame#{key}.png")
        Image.fromarray(GREYS[labels]).save(root / f"masks/mask#{key}.png")
    return keys


@pytest.fixture
def tiles_root(tmp_path) -> Path:
    """12 tiles of 48 x 40 pixels on 6 slides, not filtered yet."""
    write_pairs(tmp_path / "tiles", 12, slides=6)
    return tmp_path / "tiles"


TINY = ["data.group=^(s\\d+)", "data.crop=16", "model.widths=[4,8]", "train.epochs=3", "train.folds=2",
        "train.images_per_epoch=12", "train.batch_size=4", "train.precision=float32", "device=cpu"]


def tiny_config(root: Path):
    """A config that trains in a second on the tiles in `root`, whose list is written."""
    import config
    import data_filter
    from dataset import TILE_LIST, write_tiles

    settings = config.apply_overrides(config.Config(name="tiny"), [*TINY, f"data.root={root}"])
    write_tiles(root / TILE_LIST, data_filter.filter_tiles(settings).tiles)
    return settings


@pytest.fixture
def tiny(tiles_root):
    """The config of `tiny_config`, on `tiles_root`."""
    return tiny_config(tiles_root)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> Path:
    """A folder with tiles, and the run of `tiny_config` after one epoch."""
    import train
    from config import apply_overrides

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
