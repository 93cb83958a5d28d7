"""Fixtures of the GPU tests, and the table of what they measured, which pytest prints at the end.

    CRC_GPU_JSON=FILE     also write the table to FILE after every number, so that an interrupted session keeps it
    CRC_GPU_TESTS_ON=cpu  compute small cases on the CPU, to work on these tests without a GPU
"""

import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from gpu_helpers import TINY, write_coloured_tiles

from common.config import Config
from common.config_files import apply_overrides
from common.console import table
from common.devices import choose_precision

ON_CPU = os.environ.get("CRC_GPU_TESTS_ON") == "cpu"
FILE = os.environ.get("CRC_GPU_JSON")
ROWS = pytest.StashKey[list]()


def available(name: str) -> torch.device:
    """Return the device, or skip the test with the reason."""
    if ON_CPU:
        if name != "cuda":
            pytest.skip(f"CRC_GPU_TESTS_ON=cpu: the CPU replaces cuda, not {name}")
        name = "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here: torch.cuda.is_available() is false")
    elif name == "mps" and not torch.backends.mps.is_available():
        pytest.skip("no Apple GPU here: torch.backends.mps.is_available() is false")
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("GPU tests measure one GPU, so they must run one after the other: make test-gpu")
    device = torch.device(name)
    choose_precision("float32", device)  # float32 without TF32, as in every script
    return device


@pytest.fixture
def device() -> torch.device:
    return available("cuda")


@pytest.fixture(params=["cuda", "mps"])
def any_gpu(request) -> torch.device:
    return available(request.param)


@pytest.fixture
def cuda_only(device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("CRC_GPU_TESTS_ON=cpu: this needs CUDA itself")
    return device


# ---------------------------------------------------------------------------------------------- data

@pytest.fixture(scope="session")
def coloured_tiles(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gpu") / "tiles"
    write_coloured_tiles(root)
    return root


@pytest.fixture
def configured(coloured_tiles) -> Callable[..., Config]:
    """Make the config of a small network on the coloured tiles, for a device and with changed settings."""
    def config(device: torch.device, *changes: str) -> Config:
        return apply_overrides(Config(name="tiny"), [*TINY, f"data.root={coloured_tiles}", f"device={device}",
                                                     *changes])
    return config


# ---------------------------------------------------------------------------------------------- measured numbers

class Record:
    """Adds numbers to the table, and fails the test if one breaks its bound."""

    def __init__(self, rows: list[dict], test: str):
        self.rows, self.test = rows, test

    def __call__(self, name: str, value: float | str, *, at_most: float | None = None, at_least: float | None = None,
                 expected: str = "", unit: str = "") -> None:
        """`expected` is a bound that is only shown in the table."""
        bounds = {"at most": at_most, "at least": at_least}
        bound = expected or ", ".join(f"{word} {limit:g}" for word, limit in bounds.items() if limit is not None)
        self.rows.append({"test": self.test, "name": name, "value": value, "unit": unit, "bound": bound})
        if FILE:
            write_rows(self.rows, {})
        holds = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)  # false for NaN
        if not holds:
            pytest.fail(f"{name}: {value:.6g} {unit}, expected {bound}", pytrace=False)


@pytest.fixture
def record(request) -> Record:
    return Record(request.config.stash.setdefault(ROWS, []), request.node.name)


@cache
def environment() -> dict[str, str]:
    """Return what the numbers depend on."""
    facts = {"device": f"the CPU of this machine ({platform.machine()})", "torch": torch.__version__,
             "CUDA": str(torch.version.cuda), "driver": "unknown", "Python": platform.python_version(),
             "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    if torch.cuda.is_available() and not ON_CPU:
        facts |= {"device": torch.cuda.get_device_name(), "cuDNN": str(torch.backends.cudnn.version()),
                  "memory": f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB"}
        if shutil.which("nvidia-smi"):
            result = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                    capture_output=True, text=True)
            facts["driver"] = (result.stdout.strip().splitlines() or ["unknown"])[0]
    elif torch.backends.mps.is_available() and not ON_CPU:
        facts["device"] = f"mps ({platform.machine()})"
    return facts


def shown(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def pytest_terminal_summary(terminalreporter, config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    facts = environment()
    terminalreporter.section("measured")
    for name, fact in facts.items():
        terminalreporter.write_line(f"{name:8} {fact}")
    terminalreporter.write_line("")
    cells = [[row["name"], shown(row["value"]), row["unit"], row["bound"]] for row in rows]
    terminalreporter.write_line(table(["what", "measured", "unit", "bound"], cells))
    if FILE:
        write_rows(rows, {outcome: len(terminalreporter.stats.get(outcome, ())) for outcome in
                          ("passed", "failed", "error", "skipped", "xfailed")})
        terminalreporter.write_line(f"\nwrote {FILE}")


def write_rows(rows: list[dict], outcomes: dict[str, int]) -> None:
    """Write the numbers so far; `outcomes` are counts of tests, once they are known."""
    finite = [row | {"value": None if isinstance(row["value"], float) and not math.isfinite(row["value"])
                     else row["value"]} for row in rows]
    facts = {"environment": environment(), "outcomes": outcomes, "measured": finite}
    Path(FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
