"""Time two ways of one task side by side, each in its own process, in turns.

    lap       one execution of the task, which is timed
    side      a process that runs laps: of our way, of the plain way with our use of memory, or of the plain way with
              the use of memory of any script

Only one side runs at a time, so that other programs on the machine disturb all sides equally. Ratios compare laps that
follow each other.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common.console import UserError
from common.memory import enough_memory, reuse_memory
from common.workers import ignoring_interrupts, single_threaded

ENOUGH_SECONDS, MOST_ROUNDS = 4.0, 15  # short laps get more rounds, until one of these is reached
LESS_MEMORY = "close other programs, or try --quick"
PREPARE, RUN, FORGET = "prepare", "run", "forget"  # requests to a side


@dataclass(frozen=True)
class Setting:
    """Data and device of all tasks."""

    root: Path  # of the demo tiles
    quick: bool
    device: str  # cpu, or cuda

    def wait(self) -> None:
        """Wait until the GPU has finished: only then a lap ends."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def free_memory(self) -> None:
        """Give the GPU's memory that this process does not use to the others."""
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Lap:
    """A prepared task that a side times."""

    run: Callable[[], Any]
    items: int = 1  # handled by one lap
    facts: dict = field(default_factory=dict)  # for the row of results; "work" is the work of all items (roofline.py)


Prepare = Callable[[Setting], Lap]  # defined at the top of a module, because another process calls it


@dataclass(frozen=True)
class Race:
    """Two ways of one task to compare."""

    ours: Prepare
    baseline: Prepare
    unit: str = "ms a tile"  # or "s ..."
    one_thread: bool = False
    keeps_memory: bool = True  # as the scripts that need torch do; without effect on a GPU


class Side:
    """A process that prepares laps and runs them on request."""

    def __init__(self, keeps_memory: bool):
        context = get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, keeps_memory), daemon=True)
        with ignoring_interrupts():
            self.process.start()
        there.close()

    def call(self, request: str, *arguments: Any) -> Any:
        self.send(request, *arguments)
        return self.receive()

    def send(self, request: str, *arguments: Any) -> None:
        self.pipe.send((request, *arguments))

    def receive(self) -> Any:
        """Wait for the result of the request sent last; raise its error if it failed."""
        try:
            result = self.pipe.recv()
        except EOFError:
            raise UserError(f"a process of the benchmark died, possibly out of memory; {LESS_MEMORY}") from None
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


class _Worker:
    """What runs in the process of a `Side`: it keeps the prepared lap between requests."""

    lap: Lap | None = None
    setting: Setting | None = None

    def handle(self, request: str, *arguments: Any) -> Any:
        if request == PREPARE:
            prepare, self.setting = arguments
            self.lap = prepare(self.setting)
            return self.lap.items, self.lap.facts
        if request == RUN:
            start = time.perf_counter()
            self.lap.run()
            return time.perf_counter() - start
        self.lap = None
        return self.setting.free_memory()


def _serve(pipe: Any, keeps_memory: bool) -> None:
    """Handle requests until the other end of the pipe is closed."""
    if keeps_memory:
        reuse_memory()
    worker = _Worker()
    while True:
        try:
            request = pipe.recv()
            try:
                with enough_memory(LESS_MEMORY):
                    result = worker.handle(*request)
            except UserError as error:
                result = error
            except Exception:  # as text, because not every error can be sent
                result = RuntimeError(f"in a process of the benchmark:\n{traceback.format_exc()}")
            pipe.send(result)
        except (EOFError, OSError):
            return


class Sides:
    """The processes of all races so far. They stay for the next race, because their start takes seconds."""

    def __init__(self) -> None:
        self.open: dict[tuple, Side] = {}

    def of(self, race: Race) -> dict[str, Side]:
        """Return the sides of a race by name; `as_shipped` only if our way uses memory differently from any script."""
        wanted = {"ours": race.keeps_memory, "baseline": race.keeps_memory}
        if race.keeps_memory:
            wanted["as_shipped"] = False
        with single_threaded() if race.one_thread else nullcontext():
            for name, keeps_memory in wanted.items():
                key = name == "ours", race.one_thread, keeps_memory
                self.open[key] = self.open.get(key) or Side(keeps_memory)
        return {name: self.open[name == "ours", race.one_thread, keeps] for name, keeps in wanted.items()}

    def __enter__(self) -> "Sides":
        return self

    def __exit__(self, *_) -> None:
        for side in self.open.values():
            side.close()


def compete(race: Race, setting: Setting, rounds: int, sides: Sides) -> dict:
    """Return the row of a race: the median of each side, and median and range of the ratios of neighbouring laps."""
    racing = sides.of(race)
    for name, side in racing.items():
        side.send(PREPARE, race.ours if name == "ours" else race.baseline, setting)
    prepared = {name: side.receive() for name, side in racing.items()}
    row = turns({name: partial(side.call, RUN) for name, side in racing.items()}, prepared, race.unit, rounds)
    for side in racing.values():
        side.call(FORGET)
    return row


def turns(laps: dict[str, Callable[[], float]], prepared: dict[str, tuple[int, dict]], unit: str, rounds: int) -> dict:
    """Run the laps of all sides in turn, first to warm up, then at least `rounds` times. A lap returns its seconds.

    Short laps get more rounds, until `ENOUGH_SECONDS` or `MOST_ROUNDS`.
    """
    scale = 1000 if unit.startswith("ms") else 1
    times: dict[str, list[float]] = {name: [] for name in laps}
    spent, number = 0.0, 0
    while number <= rounds or (spent < ENOUGH_SECONDS and number <= MOST_ROUNDS):
        for name, lap in laps.items():
            seconds = lap()
            if number:
                spent += seconds
                times[name].append(scale * seconds / prepared[name][0])
        number += 1

    def ratio(name: str) -> dict:
        ratios = sorted(plain / fast for fast, plain in zip(times["ours"], times[name], strict=True))
        return {"ratio": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}

    same = ratio("baseline")
    shipped = ratio("as_shipped") if "as_shipped" in times else same
    facts = {f"{fact}_{name}": value for name in ("ours", "baseline")
             for fact, value in {"items": prepared[name][0], **prepared[name][1]}.items()}
    return {name: statistics.median(values) for name, values in times.items()} | {
        "unit": unit, "rounds": number - 1,
        "ratio_same_allocator": same["ratio"], "range_same_allocator": same["range"],
        "ratio_as_shipped": shipped["ratio"], "range_as_shipped": shipped["range"], **facts}


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the function's result from a new process that keeps its memory, as the scripts that need torch do."""
    with ProcessPoolExecutor(1, get_context("spawn"), reuse_memory) as pool:
        return pool.submit(function, *arguments).result()


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the function's result from a new process with default use of memory and one thread."""
    with single_threaded(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def plain_row(ours: float, baseline: float | None, unit: str, ratios: Sequence[float] = (), **facts: Any) -> dict:
    """Return a row without a race. Both ratios are equal, because both sides use memory in the same way."""
    ratios = sorted(ratios)
    middle, span = (statistics.median(ratios), [ratios[0], ratios[-1]]) if ratios else (None, None)
    return {"ours": ours, "baseline": baseline, "unit": unit, "ratio_same_allocator": middle,
            "range_same_allocator": span, "ratio_as_shipped": middle, "range_as_shipped": span, **facts}
